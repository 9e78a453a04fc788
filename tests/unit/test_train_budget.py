"""``Budget``: what is used of steps and time, and when to validate."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tilepipe.train.budget import N_VALIDATIONS, VALIDATION_SHARE, Budget
from tilepipe.train.spec import TrainSpec


def spec_of(**given):
    return TrainSpec.checked({"images": "i", "labels": "l", "out": "w.safetensors", **given})


@pytest.mark.parametrize(
    ("given_", "steps"),
    [
        ({"steps": 7}, 7),
        ({"epochs": 2, "batch": 3}, 7),  # 10 images: 20 / 3
        ({"steps": 5, "epochs": 2, "batch": 3}, 5),
        ({"epochs": 0.001, "batch": 3}, 1),
        ({"minutes": 1}, None),
    ],
)
def test_the_least_of_steps_and_epochs_bounds_it(given_, steps):
    assert Budget.of(spec_of(**given_), n_images=10).steps == steps


def test_what_is_further_counts():
    budget = Budget(10, 2.0)
    assert budget.used(5, 30.0) == 0.5
    assert budget.used(5, 90.0) == 0.75
    assert budget.used(11, 0.0) == budget.used(0, 1000.0) == 1.0


@given(st.floats(0, 0.999), st.floats(0, 1000))
def test_validations_come_by_steps_wherever_time_does_not_bound_it(progress, took_s):
    after = Budget(100, None).next_validation(progress, took_s)
    assert after == Budget(100, None).next_validation(progress)
    assert progress < after <= progress + 1 / N_VALIDATIONS + 1e-9


@given(st.floats(0, 0.999), st.floats(0, 1000), st.floats(0.1, 60))
def test_of_time_they_take_their_share_at_the_most(progress, took_s, minutes):
    after = Budget(None, minutes).next_validation(progress, took_s)
    assert after > progress
    # float: the two are sums of numbers below 2e3
    assert took_s <= VALIDATION_SHARE * (after - progress) * 60 * minutes + 1e-6
