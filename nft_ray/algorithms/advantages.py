"""How much better than its group is a sample? Rewards in, advantages out; NaN is a reward that could not be had.

NumPy, on the driver: N scalars of one epoch, whatever the number of workers. A sample without its reward is left out
of every mean and std, so it neither gains nor costs anything, and its advantage is NaN: dropped.
"""

from collections.abc import Mapping
from typing import Literal

import numpy as np

from nft_ray.rewards.combine import weighted_sum

STD_FLOOR = 1e-4


def group_advantages(
    rewards: np.ndarray, group_ids: np.ndarray, *, std: Literal["global", "group"] = "global"
) -> np.ndarray:
    """(reward - mean of its group) / (std + 1e-4), float64 (N,), NaN where the reward is.

    rewards (N,) of any float dtype, NaN = missing; group_ids (N,): equal ids are one group. std: of all the rewards
    ("global", the published default) or of the group. Means and stds are over what is there; the std is the
    population's (ddof 0). A group with a single reward, or with equal ones, has advantage 0.
    Source: the published per-prompt tracker. Raises ValueError for another std, other shapes or an infinite reward.
    """
    if std not in ("global", "group"):
        raise ValueError(f"unknown std {std!r}: use 'global' or 'group'")
    rewards, group_ids = np.asarray(rewards, dtype=np.float64), np.asarray(group_ids)
    if rewards.ndim != 1 or rewards.shape != group_ids.shape:
        raise ValueError(f"rewards and group_ids must both be (N,), not {rewards.shape} and {group_ids.shape}")
    if np.isinf(rewards).any():
        raise ValueError("rewards must be finite, or NaN where missing; found an infinite one")
    present = ~np.isnan(rewards)
    advantages = np.full_like(rewards, np.nan)
    for group in np.unique(group_ids[present]):
        members = present & (group_ids == group)
        spread = rewards[present if std == "global" else members].std()
        advantages[members] = (rewards[members] - rewards[members].mean()) / (spread + STD_FLOOR)
    return advantages


def combine_advantages(
    rewards: Mapping[str, np.ndarray],
    weights: Mapping[str, float],
    group_ids: np.ndarray,
    *,
    combine: Literal["sum", "normalized"] = "sum",
    std: Literal["global", "group"] = "global",
) -> np.ndarray:
    """One advantage per sample from several rewards, float64 (N,).

    rewards: name -> (N,), NaN = missing; weights: name -> w_k of the TRAINED rewards (others in `rewards` are only
    measured and never drop a sample; so is a weight of 0). A sample that misses any trained reward is missing: NaN, and
    left out of every mean and std. "sum", the published way: the advantages of sum_k w_k r_k, in which the reward with
    the largest spread wins. "normalized": sum_k w_k (r_k - group mean) / (std_k + 1e-4) / sum_k |w_k|.
    Raises ValueError for another `combine` or `std`, a trained reward that is not in `rewards`, or no weight at all.
    """
    if combine not in ("sum", "normalized"):
        raise ValueError(f"unknown combine {combine!r}: use 'sum' or 'normalized'")
    total = weighted_sum(rewards, weights)
    if combine == "sum":
        return group_advantages(total, group_ids, std=std)
    trained = {name: weight for name, weight in weights.items() if weight}
    complete = ~np.isnan(total)
    advantages = np.zeros_like(total)
    for name, weight in trained.items():
        advantages += weight * group_advantages(np.where(complete, rewards[name], np.nan), group_ids, std=std)
    return advantages / sum(abs(weight) for weight in trained.values())
