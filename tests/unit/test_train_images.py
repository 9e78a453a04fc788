"""Pairs, splits, and samples of any image."""

import dataclasses
import gc
import os
import struct
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from tilepipe.errors import TrainError
from tilepipe.export import write_ome_tiff
from tilepipe.spec import default_classes
from tilepipe.store import create_store
from tilepipe.tiling import Box, read_mirrored
from tilepipe.train import dataset, images
from tilepipe.train.ahead import batches
from tilepipe.train.augment import NO_AUGMENT, AugmentSpec
from tilepipe.train.dataset import Samples, Teaching
from tilepipe.train.ids import read_labels
from tilepipe.train.images import (
    Pair,
    data_hash,
    find_pairs,
    open_pair,
    open_raster,
    read_kinds,
    read_names,
    split,
)
from tilepipe.train.pixels import check_pair, read_pixels, span_of, to_share
from tilepipe.train.targets import make_target
from tilepipe.train.validate import load


def write(folder, name, pixels):
    folder.mkdir(exist_ok=True)
    Image.fromarray(pixels).save(folder / f"{name}.png")


@pytest.fixture
def folders(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("a", "b", "c"):
        write(tmp_path / "img", name, rng.integers(0, 256, (40, 52, 3), dtype=np.uint8))
        labels = np.zeros((40, 52), np.uint16)
        labels[5:20, 5:20], labels[20:33, 21:44] = 1, 300
        write(tmp_path / "lab", name, labels)
    return tmp_path / "img", tmp_path / "lab"


def test_pairs_by_name(folders):
    pairs = find_pairs(*folders, kinds={"b": "stained"})
    assert [(p.name, p.kind) for p in pairs] == [("a", ""), ("b", "stained"), ("c", "")]
    (folders[1] / "b.png").unlink()
    with pytest.raises(TrainError, match=r"1 of 3 images have no labels .* first 'b'"):
        find_pairs(*folders)
    with pytest.raises(TrainError, match="no such folder"):
        find_pairs(folders[0] / "x", folders[1])
    with pytest.raises(TrainError, match="img: is the folder of the images, too"):
        find_pairs(folders[0], folders[1] / ".." / "img")


def test_split_is_seeded_and_even_over_kinds(tmp_path):
    pairs = [Pair(f"{i:03}", tmp_path, tmp_path, "ab"[i % 10 == 0]) for i in range(100)]
    rest, held = split(pairs, share=0.2, seed=1)
    assert [sum(p.kind == k for p in held) for k in "ab"] == [18, 2]
    assert {p.name for p in rest}.isdisjoint(p.name for p in held)
    assert len(rest) + len(held) == 100
    assert split(pairs, share=0.2, seed=1) == (rest, held)
    assert split(pairs, share=0.2, seed=2)[1] != held
    # One image more does not move the others between the halves' order.
    fewer = split(pairs[:-1], share=0.2, seed=1)[1]
    assert len(set(held) - set(fewer)) <= 2
    assert split(pairs[:1], share=0.5, seed=0) == (tuple(pairs[:1]), ())


def test_names_file_and_data_hash(folders, tmp_path):
    path = tmp_path / "names.txt"
    path.write_text("# head\na  # why\n\nb\n  #case\ncase#3\nc#4\t#5\n")
    assert read_names(path) == ("a", "b", "case#3", "c#4")
    with pytest.raises(TrainError, match="one a line"):
        read_names(tmp_path / "no.txt")
    pairs = find_pairs(*folders)
    before = data_hash(pairs)
    assert before == data_hash(find_pairs(*folders))
    write(folders[1], "a", np.zeros((40, 52), np.uint16))
    assert data_hash(pairs) != before


def test_to_share_matches_channels():
    grey = np.full((1, 2, 2), 255, np.uint8)
    assert to_share(grey, channels=3).shape == (3, 2, 2)
    assert to_share(grey, channels=1).max() == 1.0
    rgb = np.zeros((3, 2, 2), np.uint16)
    rgb[1] = 65535
    np.testing.assert_allclose(to_share(rgb, channels=1), 0.587, atol=1e-6)
    with pytest.raises(TrainError, match="5 channels for a network of 3"):
        to_share(np.zeros((5, 2, 2), np.uint8), channels=3)
    with pytest.raises(TrainError, match="dtype int32"):
        to_share(np.zeros((1, 2, 2), np.int32), channels=1)


TEACH = Teaching(target="foreground+border", n_classes=3, weighted=True)


def make_samples(folders, **changes):
    settings = {
        "teaching": TEACH, "channels": 3, "input_px": 48, "output_px": 24,
        "augment": AugmentSpec(scale=1.2, elastic=1.0), "seed": 4,
    }  # fmt: skip
    return Samples(find_pairs(*folders), **{**settings, **changes})


CPU = torch.device("cpu")


def batch_of(samples, step, size):
    return next(batches(samples, first=step, size=size, device=CPU, threads=0))


def test_batches_are_a_function_of_seed_and_step(folders):
    first, again = (batch_of(make_samples(folders), 7, 3) for _ in range(2))
    assert first.images.shape == (3, 3, 48, 48)
    assert first.targets.shape == first.weights.shape == (3, 24, 24)
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.weights, again.weights)
    assert not torch.equal(first.images, batch_of(make_samples(folders), 8, 3).images)
    assert not torch.equal(first.images, batch_of(make_samples(folders, seed=5), 7, 3).images)


