"""Augmentation: image and label stay aligned; the mirror is that of inference; seeds decide."""

import numpy as np
import pytest
import torch

from tilepipe.tiling import Box, read_mirrored
from tilepipe.train.augment import (
    NO_AUGMENT,
    AugmentSpec,
    elastic_field,
    sample_at,
    source_coordinates,
)
from tilepipe.train.colour import blur, vary_colour, vary_stain

STRONG = AugmentSpec(elastic=1.0, elastic_px=12, scale=1.5, rotate=180)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def draw(spec, seed, extent=(80, 90), side=64, out=48):
    return source_coordinates(extent, side, out_px=out, spec=spec, generator=generator(seed))


@pytest.mark.parametrize("seed", range(4))
def test_unvaried_samples_are_mirrored_crops(seed):
    image = np.random.default_rng(seed).random((2, 40, 50)).astype(np.float32)
    coordinates = draw(NO_AUGMENT, seed, extent=(40, 50), side=62, out=20)
    y0, x0 = (int(v) for v in coordinates[0, 0])
    assert coordinates[0, 0].tolist() == [y0, x0]
    box = Box(y0, x0, y0 + 62, x0 + 62)
    wanted = read_mirrored(lambda b: image[(slice(None), *b.slices)], box, (40, 50))
    got = sample_at(torch.from_numpy(image), coordinates)
    np.testing.assert_allclose(got.numpy(), wanted, atol=2e-5)
    # What is taught lies on the image.
    assert 0 <= y0 + 21 <= 20
    assert 0 <= x0 + 21 <= 30


def test_image_smaller_than_the_sample_is_centred():
    coordinates = draw(NO_AUGMENT, 0, extent=(10, 12), side=64, out=48)
    assert coordinates[0, 0].tolist() == [-27, -26]


@pytest.mark.parametrize("seed", range(5))
def test_label_painted_into_the_image_stays_on_it(seed):
    yy, xx = np.mgrid[:80, :90]
    label = (((yy - 40) ** 2 + (xx - 45) ** 2 < 400) | (xx > 70)).astype(np.uint8)
    coordinates = draw(STRONG, seed)
    image = sample_at(torch.from_numpy(label[None].astype(np.float32)), coordinates)[0]
    target = sample_at(torch.from_numpy(label[None]), coordinates, mode="nearest")[0]
    assert set(np.unique(target.numpy())) <= {0.0, 1.0}
    differ = (image > 0.5).float() != target
    # Bilinear and nearest may fall on either side only where the value is undecided.
    assert bool((image[differ] - 0.5).abs().max() < 0.5) if differ.any() else True
    assert float(differ.float().mean()) < 0.02
    assert 0.02 < float(target.mean()) < 0.98


def test_same_seed_same_sample_other_seed_another():
    assert torch.equal(draw(STRONG, 5), draw(STRONG, 5))
    assert not torch.equal(draw(STRONG, 5), draw(STRONG, 6))


def test_elastic_displacements_have_the_papers_spread():
    vectors = torch.randn((400, 2, 3, 3), generator=generator(0)) * 10
    corners = torch.stack([elastic_field(v[None], 33)[0, 0] for v in vectors])
    assert float(corners.std()) == pytest.approx(10, rel=0.1)
    field = elastic_field(vectors[:1], 33)
    # The grid's vectors are met exactly, between them the field is smooth.
    torch.testing.assert_close(field[::16, ::16].permute(2, 0, 1), vectors[0])
    assert float(field.diff(dim=0).abs().max()) < 5


def test_quarter_turns_and_mirrors_are_exact():
    spec = NO_AUGMENT.model_copy(update={"flips": True})
    image = torch.arange(49, dtype=torch.float32).reshape(1, 7, 7)
    seen = set()
    for seed in range(40):
        coordinates = draw(spec, seed, extent=(7, 7), side=7, out=7)
        seen.add(tuple(sample_at(image, coordinates)[0].flatten().round().int().tolist()))
    wanted = set()
    for view in (image[0], image[0].flip(0)):
        for turns in range(4):
            wanted.add(tuple(torch.rot90(view, turns).flatten().int().tolist()))
    assert seen == wanted


