import json

import numpy as np
import pytest

from tilepipe.errors import JournalError, MismatchError, StoreError
from tilepipe.spec import default_classes
from tilepipe.store import create_store, open_store

SUM = "0123456789abcdef"


@pytest.fixture
def store(tmp_path):
    made = create_store(
        str(tmp_path / "a.zarr"), channels=1, dtype="uint8", extent=(700, 600), unit_px=256
    )
    made.create_label("m", classes=default_classes(2), unit_px=256)
    return made


def folder(store, target, stage="ingest", level=0):
    from pathlib import Path

    return Path(store.location, "tilepipe/journal", target, stage, str(level))


@pytest.mark.parametrize("label", [None, "m"])
def test_what_is_written_is_recorded(store, label):
    journal = store.journal(label, "f1")
    assert journal.recorded("segment", 0) == {}
    grid = store.image(0).grid
    for unit in grid:
        journal.write("segment", 0, unit, checksum=SUM, facts={"s": 0.5, "damage": [1]})
    found = open_store(store.location).journal(label, "f1").recorded("segment", 0)
    assert set(found) == {(unit.iy, unit.ix) for unit in grid}
    assert found[1, 2].checksum == SUM
    assert found[1, 2].facts == {"s": 0.5, "damage": [1]}
    assert journal.recorded("segment", 1) == {}
    assert journal.recorded("reduce", 0) == {}
    assert store.journal("m" if label is None else None, "f1").recorded("segment", 0) == {}
    assert journal.rejected == []


def test_another_job_is_refused_with_the_ways_out(store):
    store.journal("m", "f1").write("segment", 0, store.image(0).grid.unit(0, 0), checksum=SUM)
    with pytest.raises(
        MismatchError, match=r"label m was begun by another job.*--overwrite.*--name"
    ):
        store.journal("m", "f2").recorded("segment", 0)


@pytest.mark.parametrize("label", [None, "m"])
def test_whose_a_journal_is_is_seen_before_a_unit_is_written(store, label):
    made = store if label is None else store.label(label)
    made.write_record({"fingerprint": "f1"})
    store.check_current(store.journal(label, "f1"))
    made.write_record({"fingerprint": "f2"})
    with pytest.raises(MismatchError, match="begun anew by another job"):
        store.check_current(store.journal(label, "f1"))
    store.files.delete_tree(f"labels/{label}" if label else "")
    with pytest.raises(MismatchError, match="or taken away"):
        store.check_current(store.journal(label, "f2"))


def _record(**changes):
    return {
        "format": 2,
        "stage": "ingest",
        "level": 0,
        "iy": 0,
        "ix": 1,
        "checksum": SUM,
        "fingerprint": "f1",
        "facts": {},
        **changes,
    }


