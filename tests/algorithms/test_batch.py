"""One epoch's update as a pure function of the scored groups: order, learners and missing rewards."""

import dataclasses

import numpy as np
import pytest

from nft_ray.algorithms import batch as module
from nft_ray.algorithms.base import build_algorithm
from nft_ray.algorithms.batch import DROPPED, optimizer_steps, shard
from nft_ray.config import ExperimentConfig
from nft_ray.rewards.base import Scores
from nft_ray.rewards.combine import assemble
from nft_ray.types import Batch, Prompt, RolloutInfo, RolloutItem, RolloutRequest, ScoredGroup, TrainGroup
from tests.examples import example_config

INFO = RolloutInfo(epoch=3, policy_version=3, worker="a", seconds=1.0, num_bytes=1)


def scored(group_id: int, rewards: list[float]) -> ScoredGroup:
    prompt = Prompt(id=group_id, text="x")
    items = (RolloutItem(group_id=group_id, prompt=prompt, seeds=tuple(range(len(rewards)))),)
    request = RolloutRequest(epoch=3, items=items, adapter="old", policy_version=3, split="train")
    scores = {"geneval": Scores(values=np.array(rewards, np.float32), details={})}
    assembled = assemble(scores, len(rewards), {"geneval": 1.0})
    return ScoredGroup(request=request, info=INFO, samples=f"samples {group_id}", rewards=assembled)


GROUPS = [scored(4, [0.0, 1.0, 0.5, 0.5]), scored(1, [1.0, 1.0, 0.0, 1.0]), scored(9, [0.2, 0.4, 0.6, 0.8])]
CONFIG = example_config("learner.optimizer_steps=2")


def make_batch(groups: list[ScoredGroup], config: ExperimentConfig, *, num_shards: int) -> Batch:
    return module.make_batch(
        groups,
        build_algorithm(config.algorithm),
        weights=config.trained_weights,
        combine=config.scorers.combine,
        max_missing_fraction=config.scorers.max_missing_fraction,
        num_steps=config.learner.optimizer_steps,
        run_seed=config.run.seed,
        num_shards=num_shards,
    )


def flat(shards: tuple[tuple[TrainGroup, ...], ...]) -> dict[int, TrainGroup]:
    return {group.group_id: group for part in shards for group in part}


@pytest.mark.parametrize("num_shards", [1, 2, 3, 5])
def test_neither_arrival_nor_learners_change_the_update(num_shards: int) -> None:
    one = make_batch(GROUPS, CONFIG, num_shards=1)
    other = make_batch(GROUPS[::-1], CONFIG, num_shards=num_shards)
    assert other.samples_per_step == one.samples_per_step == (6, 6)
    assert len(other.shards) == num_shards
    for group_id, group in flat(one.shards).items():
        same = flat(other.shards)[group_id]
        np.testing.assert_array_equal(group.step, same.step)
        np.testing.assert_array_equal(group.weight, same.weight)
        assert same.samples == f"samples {group_id}"


def test_better_samples_of_a_group_have_the_higher_optimality() -> None:
    group = flat(make_batch(GROUPS, CONFIG, num_shards=1).shards)[9]
    assert (np.diff(group.weight) > 0).all()
    assert group.weight.mean() == pytest.approx(0.5)


def test_a_missing_reward_drops_the_sample_and_renormalises_its_group() -> None:
    config = example_config("scorers.max_missing_fraction=0.5")
    nan = float("nan")
    batch = make_batch([scored(1, [0.0, 1.0, nan, 0.5]), *GROUPS[:1]], config, num_shards=1)
    group = flat(batch.shards)[1]
    assert group.step[2] == DROPPED
    assert (np.delete(group.step, 2) >= 0).all()
    assert np.delete(group.weight, 2).mean() == pytest.approx(0.5)
    assert batch.metrics["reward/missing"] == pytest.approx(1 / 8)
    assert sum(batch.samples_per_step) == 7


def test_too_many_missing_rewards_stop_the_run() -> None:
    nan = float("nan")
    with pytest.raises(RuntimeError, match=r"38% of the samples miss a reward \(geneval 38%\).*allows 10%"):
        make_batch([scored(1, [nan, nan, nan, 0.5]), *GROUPS[:1]], CONFIG, num_shards=1)
    with pytest.raises(RuntimeError, match="100%"):
        make_batch([scored(1, [nan] * 4)], example_config("scorers.max_missing_fraction=1"), num_shards=1)


def test_the_steps_of_an_epoch_partition_the_samples_that_count() -> None:
    valid = np.array([True] * 9 + [False])
    step = optimizer_steps(valid, 4, 0, 0)
    assert step[9] == DROPPED
    assert sorted(np.bincount(step[:9]).tolist()) == [2, 2, 2, 3]
    assert (step != optimizer_steps(valid, 4, 0, 1)).any()
    assert optimizer_steps(valid, 99, 0, 0).max() == 8  # never a step without a sample


def test_shards_are_balanced_by_what_counts() -> None:
    groups = [
        dataclasses.replace(group, step=np.full(4, -1, np.int32)) if i < 2 else group
        for i, group in enumerate(flat(make_batch(GROUPS, CONFIG, num_shards=1).shards).values())
    ]
    assert [len(part) for part in shard(groups, 2)] == [3, 0]
