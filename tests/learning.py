"""Samples to learn from, and learners of several ranks: processes with a gloo group."""

import dataclasses
import multiprocessing as mp
import queue
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nft_ray.algorithms.batch import shard
from nft_ray.cores.learner import LearnerCore
from nft_ray.types import AdapterWeights, CleanSamples, LearnerState, TrainGroup, UpdateResult, Weights
from tests.examples import example_config

GROUPS, IMAGES, TIMES, LATENT = 3, 4, 2, (8, 8, 8)
Groups = tuple[list[TrainGroup], tuple[int, ...]]


def example_groups(seed: int = 0, epoch_steps: int = 2) -> Groups:
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
        groups.append(TrainGroup(group_id=g, samples=samples, weight=r, step=step))
    steps = np.concatenate([group.step for group in groups])
    return groups, tuple(int((steps == s).sum()) for s in range(epoch_steps))


def update(core: LearnerCore, groups: Sequence[TrainGroup], counts: tuple[int, ...]) -> Any:
    bare = [dataclasses.replace(group, samples=None) for group in groups]
    return core.update(core.version, bare, [group.samples for group in groups], counts)


@dataclass(frozen=True, kw_only=True)
class Rank:
    """What a rank of `on_ranks` ends with."""

    rank: int
    result: UpdateResult
    weights: AdapterWeights | None
    state: LearnerState | None
    probe: Weights | None
    num_local: int
    """Numbers that the rank keeps of the policy."""


def on_ranks(
    world_size: int,
    folder: Path,
    epochs: Sequence[Groups],
    *overrides: str,
    state: LearnerState | None = None,
) -> list[Rank]:
    """Restore the state, if any, and update by every epoch on so many ranks; what each of them ends with."""
    context = mp.get_context("spawn")
    out = context.Queue()
    shares = [(shard(groups, world_size), counts) for groups, counts in epochs]
    args = (world_size, str(folder / f"store-{len(list(folder.iterdir()))}"), shares, overrides, state, out)
    ranks = [context.Process(target=_rank, args=(rank, *args)) for rank in range(world_size)]
    for process in ranks:
        process.start()
    try:
        results = [out.get(timeout=180) for _ in ranks]
    except queue.Empty:
        raise AssertionError(f"ranks are silent: {[process.exitcode for process in ranks]}") from None
    finally:
        for process in ranks:
            process.join(timeout=30)
            process.kill()
    assert all(isinstance(result, Rank) for result in results), results
    return sorted(results, key=lambda result: result.rank)


def _rank(
    rank: int, world_size: int, store: str, shares: Any, overrides: Sequence[str], state: LearnerState | None, out: Any
) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    try:
        core = LearnerCore(example_config(*overrides), rank, world_size)
        if state is not None:
            core.restore(state)
        probe, probe_weights = core.probe()
        for of_ranks, counts in shares:
            result, weights = update(core, of_ranks[rank], counts)
        out.put(
            Rank(
                rank=rank,
                result=result,
                weights=weights,
                state=core.state(),
                probe={"velocity": probe.probe, **({} if probe_weights is None else probe_weights.old)},
                num_local=sum(value.numel() for value in core.ema.values()),
            )
        )
    except BaseException as error:
        out.put(f"rank {rank}: {error!r}")
        raise
    torch.distributed.destroy_process_group()
