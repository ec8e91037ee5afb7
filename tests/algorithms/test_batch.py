"""One epoch's update as a pure function of the scored groups: order, learners and missing rewards."""

import dataclasses
from typing import Literal

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


def scored(
    group_id: int, rewards: list[float], *, non_finite: tuple[int, ...] = (), **more: list[float]
) -> ScoredGroup:
    """Scores of geneval; `more`: of other rewards, each with a weight of 1 too."""
    prompt = Prompt(id=group_id, text=f"prompt {group_id}")
    items = (RolloutItem(group_id=group_id, prompt=prompt, seeds=tuple(range(len(rewards)))),)
    request = RolloutRequest(epoch=3, items=items, adapter="old", policy_version=3, split="train")
    values = {"geneval": rewards, **more}
    scores = {name: Scores(values=np.array(of, np.float32), details={}) for name, of in values.items()}
    assembled = assemble(scores, len(rewards), dict.fromkeys(values, 1.0))
    info = dataclasses.replace(INFO, non_finite=non_finite)
    return ScoredGroup(request=request, info=info, samples=f"samples {group_id}", rewards=assembled)


GROUPS = [scored(4, [0.0, 1.0, 0.5, 0.5]), scored(1, [1.0, 1.0, 0.0, 1.0]), scored(9, [0.2, 0.4, 0.6, 0.8])]
Combine = Literal["sum", "normalized"]
CONFIG = example_config("learner.optimizer_steps=2")


