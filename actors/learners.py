"""The learner plane: ranks of one process group that are placed together, work together and fail together.

    batch ──► rank 0 ─► UpdateResult (driver) · weights (reference)
         └──► rank k ─► UpdateResult: its checksums must be those of rank 0; no weights

Failure policy
- All or nothing: one placement group, one process group, every call goes to all ranks under one deadline. Questions,
  too: with `learner.sharding: fsdp` the ranks must put the weights together before rank 0 can answer.
- A rank that dies, or does not answer in time, ends the group: its peers are killed and every call from then on
  raises a one-line RuntimeError that names the rank. No rank is replaced, because optimizer state died with it: the
  run is started again and goes on at its last checkpoint.
- An exception of the core is raised as itself and ends the group, for its peers wait in a reduction that will not
  come.
"""

import asyncio
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, Protocol, cast

import ray
import torch
import torch.distributed as dist
from ray.util.placement_group import PlacementGroup

from actors.bundles import in_bundle
from actors.downloads import download
from actors.pool import WORKER_FAILURES, DeadlineError, answer, free_resources, one_line, together, waiting
from nft_ray.config import ExperimentConfig
from nft_ray.cores.learner import LearnerCore
from nft_ray.models.base import fetch_model
from nft_ray.types import Adapters, AdapterWeights, Batch, CleanSamples, LearnerState, TrainGroup, UpdateResult

GRACE_S = 5.0
"""After a first failure, seconds for the other ranks to say theirs: a broken connection is the echo of a death."""


class LearnerLike(Protocol):
    """What an actor needs of a core: LearnerCore, or a fake that costs nothing. Weights and state: of rank 0 only."""

    def restore(self, state: LearnerState) -> None: ...

    def state(self) -> LearnerState | None: ...

    def probe(self) -> tuple[Adapters, AdapterWeights | None]: ...

    def adapters(self) -> tuple[tuple[Adapters, AdapterWeights | None], ...]: ...

    def park(self) -> None: ...

    def wake(self) -> None: ...

    def update(
        self,
        epoch: int,
        groups: Sequence[TrainGroup],
        samples: Sequence[CleanSamples],
        samples_per_step: tuple[int, ...],
    ) -> tuple[UpdateResult, AdapterWeights | None]: ...


LearnerFactory = Callable[[ExperimentConfig, int, int], LearnerLike]


class LearnerActor:
    """One rank in one process. `samples` arrive as top-level references: read in place from the object store."""

    def __init__(self, make: LearnerFactory, config: ExperimentConfig, rank: int, world_size: int) -> None:
        self._config, self._rank, self._world_size = config, rank, world_size
        self._make = lambda: make(config, rank, world_size)

    def open_store(self) -> tuple[str, int]:
        """Rank 0 only: port 0 lets the system choose, so no two groups ever race for one."""
        self._store = self._tcp_store(ray.util.get_node_ip_address(), 0)
        return self._store.host, self._store.port

    def join(self, host: str, port: int) -> None:
        """Enter the process group; returns when every rank has."""
        if self._rank > 0:
            self._store = self._tcp_store(host, port)
        on_gpu = self._config.learner.num_gpus and torch.cuda.is_available()  # as the core decides its device
        backend, timeout = "nccl" if on_gpu else "gloo", self._timeout
        dist.init_process_group(
            backend, store=self._store, rank=self._rank, world_size=self._world_size, timeout=timeout
        )

    def download(self, token: str | None) -> Iterator[str]:
        yield from fetch_model(self._config.model, token, transformer_only=True)

    def build(self) -> None:
        self._core = self._make()

    def park(self) -> None:
        self._core.park()

    def wake(self) -> None:
        self._core.wake()

    def restore(self, state: LearnerState) -> None:
        self._core.restore(state)

    def state(self) -> LearnerState | None:
        return self._core.state()

    def probe(self) -> tuple[Adapters, AdapterWeights | None]:
        return self._core.probe()

    def adapters(self, num_returns: int) -> list[Adapters | AdapterWeights | None]:
        """(announcement, weights) of every version, flat: each is a return value of its own; None fills up."""
        flat = [part for pair in self._core.adapters() for part in pair]
        return [*flat, *[None] * (num_returns - len(flat))]

    def update(
        self, epoch: int, groups: Sequence[TrainGroup], samples_per_step: tuple[int, ...], *samples: CleanSamples
    ) -> tuple[UpdateResult, AdapterWeights | None]:
        return self._core.update(epoch, groups, samples, samples_per_step)

    @property
    def _timeout(self) -> timedelta:
        return timedelta(seconds=self._config.learner.timeout_s)

    def _tcp_store(self, host: str, port: int) -> dist.TCPStore:
        master = self._rank == 0
        return dist.TCPStore(host, port, self._world_size, master, timeout=self._timeout, wait_for_workers=False)