@pytest.mark.parametrize("large", [False, True])
def test_threads_make_the_samples_that_one_makes(folders, monkeypatch, large):
    if large:
        monkeypatch.setattr(images, "IN_MEMORY_PX", 10)
    under_way, most = [], []

    def taught(self, labels, targets, make=Teaching.weights):
        under_way.append(1)
        most.append(len(under_way))
        time.sleep(0.02)
        under_way.pop()
        return make(self, labels, targets)

    monkeypatch.setattr(Teaching, "weights", taught)
    alone = make_samples(folders)
    all_wanted = [batch_of(alone, step, 3) for step in range(3, 11)]
    before = torch.get_num_threads()
    made = batches(make_samples(folders), first=3, size=3, device=CPU, threads=4)
    try:
        for wanted in all_wanted:
            batch = next(made)
            assert torch.equal(batch.images, wanted.images)
            assert torch.equal(batch.targets, wanted.targets)
            assert torch.equal(batch.weights, wanted.weights)
    finally:
        made.close()
        torch.set_num_threads(before)
    # A whole image's weights take many times its bytes: of these one at a time.
    assert max(most) > 1 if large else max(most) == 1


def test_unvaried_sample_is_image_and_target_at_one_place(folders):
    samples = make_samples(folders, augment=NO_AUGMENT, input_px=44, output_px=20)
    batch = batch_of(samples, 0, 6)
    pair = find_pairs(*folders)[0]
    labels = open_raster(pair.labels, ids=True).read(Box(0, 0, 40, 52))[0]
    targets = TEACH.targets(labels)
    found = set()
    for image, target in zip(batch.images.numpy(), batch.targets.numpy(), strict=True):
        for pair in samples.pairs:
            share = to_share(open_raster(pair.image).read(Box(0, 0, 40, 52)), channels=3)
            for y, x in np.ndindex(21, 33):
                if np.array_equal(targets[y : y + 20, x : x + 20], target):
                    box = Box(y - 12, x - 12, y + 32, x + 32)
                    crop = read_mirrored(lambda b, s=share: s[(..., *b.slices)], box, (40, 52))
                    if np.allclose(crop, image, atol=1e-4):
                        found.add((pair.name, y, x))
    assert len(found) >= 5