def make_batch(
    groups: list[ScoredGroup], config: ExperimentConfig, *, num_shards: int = 1, combine: Combine = "sum"
) -> Batch:
    return module.make_batch(
        groups,
        build_algorithm(config.algorithm),
        weights=dict.fromkeys(groups[0].rewards.raw, 1.0),
        combine=combine,
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
    with pytest.raises(RuntimeError, match=r"^epoch 4: 38% of the samples miss a reward \(geneval 38%\).*allows 10%"):
        make_batch([scored(1, [nan, nan, nan, 0.5]), *GROUPS[:1]], CONFIG, num_shards=1)
    with pytest.raises(RuntimeError, match="100%"):
        make_batch([scored(1, [nan] * 4)], example_config("scorers.max_missing_fraction=1"), num_shards=1)


def test_a_missing_reward_is_named_and_counted() -> None:
    groups = [
        scored(1, [0.0, 1.0, np.inf, 0.5], ocr=[0.0, 1.0, 1.0, np.nan]),
        scored(2, [0, 1, 0, 1], ocr=[0, 1, 0, 1]),
    ]
    batch = make_batch(groups, example_config("scorers.max_missing_fraction=0.5"))
    shares = {name: batch.metrics[f"reward/missing{name}"] for name in ("", "/geneval", "/ocr")}
    assert shares == {"": 1 / 4, "/geneval": 1 / 8, "/ocr": 1 / 8}
    assert batch.remarks["missing geneval"].startswith(
        "epoch 4: reward geneval gave no number, or an infinite one, or one that (with its weight) is beyond float32, "
        "for 1 of 8 images"
    )
    assert set(batch.remarks) == {"missing geneval", "missing ocr"}


def test_huge_rewards_have_a_mean() -> None:
    """Their sum is beyond float32, each of them is not."""
    with np.errstate(all="raise"):
        batch = make_batch([scored(1, [1e38, 2e38, 3e38, 2e38]), scored(2, [2e38] * 4)], CONFIG)
    assert batch.metrics["reward/total"] == batch.metrics["reward/geneval"] == pytest.approx(2e38)
    assert batch.remarks == {}


@pytest.mark.parametrize("combine", ["sum", "normalized"])
def test_where_all_rewards_are_equal_there_is_no_step(combine: Combine) -> None:
    """Each group its own value, and one that float32 does not hold exactly: a mean of it is another number."""
    equal = [scored(1, [0.1] * 7), scored(2, [0.7] * 5), scored(3, [0.3])]
    batch = make_batch(equal, CONFIG, combine=combine)
    assert batch.samples_per_step == ()
    assert all((group.step == DROPPED).all() for group in flat(batch.shards).values())
    assert batch.metrics["reward/groups_without_signal"] == batch.metrics["reward/constant/geneval"] == 1
    assert "gives all images of each prompt the same: nothing is learned" in batch.remarks["constant geneval"]
    one_differs = make_batch([*equal[:2], scored(3, [0.3, 0.4])], CONFIG, combine=combine)
    assert sum(one_differs.samples_per_step) == 14
    assert one_differs.metrics["reward/groups_without_signal"] == pytest.approx(2 / 3)
    assert one_differs.remarks == {}


def test_a_missing_reward_does_not_pass_for_a_signal() -> None:
    batch = make_batch(
        [scored(1, [0.5, 0.5, float("nan")]), scored(2, [0.5] * 3)], example_config("scorers.max_missing_fraction=0.5")
    )
    assert batch.samples_per_step == ()
    assert "gives 0.5 to every image" in batch.remarks["constant geneval"]


def test_a_reward_that_says_nothing_is_named_beside_one_that_does() -> None:
    groups = [scored(1, [0.0, 1.0], ocr=[0.0, 0.0]), scored(2, [1.0, 0.0], ocr=[0.0, 0.0])]
    batch = make_batch(groups, CONFIG)
    assert (batch.metrics["reward/constant/ocr"], batch.metrics["reward/constant/geneval"]) == (1, 0)
    assert batch.metrics["reward/groups_without_signal"] == 0
    assert batch.remarks["constant ocr"].startswith("epoch 4: reward ocr gives 0 to every image: nothing is learned")
    assert sum(batch.samples_per_step) == 4


def test_rewards_that_cancel_are_a_signal_only_where_each_is_normalised() -> None:
    groups = [scored(1, [0.0, 1.0, 0.0], ocr=[1.0, 0.0, 1.0]), scored(2, [0.5] * 3, ocr=[0.5] * 3)]
    assert make_batch(groups, CONFIG, combine="sum").samples_per_step == ()
    assert sum(make_batch(groups, CONFIG, combine="normalized").samples_per_step) == 6


def test_an_image_that_is_not_finite_is_dropped_named_and_no_missing_reward() -> None:
    """What the reward says of it does not matter: its group is normalised without it."""
    without = flat(make_batch([scored(1, [0.0, 1.0, 0.5]), GROUPS[0]], CONFIG).shards)
    batch = make_batch([scored(1, [0.0, float("nan"), 1.0, 99.0, 0.5], non_finite=(1, 3)), GROUPS[0]], CONFIG)
    found = flat(batch.shards)
    np.testing.assert_array_equal(np.flatnonzero(found[1].step == DROPPED), [1, 3])
    np.testing.assert_array_equal(found[1].weight[[0, 2, 4]], without[1].weight)
    np.testing.assert_array_equal(found[4].weight, without[4].weight)
    assert (batch.metrics["rollout/non_finite"], batch.metrics["reward/missing"]) == (2, 0)
    assert batch.metrics["reward/geneval"] == pytest.approx(3.5 / 7)
    assert batch.remarks == {
        "not finite 4": "epoch 4: 2 of 9 images are not finite numbers: 'prompt 1' (image 2, 4) (with model.dtype = "
        "float16, bfloat16 has a wider range); they are left out of the update"
    }


def test_no_finite_image_at_all_is_an_epoch_without_a_step() -> None:
    batch = make_batch([scored(i, [0.0, 1.0], non_finite=(0, 1)) for i in range(5)], CONFIG)
    assert batch.samples_per_step == ()
    assert batch.metrics["rollout/non_finite"] == 10
    assert (batch.metrics["reward/missing"], batch.metrics["reward/groups_without_signal"]) == (0, 1)
    assert "'prompt 2' (image 1, 2) and 2 more prompts" in batch.remarks["not finite 4"]


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
