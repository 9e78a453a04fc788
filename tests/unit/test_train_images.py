"""Pairs, splits, and samples of any image."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from tilepipe.errors import TrainError
from tilepipe.tiling import Box, read_mirrored
from tilepipe.train import images
from tilepipe.train.augment import NO_AUGMENT, AugmentSpec
from tilepipe.train.dataset import Samples, Teaching, to_share
from tilepipe.train.images import Pair, data_hash, find_pairs, open_raster, read_names, split


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
    pairs = find_pairs(*folders, kinds={"b": "stained"}, exclude=["c"])
    assert [(p.name, p.kind) for p in pairs] == [("a", ""), ("b", "stained")]
    (folders[1] / "b.png").unlink()
    with pytest.raises(TrainError, match=r"1 of 3 images have no labels .* first 'b'"):
        find_pairs(*folders)
    with pytest.raises(TrainError, match="no such folder"):
        find_pairs(folders[0] / "x", folders[1])


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
    path.write_text("# head\na  # why\n\nb\n")
    assert read_names(path) == ("a", "b")
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


def test_batches_are_a_function_of_seed_and_step(folders):
    first, again = (make_samples(folders).batch(7, 3, CPU) for _ in range(2))
    assert first.images.shape == (3, 3, 48, 48)
    assert first.targets.shape == first.weights.shape == (3, 24, 24)
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.weights, again.weights)
    assert not torch.equal(first.images, make_samples(folders).batch(8, 3, CPU).images)
    assert not torch.equal(first.images, make_samples(folders, seed=5).batch(7, 3, CPU).images)


def test_unvaried_sample_is_image_and_target_at_one_place(folders):
    samples = make_samples(folders, augment=NO_AUGMENT, input_px=44, output_px=20)
    batch = samples.batch(0, 6, CPU)
    pair = find_pairs(*folders)[0]
    labels = open_raster(pair.labels).read(Box(0, 0, 40, 52))[0]
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


def test_images_too_large_to_keep_give_the_same_samples(folders, monkeypatch):
    kept = make_samples(folders).batch(3, 4, CPU)
    monkeypatch.setattr(images, "IN_MEMORY_PX", 10)
    read = make_samples(folders).batch(3, 4, CPU)
    torch.testing.assert_close(kept.images, read.images, atol=1e-4, rtol=0)
    inside = (kept.targets == read.targets).float().mean()
    assert float(inside) > 0.97  # mirrored cells have rings of their own


def test_kind_weights_choose(folders):
    samples = make_samples(folders)
    pairs = [dataclasses.replace(p, kind=p.name) for p in samples.pairs]
    only_b = Samples(
        pairs, teaching=TEACH, channels=3, input_px=24, output_px=24, augment=NO_AUGMENT,
        kind_weights={"a": 0, "c": 0},
    )  # fmt: skip
    only_b.batch(0, 5, CPU)
    assert set(only_b._kept) == {1}
    with pytest.raises(TrainError, match="no image has a chance"):
        Samples(pairs, teaching=TEACH, channels=3, input_px=24, output_px=24,
                kind_weights={"a": 0, "b": 0, "c": 0})  # fmt: skip


def test_wrong_files_are_named(folders, tmp_path):
    write(folders[1], "a", np.zeros((40, 50), np.uint16))
    with pytest.raises(TrainError, match=r"a: the image has \(40, 52\) px .* labels have \(40, 50"):
        make_samples(folders).batch(0, 9, CPU)
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"\x89PNG nothing")
    with pytest.raises(TrainError, match=r"bad\.png: cannot be read as an image"):
        open_raster(bad)
    write(folders[1], "a", np.random.default_rng(0).integers(0, 9, (40, 52, 3), dtype=np.uint8))
    with pytest.raises(TrainError, match="labels of 3 channels"):
        make_samples(folders).batch(0, 9, CPU)