@pytest.mark.parametrize("target", ["classes", "foreground+border"])
def test_images_too_large_to_keep_give_the_same_samples(folders, monkeypatch, target):
    """Beyond the border, too, where what was made of labels is mirrored, not labels themselves."""
    teaching = Teaching(target=target, n_classes=3, weighted=True)
    for path in folders[1].iterdir():
        write(folders[1], path.stem, np.minimum(np.asarray(Image.open(path)), 2))
    kept = batch_of(make_samples(folders, teaching=teaching), 3, 16)
    monkeypatch.setattr(images, "IN_MEMORY_PX", 10)
    read = batch_of(make_samples(folders, teaching=teaching), 3, 16)
    torch.testing.assert_close(kept.images, read.images, atol=1e-4, rtol=0)
    assert torch.equal(kept.targets, read.targets)
    torch.testing.assert_close(kept.weights, read.weights, atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    "teaching",
    [
        Teaching("foreground+border", 3, ring_px=2.0),
        Teaching("foreground+border", 3, ring_px=4.0),
        Teaching("classes", 2, weighted=True, sigma=1.0),
    ],
)
def test_cells_that_a_sample_cuts_are_taught_as_the_whole(tmp_path, monkeypatch, teaching):
    """A part alone may be all ring, or hardly any; two parts of one cell have no border between."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:200, :200]
    labels = np.zeros((200, 200), np.uint16)
    if teaching.target == "classes":
        down, right = y % 40 - 20, x % 40 - 20  # rings with a slit
        slit = (np.abs(down) < 2) & (right > 0)
        labels[(np.abs(np.hypot(down, right) - 15) < 2) & ~slit] = 1
    else:
        for number in range(1, 90):
            centre, axes = rng.integers(0, 200, 2), rng.integers(3, 12, 2)
            cell = ((y - centre[0]) / axes[0]) ** 2 + ((x - centre[1]) / axes[1]) ** 2 <= 1
            labels[cell & (labels == 0)] = number
    write(tmp_path / "img", "a", np.zeros((200, 200), np.uint8))
    write(tmp_path / "lab", "a", labels)
    asked = {"augment": NO_AUGMENT, "teaching": teaching, "output_px": 48}
    folders = tmp_path / "img", tmp_path / "lab"
    kept = batch_of(make_samples(folders, **asked), 0, 64)
    monkeypatch.setattr(images, "IN_MEMORY_PX", 10)
    read = batch_of(make_samples(folders, **asked), 0, 64)
    assert torch.equal(kept.targets, read.targets)
    if teaching.weighted:
        torch.testing.assert_close(kept.weights, read.weights, atol=1e-3, rtol=0)


def test_a_sample_costs_what_it_reads_and_not_its_image(tmp_path, monkeypatch):
    rng = np.random.default_rng(1)
    for folder, pixels in (
        ("img", rng.integers(0, 256, (300, 410, 3), dtype=np.uint8)),
        ("lab", rng.integers(0, 3, (300, 410), dtype=np.uint8)),
    ):
        write(tmp_path / folder, "a", pixels)
    asked = {"teaching": Teaching("classes", 3, weighted=True)}
    taken = []

    def counted(pixels, *, channels):
        taken.append(pixels.shape)
        return to_share(pixels, channels=channels)

    monkeypatch.setattr(dataset, "to_share", counted)
    folders = tmp_path / "img", tmp_path / "lab"
    cut = batch_of(make_samples(folders, **asked), 0, 32)
    # 48 px, zoomed and turned, and what vectors of 10 px add to both sides.
    assert max(max(shape) for shape in taken) < 48 * 1.2 * 2**0.5 + 2 * 40
    monkeypatch.setattr(dataset, "_cut", lambda whole, *_: (whole, (0, 0), (0, 0)))
    whole = batch_of(make_samples(folders, **asked), 0, 32)
    assert max(taken) == (3, 300, 410)
    torch.testing.assert_close(cut.images, whole.images, atol=2e-3, rtol=0)
    torch.testing.assert_close(cut.weights, whole.weights, atol=1e-2, rtol=0)
    assert (cut.targets != whole.targets).float().mean() < 1e-4  # ties in float32


@pytest.mark.parametrize("keep_bytes", [0, 1 << 30])
def test_images_that_were_read_are_not_held_open(folders, keep_bytes):
    """Of TIFFs each is an open file, of which a process may have a thousand; of PNGs the pixels."""

    def rasters():
        gc.collect()
        return sum(isinstance(one, images.Raster) for one in gc.get_objects())

    before = rasters()  # what failed in other tests is held by them
    samples = make_samples(folders, keep_bytes=keep_bytes)
    batch_of(samples, 0, 12)
    assert rasters() <= before


def test_files_are_closed_with_what_was_read_of_them(tmp_path):
    descriptors = Path("/proc/self/fd")
    if not descriptors.is_dir():
        pytest.skip("this system does not list a process's open files")
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, np.ones((32, 32), np.uint8))
    before = len(list(descriptors.iterdir()))
    pair = Pair("a", path, path)
    for _ in range(5):
        check_pair(pair, channels=1, n_classes=2)
        load(pair, channels=1)
    assert len(list(descriptors.iterdir())) == before
    image, _ = open_pair(pair)
    assert image.read(Box(0, 0, 32, 32)).all()


@pytest.mark.parametrize("class_weights", [(5e-9, 1e-6, 2e-6), (1.0, 1e5, 3e5)])
def test_class_weights_of_any_size_have_their_say(folders, class_weights):
    """Such as one over how many px a class has: fp16 holds neither these nor 1e5."""
    teach = dataclasses.replace(TEACH, class_weights=class_weights, w0=0.0)
    batch = batch_of(make_samples(folders, augment=NO_AUGMENT, teaching=teach), 0, 4)
    wanted = torch.tensor(class_weights)[batch.targets]
    torch.testing.assert_close(batch.weights, wanted, rtol=1e-2, atol=1e-5 * class_weights[2])


def test_kind_weights_choose(folders):
    samples = make_samples(folders)
    pairs = [dataclasses.replace(p, kind=p.name) for p in samples.pairs]
    only_b = Samples(
        pairs, teaching=TEACH, channels=3, input_px=24, output_px=24, augment=NO_AUGMENT,
        kind_weights={"a": 0, "c": 0},
    )  # fmt: skip
    batch_of(only_b, 0, 5)
    assert set(only_b._kept) == {1}
    with pytest.raises(TrainError, match="no image has a chance"):
        Samples(pairs, teaching=TEACH, channels=3, input_px=24, output_px=24,
                kind_weights={"a": 0, "b": 0, "c": 0})  # fmt: skip


def test_wrong_files_are_named(folders, tmp_path):
    write(folders[1], "a", np.zeros((40, 50), np.uint16))
    with pytest.raises(TrainError, match=r"a\.png: has \(40, 52\) px .*a\.png have \(40, 50"):
        batch_of(make_samples(folders), 0, 9)
    with pytest.raises(TrainError, match="labels are of the image's size"):
        load(find_pairs(*folders)[0], channels=3)
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"\x89PNG nothing")
    with pytest.raises(TrainError, match=r"bad\.png: cannot be read as an image"):
        open_raster(bad)
    write(folders[1], "a", np.random.default_rng(0).integers(0, 9, (40, 52, 3), dtype=np.uint8))
    with pytest.raises(TrainError, match="labels of 3 channels"):
        batch_of(make_samples(folders), 0, 9)


def whole(raster):
    return Box.of_shape(raster.extent)


GREY = np.arange(20 * 30, dtype=np.uint16).reshape(20, 30).astype(np.uint8)


def with_alpha(mode):
    image = Image.fromarray(np.stack([GREY, 255 - GREY, GREY // 2], -1)).convert("RGBA")
    image.putalpha(Image.fromarray(255 - GREY))
    return image.convert(mode)


def palette():
    image = Image.fromarray(GREY % 7).convert("P")
    image.putpalette([255, 0, 0, 0, 0, 255, 9, 9, 9, 1, 2, 3, 40, 50, 60, 7, 8, 9, 0, 99, 0])
    return image


@pytest.mark.parametrize("suffix", [".png", ".bmp"])
@pytest.mark.parametrize("transparency", [None, 3, bytes(range(7))])
def test_of_a_palette_images_have_the_colours_and_labels_the_indices(
    tmp_path, suffix, transparency
):
    image = palette()
    extra = {} if transparency is None or suffix == ".bmp" else {"transparency": transparency}
    image.save(tmp_path / f"p{suffix}", **extra)
    seen, ids = open_raster(tmp_path / f"p{suffix}"), open_raster(tmp_path / f"p{suffix}", ids=True)
    colours = np.array(image.getpalette()[:21]).reshape(7, 3)
    np.testing.assert_array_equal(seen.read(whole(seen)), colours[GREY % 7].transpose(2, 0, 1))
    np.testing.assert_array_equal(ids.read(whole(ids))[0], GREY % 7)


def test_other_modes_are_read_as_they_look(tmp_path):
    rgb = with_alpha("RGB")
    colours = np.asarray(rgb).transpose(2, 0, 1)
    rgb.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=100, subsampling=0)
    cmyk = open_raster(tmp_path / "cmyk.jpg")
    assert np.abs(cmyk.read(whole(cmyk)).astype(int) - colours).max() < 12  # JPEG's own loss
    # Alpha is left out: blended with nothing.
    with_alpha("RGBA").save(tmp_path / "rgba.png")
    rgba = open_raster(tmp_path / "rgba.png")
    np.testing.assert_array_equal(rgba.read(whole(rgba)), colours)
    with_alpha("LA").save(tmp_path / "la.png")
    la = open_raster(tmp_path / "la.png")
    np.testing.assert_array_equal(la.read(whole(la))[0], np.asarray(with_alpha("LA"))[..., 0])
    Image.fromarray(GREY.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    assert open_raster(tmp_path / "deep.png").dtype == np.uint16


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_colour_of_16_bits_keeps_them_all(tmp_path, channels):
    """Of a camera's 12 bits Pillow would leave 16 values."""
    import imagecodecs

    deep = (np.arange(20 * 30 * channels, dtype=np.uint16) % 4096).reshape(20, 30, channels)
    path = tmp_path / "deep.png"
    path.write_bytes(imagecodecs.png_encode(deep))
    raster = open_raster(path)
    assert raster.dtype == np.uint16
    wanted = deep[..., : {2: 1, 3: 3, 4: 3}[channels]].transpose(2, 0, 1)
    np.testing.assert_array_equal(raster.read(whole(raster)), wanted)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(TrainError, match=r"deep\.png: cannot be read as an image"):
        open_raster(path)


