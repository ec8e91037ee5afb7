"""The learner core: the same update from any number of ranks, from any micro-batch, and after a restore."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from nft_ray.cores.learner import LearnerCore
from nft_ray.cores.publish import checksum
from nft_ray.cores.sampler import SamplerCore
from nft_ray.types import TrainGroup, Weights
from tests.examples import example_config
from tests.learning import GROUPS, IMAGES, example_groups, on_ranks, update


def distance(a: Weights, b: Weights) -> float:
    """|a - b| / |b - start| over all tensors: relative to the whole update, where the LoRA's B starts at 0."""
    moved = [name for name in b if "lora_B" in name]
    difference = np.concatenate([(a[name] - b[name]).ravel() for name in moved])
    return float(np.linalg.norm(difference) / np.linalg.norm(np.concatenate([b[name].ravel() for name in moved])))


@pytest.mark.parametrize("world_size", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (3, 4))])
def test_any_number_of_ranks_gives_the_update_of_one(world_size: int, tmp_path: Path) -> None:
    groups, counts = example_groups()
    one, weights = update(LearnerCore(example_config(kl_weight=0.1)), groups, counts)
    # 4 ranks for 3 groups: one rank has no pair and still joins the reduction
    ranks = on_ranks(world_size, tmp_path, [(groups, counts)], "algorithm.kl_weight=0.1")
    for rank in ranks:
        assert rank.result.metrics["nft/loss"] == pytest.approx(one.metrics["nft/loss"], rel=1e-5)
        assert rank.result.adapters.checksums == ranks[0].result.adapters.checksums  # every rank holds the same policy
        assert (rank.weights is None) == (rank.state is None) == (rank.rank > 0)
    assert ranks[0].weights is not None
    assert distance(ranks[0].weights.old, weights.old) < 1e-5


def test_micro_batches_do_not_change_the_update() -> None:
    groups, counts = example_groups()
    _, small = update(LearnerCore(example_config(micro_batch_size=3)), groups, counts)
    _, large = update(LearnerCore(example_config(micro_batch_size=64)), groups, counts)
    # looser than over ranks: Adam's first steps divide a gradient by itself, also one that is mostly rounding
    assert distance(small.old, large.old) < 1e-3


def test_an_update_moves_every_lora_tensor_and_dropped_samples_do_not_count() -> None:
    core = LearnerCore(example_config())
    groups, counts = example_groups()
    before = core.state().policy
    update(core, groups, counts)
    after = core.state().policy
    still = {name for name in before if "lora_B" in name and (before[name] == after[name]).all()}
    assert still == {"transformer_blocks.3.attn.add_q_proj.lora_B.weight"}  # SD3's last block drops its text stream
    poisoned = [
        dataclasses.replace(
            group,
            samples=dataclasses.replace(
                group.samples, x0=np.where((group.step < 0)[:, None, None, None], np.float32("nan"), group.samples.x0)
            ),
        )
        for group in groups
    ]
    other = LearnerCore(example_config())
    update(other, poisoned, counts)
    assert checksum(other.state().policy) == checksum(after)


def test_a_restored_learner_goes_on_bit_for_bit() -> None:
    straight, first = LearnerCore(example_config()), LearnerCore(example_config())
    for core in (straight, first):
        update(core, *example_groups(0))
    resumed = LearnerCore(example_config())
    resumed.restore(first.state())
    _, expected = update(straight, *example_groups(1))
    _, found = update(resumed, *example_groups(1))
    assert checksum(found.old) == checksum(expected.old)
    assert checksum(found.ema) == checksum(expected.ema)
    assert resumed.optimizer_step == 4


def broken(group: TrainGroup, step: int) -> TrainGroup:
    """The group with an infinite x0 in every sample of an optimizer step."""
    rows = (group.step == step)[:, None, None, None]
    assert rows.any()
    return dataclasses.replace(
        group, samples=dataclasses.replace(group.samples, x0=np.where(rows, np.float32("inf"), group.samples.x0))
    )


def only_step(groups: Sequence[TrainGroup], step: int) -> list[TrainGroup]:
    """The groups as if that optimizer step were the only one."""
    return [dataclasses.replace(group, step=np.where(group.step == step, 0, -1).astype(np.int32)) for group in groups]


def test_a_step_whose_gradient_is_not_finite_is_as_if_it_had_not_been_asked_for() -> None:
    groups, counts = example_groups()
    expected = LearnerCore(example_config())
    wanted, _ = update(expected, only_step(groups, 1), counts[1:])
    core = LearnerCore(example_config())
    result, weights = update(core, [groups[0], broken(groups[1], 0), groups[2]], counts)
    assert (result.skipped_steps, result.num_optimizer_steps, result.culprits) == (1, 1, (1,))
    assert (result.metrics["nft/skipped_steps"], core.optimizer_step) == (1.0, 1)
    assert result.steps == wanted.steps  # the figures of what was learned; NaN of nothing
    assert result.adapters.checksums == wanted.adapters.checksums
    assert checksum(core.state().optimizer) == checksum(expected.state().optimizer)
    _, after = update(core, *example_groups(1))
    _, wanted_after = update(expected, *example_groups(1))
    assert checksum(after.old) == checksum(wanted_after.old)
    assert all(np.isfinite(value).all() for value in weights.old.values())


