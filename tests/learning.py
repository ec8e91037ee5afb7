"""Samples to learn from, and learners of several ranks: processes with a gloo group.

The processes are started by the first test that wants them and wait for the next one: each imports for 6 s.
"""

import dataclasses
import multiprocessing as mp
import queue
import uuid
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


class _Process:
    """One that runs `_rank` for whatever is put into `work`; it ends with the tests."""

    def __init__(self) -> None:
        context = mp.get_context("spawn")
        self.work, self.results = context.Queue(), context.Queue()
        self.process = context.Process(target=_serve, args=(self.work, self.results), daemon=True)
        self.process.start()


_processes: list[_Process] = []


def on_ranks(
    world_size: int,
    folder: Path,
    epochs: Sequence[Groups],
    *overrides: str,
    state: LearnerState | None = None,
) -> list[Rank]:
    """Restore the state, if any, and update by every epoch on so many ranks; what each of them ends with."""
    shares = [(shard(groups, world_size), counts) for groups, counts in epochs]
    store = str(folder / f"store-{uuid.uuid4()}")
    while len(_processes) < world_size:
        _processes.append(_Process())
    ranks = _processes[:world_size]
    for rank, one in enumerate(ranks):
        one.work.put((rank, world_size, store, shares, overrides, state))
    results: list[Any] = []
    try:
        results = [one.results.get(timeout=180) for one in ranks]
    except queue.Empty:
        raise AssertionError(f"ranks are silent: {[one.process.exitcode for one in ranks]}") from None
    finally:
        if not all(isinstance(result, Rank) for result in results) or not results:
            while _processes:  # they may wait for each other
                _processes.pop().process.kill()
    assert all(isinstance(result, Rank) for result in results), results
    return results


def _serve(work: Any, results: Any) -> None:
    while True:
        try:
            results.put(_rank(*work.get()))
        except BaseException as error:
            results.put(repr(error))
            raise


def _rank(
    rank: int, world_size: int, store: str, shares: Any, overrides: Sequence[str], state: LearnerState | None
) -> Rank:
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    core = LearnerCore(example_config(*overrides), rank, world_size)
    if state is not None:
        core.restore(state)
    probe, probe_weights = core.probe()
    for of_ranks, counts in shares:
        result, weights = update(core, of_ranks[rank], counts)
    found = Rank(
        rank=rank,
        result=result,
        weights=weights,
        state=core.state(),
        probe={"velocity": probe.probe, **({} if probe_weights is None else probe_weights.old)},
        num_local=sum(value.numel() for value in core.ema.values()),
    )
    torch.distributed.destroy_process_group()
    return found