def test_ids_beside_alpha_are_read_without_it(tmp_path):
    Image.fromarray(np.stack([GREY % 3, GREY], -1)).save(tmp_path / "la.png")
    raster = open_raster(tmp_path / "la.png", ids=True)
    np.testing.assert_array_equal(read_labels(raster, whole(raster)), GREY % 3)


@pytest.mark.parametrize("suffix", [".png", ".npy"])
def test_black_and_white_is_0_and_255_and_its_ids_0_and_1(tmp_path, suffix):
    white = GREY > 100
    path = tmp_path / f"bw{suffix}"
    if suffix == ".npy":
        np.save(path, white)
    else:
        Image.fromarray(white).save(path)
    image, ids = open_raster(path), open_raster(path, ids=True)
    np.testing.assert_array_equal(image.read(whole(image))[0], white * 255)
    np.testing.assert_array_equal(read_labels(ids, whole(ids)), white)


@pytest.mark.parametrize("suffix", [".tif", ".npy"])
@pytest.mark.parametrize(
    "dtype", ["uint8", "uint16", "uint32", "int8", "int16", "int32", "int64", "float32"]
)
def test_ids_of_any_integer_kind(tmp_path, dtype, suffix):
    import tifffile

    ids = (GREY % 100).astype(dtype)
    path = tmp_path / f"ids{suffix}"
    np.save(path, ids) if suffix == ".npy" else tifffile.imwrite(path, ids)
    raster = open_raster(path, ids=True)
    if dtype == "float32":
        with pytest.raises(TrainError, match=r"ids\.\w+: labels of dtype float32"):
            read_labels(raster, whole(raster))
    else:
        assert raster.dtype == dtype
        np.testing.assert_array_equal(read_labels(raster, whole(raster)), ids)


