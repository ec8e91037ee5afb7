import numpy as np
import pytest

from nft_ray.rewards.base import Scores
from nft_ray.rewards.combine import assemble, combine_total

NAN = np.nan


def test_weighted_sum_and_missing() -> None:
    raw = {
        "a": np.array([1.0, NAN, 3.0, NAN], dtype=np.float32),
        "b": np.array([10.0, 20.0, NAN, NAN], dtype=np.float32),
        "measured": np.array([NAN, 1.0, 1.0, 1.0], dtype=np.float32),
    }
    total = combine_total(raw, {"a": 2.0, "b": -0.5})
    assert total.dtype == np.float32
    np.testing.assert_array_equal(total, np.array([-3.0, NAN, NAN, NAN], dtype=np.float32))
    np.testing.assert_array_equal(combine_total(raw, {"a": 1.0, "b": 0.0}), raw["a"])  # a weight of 0 trains nothing


@pytest.mark.parametrize(
    ("raw", "weights", "message"),
    [
        ({"a": np.zeros(2)}, {}, "no reward has a weight to train on"),
        ({"a": np.zeros(2)}, {"b": 1.0}, "no scores of the trained reward 'b'; there are: a"),
        ({"a": np.zeros(2), "b": np.zeros(3)}, {"a": 1.0, "b": 1.0}, r"rewards must all be \(N,\)"),
    ],
)
def test_bad_input(raw: dict, weights: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        combine_total(raw, weights)


def test_a_reward_that_could_not_be_had_is_missing_and_never_zero() -> None:
    values, strict = np.array([0.5, NAN], dtype=np.float32), np.array([1.0, 0.0], dtype=np.float32)
    scores = {"a": Scores(values=values, details={"strict": strict}), "b": None}
    rewards = assemble(scores, 2, {"a": 2.0})  # b is only measured
    np.testing.assert_array_equal(rewards.raw["b"], [NAN, NAN])
    np.testing.assert_array_equal(rewards.total, [1.0, NAN])
    assert {name: missing.tolist() for name, missing in rewards.missing.items()} == {
        "a": [False, True],
        "b": [True, True],
    }
    assert rewards.details.keys() == {"a/strict"}
    assert np.isnan(assemble(scores, 2, {"a": 2.0, "b": 1.0}).total).all()


def test_a_total_beyond_float32_is_missing_for_the_reward_that_took_it_there() -> None:
    """Each score is finite, and so is each weight."""
    scores = {
        "huge": Scores(values=np.array([1e38, 1e38, -3e38, 1], np.float32)),
        "small": Scores(values=np.array([1, NAN, 1, 1], np.float32)),
    }
    with np.errstate(all="raise"):
        rewards = assemble(scores, 4, {"huge": 10.0, "small": 1.0})
    np.testing.assert_array_equal(rewards.total, [NAN, NAN, NAN, 11])
    np.testing.assert_array_equal(rewards.raw["huge"], np.array([NAN, 1e38, NAN, 1], np.float32))
    assert rewards.infinite == {"huge"}
    assert rewards.missing["huge"].tolist() == [True, False, True, False]
    assert rewards.missing["small"].tolist() == [False, True, False, False]
    assert np.isfinite(assemble(scores, 4, {"huge": 1.0}).total).all()
    assert scores["huge"].values[0] == np.float32(1e38)


@pytest.mark.parametrize(
    ("values", "found"),
    [
        (np.zeros(3), r"float64 \(3,\)"),
        (np.zeros((4, 1), np.float32), r"float32 \(4, 1\)"),
        (np.array(["a"] * 4), "<U1"),
    ],
)
def test_whoever_answered_under_a_rewards_name_its_scores_are_one_per_image(values: np.ndarray, found: str) -> None:
    with pytest.raises(ValueError, match=rf"^reward a: returned values as {found}.* for 4 images; return float32 \(4,"):
        assemble({"a": Scores(values=values)}, 4, {"a": 1.0})
    with pytest.raises(ValueError, match=r"^reward a: returned a dict"):
        assemble({"a": {"values": values}}, 4, {"a": 1.0})  # type: ignore[dict-item]
