from pathlib import Path

import numpy as np
import pytest

from nft_ray.algorithms.advantages import combine_advantages, group_advantages
from nft_ray.rewards.combine import weighted_sum

NAN = np.nan
GROUPS = np.array([7, 3, 7, 3, 7, 9])


@pytest.mark.parametrize("i", range(4))
def test_advantages_match_the_goldens(goldens: Path, i: int) -> None:
    with np.load(goldens / "advantages.npz") as file:
        assert int(file["n"]) == 4
        std = "global" if file[f"{i}/global_std"] else "group"
        advantages = group_advantages(file[f"{i}/rewards"], file[f"{i}/prompts"], std=std)
        np.testing.assert_allclose(advantages, file[f"{i}/adv"], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("std", ["global", "group"])
def test_a_missing_reward_is_as_if_the_sample_were_not_there(std: str) -> None:
    rewards = np.array([1.0, 0.2, NAN, 0.9, 3.0, NAN])
    present = ~np.isnan(rewards)
    advantages = group_advantages(rewards, GROUPS, std=std)
    assert np.isnan(advantages).tolist() == (~present).tolist()
    np.testing.assert_array_equal(advantages[present], group_advantages(rewards[present], GROUPS[present], std=std))
    assert advantages[4] > 0 > advantages[0]


@pytest.mark.parametrize("std", ["global", "group"])
def test_a_single_reward_has_no_advantage(std: str) -> None:
    advantages = group_advantages(np.array([5.0, NAN, 1.0, 2.0]), np.array([0, 0, 1, 1]), std=std)
    assert advantages[0] == 0
    assert advantages[3] > 0.2


def test_nothing_but_missing_rewards() -> None:
    assert np.isnan(group_advantages(np.full(6, NAN), GROUPS)).all()


def test_float32_rewards_are_averaged_in_float64() -> None:
    rewards = np.array([1e8, 1e8 + 8, 1e8, 1e8 + 8], dtype=np.float32)
    advantages = group_advantages(rewards, np.zeros(4))
    assert advantages.dtype == np.float64
    np.testing.assert_allclose(advantages, np.array([-1, 1, -1, 1]) * 4 / (4 + 1e-4), rtol=1e-12)


@pytest.mark.parametrize(
    ("rewards", "groups", "std", "message"),
    [
        ([1.0, 2.0], [0, 0], "local", "unknown std 'local': use 'global' or 'group'"),
        ([1.0, 2.0], [0, 0, 1], "global", r"must both be \(N,\), not \(2,\) and \(3,\)"),
        ([1.0, np.inf], [0, 0], "global", "must be finite, or NaN"),
    ],
)
def test_bad_input(rewards: list[float], groups: list[int], std: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        group_advantages(np.array(rewards), np.array(groups), std=std)


A = np.array([1.0, 0.0, NAN, 1.0, 3.0, 2.0])
B = np.array([10.0, 30.0, 20.0, 10.0, 50.0, NAN])
COMPLETE = np.array([True, True, False, True, True, False])


@pytest.mark.parametrize("std", ["global", "group"])
def test_sum_is_the_advantage_of_the_weighted_sum(std: str) -> None:
    combined = combine_advantages({"a": A, "b": B}, {"a": 2.0, "b": -0.5}, GROUPS, combine="sum", std=std)
    np.testing.assert_array_equal(combined, group_advantages(2 * A - 0.5 * B, GROUPS, std=std))
    assert (~np.isnan(combined)).tolist() == COMPLETE.tolist()


@pytest.mark.parametrize("std", ["global", "group"])
def test_normalized_by_hand(std: str) -> None:
    combined = combine_advantages({"a": A, "b": B}, {"a": 2.0, "b": -0.5}, GROUPS, combine="normalized", std=std)
    assert (~np.isnan(combined)).tolist() == COMPLETE.tolist()
    for group in (3, 7):
        members = COMPLETE & (group == GROUPS)
        basis = COMPLETE if std == "global" else members
        parts = [w * (r[members] - r[members].mean()) / (r[basis].std() + 1e-4) for w, r in ((2.0, A), (-0.5, B))]
        np.testing.assert_allclose(combined[members], (parts[0] + parts[1]) / 2.5, rtol=1e-12)


def test_normalized_does_not_care_for_the_scale_of_a_reward_and_sum_does() -> None:
    rewards = {"a": np.array([0.0, 1.0, 2.0, 3.0]), "b": np.array([3.0, 1.0, 2.0, 0.0])}
    louder = rewards | {"b": rewards["b"] * 1000}
    weights, groups = {"a": 1.0, "b": 1.0}, np.zeros(4)
    change = {
        combine: np.abs(
            combine_advantages(louder, weights, groups, combine=combine)
            - combine_advantages(rewards, weights, groups, combine=combine)
        ).max()
        for combine in ("sum", "normalized")
    }
    assert change["normalized"] < 1e-3 < 0.5 < change["sum"]


@pytest.mark.parametrize("combine", ["sum", "normalized"])
def test_a_reward_that_is_only_measured_never_drops_a_sample(combine: str) -> None:
    rewards = {"a": np.arange(6.0), "measured": np.full(6, NAN), "zero": np.full(6, NAN)}
    combined = combine_advantages(rewards, {"a": 1.0, "zero": 0.0}, GROUPS, combine=combine)
    np.testing.assert_allclose(combined, group_advantages(rewards["a"], GROUPS))


def test_one_reward_is_the_same_either_way() -> None:
    both = [combine_advantages({"a": A}, {"a": 3.0}, GROUPS, combine=c, std="group") for c in ("sum", "normalized")]
    np.testing.assert_allclose(both[0], both[1], rtol=2e-3)  # the 1e-4 beside the std is not scaled by the weight


def test_missing_agrees_with_the_total_that_is_reported() -> None:
    total = weighted_sum({"a": A, "b": B}, {"a": 1.0, "b": 1.0})
    combined = combine_advantages({"a": A, "b": B}, {"a": 1.0, "b": 1.0}, GROUPS, combine="normalized")
    assert np.isnan(total).tolist() == np.isnan(combined).tolist()


@pytest.mark.parametrize(
    ("weights", "combine", "message"),
    [
        ({"a": 1.0}, "mean", "unknown combine 'mean': use 'sum' or 'normalized'"),
        ({"c": 1.0}, "sum", "no scores of the trained reward 'c'; there are: a, b"),
        ({"a": 0.0}, "normalized", "no reward has a weight to train on"),
    ],
)
def test_bad_combination(weights: dict[str, float], combine: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        combine_advantages({"a": A, "b": B}, weights, GROUPS, combine=combine)