@pytest.mark.parametrize("dtype", ["uint8", "int32"])
def test_ids_of_a_mask_that_was_exported(tmp_path, dtype):
    """OME-TIFF with a palette for classes, of four bytes for objects."""
    store = create_store(
        str(tmp_path / "a.zarr"), channels=1, dtype="uint8", extent=GREY.shape, unit_px=512
    )
    label = store.create_label("m", classes=default_classes(9), unit_px=512, dtype=dtype)
    ids = (GREY % 100).astype(dtype)
    label.level(0).write_unit(label.level(0).grid.unit(0, 0), ids)
    write_ome_tiff(tmp_path / "ids.ome.tif", store, label="m")
    raster = open_raster(tmp_path / "ids.ome.tif", ids=True)
    assert (raster.channels, raster.dtype) == (1, dtype)
    np.testing.assert_array_equal(read_labels(raster, whole(raster)), ids)


@pytest.mark.parametrize("dtype", [">u2", ">i4", ">i8"])
@pytest.mark.parametrize("target", ["classes", "foreground", "foreground+border"])
def test_ids_with_their_bytes_the_other_way_round(tmp_path, dtype, target):
    ids = (GREY % 3).astype(dtype)
    np.save(tmp_path / "a.npy", ids)
    raster = open_raster(tmp_path / "a.npy", ids=True)
    read = read_labels(raster, whole(raster))
    teach = Teaching(target=target, n_classes=3, weighted=True)
    taught, plain = teach.targets(read), teach.targets(GREY % 3)
    np.testing.assert_array_equal(taught, plain)
    np.testing.assert_array_equal(teach.weights(read, taught), teach.weights(GREY % 3, plain))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ids", [False, True])