HOSTILE = {
    "empty": b"",
    "torn": json.dumps(_record()).encode()[:40],
    "not json": b"\xff\xfe\x00",
    "null": b"null",
    "list": b"[1, 2]",
    "another unit": json.dumps(_record(iy=1)).encode(),
    "another level": json.dumps(_record(level=1)).encode(),
    "another stage": json.dumps(_record(stage="segment")).encode(),
    "negative": json.dumps(_record(iy=-1)).encode(),
    "not a number": json.dumps(_record(iy="0")).encode(),
    "a bool": json.dumps(_record(iy=False)).encode(),
    "extra key": json.dumps(_record(run="rm -rf")).encode(),
    "checksum": json.dumps(_record(checksum="../../etc/passwd")).encode(),
    "past": json.dumps(_record(format=1)).encode(),
    "future": json.dumps(_record(format=3)).encode(),
    "large": json.dumps(_record(facts={"x": "y" * 70000})).encode(),
    "deep": b'{"facts":' + b"[" * 8000 + b"]" * 8000 + b"}",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_record_that_cannot_be_believed_counts_as_not_there(store, kind):
    journal = store.journal(None, "f1")
    journal.write("ingest", 0, store.image(0).grid.unit(0, 0), checksum=SUM)
    (folder(store, "_image") / "0.1.json").write_bytes(HOSTILE[kind])
    for only in (None, [(0, 0), (0, 1)]):
        assert set(journal.recorded("ingest", 0, only=only)) == {(0, 0)}
    assert len(journal.rejected) == 1
    assert journal.rejected[0].startswith("tilepipe/journal/_image/ingest/0/0.1.json: ")


def test_records_outside_the_grid_and_odd_names(store):
    journal = store.journal(None, "f1")
    journal.write("ingest", 0, store.image(0).grid.unit(0, 0), checksum=SUM)
    where = folder(store, "_image")
    for iy, ix in ((3, 0), (0, 3), (10**9, 10**9)):
        (where / f"{iy}.{ix}.json").write_text(json.dumps(_record(iy=iy, ix=ix)))
    (where / "00.1.json").write_text(json.dumps(_record()))
    (where / "notes.txt").write_text("hello")
    (where / "0.1.json.1234.partial").write_text("half")
    (where / "folder.json").mkdir()
    assert set(journal.recorded("ingest", 0)) == {(0, 0)}
    assert len(journal.rejected) == 5


def test_a_link_is_not_followed(store, tmp_path):
    journal = store.journal(None, "f1")
    journal.write("ingest", 0, store.image(0).grid.unit(0, 0), checksum=SUM)
    outside = tmp_path / "outside.json"
    outside.write_text(json.dumps(_record()))
    (folder(store, "_image") / "0.1.json").symlink_to(outside)
    assert set(journal.recorded("ingest", 0)) == {(0, 0)}


def test_a_linked_journal_folder_is_refused(store, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    where = folder(store, "_image").parent.parent
    where.parent.mkdir(parents=True)
    where.symlink_to(outside)
    unit = store.image(0).grid.unit(0, 0)
    with pytest.raises(StoreError, match="leaves the store"):
        store.journal(None, "f1").write("ingest", 0, unit, checksum=SUM)
    with pytest.raises(StoreError, match="leaves the store"):
        store.journal(None, "f1").recorded("ingest", 0)
    assert not list(outside.iterdir())


def test_what_would_not_be_believed_is_not_written(store):
    journal = store.journal(None, "f1")
    unit = store.image(0).grid.unit(0, 0)
    with pytest.raises(JournalError, match="checksum"):
        journal.write("ingest", 0, unit, checksum="xyz")
    with pytest.raises(JournalError, match="stage"):
        journal.write("../x", 0, unit, checksum=SUM)
    with pytest.raises(JournalError, match="the limit is"):
        journal.write("ingest", 0, unit, checksum=SUM, facts={"x": "y" * 70000})
    with pytest.raises(JournalError, match="a record is wrong"):
        journal.write("ingest", 0, unit, checksum=SUM, facts={"x": object()})
    assert journal.recorded("ingest", 0) == {}


@pytest.mark.parametrize("name", ["..", "a/b", "../x", ".hidden", "_image", "", "a" * 101, "a\n"])
def test_label_names_stay_in_the_store(store, name):
    with pytest.raises(StoreError, match="cannot be a label's name"):
        store.journal(name, "f1")
    with pytest.raises(StoreError, match="cannot be a label's name"):
        store.create_label(name, classes=default_classes(2), unit_px=256)


def test_forget(store):
    journal = store.journal("m", "f1")
    unit = store.image(0).grid.unit(0, 0)
    journal.write("segment", 0, unit, checksum=SUM)
    journal.write("label-reduce", 1, store.image(1).grid.unit(0, 0), checksum=SUM)
    journal.forget("segment")
    assert not journal.recorded("segment", 0)
    assert journal.recorded("label-reduce", 1)
    journal.forget()
    assert not journal.recorded("label-reduce", 1)


def test_overwriting_a_label_forgets_its_records(store):
    unit = store.image(0).grid.unit(0, 0)
    label = store.label("m")
    label.level(0).write_unit(unit, np.ones((256, 256), np.uint8))
    store.journal("m", "f1").write("segment", 0, unit, checksum=SUM)
    store.journal(None, "f1").write("ingest", 0, unit, checksum=SUM)
    store.create_label("m", classes=default_classes(2), unit_px=256, overwrite=True)
    assert not store.journal("m", "f2").recorded("segment", 0)
    assert store.journal(None, "f1").recorded("ingest", 0)
    assert not store.label("m").level(0).read(unit.box).any()


def test_thousands_of_records(store, tmp_path):
    many = create_store(
        str(tmp_path / "many.zarr"), channels=1, dtype="uint8", extent=(400, 400), unit_px=8
    )
    journal = many.journal(None, "f1")
    for unit in many.image(0).grid:
        journal.write("ingest", 0, unit, checksum=SUM)
    assert len(journal.recorded("ingest", 0)) == 2_500
