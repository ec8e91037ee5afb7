"""The learner core: the same update from any number of ranks, from any micro-batch, and after a restore."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from nft_ray.cores.learner import LearnerCore
from nft_ray.cores.publish import checksum
from nft_ray.cores.sampler import SamplerCore
from nft_ray.types import Weights
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


def test_a_gradient_that_is_not_finite_stops_the_run() -> None:
    groups, counts = example_groups()
    bad = dataclasses.replace(groups[0].samples, x0=np.full_like(groups[0].samples.x0, np.inf))
    groups[0] = dataclasses.replace(groups[0], samples=bad, step=np.zeros(IMAGES, np.int32))
    with pytest.raises(RuntimeError, match="gradient norm"):
        update(LearnerCore(example_config()), groups, (IMAGES, *counts[1:]))


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