def test_what_a_camera_marked_as_turned_is_read_upright(tmp_path, orientation, ids):
    """As viewers and annotation tools show it, and as an oriented TIFF is read."""
    turned = Image.fromarray(GREY)
    exif = turned.getexif()
    exif[0x0112] = orientation
    turned.save(tmp_path / "a.png", exif=exif)
    upright = {
        1: GREY, 2: GREY[:, ::-1], 3: GREY[::-1, ::-1], 4: GREY[::-1], 5: GREY.T,
        6: np.rot90(GREY, -1), 7: GREY[::-1, ::-1].T, 8: np.rot90(GREY),
    }  # fmt: skip
    raster = open_raster(tmp_path / "a.png", ids=ids)
    np.testing.assert_array_equal(raster.read(whole(raster))[0], upright[orientation])


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("channels", [2, 3, 4])
def test_colour_of_16_bits_is_read_upright_as_its_labels_are(tmp_path, orientation, channels):
    import imagecodecs

    deep = np.random.default_rng(0).integers(0, 65536, (20, 30, channels), np.uint16)
    exif = Image.Exif()
    exif[0x0112] = orientation
    chunk = b"eXIf" + exif.tobytes().removeprefix(b"Exif\0\0")
    packed = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    stored = imagecodecs.png_encode(deep)
    (tmp_path / "a.png").write_bytes(stored[:33] + packed + stored[33:])  # behind the IHDR
    grey = Image.fromarray(deep[..., 0])
    grey.save(tmp_path / "grey.png", exif=exif)
    colour, labels = open_raster(tmp_path / "a.png"), open_raster(tmp_path / "grey.png", ids=True)
    assert colour.extent == labels.extent
    np.testing.assert_array_equal(colour.read(whole(colour))[:1], labels.read(whole(labels)))
    assert colour.channels == {2: 1, 3: 3, 4: 3}[channels]


def test_an_odd_tag_beside_the_turn_is_nothing_to_the_pixels(tmp_path):
    """Pillow wrote all of EXIF anew for a turned image, and failed of a width in letters."""
    width, turned = struct.pack("<HHI4s", 256, 2, 3, b"aa"), struct.pack("<HHII", 274, 3, 1, 6)
    exif = b"II*\0" + struct.pack("<IH", 8, 2) + width + turned + bytes(4)
    Image.fromarray(GREY).save(tmp_path / "a.png", exif=exif)
    raster = open_raster(tmp_path / "a.png")
    np.testing.assert_array_equal(raster.read(whole(raster))[0], np.rot90(GREY, -1))


def test_of_large_images_nothing_is_warned_and_too_large_ones_say_what_next(tmp_path, monkeypatch):
    Image.fromarray(GREY).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", GREY.size - 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_raster(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", GREY.size // 3)
    with pytest.raises(TrainError, match=r"a\.png: is too large .* save it as a tiled TIFF"):
        open_raster(tmp_path / "a.png")


def test_ids_that_a_jpeg_has_blurred_are_none(tmp_path):
    """Each speck around a cell would be foreground, or a cell of its own."""
    mask = np.zeros((64, 64), np.uint8)
    mask[20:40, 20:40] = 255
    Image.fromarray(mask).save(tmp_path / "a.jpg", quality=90)
    assert len(np.unique(np.asarray(Image.open(tmp_path / "a.jpg")))) > 2
    with pytest.raises(TrainError, match="labels as JPEG, which keeps no ids") as raised:
        open_raster(tmp_path / "a.jpg", ids=True)
    assert str(raised.value).startswith(f"{tmp_path / 'a.jpg'}: labels as")
    assert open_raster(tmp_path / "a.jpg").extent == (64, 64)


def test_ids_below_zero_are_named(tmp_path):
    np.save(tmp_path / "a.npy", GREY.astype(np.int32) - 3)
    raster = open_raster(tmp_path / "a.npy", ids=True)
    with pytest.raises(TrainError, match=r"a\.npy: holds id -3; ids count from 0"):
        read_labels(raster, whole(raster))
    np.save(tmp_path / "a.npy", GREY.astype(np.uint64) + np.uint64(2**63))
    raster = open_raster(tmp_path / "a.npy", ids=True)
    with pytest.raises(TrainError, match=r"a\.npy: holds id 9\d+"):
        read_labels(raster, whole(raster))