@pytest.mark.parametrize("sharding", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_every_rank_leaves_the_same_step_out_and_names_the_same_group(sharding: str, tmp_path: Path) -> None:
    groups, counts = example_groups()
    groups = [groups[0], groups[1], broken(groups[2], 1)]
    one, weights = update(LearnerCore(example_config()), groups, counts)
    for rank in on_ranks(2, tmp_path, [(groups, counts)], f"learner.sharding={sharding}"):
        assert (rank.result.skipped_steps, rank.result.culprits) == (one.skipped_steps, one.culprits) == (1, (2,))
        if rank.weights is not None:
            assert distance(rank.weights.old, weights.old) < 1e-5


def test_without_a_step_nothing_moves() -> None:
    core = LearnerCore(example_config("algorithm.old_policy_decay=on_policy"))
    groups, counts = example_groups()
    update(core, groups, counts)
    before = core.state()
    result, _ = update(core, [dataclasses.replace(group, step=np.full(IMAGES, -1, np.int32)) for group in groups], ())
    after = core.state()
    assert (result.version, result.steps, result.num_optimizer_steps, result.skipped_steps) == (2, (), 0, 0)
    assert after.optimizer_step == before.optimizer_step == 2
    for name in ("policy", "ema", "optimizer"):
        assert checksum(getattr(after, name)) == checksum(getattr(before, name))
    assert checksum(after.versions[2].old) == checksum(before.versions[1].old)


def test_a_policy_that_has_blown_up_is_published_by_nobody() -> None:
    core = LearnerCore(example_config("learner.learning_rate=1e12"))
    message = (
        r"^the policy has blown up: its velocity is not finite after epoch 1 \(optimizer step 1, learning rate 1e\+12\)"
    )
    with pytest.raises(RuntimeError, match=message) as error:
        update(core, *example_groups())
    assert "\n" not in str(error.value)
    with torch.no_grad():
        next(iter(core.ema.values()))[0] = torch.nan
    core._versions[0] = dataclasses.replace(core._versions[0], ema={k: v.cpu() for k, v in core.ema.items()})
    with pytest.raises(RuntimeError, match=r"^the policy has blown up: .*lora_A.* is not finite"):
        core.adapters()


@pytest.mark.parametrize("finished", [0, 1])
def test_a_learner_that_goes_back_is_as_new(finished: int) -> None:
    core = LearnerCore(example_config())
    states = [core.state()]
    for seed in range(2):
        update(core, *example_groups(seed))
        states.append(core.state())
    core.restore(states[finished])
    fresh = LearnerCore(example_config())
    fresh.restore(states[finished])
    for learner in (core, fresh):
        update(learner, *example_groups(5))
    assert checksum(core.state().policy) == checksum(fresh.state().policy)
    assert checksum(core.state().optimizer) == checksum(fresh.state().optimizer)


def test_a_step_without_any_sample_of_this_rank_is_the_zero_gradient() -> None:
    groups, _ = example_groups()
    core = LearnerCore(example_config(weight_decay=0.0))
    before = core.state().policy
    nothing = [dataclasses.replace(group, step=np.full(IMAGES, -1, np.int32)) for group in groups]
    result, _ = update(core, nothing, (1,))
    assert checksum(core.state().policy) == checksum(before)
    assert result.metrics["nft/grad_norm"] == 0.0


def test_less_memory_is_the_same_update() -> None:
    same_update("learner.gradient_checkpointing=true")


@pytest.mark.slow
def test_more_speed_is_the_same_update(compiler: None) -> None:
    same_update("learner.compile=true")


def same_update(setting: str) -> None:
    groups, counts = example_groups()
    # 5 pairs divide no step's pairs: the last micro-batch is shorter, and compiled it is filled up
    plain = LearnerCore(example_config("learner.micro_batch_size=5", kl_weight=0.1))
    other = LearnerCore(example_config("learner.micro_batch_size=5", setting, kl_weight=0.1))
    expected, weights = update(plain, groups, counts)
    result, found = update(other, groups, counts)
    for name in ("nft/loss", "nft/kl", "nft/x0_norm", "nft/grad_norm"):
        assert result.metrics[name] == pytest.approx(expected.metrics[name], rel=1e-4)
    assert distance(found.old, weights.old) < 1e-3


def test_a_small_gradient_in_float16_does_not_become_zero() -> None:
    """Of these 3 prompts' pairs and a hundred thousand times as many of other ranks: each adds 1e-9."""
    groups, _ = example_groups(epoch_steps=1)
    groups = [dataclasses.replace(group, step=np.zeros(IMAGES, np.int32)) for group in groups]
    gradients = []
    for dtype in ("float32", "float16"):
        core = LearnerCore(example_config(f"model.dtype={dtype}", kl_weight=0.1))
        result, _ = update(core, groups, (100_000 * GROUPS * IMAGES,))
        gradients.append(torch.cat([value.grad.double().flatten() for value in core.policy.values()]))  # type: ignore[union-attr]
        assert result.metrics["nft/grad_norm"] == pytest.approx(float(gradients[-1].norm()), rel=1e-3)
    exact, found = gradients
    assert exact @ found / (exact.norm() * found.norm()) > 0.999
    assert float(found.norm()) == pytest.approx(float(exact.norm()), rel=0.02)


LARGE = ("model.dtype=float16", "algorithm.advantage_clip=3e6")
"""The loss is a million times as large: finite, and its gradient leaves float16."""


def test_a_gradient_that_leaves_float16_is_scaled_down_until_it_fits(caplog: pytest.LogCaptureFixture) -> None:
    groups, counts = example_groups(epoch_steps=1)
    core, skipped = LearnerCore(example_config(*LARGE)), 0
    while skipped < 20:
        before = checksum(core.state().policy)
        result, _ = update(core, groups, counts)
        if not result.skipped_steps:
            break
        assert (result.culprits, checksum(core.state().policy)) == ((), before)  # no loss is to blame
        skipped += 1
        assert result.metrics["nft/loss_scale"] == core.state().loss_scale == 2.0**-skipped
    assert 1 <= skipped <= 10
    exact = LearnerCore(example_config(LARGE[1]))
    update(exact, groups, counts)
    gradients = [
        torch.cat([value.grad.double().flatten() for value in learner.policy.values()])  # type: ignore[union-attr]
        for learner in (core, exact)
    ]
    assert gradients[0] @ gradients[1] / (gradients[0].norm() * gradients[1].norm()) > 0.99
    resumed = LearnerCore(example_config(*LARGE))
    resumed.restore(core.state())
    result, _ = update(resumed, groups, counts)
    assert (result.skipped_steps, resumed.state().loss_scale) == (0, 2.0**-skipped)
    core.restore(dataclasses.replace(core.state(), loss_scale=None))  # a checkpoint of before it was scaled down
    assert core.state().loss_scale == 2.0**-skipped


@pytest.mark.slow
def test_the_number_of_ranks_is_kept_out_of_float16(tmp_path: Path) -> None:
    """3 is no power of two: multiplied in 16 bit it would round. One pair at a time: the same rows in each forward."""
    settings = ("model.dtype=float16", "learner.micro_batch_size=1", "algorithm.kl_weight=0.1")
    groups, counts = example_groups()
    _, weights = update(LearnerCore(example_config(*settings)), groups, counts)
    ranks = on_ranks(3, tmp_path, [(groups, counts)], *settings)
    assert ranks[0].weights is not None
    assert distance(ranks[0].weights.old, weights.old) < 1e-5


def test_the_kl_of_every_choice_of_times_averages_to_the_whole() -> None:
    """TIMES = 2, so each sample has one of two choices: all samples' first, and all samples' second."""
    groups, _ = example_groups(epoch_steps=1)
    groups = [dataclasses.replace(group, step=np.zeros(IMAGES, np.int32)) for group in groups]
    counts = (GROUPS * IMAGES,)

    def gradient(time: int | None) -> np.ndarray:
        chosen = groups
        if time is not None:
            index = np.full((IMAGES, 1), time, np.int64)
            chosen = [
                dataclasses.replace(
                    group,
                    samples=dataclasses.replace(
                        group.samples, v_ref=group.samples.v_ref[:, time : time + 1], ref_times=index
                    ),
                )
                for group in groups
            ]
        core = LearnerCore(example_config("learner.max_grad_norm=1e9", kl_weight=0.5))
        update(core, chosen, counts)
        return np.concatenate([value.grad.numpy().ravel() for value in core.policy.values() if value.grad is not None])

    whole, first, second = gradient(None), gradient(0), gradient(1)
    assert np.linalg.norm(first - second) > 1e-2 * np.linalg.norm(whole)  # else there is nothing to average
    np.testing.assert_allclose((first + second) / 2, whole, atol=1e-5 * np.abs(whole).max())


def test_a_16_bit_policy_equal_to_the_old_one_has_the_samplers_very_velocity() -> None:
    """v - v_old must be the policies' difference, not that of two ways to round."""
    config = example_config("model.dtype=bfloat16")
    learner, sampler = LearnerCore(config), SamplerCore(config)
    adapters, weights = learner.probe()
    receipt = sampler.load(adapters, weights)
    assert (receipt.probe == adapters.probe).all()
    assert (receipt.probe != adapters.probe_base).any()
