import os
import subprocess
import sys
import time

import pytest

from tilepipe.errors import StoreError
from tilepipe.store import LocalFiles, open_files
from tilepipe.store.files import Entry


@pytest.fixture
def files(tmp_path):
    made = LocalFiles(str(tmp_path / "a"))
    made.put("top", b"1")
    made.put("folder/below", b"22")
    return made


def test_what_is_put_is_got(files):
    assert files.get("top") == b"1"
    assert files.get("folder/below", limit_bytes=2) == b"22"
    files.put("folder/below", b"new")
    assert files.get("folder/below") == b"new"
    assert files.get("nothing") is None
    assert files.get("folder") is None
    assert files.get("top/below") is None
    with pytest.raises(StoreError, match="folder/below is larger than 2 bytes"):
        files.get("folder/below", limit_bytes=2)


def test_listing_and_removing(files):
    found = {entry.name: entry.is_folder for entry in files.entries("")}
    assert found == {"top": False, "folder": True}
    assert list(files.entries("folder")) == [Entry("below", False, 2)]
    assert list(files.entries("nothing")) == []
    assert list(files.entries("top")) == []
    files.delete("top")
    files.delete("top")
    files.delete_tree("folder")
    files.delete_tree("folder")
    assert list(files.entries("")) == []


@pytest.mark.parametrize(
    "key", ["..", "../x", "a/../../x", "/etc/passwd", "a//b", "a\\b", "a\0", "."]
)
def test_a_key_cannot_leave(files, key):
    for act in (files.get, files.delete, files.check_inside, lambda key: files.put(key, b"x")):
        with pytest.raises(StoreError, match="is not a name inside a store"):
            act(key)


def test_links_are_not_followed_out(files, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_text("mine")
    (tmp_path / "a/link").symlink_to(outside)
    (tmp_path / "a/direct").symlink_to(outside / "secret")
    for key in ("link/secret", "link/new"):
        with pytest.raises(StoreError, match="leaves the store"):
            files.get(key)
        with pytest.raises(StoreError, match="leaves the store"):
            files.put(key, b"x")
    with pytest.raises(StoreError, match="direct"):
        files.get("direct")
    files.put("direct", b"x")  # replaces the link, not its target
    files.delete_tree("link")
    assert (outside / "secret").read_text() == "mine"
    assert sorted(os.listdir(outside)) == ["secret"]


def test_the_location_does_not_depend_on_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = open_files("b.zarr")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    files.put("x", b"1")
    assert (tmp_path / "b.zarr/x").read_bytes() == b"1"
    assert open_files(f"file://{tmp_path}/b.zarr").get("x") == b"1"


def test_a_failed_put_leaves_the_old_bytes_and_no_litter(files, tmp_path, monkeypatch):
    def fail(handle):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StoreError, match="the disk reports an error; check it"):
        files.put("top", b"new", durable=True)
    assert files.get("top") == b"1"
    assert not list(tmp_path.rglob("*.partial"))


def test_what_could_not_be_claimed_is_free(files):
    with pytest.raises(TypeError):
        files.claim("lease", "a text that no file of bytes takes")
    assert files.get("lease") is None
    assert files.claim("lease", b"mine")
    assert not files.claim("lease", b"yours")
    assert files.get("lease") == b"mine"


WRITER = """
import os, sys, time
from tilepipe.store import LocalFiles
def wait(handle):
    print("waiting", flush=True)
    time.sleep(60)
os.fsync = wait
LocalFiles(sys.argv[1]).put("top", b"new", durable=True)
"""


def test_unfinished_files_go_when_their_writer_is_gone(files, tmp_path):
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(files.root)], stdout=subprocess.PIPE
    )
    try:
        assert writer.stdout.readline() == b"waiting\n"
        assert len(list(tmp_path.rglob("*.partial"))) == 1
        assert files.clean_partial() == 0  # it is alive: another part of the same job
    finally:
        writer.kill()
        writer.wait()
        writer.stdout.close()
    assert files.get("top") == b"1"
    assert files.clean_partial() == 1
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize(
    "name",
    [
        "x.00000000-12-0123456789ab.partial",  # another machine's
        "x.0123456789abcdef0123456789abcdef.partial",  # zarr's: another program's, of its image
    ],
)
def test_unfinished_files_of_other_machines_and_programs_stay_until_they_are_old(files, name):
    other = files.root / name
    other.write_bytes(b"")
    assert files.clean_partial() == 0
    os.utime(other, (time.time() - 7200,) * 2)
    assert files.clean_partial() == 1


def test_what_goes_while_a_folder_is_listed_is_left_out(tmp_path):
    files = LocalFiles(str(tmp_path))
    for name in "abc":
        files.put(f"folder/{name}", b"1")
    listed = files.entries("folder")
    first = next(listed).name
    gone, kept = sorted({"a", "b", "c"} - {first})
    files.delete(f"folder/{gone}")
    assert [entry.name for entry in listed] == [kept]