@pytest.mark.parametrize(
    ("ids", "advice"),
    [
        ([0, 255], "0, 255; .*so ids are 0 to 1; renumber the ids, pass --target foreground"),
        ([0, 1, 2], "0, 1, 2; .*renumber the ids, pass --classes 3, or pass --target"),
        (range(40), r"0, 1, .*9, \.\.\.; .*pass --classes 40, or"),
        (range(1000), "0, 1, .*renumber the ids, pass --target foreground"),
    ],
)
def test_ids_beyond_the_classes_say_what_to_do(ids, advice):
    labels = np.array([list(ids)], np.uint16)
    with pytest.raises(TrainError, match=f"^mask.png: holds class ids {advice}"):
        make_target(labels, "classes", n_classes=2, source="mask.png")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"junk",
        b"\x93NUMPY\x01\x00",
        b"PK\x03\x04",
        b"PK\x05\x06" + bytes(18),
        b"\x93NUMPY\x01\x00\x02\x00{(",
    ],
)
def test_what_is_no_array_is_named(tmp_path, content):
    path = tmp_path / "a.npy"
    path.write_bytes(content)
    with pytest.raises(TrainError, match=r"a\.npy: "):
        open_raster(path)
    np.save(path, np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(TrainError, match=r"a\.npy: cannot be read as a numpy array"):
        open_raster(path)


def test_lists_may_begin_with_the_mark_that_spreadsheets_write(tmp_path):
    (tmp_path / "kinds.csv").write_bytes(b"\xef\xbb\xbfid,kind\na,x\n")
    assert read_kinds(tmp_path / "kinds.csv") == {"a": "x"}
    (tmp_path / "names.txt").write_bytes(b"\xef\xbb\xbfa\nb\n")
    assert read_names(tmp_path / "names.txt") == ("a", "b")


def test_kinds_of_short_rows_are_named(tmp_path):
    path = tmp_path / "kinds.csv"
    path.write_text("id,kind\na,stained\nb\n")
    with pytest.raises(TrainError, match=r"kinds\.csv: the row of 'b' has no kind"):
        read_kinds(path)


def test_an_image_of_two_kinds_is_named(tmp_path):
    path = tmp_path / "kinds.csv"
    path.write_text("id,kind\na,stained\nb,dark\na,stained\n")
    assert read_kinds(path) == {"a": "stained", "b": "dark"}
    path.write_text("id,kind\na,stained\nb,dark\na,dark\n")
    with pytest.raises(TrainError, match=r"kinds\.csv: 'a' is of kind 'stained' .* and 'dark'"):
        read_kinds(path)


def write_floats(folders, values, suffix=".npy"):
    """Replace the images by float ones (the labels stay)."""
    for path in list(folders[0].iterdir()):
        path.unlink()
        np.save(folders[0] / f"{path.stem}.npy", values)
    return find_pairs(*folders)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int8", "int16", "float16", "float32"])
def test_training_sees_the_numbers_that_run_sees(tmp_path, dtype):
    import tifffile

    from tilepipe.models import Normalisation
    from tilepipe.slide import open_slide

    values = np.random.default_rng(0).integers(0, 30_000, (20, 30)).astype(dtype)
    tifffile.imwrite(tmp_path / "a.tif", values)
    with open_slide(tmp_path / "a.tif") as slide:
        pixels = slide.read(Box(0, 0, 20, 30))
    wanted = Normalisation()(torch.from_numpy(pixels)).numpy()
    np.save(tmp_path / "a.npy", values)
    for name in ("a.tif", "a.npy"):
        raster = open_raster(tmp_path / name)
        np.testing.assert_array_equal(to_share(raster.read(whole(raster)), channels=1), wanted)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "int16", "int8"])
def test_training_and_validation_see_the_numbers_of_a_float_image(folders, dtype):
    rng = np.random.default_rng(0)
    values = (rng.random((1, 40, 52)) * 200 - 100).astype(dtype)
    pairs = write_floats(folders, values)
    settings = {"channels": 1, "input_px": 40, "output_px": 40, "augment": NO_AUGMENT}
    sample = batch_of(Samples(pairs, teaching=TEACH, **settings), 0, 1).images[0, 0].numpy()
    share, _ = load(pairs[0], channels=1)
    np.testing.assert_array_equal(share, values.astype(np.float32))
    assert any(
        np.allclose(sample, share[0, :, x : x + 40], atol=0.01) for x in range(share.shape[2] - 39)
    )


