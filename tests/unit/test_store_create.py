import json
import os
import re

import numpy as np
import pytest

from tilepipe.errors import StoreError
from tilepipe.spec import default_classes
from tilepipe.store import LocalFiles, create_store, open_store
from tilepipe.store.layout import chunk_side

ASKED = {"channels": 1, "dtype": "uint8", "extent": (700, 600), "unit_px": 256}


def snapshot(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("version", ["0.5", "0.4"])
def test_facts_survive(tmp_path, version):
    created = create_store(
        str(tmp_path / "deep/er/a.zarr"),
        channels=2,
        dtype=np.uint16,
        extent=(1100, 900),
        mpp=(0.5, 0.25),
        channel_names=("DAPI", "CD3"),
        channel_colors=("0000FF", None),
        ome_zarr=version,
        unit_px=512,
    )
    opened = open_store(created.location)
    for store in (created, opened):
        assert store.version == version
        assert (store.extent, store.channels, store.dtype) == ((1100, 900), 2, np.uint16)
        assert (store.mpp, store.channel_names, store.rgb) == ((0.5, 0.25), ("DAPI", "CD3"), False)
        shapes = [store.image(level).shape for level in range(store.n_levels)]
        assert shapes == [(1100, 900), (550, 450), (275, 225)]
        assert [store.image(level).downsample for level in range(3)] == [1, 2, 4]
        assert store.labels == ()
        assert store.own
        assert store.has_image
    with pytest.raises(StoreError, match="no image level 3; it has 0 to 2"):
        opened.image(3)


def test_a_store_is_not_replaced_without_being_asked(tmp_path):
    store = create_store(str(tmp_path / "a.zarr"), **ASKED)
    store.write_record({"job": 1})
    before = snapshot(tmp_path)
    with pytest.raises(StoreError, match="a store is there already; use --overwrite"):
        create_store(str(tmp_path / "a.zarr"), **ASKED)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("version", ["0.5", "0.4"])
@pytest.mark.parametrize("place", ["labels/mask", "labels/new", "0", "deep/inside/it", "link"])
def test_no_store_is_made_inside_another(tmp_path, version, place):
    """Its levels and labels are the image's: --overwrite takes none of them away."""
    store = create_store(str(tmp_path / "a.zarr"), **{**ASKED, "ome_zarr": version})
    store.create_label("mask", classes=default_classes(2), unit_px=256)
    (tmp_path / "link").symlink_to(tmp_path / "a.zarr" / "labels")
    before = snapshot(tmp_path)
    inside = tmp_path / "link" / "mask" if place == "link" else tmp_path / "a.zarr" / place
    wanted = f"lies inside the OME-Zarr {tmp_path / 'a.zarr'}"
    for overwrite in (False, True):
        with pytest.raises(StoreError, match=re.escape(wanted)):
            create_store(str(inside), **ASKED, overwrite=overwrite)
    assert snapshot(tmp_path) == before


def test_a_store_may_lie_in_a_group_of_images(tmp_path):
    (tmp_path / "all.zarr").mkdir()
    (tmp_path / "all.zarr" / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group"}')
    assert create_store(str(tmp_path / "all.zarr" / "a"), **ASKED).own


def test_overwrite_leaves_nothing_of_the_old_store(tmp_path):
    path = tmp_path / "a.zarr"
    store = create_store(str(path), **ASKED)
    store.create_label("old", classes=default_classes(2), unit_px=256)
    unit = store.image(0).grid.unit(0, 0)
    summed = store.image(0).write_unit(unit, np.ones((1, 256, 256), np.uint8))
    store.journal(None, "f").write("ingest", 0, unit, checksum=summed)
    again = create_store(str(path), overwrite=True, ome_zarr="0.4", **ASKED)
    assert again.labels == ()
    assert again.version == "0.4"
    assert not again.journal(None, "f").recorded("ingest", 0)
    assert not list(path.rglob("zarr.json"))


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("what", ["file", "folder", "zarr group", "zarr array", "broken"])
def test_anything_else_is_left_alone(tmp_path, what, overwrite):
    path = tmp_path / "a.zarr"
    if what == "file":
        path.write_text("mine")
    else:
        path.mkdir()
        (path / "thesis.txt").write_text("mine")
    if what == "zarr group":
        (path / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group"}')
    if what == "zarr array":
        (path / "zarr.json").write_text('{"zarr_format": 3, "node_type": "array"}')
    if what == "broken":
        (path / "zarr.json").write_text("{")
    before = snapshot(tmp_path)
    with pytest.raises(StoreError, match="not an OME-Zarr store, it is left alone"):
        create_store(str(path), overwrite=overwrite, **ASKED)
    assert snapshot(tmp_path) == before


def test_an_empty_folder_is_taken(tmp_path):
    (tmp_path / "a.zarr").mkdir()
    assert create_store(str(tmp_path / "a.zarr"), **ASKED).n_levels == 2


def test_overwrite_does_not_follow_links_out(tmp_path):
    path = tmp_path / "a.zarr"
    create_store(str(path), **ASKED)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("mine")
    (path / "link").symlink_to(mine)
    (path / "0/link").symlink_to(mine)
    create_store(str(path), overwrite=True, **ASKED)
    assert (mine / "thesis.txt").read_text() == "mine"
    assert not (path / "link").exists()


class Crash(BaseException):
    pass


@pytest.mark.parametrize("version", ["0.5", "0.4"])
@pytest.mark.parametrize("overwriting", [False, True])
def test_a_crash_at_any_file_leaves_what_the_next_run_recognises(
    tmp_path, monkeypatch, version, overwriting
):
    old_put, old_delete = LocalFiles.put, LocalFiles.delete
    left = [0]

    def count():
        left[0] -= 1
        if left[0] < 0:
            raise Crash

    def put(self, *args, **kwargs):
        count()
        old_put(self, *args, **kwargs)

    def delete(self, *args):
        count()
        old_delete(self, *args)

    monkeypatch.setattr(os, "fsync", lambda handle: None)  # hundreds of files, on a busy disk
    monkeypatch.setattr(LocalFiles, "put", put)
    monkeypatch.setattr(LocalFiles, "delete", delete)
    crashes = 0
    for steps in range(60):
        path = tmp_path / f"{steps}.zarr"
        if overwriting:
            left[0] = 10**6
            create_store(str(path), ome_zarr=version, **ASKED).write_record({"old": True})
        left[0] = steps
        try:
            create_store(str(path), ome_zarr=version, overwrite=overwriting, **ASKED)
            break
        except Crash:
            crashes += 1
        left[0] = 10**6
        try:
            found, told = open_store(str(path)), ""
        except StoreError as error:
            told = str(error)
            found = None
        if found is not None:
            assert overwriting
            assert found.read_record() == {"old": True}  # not begun: the old store is whole
            continue
        assert re.search("interrupted|nothing there|a folder, not", told)
        store = create_store(str(path), ome_zarr=version, **ASKED)
        assert store.read_record() == {}
        assert store.image(1).shape == (350, 300)
    assert crashes >= 5


def test_a_location_of_another_kind(tmp_path):
    # A scheme in capitals would be a folder of that name.
    for scheme in ("gs", "S3", "a.b-c"):
        with pytest.raises(StoreError, match=f"local paths or s3://bucket/key, not {scheme}://"):
            create_store(f"{scheme}://b/a.zarr", **ASKED)
    with pytest.raises(StoreError, match="give a bucket and a key"):
        create_store("s3://bucket", **ASKED)
    with pytest.raises(StoreError, match="nothing there, not an OME-Zarr store"):
        open_store(str(tmp_path / "a.zarr"))


@pytest.mark.parametrize(
    "change, said",
    [
        ({"dtype": "complex64"}, "an image of complex64; use one of uint8, uint16, float32"),
        ({"extent": (0, 5)}, "cannot be stored"),
        ({"channels": 0}, "cannot be stored"),
        ({"unit_px": 0}, "cannot be stored"),
    ],
)
def test_what_cannot_be_stored(tmp_path, change, said):
    with pytest.raises(StoreError, match=said):
        create_store(str(tmp_path / "a.zarr"), **{**ASKED, **change})
    assert not (tmp_path / "a.zarr").exists()


def test_a_path_through_a_file(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="cannot"):
        create_store(str(tmp_path / "file/a.zarr"), **ASKED)


def test_an_unwritable_folder_says_what_to_do(tmp_path, monkeypatch):
    def refuse(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.mkdir", refuse)
    with pytest.raises(StoreError, match="Permission denied; choose another output folder"):
        create_store(str(tmp_path / "a.zarr"), **ASKED)


def test_labels_only(tmp_path):
    store = create_store(str(tmp_path / "a.zarr"), with_image=False, **ASKED)
    store.write_record({"slide": "/data/slide.svs"})
    store.create_label("m", classes=default_classes(2), level=1, unit_px=256)
    opened = open_store(store.location, writable=True)
    assert not opened.has_image
    assert opened.read_record() == {"slide": "/data/slide.svs"}
    assert opened.label("m").level(0).shape == (350, 300)
    with pytest.raises(StoreError, match="holds labels only"):
        opened.image(0)


def test_the_record_is_replaced_whole_and_keeps_the_layout(tmp_path):
    store = create_store(str(tmp_path / "a.zarr"), **ASKED)
    store.write_record({"a": 1, "b": {"c": [1, 2]}})
    assert store.read_record() == {"a": 1, "b": {"c": [1, 2]}}
    store.write_record({"z": "µm"})
    assert open_store(store.location).read_record() == {"z": "µm"}
    ome = json.loads((tmp_path / "a.zarr/zarr.json").read_text())["attributes"]["ome"]
    assert ome["version"] == "0.5"
    with pytest.raises(StoreError, match="`store` is the store's own"):
        store.write_record({"store": 1})
    with pytest.raises(StoreError, match="cannot be written as JSON"):
        store.write_record({"a": float("nan")})
    with pytest.raises(StoreError, match="writable=True"):
        open_store(store.location).write_record({})
    assert store.read_record() == {"z": "µm"}


def test_a_damaged_layout_record_is_told(tmp_path):
    store = create_store(str(tmp_path / "a.zarr"), **ASKED)
    path = tmp_path / "a.zarr/zarr.json"
    document = json.loads(path.read_text())
    document["attributes"]["tilepipe"]["store"]["format"] = 99
    path.write_text(json.dumps(document))
    with pytest.raises(StoreError, match=r"format: .*--overwrite begins anew"):
        open_store(store.location)
    assert create_store(store.location, overwrite=True, **ASKED).own


def test_partial_files_are_cleaned(tmp_path):
    store = create_store(str(tmp_path / "a.zarr"), **ASKED)
    (tmp_path / "a.zarr/0/c").mkdir()
    for name in ("0/c/0.1234.partial", "tilepipe/x.partial"):
        (tmp_path / "a.zarr" / name).write_bytes(b"x")
        os.utime(tmp_path / "a.zarr" / name, (0, 0))
    assert store.clean_partial() == 2
    assert store.clean_partial() == 0
    assert not list(tmp_path.rglob("*.partial"))


def test_chunk_sides_divide_their_unit():
    for unit_px in (*range(1, 600), 1021, 1536, 4096, 4000, 5000, 2**14):
        side = chunk_side(unit_px, 512)
        assert unit_px % side == 0
        assert side >= min(unit_px, 128)


@pytest.mark.parametrize("version", ["0.5", "0.4"])
def test_a_label_is_no_store(tmp_path, version):
    store = create_store(str(tmp_path / "slide.zarr"), ome_zarr=version, **ASKED)
    store.create_label("unet", classes=default_classes(2), unit_px=256)
    with pytest.raises(StoreError, match=f"is a label, .* lies in: {tmp_path}/slide.zarr$"):
        open_store(str(tmp_path / "slide.zarr" / "labels" / "unet") + "/")
