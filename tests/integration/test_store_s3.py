"""A store on S3: the same calls and errors as on disk; each object is written once."""

import numpy as np
import pytest
import zarr

from tilepipe.errors import MismatchError, SlideError, StoreError
from tilepipe.pipeline.inspect import inspect
from tilepipe.spec import default_classes
from tilepipe.store import create_store, open_files, open_store
from tilepipe.tiling import Box


def pixels_of(store):
    return np.random.default_rng(0).integers(0, 255, (3, *store.extent), np.uint8)


def make(key, *, version="0.5", overwrite=False):
    return create_store(
        f"s3://slides/{key}",
        channels=3,
        dtype="uint8",
        extent=(600, 300),
        mpp=(0.5, 0.5),
        rgb=True,
        ome_zarr=version,
        unit_px=256,
        chunk_px=128,
        overwrite=overwrite,
    )


@pytest.mark.parametrize("version", ["0.5", "0.4"])
def test_a_whole_job_on_s3(bucket, version):
    key = f"deep/{version}.zarr"
    store = make(key, version=version)
    label = store.create_label("m", classes=default_classes(3), unit_px=256)
    pixels = pixels_of(store)
    journal = store.journal(None, "f1")
    sums = {}
    bucket.puts.clear()
    for unit in store.image(0).grid:
        sums[unit.iy, unit.ix] = store.image(0).write_unit(unit, pixels[(..., *unit.box.slices)])
        journal.write("ingest", 0, unit, checksum=sums[unit.iy, unit.ix])
    for unit in label.level(0).grid:
        label.level(0).write_unit(unit, np.ones(unit.box.shape, np.uint8))
    # 3 x 2 units of one image shard, one record and one mask shard; in 0.4 5 x 3 chunks of each.
    assert len(bucket.puts) == (18 if version == "0.5" else 6 + 2 * 15)
    assert set(bucket.puts.values()) == {1}

    again = open_store(f"s3://slides/{key}", writable=True)
    assert again.labels == ("m",)
    np.testing.assert_array_equal(again.image(0).read(Box(0, 0, 600, 300)), pixels)
    found = again.journal(None, "f1").recorded("ingest", 0)
    assert {index: record.checksum for index, record in found.items()} == sums
    with pytest.raises(MismatchError):
        again.journal(None, "f2").recorded("ingest", 0)
    again.write_record({"done": True})
    assert open_store(f"s3://slides/{key}").read_record() == {"done": True}
    assert again.clean_partial() == 0
    with pytest.raises(StoreError, match="a store is there already"):
        make(key, version=version)
    anew = make(key, version=version, overwrite=True)
    assert anew.labels == ()
    assert not anew.image(0).read(Box(0, 0, 600, 300)).any()
    assert not anew.journal(None, "f2").recorded("ingest", 0)


def test_a_label_is_replaced(bucket):
    store = make("label.zarr")
    unit = store.image(0).grid.unit(0, 0)
    first = store.create_label("m", classes=default_classes(3), unit_px=256)
    first.level(0).write_unit(unit, np.ones((256, 256), np.uint8))
    store.journal("m", "f1").write("segment", 0, unit, checksum="0" * 16)
    second = store.create_label("m", classes=default_classes(2), unit_px=256, overwrite=True)
    assert not second.level(0).read(unit.box).any()
    assert len(second.classes) == 2
    assert not store.journal("m", "f2").recorded("segment", 0)


def test_a_truncated_object_is_an_error(bucket):
    store = make("damaged.zarr")
    level = store.image(0)
    unit = level.grid.unit(0, 0)
    level.write_unit(unit, pixels_of(store)[:, :256, :256])
    for body in (b"", b"half a shard"):
        bucket.client.put_object(Bucket="slides", Key="damaged.zarr/0/c/0/0/0", Body=body)
        with pytest.raises(StoreError, match=r"s3://slides/damaged.zarr: array 0 cannot be read"):
            level.checksum(unit)


def test_other_objects_are_left_alone(bucket):
    bucket.client.put_object(Bucket="slides", Key="mine/thesis.txt", Body=b"mine")
    with pytest.raises(StoreError, match="not an OME-Zarr store, it is left alone"):
        make("mine", overwrite=True)
    with pytest.raises(StoreError, match="other objects, not an OME-Zarr"):
        open_store("s3://slides/mine")
    with pytest.raises(StoreError, match="nothing there"):
        open_store("s3://slides/none.zarr")
    body = bucket.client.get_object(Bucket="slides", Key="mine/thesis.txt")["Body"].read()
    assert body == b"mine"


