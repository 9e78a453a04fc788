"""OME-Zarr of others as input: both versions, odd axes, damage."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import zarr
from numcodecs import Blosc
from zarr.codecs import BloscCodec

from tilepipe.errors import DamageError, SlideError, StoreError
from tilepipe.slide import Slide, open_slide
from tilepipe.store import open_store
from tilepipe.tiling import Box

IMAGE = np.random.default_rng(0).integers(0, 255, (3, 100, 90), dtype=np.uint8)


def write(path, levels, axes, *, version="0.5", scale=0.5, unit="micrometer", omero=None):
    group = zarr.open_group(path, mode="w", zarr_format=3 if version == "0.5" else 2)
    for number, level in enumerate(levels):
        chunks = tuple(min(side, 32) for side in level.shape)
        group.create_array(str(number), data=level, chunks=chunks)
    ome = {
        "multiscales": [
            {
                "axes": [
                    {"name": axis, "type": "space", "unit": unit}
                    if axis in "zyx"
                    else {"name": axis}
                    for axis in axes
                ],
                "datasets": [
                    {
                        "path": str(number),
                        "coordinateTransformations": [
                            {
                                "type": "scale",
                                "scale": [scale * 2**number if a in "yx" else 1 for a in axes],
                            }
                        ],
                    }
                    for number in range(len(levels))
                ],
            }
        ]
    }
    if omero:
        ome["omero"] = omero
    if version == "0.5":
        group.attrs["ome"] = {"version": "0.5", **ome}
    else:
        group.attrs.update(ome)
    return path


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_versions(tmp_path, version):
    path = write(tmp_path / "a.zarr", [IMAGE, IMAGE[:, ::2, ::2]], "cyx", version=version)
    with open_slide(path) as slide:
        assert isinstance(slide, Slide)
        assert (slide.format, slide.channels, slide.rgb) == ("ome-zarr", 3, True)
        assert slide.mpp == (0.5, 0.5)
        assert [level.shape for level in slide.levels] == [(100, 90), (50, 45)]
        np.testing.assert_array_equal(slide.read(Box(7, 3, 77, 90)), IMAGE[:, 7:77, 3:])
        np.testing.assert_array_equal(slide.read(Box(0, 0, 50, 45), level=1), IMAGE[:, ::2, ::2])


@pytest.mark.parametrize(
    "axes, shape", [("tczyx", (1, 3, 1, 100, 90)), ("yxc", None), ("yx", None), ("xyc", None)]
)
def test_axes(tmp_path, axes, shape):
    if shape:
        image = IMAGE.reshape(shape)
    elif axes == "yx":
        image = IMAGE[0]
    else:
        image = np.moveaxis(IMAGE, 0, -1) if axes == "yxc" else IMAGE.transpose(2, 1, 0)
    with open_slide(write(tmp_path / "a.zarr", [image], axes)) as slide:
        wanted = IMAGE[:1] if axes == "yx" else IMAGE
        np.testing.assert_array_equal(slide.read(Box(1, 2, 60, 70)), wanted[:, 1:60, 2:70])


def test_dtypes_and_names(tmp_path):
    image = IMAGE.astype(np.int16)
    omero = {"channels": [{"label": name, "color": "0000FF"} for name in ("a", "b", "c")]}
    with open_slide(write(tmp_path / "a.zarr", [image], "cyx", omero=omero)) as slide:
        assert slide.dtype == np.float32
        assert slide.channel_names == ("a", "b", "c")
        assert slide.channel_colors == ("0000FF",) * 3
        assert not slide.rgb
        np.testing.assert_array_equal(slide.read(Box(0, 0, 100, 90)), IMAGE)


def test_what_is_refused(tmp_path):
    stack = write(tmp_path / "z.zarr", [IMAGE.reshape(1, 1, 3, 100, 90)], "tczyx")
    with pytest.raises(SlideError, match="3 planes along z"):
        open_slide(stack)
    with pytest.raises(SlideError, match="float64 samples"):
        open_slide(write(tmp_path / "f.zarr", [IMAGE.astype(float)], "cyx"))
    with pytest.raises(SlideError, match="more than the limit"):
        open_slide(write(tmp_path / "b.zarr", [IMAGE], "cyx"), max_pixels=100)
    zarr.open_group(tmp_path / "n.zarr", mode="w")
    with pytest.raises(SlideError, match="without OME multiscales"):
        open_slide(tmp_path / "n.zarr")
    bad = write(tmp_path / "p.zarr", [IMAGE], "cyx")
    (bad / "zarr.json").write_text("{")
    with pytest.raises(SlideError, match="metadata is damaged"):
        open_slide(bad)


def test_missing_level(tmp_path):
    path = write(tmp_path / "a.zarr", [IMAGE], "cyx")
    group = zarr.open_group(path)
    ome = dict(group.attrs["ome"])
    ome["multiscales"][0]["datasets"].append({"path": "9"})
    group.attrs["ome"] = ome
    with pytest.raises(SlideError, match="damaged"):
        open_slide(path)


def test_no_unit_no_pixel_size(tmp_path):
    with open_slide(write(tmp_path / "a.zarr", [IMAGE], "cyx", unit=None)) as slide:
        assert slide.mpp is None
        assert "--slide-mpp" in slide.mpp_source
    with open_slide(tmp_path / "a.zarr", mpp=0.2) as slide:
        assert slide.mpp == (0.2, 0.2)


def test_damaged_chunk_is_named(tmp_path):
    path = write(tmp_path / "a.zarr", [IMAGE], "cyx")
    (path / "0" / "c" / "0" / "1" / "1").write_bytes(b"garbage")
    with open_slide(path) as slide:
        slide.read(Box(0, 0, 30, 30))
        with pytest.raises(DamageError, match=r"level 0, y 40:50, x 40:50: cannot be decoded"):
            slide.read(Box(40, 40, 50, 50))


def test_damaged_chunk_is_filled_and_recorded(tmp_path):
    path = write(tmp_path / "a.zarr", [IMAGE], "cyx")
    (path / "0" / "c" / "0" / "1" / "1").write_bytes(b"garbage")
    with open_slide(path, on_damage="fill") as slide:
        got = slide.read(Box(5, 5, 99, 88))
        slide.read(Box(40, 40, 50, 50))
        assert [(tile.index, tile.box) for tile in slide.damage] == [(4, Box(32, 32, 64, 64))]
    wanted = IMAGE.copy()
    wanted[:, 32:64, 32:64] = 255
    np.testing.assert_array_equal(got, wanted[:, 5:99, 5:88])


@pytest.mark.parametrize("on_damage", ["error", "fill"])
@pytest.mark.parametrize("how", ["anew", "gone"])
def test_an_image_that_is_written_anew_while_it_is_read_is_told(tmp_path, on_damage, how):
    path = write(tmp_path / "a.zarr", [IMAGE], "cyx")
    metadata = Path(path) / "0" / "zarr.json"
    with open_slide(path, on_damage=on_damage) as slide:
        # A file server may set its own time, or round it, once the file is closed.
        settled_ns = metadata.stat().st_mtime_ns // 10**9 * 10**9
        os.utime(metadata, ns=(settled_ns, settled_ns))
        slide.read(Box(0, 0, 9, 9))
    os.utime(metadata, ns=(settled_ns - 60 * 10**9,) * 2)
    with open_slide(path, on_damage=on_damage) as slide:
        shutil.rmtree(path)  # its chunks would be read as 0
        if how == "anew":
            write(path, [255 - IMAGE], "cyx")
        with pytest.raises(SlideError, match="was begun anew by another program, or taken away"):
            slide.read(Box(0, 0, 9, 9))


def test_fingerprint_sees_other_pixels_but_not_new_labels(tmp_path):
    path = write(tmp_path / "a.zarr", [IMAGE], "cyx")
    with open_slide(path) as slide:
        first = slide.fingerprint()
    zarr.open_group(path).create_group("labels").attrs["ome"] = {"labels": []}
    with open_slide(path) as slide:
        assert slide.fingerprint() == first
    zarr.open_group(path)["0"][0, 0, 0] = int(IMAGE[0, 0, 0]) ^ 1
    with open_slide(path) as slide:
        assert slide.fingerprint() != first


@pytest.mark.parametrize("version", ["0.4", "0.5"])
@pytest.mark.parametrize(
    "ome, hint",
    [
        ({"plate": {"wells": [{"path": "B/3"}]}}, "one of them, e.g. {path}/B/3/0"),
        ({"plate": {}}, "one of them, e.g. {path}/A/1/0"),
        ({"well": {"images": [{"path": "0"}]}}, "one of them, e.g. {path}/0"),
        ({"bioformats2raw.layout": 3}, "one of them, e.g. {path}/0"),
    ],
)
def test_a_group_of_images_is_told_from_an_image(tmp_path, version, ome, hint):
    path = tmp_path / "a.zarr"
    group = zarr.open_group(path, mode="w", zarr_format=3 if version == "0.5" else 2)
    group.attrs.update({"ome": {"version": "0.5", **ome}} if version == "0.5" else ome)
    for opened, error in ((open_slide, SlideError), (open_store, StoreError)):
        with pytest.raises(error, match=re.escape(hint.format(path=path))):
            opened(str(path))


def test_several_multiscales(tmp_path):
    path = write(tmp_path / "a.zarr", [IMAGE], "cyx", version="0.4")
    group = zarr.open_group(path)
    group.attrs["multiscales"] = group.attrs["multiscales"] * 2
    with open_slide(path) as slide:
        assert slide.notes == ("2 multiscales in the group; the first one is used",)


@pytest.mark.filterwarnings("ignore:Consolidated metadata")
@pytest.mark.parametrize("version, number", [("0.4", 2), ("0.5", 3)])
def test_consolidated_metadata_that_is_out_of_date(tmp_path, version, number):
    path = write(tmp_path / "a.zarr", [IMAGE], "cyx", version=version)
    zarr.consolidate_metadata(path)
    image = IMAGE[:, :60, :70]
    zarr.create_array(path, name="0", data=image, overwrite=True, zarr_format=number)
    with open_slide(path) as slide:
        assert slide.levels[0].shape == (60, 70)
        np.testing.assert_array_equal(slide.read(Box(0, 0, 60, 70)), image)


def test_a_chunk_that_no_memory_holds_is_refused(tmp_path):
    """Copied as segmented in place: what is not stored of it would not show that."""
    path = tmp_path / "a.zarr"
    write(path, [IMAGE], "cyx")
    group = zarr.open_group(path, mode="a")
    side = 1 << 15
    group.create_array(
        "0", shape=(3, side, side), chunks=(3, side, side), dtype=np.uint8, overwrite=True
    )
    wanted = r"array 0 has chunks of \(3, 32768, 32768\) uint8; the limit is 2 GiB"
    with pytest.raises(SlideError, match=wanted):
        open_slide(path)
    with pytest.raises(StoreError, match=wanted):
        open_store(str(path)).image(0)


@pytest.mark.parametrize("version", ["0.5", "0.4"])
@pytest.mark.parametrize("left", [0, 10, 20, 700, -1])
def test_a_blosc_chunk_that_was_cut_off_is_damage(tmp_path, version, left):
    """Blosc decoded what lay in memory behind it, and that passed for pixels."""
    path = tmp_path / "a.zarr"
    write(path, [IMAGE], "cyx", version=version)
    compressor = BloscCodec() if version == "0.5" else Blosc(cname="lz4")
    group = zarr.open_group(path, mode="a")
    group.create_array("0", data=IMAGE, chunks=(1, 32, 32), compressors=compressor, overwrite=True)
    chunk = path / "0" / ("c/1/2/0" if version == "0.5" else "1.2.0")
    whole = chunk.read_bytes()
    chunk.write_bytes(whole[:left])
    box = Box(0, 0, 100, 90)
    with open_slide(path) as slide, pytest.raises(DamageError, match=r"level 0, y 0:100"):
        slide.read(box)
    with open_slide(path, on_damage="fill") as slide:
        got = slide.read(box)
        assert [tile.box for tile in slide.damage] == [Box(64, 0, 96, 32)]
    right = IMAGE.copy()
    right[:, 64:96, :32] = 255
    np.testing.assert_array_equal(got, right)
    with pytest.raises(StoreError, match=r"array 0 cannot be read at y 0:100"):
        open_store(str(path)).image(0).read(box)
    chunk.write_bytes(whole)
    with open_slide(path) as slide:
        np.testing.assert_array_equal(slide.read(box), IMAGE)
    np.testing.assert_array_equal(open_store(str(path)).image(0).read(box), IMAGE)


def test_a_shard_that_is_an_empty_file_is_damage(tmp_path):
    """So a machine that lost its power leaves files; zarr read fill value."""
    path = tmp_path / "a.zarr"
    write(path, [IMAGE], "cyx")
    group = zarr.open_group(path, mode="a")
    group.create_array("0", data=IMAGE, chunks=(1, 32, 32), shards=(3, 64, 64), overwrite=True)
    (path / "0" / "c" / "0" / "1" / "0").write_bytes(b"")
    box = Box(0, 0, 100, 90)
    with open_slide(path) as slide, pytest.raises(DamageError, match="c/0/1/0 is an empty file"):
        slide.read(box)
    with open_slide(path, on_damage="fill") as slide:
        got = slide.read(box)
        wanted = [(64, 0, 96, 32), (64, 32, 96, 64), (96, 0, 100, 32), (96, 32, 100, 64)]
        assert [tile.box for tile in slide.damage] == [Box(*sides) for sides in wanted]
    right = IMAGE.copy()
    right[:, 64:, :64] = 255
    np.testing.assert_array_equal(got, right)
    (path / "0" / "c" / "0" / "1" / "0").unlink()  # a shard of fill value is left out
    right[:, 64:, :64] = 0
    with open_slide(path) as slide:
        np.testing.assert_array_equal(slide.read(box), right)