class LearnerGroup:
    """roles.Learners over Ray actors. After a failure it is over; see the policy above."""

    def __init__(self, config: ExperimentConfig, bundles: PlacementGroup, make: LearnerFactory = LearnerCore) -> None:
        self._config, self._make, self._bundles = config, make, bundles
        self._actors: list[Any] = []
        self._over = ""

    @property
    def size(self) -> int:
        return self._config.learner.num_workers

    async def start(self) -> None:
        """All ranks placed at once, connected, their models loaded."""
        learner, name = self._config.learner, f"{self._config.run.name}/learner"
        self._actors = [self._spawn(f"{name}-{rank}", rank) for rank in range(self.size)]
        start = f"start with {learner.num_cpus:g} CPUs and {learner.num_gpus:g} GPUs each"
        await self._all(start, lambda actor: actor.__ray_ready__.remote(), self._config.cluster.wait_s, free_resources)
        await together([download(actor, self._config.model, "a learner") for actor in self._actors])
        if self.size > 1:
            host, port = await answer(self._actors[0].open_store.remote(), "rank 0 to open a store", learner.timeout_s)
            await self._all("join the process group", lambda actor: actor.join.remote(host, port))
        await self._all("load the model", lambda actor: actor.build.remote())

    def close(self) -> None:
        """Kill every rank."""
        self._over = self._over or "the learner group is closed"
        for actor in self._actors:
            ray.kill(actor)
        self._actors = []

    async def park(self) -> None:
        """Every rank's device memory is free."""
        await self._all("park", lambda actor: actor.park.remote())

    async def wake(self) -> None:
        await self._all("wake up", lambda actor: actor.wake.remote())

    async def restore(self, state: LearnerState) -> None:
        ref = ray.put(state)
        await self._all("restore a checkpoint", lambda actor: actor.restore.remote(ref))

    async def state(self) -> LearnerState:
        state, *_ = await self._all("give the state", lambda actor: actor.state.remote())
        assert state is not None, "rank 0 gave no state"
        return cast(LearnerState, state)

    async def probe(self) -> Adapters:
        ranks = [actor.probe.options(num_returns=2).remote() for actor in self._living]
        announced = await self._ranks("give random weights", [refs[0] for refs in ranks])
        self._agree(announced)
        return dataclasses.replace(announced[0], weights=ranks[0][1])

    async def adapters(self) -> tuple[Adapters, ...]:
        num_returns = 2 * (self._config.run.max_staleness + 1)
        ranks = [actor.adapters.options(num_returns=num_returns).remote(num_returns) for actor in self._living]
        found = []
        for place in range(0, num_returns, 2):
            announced = await self._ranks("give the weights", [refs[place] for refs in ranks])
            if announced[0] is not None:
                self._agree(announced)
                found.append(dataclasses.replace(announced[0], weights=ranks[0][place + 1]))
        return tuple(found)

    async def update(self, batch: Batch) -> UpdateResult:
        ranks = []
        for actor, shard in zip(self._living, batch.shards, strict=True):
            groups = [dataclasses.replace(group, samples=None) for group in shard]
            arguments = (batch.epoch, groups, batch.samples_per_step, *(group.samples for group in shard))
            ranks.append(actor.update.options(num_returns=2).remote(*arguments))
        results = await self._ranks(f"update of epoch {batch.epoch}", [refs[0] for refs in ranks])
        self._agree([result.adapters for result in results])
        return dataclasses.replace(results[0], adapters=dataclasses.replace(results[0].adapters, weights=ranks[0][1]))

    @property
    def _living(self) -> list[Any]:
        if self._over:
            raise RuntimeError(self._over)
        return self._actors

    async def _all(
        self,
        what: str,
        send: Callable[[Any], Any],
        timeout_s: float | None = None,
        detail: Callable[[], str] = lambda: "",
    ) -> list[Any]:
        return await self._ranks(what, [send(actor) for actor in self._living], timeout_s, detail)

    async def _ranks(
        self,
        what: str,
        refs: Sequence[Any],
        timeout_s: float | None = None,
        detail: Callable[[], str] = lambda: "",
    ) -> list[Any]:
        """The answers of ranks 0, 1, ...: all of them, or the group is over."""
        timeout_s = timeout_s or self._config.learner.timeout_s
        tasks = [
            asyncio.ensure_future(answer(ref, f"learner {rank}: {what}", 2 * timeout_s))
            for rank, ref in enumerate(refs)
        ]
        try:
            everyone = asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            await waiting(everyone, f"{self.size} learners: {what}", timeout_s, detail)
            if not all(task.done() and task.exception() is None for task in tasks):
                await asyncio.wait(tasks, timeout=GRACE_S)
                self._fail(what, tasks)
        except DeadlineError as error:
            silent = ", ".join(str(rank) for rank, task in enumerate(tasks) if not task.done())
            self._end(f"learner {silent} did not finish within {timeout_s:g} s: {what}", error)
        finally:
            for task in tasks:
                task.cancel()
        return [task.result() for task in tasks]

    def _fail(self, what: str, tasks: Sequence["asyncio.Task[Any]"]) -> None:
        """Raise what ended the group: a death before an exception, which may be its echo."""
        errors = {rank: task.exception() for rank, task in enumerate(tasks) if task.done() and task.exception()}
        for rank, error in errors.items():
            if isinstance(error, WORKER_FAILURES):
                self._end(f"learner {rank} died: {what}", error)
        rank, error = next(iter(errors.items()))
        assert error is not None
        self._over = f"learner {rank} failed: {what}: {one_line(error)}"
        self.close()
        raise error

    def _end(self, why: str, error: BaseException) -> None:
        self._over = f"{why}; start the run again to go on at its last checkpoint"
        self.close()
        raise RuntimeError(self._over) from error

    def _agree(self, announced: Sequence[Adapters]) -> None:
        """Ranks that drift apart train different policies, silently: never."""
        first = announced[0]
        for rank, adapters in enumerate(announced):
            if adapters.checksums != first.checksums:
                self._end(
                    f"learner {rank} differs from learner 0 at version {first.version}: "
                    f"{adapters.checksums} is not {first.checksums}",
                    RuntimeError("checksums differ"),
                )

    def _spawn(self, name: str, rank: int) -> Any:
        learner = self._config.learner
        actor = ray.remote(LearnerActor).options(  # type: ignore[attr-defined]
            name=name,
            num_cpus=learner.num_cpus,
            num_gpus=learner.num_gpus,
            max_restarts=0,
            max_task_retries=0,
            scheduling_strategy=in_bundle(self._bundles, rank),
        )
        return actor.remote(self._make, self._config, rank, self.size)
