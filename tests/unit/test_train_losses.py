"""Each loss: a float64 reference in numpy, and gradients against finite differences."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from tilepipe.errors import TrainError
from tilepipe.train import losses
from tilepipe.train.ms_ssim import EXPONENTS, ms_ssim, n_scales


def case(channels, seed=0, side=12):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn((2, channels, side, side), generator=generator, dtype=torch.float64)
    target = torch.randint(max(2, channels), (2, side, side), generator=generator)
    weight = 0.5 + torch.rand((2, side, side), generator=generator, dtype=torch.float64)
    return logits, target, weight


def numpy_probabilities(logits):
    z = logits.numpy()
    if z.shape[1] == 1:
        return 1 / (1 + np.exp(-z))
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def numpy_hot(target, channels):
    t = target.numpy()
    if channels == 1:
        return (t != 0)[:, None].astype(float)
    return np.stack([t == k for k in range(channels)], 1).astype(float)


def true_p(p, t):
    """Probability of the true class, (B, Y, X)."""
    if p.shape[1] == 1:
        return np.where(t.numpy() != 0, p[:, 0], 1 - p[:, 0])
    return np.take_along_axis(p, t.numpy()[:, None], 1)[:, 0]


def ref_ce(p, t, w):
    return float((-np.log(true_p(p, t)) * w).mean())


def ref_bce(p, t, w, z):
    z = z.numpy()
    hot = numpy_hot(t, z.shape[1])
    s = 1 / (1 + np.exp(-z))
    return float((-(hot * np.log(s) + (1 - hot) * np.log(1 - s)).mean(1) * w).mean())


def parts(p, t):
    hot = numpy_hot(t, p.shape[1])
    return (p, hot) if p.shape[1] == 1 else (p[:, 1:], hot[:, 1:])


def ref_dice(p, t, w):
    a, b = parts(p, t)
    w = w[:, None]
    both = (a * b * w).sum((0, 2, 3))
    return float((1 - (2 * both + 1e-6) / ((a * w + b * w).sum((0, 2, 3)) + 1e-6)).mean())


def ref_iou(p, t, w):
    a, b = parts(p, t)
    w = w[:, None]
    both = (a * b * w).sum((2, 3))
    return float((1 - (both + 1e-6) / (((a + b - a * b) * w).sum((2, 3)) + 1e-6)).mean())


def ref_focal(p, t, w):
    q = true_p(p, t)
    return float((-((1 - q) ** 2) * np.log(q) * w).mean())


def ref_ms_ssim(a, b):
    kernel = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    kernel /= kernel.sum()

    def smooth(x):
        # scipy's "mirror" does not repeat the border pixel, as torch's "reflect".
        x = ndimage.correlate1d(x, kernel, axis=-2, mode="mirror")
        return ndimage.correlate1d(x, kernel, axis=-1, mode="mirror")

    scales = n_scales(*a.shape[-2:])
    power = np.array(EXPONENTS[:scales]) / sum(EXPONENTS[:scales])
    result = np.ones(a.shape[:2])
    for k in range(scales):
        ma, mb = smooth(a), smooth(b)
        va, vb, cov = smooth(a * a) - ma**2, smooth(b * b) - mb**2, smooth(a * b) - ma * mb
        term = (2 * cov + 9e-4) / (va + vb + 9e-4)
        if k == scales - 1:
            term = term * (2 * ma * mb + 1e-4) / (ma**2 + mb**2 + 1e-4)
        result *= np.maximum(term.mean((-2, -1)), 1e-6) ** power[k]
        y, x = (s // 2 * 2 for s in a.shape[-2:])
        a, b = (
            v[..., :y, :x].reshape(*v.shape[:2], y // 2, 2, x // 2, 2).mean((3, 5)) for v in (a, b)
        )
    return float(result.mean())


def reference(name, logits, target, weight):
    p, w = numpy_probabilities(logits), weight.numpy()
    if name in ("ce", "weighted-ce"):
        return ref_ce(p, target, w)
    if name == "bce":
        return ref_bce(p, target, w, logits)
    if name == "ms-ssim":
        return 1 - ref_ms_ssim(*parts(p, target))
    if name == "hybrid":
        return ref_focal(p, target, w) + 1 - ref_ms_ssim(*parts(p, target)) + ref_iou(p, target, w)
    return {"dice": ref_dice, "focal": ref_focal, "iou": ref_iou}[name](p, target, w)


@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("name", sorted(losses.LOSSES))
def test_equals_the_reference(name, channels):
    logits, target, weight = case(channels, side=26)
    got = losses.make_loss(name)(logits, target, weight)
    assert float(got) == pytest.approx(reference(name, logits, target, weight), abs=1e-10)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", sorted(losses.LOSSES))
def test_gradient_is_that_of_finite_differences(name, channels):
    logits, target, weight = case(channels, seed=3, side=5)
    loss = losses.make_loss(name)
    assert torch.autograd.gradcheck(
        lambda z: loss(z, target, weight), (logits.requires_grad_(),), atol=1e-6, rtol=1e-4
    )


@pytest.mark.parametrize("name", sorted(set(losses.LOSSES) - {"ms-ssim", "hybrid"}))
def test_weight_of_one_changes_nothing_and_weights_matter(name):
    logits, target, weight = case(3)
    loss = losses.make_loss(name)
    torch.testing.assert_close(
        loss(logits, target), loss(logits, target, torch.ones_like(weight)), rtol=1e-9, atol=1e-12
    )
    assert float(loss(logits, target)) != pytest.approx(float(loss(logits, target, weight)))


@pytest.mark.parametrize("name", sorted(losses.LOSSES))
def test_truth_costs_nothing_and_its_opposite_much(name):
    _, target, _ = case(2, side=24)
    hot = losses.one_hot(target, 2).double()
    loss = losses.make_loss(name)
    assert float(loss((hot * 2 - 1) * 40, target)) == pytest.approx(0, abs=1e-6)
    assert float(loss((1 - hot * 2) * 40, target)) > 0.5


def test_class_weights_scale_their_class():
    logits, _, _ = case(3)
    target = torch.full((2, 12, 12), 2)
    plain = losses.make_loss("ce")(logits, target)
    heavy = losses.make_loss("ce", class_weights=(1, 1, 4))(logits, target)
    torch.testing.assert_close(heavy, 4 * plain)


def test_sum_of_losses_and_unknown_names():
    logits, target, weight = case(3)
    both = losses.make_loss("ce+dice")(logits, target, weight)
    each = losses.cross_entropy(logits, target, weight) + losses.soft_dice(logits, target, weight)
    torch.testing.assert_close(both, each)
    with pytest.raises(TrainError, match="'l2' is unknown; there are ce"):
        losses.make_loss("ce+l2")


def test_deep_supervision_is_the_mean_of_outputs():
    a, target, _ = case(2, seed=1)
    b, _, _ = case(2, seed=2)
    ce = losses.make_loss("ce")
    got = losses.supervised([a, b], target, None, loss=ce)
    torch.testing.assert_close(got, (ce(a, target) + ce(b, target)) / 2)
    got = losses.supervised([a, b], target, None, loss=ce, output_weights=[3, 1])
    torch.testing.assert_close(got, (3 * ce(a, target) + ce(b, target)) / 4)
    with pytest.raises(TrainError, match="1 weights for 2 outputs"):
        losses.supervised([a, b], target, None, loss=ce, output_weights=[1])


def test_gate_learns_presence():
    target = torch.zeros((2, 4, 4), dtype=torch.long)
    target[1, 0, 0] = 1
    right = losses.gate_loss(torch.tensor([-9.0, 9.0], dtype=torch.float64), target)
    wrong = losses.gate_loss(torch.tensor([9.0, -9.0], dtype=torch.float64), target)
    assert float(right) == pytest.approx(np.log1p(np.exp(-9)), abs=1e-12)
    assert float(wrong) == pytest.approx(9 + np.log1p(np.exp(-9)), abs=1e-12)
    z = torch.randn(2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.autograd.gradcheck(
        lambda gate: losses.gate_loss(gate, target), (z.requires_grad_(),)
    )


def test_ms_ssim_of_an_image_with_itself():
    image = torch.rand((1, 2, 180, 190), generator=torch.Generator().manual_seed(0))
    assert n_scales(180, 190) == 5
    assert float(ms_ssim(image, image)) == pytest.approx(1)
    assert float(ms_ssim(image, image.flip(-1))) < 0.5
