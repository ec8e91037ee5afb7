"""The interval around a mean: as wide as theory says, and the same whenever it is asked for."""

import numpy as np
import pytest

from nft_ray.evaluation import bootstrap
from nft_ray.evaluation.bootstrap import interval


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


def test_four_copies_of_a_line_say_no_more_than_one() -> None:
    values = np.random.default_rng(2).normal(size=200)
    assert interval(np.repeat(values, 4), np.repeat(np.arange(200), 4)) == pytest.approx(interval(values))


def test_four_images_of_each_prompt_hold_the_true_mean_and_three_prompts_have_a_width() -> None:
    rng = np.random.default_rng(0)
    prompts = np.repeat(np.arange(60), 4)
    held = {"lines": 0, "prompts": 0}
    for _ in range(150):
        values = rng.normal(size=60)[prompts] + 0.5 * rng.normal(size=240)  # what a prompt is worth, and noise
        for name, (low, high) in {"lines": interval(values), "prompts": interval(values, prompts)}.items():
            held[name] += low <= 0 <= high
    assert held["lines"] / 150 < 0.8
    assert held["prompts"] / 150 >= 0.92
    low, high = interval(np.tile([0.0, 1.0], 30), np.repeat(np.arange(3), 20))
    assert high - low > 0.2


def test_means_are_over_lines_where_prompts_have_different_numbers_of_them() -> None:
    prompts = np.array([*np.repeat(np.arange(100), 9), *range(100, 200)])
    low, high = interval(np.where(prompts < 100, 1.0, 0.0), prompts)
    assert 0.8 < low < 0.9 < high < 1
