"""What a manifest may hold, and what is refused before anything is written."""

from __future__ import annotations

import pytest

from tilepipe.cli.requests import requests_of
from tilepipe.errors import SpecError
from tilepipe.spec import JobSpec


@pytest.fixture
def read(tmp_path):
    def call(text):
        path = tmp_path / "m.csv"
        path.write_text(text, encoding="utf-8")
        return requests_of((), str(tmp_path / "out"), str(path), JobSpec())

    return call


@pytest.mark.parametrize(
    "head", ["slide,mpp", "Slide,MPP", " slide , mpp", "\ufeffslide,mpp", "slide,mpp,,"]
)
def test_columns_are_known_however_they_are_spelled(read, head):
    (request,) = read(f"{head}\na.tif, 0.25\n")
    assert request.spec.slide_mpp == 0.25


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("slide,mmp\na.tif,0.25\n", "no column is called 'mmp'; the columns are slide, output"),
        ("slide;mpp\na.tif;0.25\n", "no column is called 'slide;mpp'"),
        ("slide,mpp,mpp\na.tif,0.25,0.5\n", "two columns are called 'mpp'"),
        ("slide,output\na.tif,a.zarr,0.25\n", "line 2: more cells than columns"),
        ("slide,mpp\na.tif,\nb.tif,-1\n", "m.csv: line 3: .*slide_mpp"),
        (
            'slide,output\n"a.tif","a.zarr\nb.tif,\nc.tif,\n',
            "m.csv: line 4: unexpected end of data",
        ),
        ('slide\n"a".tif\nb.tif\n', "m.csv: line 2: .*; quotes stand around a whole cell"),
        ("slide\n", "lists no slide"),
        ("", "lists no slide"),
    ],
)
def test_what_nobody_would_read_is_refused(read, text, told):
    with pytest.raises(SpecError, match=told):
        read(text)


def test_a_quoted_name_may_hold_any_character(read, tmp_path):
    names = ["a,b.tif", "line\nbreak.tif", "form\x0cfeed.tif", "line\u2028separator.tif"]
    requests = read("slide\n" + "".join(f'"{name}"\n' for name in names))
    assert [request.slide for request in requests] == [str(tmp_path / name) for name in names]


def test_a_tilde_is_the_home_folder(read, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    (request,) = read("slide\n~/a.tif\n")
    assert request.slide == str(tmp_path / "me" / "a.tif")
    with pytest.raises(SpecError, match="leaves the output folder"):
        read("slide,output\n~/a.tif,~/a.zarr\n")


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(tmp_path):
    for name in ("x?z.tif", "xyz.tif"):
        (tmp_path / name).touch()
    odd, plain = str(tmp_path / "x?z.tif"), str(tmp_path / "xyz.tif")

    def slides(*given):
        return [request.slide for request in requests_of(given, None, None, JobSpec())]

    assert slides(odd) == [odd]
    assert slides(odd, plain) == [odd, plain]  # as a shell expands x*z.tif
    assert slides(str(tmp_path / "x*z.tif")) == [odd, plain]
