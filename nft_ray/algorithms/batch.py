"""From scored groups to one epoch's update: sample weights, optimizer steps and shards. Scalars only, no Ray.

Which optimizer step a sample belongs to is a function of (run seed, epoch) and the samples that count, with groups in
the order of their ids: never of arrival or of the number of learners. A sample that misses a trained reward, or whose
image is not finite, is dropped here, not multiplied by 0; what is left of its group is normalised without it. What a
reward is worth is the algorithm's business.

Where every image of every group earns the same there is nothing to learn, and no optimizer step: of a gradient that is
rounding alone AdamW would make steps as long as any other.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Literal

import numpy as np

from nft_ray.algorithms.base import Algorithm, EpochRewards, SampleWeights
from nft_ray.algorithms.remarks import remarks
from nft_ray.algorithms.signal import constant_in_groups
from nft_ray.seeding import permutation
from nft_ray.types import Batch, Rewards, ScoredGroup, TrainGroup

DROPPED = -1


def make_batch(
    groups: Sequence[ScoredGroup],
    algorithm: Algorithm,
    *,
    weights: Mapping[str, float],
    combine: Literal["sum", "normalized"],
    max_missing_fraction: float,
    num_steps: int,
    run_seed: int,
    num_shards: int,
) -> Batch:
    """The update of one epoch. `weights`: reward name -> weight, of those that train; `num_steps`: optimizer steps.

    RuntimeError where more than `max_missing_fraction` of the samples miss a trained reward; those whose image is not
    finite are not asked.
    """
    groups = sorted(groups, key=lambda group: group.request.items[0].group_id)
    sizes = [group.request.num_images for group in groups]
    ids = np.repeat([group.request.items[0].group_id for group in groups], sizes)
    epoch = groups[0].request.epoch
    finite = np.concatenate([_finite(group) for group in groups])
    check_missing([group.rewards for group in groups], weights, max_missing_fraction, f"epoch {epoch + 1}", of=finite)
    raw = {
        name: np.where(finite, np.concatenate([group.rewards.raw[name] for group in groups]), np.nan)
        for name in weights
    }
    total = np.where(finite, np.concatenate([group.rewards.total for group in groups]), np.nan)
    complete = {name: np.where(np.isnan(total), np.nan, raw[name]) for name, weight in weights.items() if weight}
    constant = {name: constant_in_groups(values, ids) for name, values in complete.items()}
    flat = constant_in_groups(total, ids) if combine == "sum" else np.all([*constant.values()], axis=0)
    found = _sample_weights(algorithm, EpochRewards(raw=raw, weights=weights, group_ids=ids, combine=combine))
    valid = np.isfinite(found.values)
    step = optimizer_steps(valid & (not flat.all()), num_steps, run_seed, epoch)
    cuts = np.cumsum(sizes)[:-1]
    parts = zip(groups, np.split(np.where(valid, found.values, 0), cuts), np.split(step, cuts), strict=True)
    train = [
        TrainGroup(group_id=group.request.items[0].group_id, samples=group.samples, weight=weight, step=of_group)
        for group, weight, of_group in parts
    ]
    metrics = _reward_metrics(groups, finite) | {
        "rollout/non_finite": float((~finite).sum()),
        "reward/missing": float((np.isnan(total) & finite).mean()),
        "reward/groups_without_signal": float(flat.mean()) if len(flat) else 1.0,
        **{f"reward/missing/{name}": float((np.isnan(raw[name]) & finite).mean()) for name in constant},
        **{f"reward/constant/{name}": float(len(of) > 0 and of.all()) for name, of in constant.items()},
    }
    return Batch(
        epoch=epoch,
        shards=shard(train, num_shards),
        samples_per_step=tuple(int((step == s).sum()) for s in range(step.max() + 1)),
        metrics=metrics | {f"{algorithm.name}/{name}": value for name, value in found.metrics.items()},
        remarks=remarks(groups, {name: raw[name] for name in constant}, finite, constant),
    )


def _finite(group: ScoredGroup) -> np.ndarray:
    """Of which images everything is finite, bool (G,)."""
    finite = np.ones(group.request.num_images, dtype=bool)
    finite[list(group.info.non_finite)] = False
    return finite


def _sample_weights(algorithm: Algorithm, rewards: EpochRewards) -> SampleWeights:
    """Of the algorithm, which is not asked where there is no sample at all."""
    missing = np.any([np.isnan(rewards.raw[name]) for name, weight in rewards.weights.items() if weight], axis=0)
    if missing.all():
        return SampleWeights(np.full(len(missing), np.nan, np.float32), {})
    return algorithm.sample_weights(rewards)


def check_missing(
    rewards: Sequence[Rewards],
    trained: Collection[str],
    limit: float,
    what: str,
    *,
    of: np.ndarray,
) -> None:
    """RuntimeError naming the rewards behind it, where more samples miss a trained reward than the limit allows.

    of: bool (N,), the samples that are looked at; none of them is no mistake.
    """
    lacking = np.isnan(np.concatenate([scores.total for scores in rewards]))[of]
    fraction = lacking.mean() if len(lacking) else 0.0
    if fraction > limit or fraction == 1:
        missing = {name: np.concatenate([scores.missing[name] for scores in rewards])[of] for name in trained}
        by_name = ", ".join(f"{name} {values.mean():.0%}" for name, values in missing.items())
        raise RuntimeError(
            f"{what}: {fraction:.0%} of the samples miss a reward ({by_name}); "
            f"scorers.max_missing_fraction allows {limit:.0%}"
        )


def optimizer_steps(valid: np.ndarray, num_steps: int, run_seed: int, epoch: int) -> np.ndarray:
    """Optimizer step of every sample, i32 (N,), -1 = dropped: near-equal parts of a permutation of the rest, if any."""
    (kept,) = np.nonzero(valid)
    step = np.full(len(valid), DROPPED, dtype=np.int32)
    order = kept[permutation(len(kept), "optimizer steps", run_seed, epoch)]
    for s, part in enumerate(np.array_split(order, max(1, min(num_steps, len(order))))):
        step[part] = s
    return step


def shard(groups: Sequence[TrainGroup], num_shards: int) -> tuple[tuple[TrainGroup, ...], ...]:
    """Whole groups to shards, each to the one with the fewest samples so far; a shard may stay empty."""
    shards: list[list[TrainGroup]] = [[] for _ in range(num_shards)]
    load = [0] * num_shards
    for group in groups:
        target = load.index(min(load))
        shards[target].append(group)
        load[target] += int((group.step != DROPPED).sum())
    return tuple(tuple(part) for part in shards)


def _reward_metrics(groups: Sequence[ScoredGroup], finite: np.ndarray) -> dict[str, float]:
    """Means over the images that are finite and have that score."""
    metrics = {"reward/total": float("nan")}
    values = {"total": np.concatenate([group.rewards.total for group in groups])}
    for name in sorted({name for group in groups for name in (*group.rewards.raw, *group.rewards.details)}):
        values[name] = np.concatenate([group.rewards.values(name) for group in groups])
    for name, value in values.items():
        found = value[finite & np.isfinite(value)]
        if len(found):
            metrics[f"reward/{name}"] = float(found.mean(dtype=np.float64))  # a sum of float32 may be infinite
    return metrics