def test_origin_shifts_the_window():
    image = torch.rand((1, 30, 30), generator=generator(0))
    coordinates = torch.stack(
        torch.meshgrid(torch.arange(10, 15.0), torch.arange(12, 17.0), indexing="ij"), -1
    )
    whole = sample_at(image, coordinates)
    part = sample_at(image[:, 5:25, 8:28], coordinates, origin=(5, 8))
    torch.testing.assert_close(whole, part)
    torch.testing.assert_close(whole, image[:, 10:15, 12:17])


def test_colour_stays_in_range_and_off_means_off():
    sample = torch.rand((3, 20, 20), generator=generator(1))
    torch.testing.assert_close(
        vary_colour(sample, spec=NO_AUGMENT, generator=generator(2)), sample, atol=1e-6, rtol=0
    )
    wild = AugmentSpec(gain=3, brightness=0.5, gamma=3, noise=0.3, invert=0.5, stain=0.5, gray=0.3)
    for seed in range(8):
        varied = vary_colour(sample, spec=wild, generator=generator(seed))
        assert 0 <= float(varied.min()) <= float(varied.max()) <= 1
        assert torch.equal(varied, vary_colour(sample, spec=wild, generator=generator(seed)))


@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("seed", range(4))
def test_floats_are_varied_relative_to_their_span(channels, seed):
    """Another unit of the same image is varied the same way: nothing depends on 0 and 1."""
    image = torch.rand((channels, 20, 20), generator=generator(seed)) * 1.3 - 0.15
    wild = AugmentSpec(gain=2, brightness=0.3, gamma=2, noise=0.2, invert=0.5, stain=0.5, gray=0.3)
    varied = vary_colour(image, spec=wild, generator=generator(seed), span=(0.0, 1.0))
    other = vary_colour(image * 400 - 50, spec=wild, generator=generator(seed), span=(-50.0, 350.0))
    torch.testing.assert_close((other + 50) / 400, varied, atol=1e-4, rtol=1e-4)
    # What lies beyond the span stays.
    kept = vary_colour(image * 400, spec=NO_AUGMENT, generator=generator(seed), span=(0.0, 400.0))
    torch.testing.assert_close(kept, image * 400, atol=1e-3, rtol=0)


def test_grey_images_take_one_colour_and_invert():
    grey = torch.full((3, 8, 8), 0.25)
    tinted = vary_colour(
        grey, spec=NO_AUGMENT.model_copy(update={"tint": 1.0}), generator=generator(0)
    )
    per_channel = tinted.mean((1, 2))
    assert float(per_channel.max()) == pytest.approx(0.25)
    assert float(per_channel.min()) < 0.2
    inverted = vary_colour(
        grey, spec=NO_AUGMENT.model_copy(update={"invert": 1.0}), generator=generator(0)
    )
    torch.testing.assert_close(inverted, torch.full_like(grey, 0.75))


def test_stain_of_factor_one_is_the_image():
    sample = torch.rand((3, 6, 6), generator=generator(4)).clamp(min=0.01)
    torch.testing.assert_close(vary_stain(sample, torch.ones(3)), sample, atol=1e-5, rtol=0)
    # More haematoxylin makes a haematoxylin-coloured pixel darker.
    purple = torch.tensor([0.4, 0.35, 0.7])[:, None, None]
    assert float(vary_stain(purple, torch.tensor([1.5, 1, 1])).sum()) < float(purple.sum())


def test_blur_keeps_the_mean_of_a_flat_image():
    flat = torch.full((2, 9, 9), 0.3)
    torch.testing.assert_close(blur(flat, 2.0), flat)