@pytest.mark.parametrize("scale", [1.0, 255.0, 4000.0, 1e-3])
@pytest.mark.parametrize("offset", [0.0, -300.0])
def test_varied_float_samples_are_neither_constant_nor_cut_off(folders, scale, offset):
    values = (np.random.default_rng(1).random((1, 40, 52)) * scale + offset).astype(np.float32)
    samples = Samples(
        write_floats(folders, values), teaching=TEACH, channels=1, input_px=40, output_px=40,
        augment=AugmentSpec(blur_px=0),
    )  # fmt: skip
    drawn = batch_of(samples, 0, 8).images
    spread = drawn.std((1, 2, 3)) / values.std()
    assert 0.4 < float(spread.min()) <= float(spread.max()) < 2
    assert float((drawn.mean((1, 2, 3)) - values.mean()).abs().max()) < scale


def test_varied_samples_of_a_camera_of_few_bits_show_what_it_saw(folders):
    """Shares of 16 bits: a shift by some hundredths would leave nothing but black of 12 of them."""
    rng = np.random.default_rng(1)
    values = (rng.random((1, 40, 52)) * 1500 + 150).astype(np.uint16)
    samples = Samples(
        write_floats(folders, values), teaching=TEACH, channels=1, input_px=40, output_px=40,
        augment=AugmentSpec(blur_px=0),
    )  # fmt: skip
    drawn = batch_of(samples, 0, 64).images * 65535
    spread = drawn.std((1, 2, 3)) / values.std()
    assert 0.4 < float(spread.min()) <= float(spread.max()) < 2
    assert float((drawn.mean((1, 2, 3)) - values.mean()).abs().max()) < 1500
    assert float(drawn.min()) >= 0


def test_the_span_is_that_of_nearly_all_pixels():
    assert span_of(np.zeros((1, 4, 4), np.uint8)) is None
    assert span_of(np.zeros((1, 4, 4), np.uint16)) == (0.0, 1 / 65535)
    twelve_bits = np.linspace(100, 4000, 400).round().astype(np.uint16).reshape(1, 20, 20)
    assert np.multiply(span_of(twelve_bits), 65535) == pytest.approx([120, 3980], abs=3)
    assert span_of(np.full((1, 4, 4), 5, np.int16)) == (5.0, 6.0)
    values = np.random.default_rng(0).random((2, 1000, 300)).astype(np.float32)
    values[0, 5, 5], values[1, 9, 9] = 1e9, -1e9
    low, high = span_of(values)
    assert 0 < low < 0.02
    assert 0.98 < high < 1
    lit = np.zeros((1, 100, 100), np.float32)
    lit[0, 3, 3] = 2.0
    assert span_of(lit) == (0.0, 2.0)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300, -3.4e38])
def test_what_is_no_number_is_named_before_the_first_step(folders, value):
    values = np.zeros((1, 40, 52), np.float64)
    values[0, 7, 8] = value
    pairs = write_floats(folders, values)
    with pytest.raises(TrainError, match=r"a\.npy: holds NaN, infinity"):
        check_pair(pairs[0], channels=1, n_classes=None)
    raster = open_raster(pairs[0].image)
    with pytest.raises(TrainError, match="leave the image out"):
        read_pixels(raster, whole(raster))
    assert read_pixels(raster, Box(8, 0, 40, 52)).max() == 0


def test_pairs_that_cannot_be_learnt_from_are_named_at_the_start(folders):
    pairs = find_pairs(*folders)
    check_pair(pairs[0], channels=1, n_classes=None)
    with pytest.raises(TrainError, match=r"lab/a\.png: holds class ids 0, 1, 300"):
        check_pair(pairs[0], channels=1, n_classes=5)
    with pytest.raises(TrainError, match=r"a\.png: images of 3 channels for a network of 2"):
        check_pair(pairs[0], channels=2, n_classes=None)
    write(folders[1], "b", np.zeros((40, 50), np.uint16))
    with pytest.raises(TrainError, match=r"b\.png: has \(40, 52\)"):
        open_pair(pairs[1])
    with pytest.raises(TrainError, match=r"b\.png: has \(40, 52\)"):
        check_pair(pairs[1], channels=3, n_classes=None)


def test_names_that_are_no_utf8_are_split_and_hashed(tmp_path: Path) -> None:
    paths = [tmp_path / os.fsdecode(name) for name in (b"a\xff.npy", b"b.npy")]
    for path in paths:
        path.write_bytes(b"")
    pairs = [Pair(path.stem, path, path) for path in paths]
    rest, held = split(pairs, share=0.5, seed=0)
    assert len(rest) == len(held) == 1
    assert data_hash(pairs[:1]) != data_hash(pairs[1:])
