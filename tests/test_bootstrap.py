"""The interval around a mean: as wide as theory says, and the same whenever it is asked for."""

import numpy as np
import pytest

from nft_ray import bootstrap
from nft_ray.bootstrap import interval


@pytest.mark.parametrize("num", [50, 480, 2212])
def test_the_width_is_that_of_the_normal_approximation(num: int) -> None:
    values = np.random.default_rng(num).normal(3.0, 2.0, num)
    half = 1.96 * values.std() / np.sqrt(num)
    low, high = interval(values)
    assert low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_nineteen_of_twenty_intervals_hold_the_true_mean() -> None:
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(400):
        low, high = interval(rng.random(100) < 0.6)
        held += low <= 0.6 <= high
    assert 0.92 <= held / 400 <= 0.98


def test_the_same_values_give_the_same_interval_however_much_is_drawn_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(1).random(300)
    first = interval(values)
    monkeypatch.setattr(bootstrap, "CHUNK", 7000)
    assert interval(values) == first


def test_equal_values_have_no_width() -> None:
    assert interval(np.ones(7)) == (1.0, 1.0)
