"""The learner core: the same update from any number of ranks, from any micro-batch, and after a restore."""

import dataclasses
import multiprocessing as mp
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nft_ray.algorithms.batch import shard
from nft_ray.learner import LearnerCore
from nft_ray.models.lora import checksum
from nft_ray.sampler import SamplerCore
from nft_ray.types import CleanSamples, TrainGroup, Weights
from tests.examples import example_config

GROUPS, IMAGES, TIMES, LATENT = 3, 4, 2, (8, 8, 8)


def example_groups(seed: int = 0, epoch_steps: int = 2) -> tuple[list[TrainGroup], tuple[int, ...]]:
    rng = np.random.default_rng(seed)
    groups, normal = [], lambda *shape: rng.standard_normal(shape).astype(np.float32)
    for g in range(GROUPS):
        samples = CleanSamples(
            x0=normal(IMAGES, *LATENT),
            t=rng.choice([1.0, 0.75, 0.5, 0.25], (IMAGES, TIMES)).astype(np.float32),
            noise_seeds=rng.integers(0, 2**32, (IMAGES, TIMES)),
            v_old=normal(IMAGES, TIMES, *LATENT),
            v_ref=normal(IMAGES, TIMES, *LATENT),
            conditioning={"prompt_embeds": normal(1, 8, 128), "pooled_prompt_embeds": normal(1, 128)},
        )
        step = rng.integers(-1, epoch_steps, IMAGES).astype(np.int32)
        r = rng.random(IMAGES).astype(np.float32)
        groups.append(TrainGroup(group_id=g, samples=samples, optimality=r, step=step))
    steps = np.concatenate([group.step for group in groups])
    return groups, tuple(int((steps == s).sum()) for s in range(epoch_steps))


def update(core: LearnerCore, groups: list[TrainGroup], counts: tuple[int, ...]) -> Any:
    bare = [dataclasses.replace(group, samples=None) for group in groups]
    return core.update(core.version, bare, [group.samples for group in groups], counts)


def distance(a: Weights, b: Weights) -> float:
    """|a - b| / |b - start| over all tensors: relative to the whole update, where the LoRA's B starts at 0."""
    moved = [name for name in b if "lora_B" in name]
    difference = np.concatenate([(a[name] - b[name]).ravel() for name in moved])
    return float(np.linalg.norm(difference) / np.linalg.norm(np.concatenate([b[name].ravel() for name in moved])))


def rank_main(rank: int, world_size: int, store: str, shares: Any, counts: tuple[int, ...], out: Any) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    core = LearnerCore(example_config(kl_weight=0.1), rank, world_size)
    result, weights = update(core, list(shares[rank]), counts)
    out.put((rank, result.metrics["nft/loss"], weights.old))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_any_number_of_ranks_gives_the_update_of_one(world_size: int, tmp_path: Path) -> None:
    groups, counts = example_groups()
    one, weights = update(LearnerCore(example_config(kl_weight=0.1)), groups, counts)
    context = mp.get_context("spawn")
    out = context.Queue()
    shares = shard(groups, world_size)  # 4 ranks for 3 groups: one rank has no pair and still joins the reduction
    args = (world_size, str(tmp_path / "store"), shares, counts, out)
    ranks = [context.Process(target=rank_main, args=(rank, *args)) for rank in range(world_size)]
    for process in ranks:
        process.start()
    results = [out.get(timeout=120) for _ in ranks]
    for process in ranks:
        process.join(timeout=30)
        assert process.exitcode == 0
    for _, loss, old in results:
        assert loss == pytest.approx(one.metrics["nft/loss"], rel=1e-5)
        assert checksum(old) == checksum(results[0][2])  # every rank holds the very same policy
        assert distance(old, weights.old) < 1e-5


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


@pytest.mark.parametrize("setting", ["learner.gradient_checkpointing=true", "learner.compile=true"])
def test_less_memory_or_more_speed_is_the_same_update(setting: str) -> None:
    groups, counts = example_groups()
    # 5 pairs divide no step's pairs: the last micro-batch is shorter, and compiled it is filled up
    plain = LearnerCore(example_config("learner.micro_batch_size=5", kl_weight=0.1))
    other = LearnerCore(example_config("learner.micro_batch_size=5", setting, kl_weight=0.1))
    expected, weights = update(plain, groups, counts)
    result, found = update(other, groups, counts)
    for name in ("nft/loss", "nft/kl", "nft/x0_norm", "nft/grad_norm"):
        assert result.metrics[name] == pytest.approx(expected.metrics[name], rel=1e-4)
    assert distance(found.old, weights.old) < 1e-3


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