def test_the_marker_of_a_folder_is_nothing_that_lies_in_it(bucket):
    """Consoles and sync programs put an empty object ``folder/`` for a folder."""
    bucket.client.put_object(Bucket="slides", Key="marked.zarr/", Body=b"")
    store = make("marked.zarr")
    bucket.client.put_object(Bucket="slides", Key="marked.zarr/0/c/0/0/", Body=b"")
    level = store.image(0)
    pixels = pixels_of(store)
    for unit in level.grid:
        level.write_unit(unit, pixels[(..., *unit.box.slices)])
    # A marker "0/" would pass for the shard 0 beside it.
    bucket.client.delete_object(Bucket="slides", Key="marked.zarr/0/c/0/0/0")
    assert [(unit.iy, unit.ix) for unit in level.not_stored()] == [(0, 0)]
    bucket.client.put_object(Bucket="slides", Key="marked.zarr", Body=b"an object beside it")
    make("marked.zarr", overwrite=True)
    assert bucket.client.get_object(Bucket="slides", Key="marked.zarr")["Body"].read()


def test_an_object_is_not_nothing(bucket):
    bucket.client.put_object(Bucket="slides", Key="a/slide.tif", Body=b"II*\0")
    with pytest.raises(StoreError, match=r"slides/a/slide\.tif: a file, not an OME-Zarr store"):
        open_store("s3://slides/a/slide.tif")
    with pytest.raises(SlideError, match=r"slide\.tif: slides are read from local disks; copy it"):
        inspect("s3://slides/a/slide.tif")
    for name in ("a/slide", "a/slide.ti"):
        with pytest.raises(StoreError, match="nothing there, not an OME-Zarr store"):
            inspect(f"s3://slides/{name}")


def test_no_store_is_made_inside_another(bucket):
    make("around/a.zarr")
    for key in ("around/a.zarr/labels/x", "around/a.zarr/0"):
        with pytest.raises(
            StoreError, match=r"lies inside the OME-Zarr s3://slides/around/a\.zarr"
        ):
            make(key, overwrite=True)
    make("around/b.zarr")


def test_a_bucket_that_is_not_there(bucket):
    with pytest.raises(
        StoreError,
        match=r"s3://nobody/a.zarr: cannot .*: the server says NoSuchBucket: .*check the address",
    ):
        create_store("s3://nobody/a.zarr", channels=1, dtype="uint8", extent=(9, 9), unit_px=16)


def test_another_reader_opens_it(bucket):
    store = make("read.zarr")
    unit = store.image(0).grid.unit(0, 0)
    store.image(0).write_unit(unit, pixels_of(store)[:, :256, :256])
    from obstore.store import S3Store
    from zarr.storage import ObjectStore

    plain = S3Store(
        "slides",
        prefix="read.zarr",
        config={"endpoint": bucket.endpoint, "region": "us-east-1"},
        client_options={"allow_http": True},
    )
    group = zarr.open_group(ObjectStore(plain, read_only=True), mode="r")
    np.testing.assert_array_equal(group["0"][:, :256, :256], pixels_of(store)[:, :256, :256])


def test_a_shard_may_take_minutes_on_its_way(bucket, monkeypatch):
    """All lanes' shards share one line: 30 s, obstore's own, are too few for it."""
    files = open_files("s3://slides/slow.zarr")
    waits = [files.zarr_store(read_only=False).store]
    monkeypatch.setattr("obstore.put", lambda store, *_: waits.append(store))
    files.put("0/c/0/0/0", b"a shard")
    assert [store.client_options["timeout"] for store in waits] == ["5m", "5m"]
    # A server that does not answer a reader is told sooner.
    assert "timeout" not in files.zarr_store(read_only=True).store.client_options


def test_a_cut_network_is_waited_for_while_a_job_is_under_way(bucket, monkeypatch):
    """Eight tries are over in a second or three: a cut of 20 s failed every unit four times."""
    files = open_files("s3://slides/cut.zarr")
    stores = [files.zarr_store(read_only=read_only).store for read_only in (True, False)]
    monkeypatch.setattr("obstore.put", lambda store, *_: stores.append(store))
    monkeypatch.setattr("obstore.delete", lambda store, *_: stores.append(store))
    files.put("0/c/0/0/0", b"a shard")
    files.delete("0/c/0/0/0")
    assert len(stores) == 4
    # What says that a unit is still of its job is read before each is written.
    asked = []
    get = files._obs.get
    monkeypatch.setattr("obstore.get", lambda store, key: asked.append(store) or get(store, key))
    for _ in range(2):
        assert files.get("zarr.json") is None
    assert [store.retry_config["max_retries"] for store in asked] == [8, 1000]
    stores.append(asked[1])
    assert all(store.retry_config["max_retries"] >= 100 for store in stores)
    assert {str(store.retry_config["retry_timeout"]) for store in stores} == {"0:01:00"}
