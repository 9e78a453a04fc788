"""All values' regions, found in one pass, are those that a pass for each value finds."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from tilepipe.tiling.regions import label_regions


def by_value(mask, without):
    """A pass for each value, numbered on."""
    ids, values = np.zeros(mask.shape, np.int32), []
    for value in np.unique(mask):
        if value not in (0, *without):
            found, count = ndimage.label(mask == value)
            ids[found != 0] = found[found != 0] + len(values)
            values += [value] * count
    return ids, values


@given(
    seed=st.integers(0, 10**6),
    sides=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    count=st.sampled_from([1, 2, 4, 30, 256]),
    smooth=st.sampled_from([0.0, 1.5]),
    without=st.sets(st.integers(0, 5), max_size=2),
)
def test_regions_have_the_numbers_that_a_pass_for_each_value_gives(
    seed, sides, count, smooth, without
):
    generator = np.random.default_rng(seed)
    field = ndimage.gaussian_filter(generator.random(sides), smooth)
    cuts = np.quantile(field, np.linspace(0, 1, count + 1)[1:-1])
    mask = generator.permutation(count).astype(np.uint8)[np.digitize(field, cuts)]
    ids, values = label_regions(mask, without=without)
    expected, their_values = by_value(mask, without)
    np.testing.assert_array_equal(ids, expected)
    assert ids.dtype == np.int32
    assert values.tolist() == their_values


def test_two_hundred_classes_take_one_pass(monkeypatch):
    passes = []
    label = ndimage.label
    monkeypatch.setattr(ndimage, "label", lambda *a, **k: passes.append(1) or label(*a, **k))
    mask = np.arange(200, dtype=np.uint8).reshape(10, 20)
    _, values = label_regions(mask)
    assert (values.tolist(), len(passes)) == (list(range(1, 200)), 1)
