"""The learner plane: ranks of one process group that are placed together, work together and start again together.

    batch ──► rank 0 ─► UpdateResult (driver) · weights (reference) · state (reference, held on the driver's node)
         └──► rank k ─► UpdateResult: its checksums must be those of rank 0; nothing else
                  │ died, is silent, lost its device
                  ▼
              all are killed ──► a new group, at the state of the newest finished epoch ──► asked again

Failure policy
- All or nothing: one placement group, one process group, every call goes to all ranks under one deadline. Questions,
  too: with `learner.sharding: fsdp` the ranks must put the weights together before rank 0 can answer.
- A rank that dies, does not answer in time or fails with its device ends the group, for its peers wait in a reduction
  that will not come: a new one starts, gets the state that the newest epoch left, and the call is made again, an update
  with the same batch. `learner.max_restarts` within `learner.restart_window_s`, then RuntimeError with the last cause.
- Memory that is too small twice is no accident: the line says what to lower; `learner.shrink_on_oom` does so, unasked.
- Where a node stays away for `cluster.wait_s`, the new group has fewer ranks, `learner.min_workers` at least.
- The state is lost where its node went before the driver had it, and with full fine-tuning, whose tens of GB are kept
  in checkpoints only: the new group is at version 0 then, and StateLostError says so.
- Samples that are gone are no rank's fault: ObjectsLostError names their groups, and the group is as before the update.
- An exception of the core is the same anywhere: it is raised as itself and ends the group for good.
"""

import asyncio
import dataclasses
import logging
import os
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar, cast

import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup

from actors.answers import DeadlineError, one_line, put_aside
from actors.kept import Kept, lost
from actors.rank import LearnerFactory, learner_core
from actors.ranks import GroupError, Ranks
from actors.restarts import Restarts
from nft_ray import failures
from nft_ray.algorithms.batch import shard
from nft_ray.config import ExperimentConfig, LearnerConfig
from nft_ray.roles import ObjectsLostError, StateLostError
from nft_ray.types import Adapters, Batch, LearnerState, UpdateResult

logger = logging.getLogger(__name__)
T = TypeVar("T")


class LearnerGroup:
    """roles.Learners over Ray actors."""

    def __init__(
        self,
        config: ExperimentConfig,
        bundles: PlacementGroup,
        make: LearnerFactory = learner_core,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config, self._make, self._bundles = config, make, bundles
        self._keeps = config.model.tuning == "lora"
        self._lives = 0
        self._ranks = Ranks(config, bundles, make, 0)
        self._over = ""
        self._restarts = Restarts(config.learner.max_restarts, config.learner.restart_window_s, clock)
        self._ooms = Restarts(1, config.learner.restart_window_s, clock)
        self._turn = asyncio.Lock()
        self._version = 0
        self._fresh = True  # as `build` leaves it: nothing to keep
        self._state: Kept | None = None
        self._weights: deque[Kept] = deque(maxlen=config.run.max_staleness + 1)

    @property
    def size(self) -> int:
        return len(self._ranks.actors) or self._config.learner.num_workers

    async def start(self) -> None:
        """All ranks placed at once, connected, their models loaded."""
        # of a call that failed Ray would print a traceback for each of its return values that nobody asked for
        os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
        await self._ranks.come_up(self._config.learner.num_workers)

    def close(self) -> None:
        """Kill every rank."""
        self._over = self._over or "the learner group is closed"
        self._ranks.kill()
        for kept in [*self._weights, *([self._state] if self._state else [])]:
            kept.drop()

    async def park(self) -> None:
        """Every rank's device memory is free."""
        await self._surely(lambda: self._ranks.all("park", lambda actor: actor.park.remote()))

    async def wake(self) -> None:
        await self._surely(lambda: self._ranks.all("wake up", lambda actor: actor.wake.remote()))

    async def restore(self, state: LearnerState) -> None:
        """From here on this is the state of the newest finished epoch."""
        ref = ray.put(state)
        if self._keeps:
            self._keep(ref)
        await self._surely(lambda: self._restore(ref), at_state=False)
        self._fresh, self._version = False, state.version
        if not self._keeps:
            self._state = None

    async def state(self) -> LearnerState:
        """As the newest epoch left it: no rank is asked where it is kept."""
        if self._state is not None:
            try:
                return cast(LearnerState, await self._state.value())
            except (RayError, DeadlineError) as error:
                logger.warning("the learners' state did not reach this node and is asked for: %s", one_line(error))
                self._state = None
        return await self._surely(self._ask_state)

    async def probe(self) -> Adapters:
        return await self._surely(self._probe)

    async def adapters(self) -> tuple[Adapters, ...]:
        return await self._surely(self._adapters)

    async def update(self, batch: Batch) -> UpdateResult:
        return await self._surely(lambda: self._update(batch))

    async def _restore(self, ref: Any) -> None:
        await self._ranks.all("restore a state", lambda actor: actor.restore.remote(ref))

    async def _ask_state(self) -> LearnerState:
        refs = [actor.state.remote() for actor in self._ranks.actors]
        state, *_ = await self._ranks.ask("give the state", refs)
        assert state is not None, "rank 0 gave no state"
        if self._keeps and not self._fresh:
            self._keep(refs[0])
        return cast(LearnerState, state)

    async def _probe(self) -> Adapters:
        ranks = [actor.probe.options(num_returns=2).remote() for actor in self._ranks.actors]
        announced = await self._ranks.ask("give random weights", [refs[0] for refs in ranks])
        self._agree(announced)
        return dataclasses.replace(announced[0], weights=ranks[0][1])

    async def _adapters(self) -> tuple[Adapters, ...]:
        num_returns = 2 * (self._config.run.max_staleness + 1)
        ranks = [actor.adapters.options(num_returns=num_returns).remote(num_returns) for actor in self._ranks.actors]
        found = []
        for place in range(0, num_returns, 2):
            announced = await self._ranks.ask("give the weights", [refs[place] for refs in ranks])
            if announced[0] is not None:
                self._agree(announced)
                found.append(self._published(announced[0], ranks[0][place + 1]))
        return tuple(found)

    async def _update(self, batch: Batch) -> UpdateResult:
        what = f"update of epoch {batch.epoch + 1}"
        await _check_samples(what, batch)
        ranks = []
        for actor, part in zip(self._ranks.actors, _shards(batch, self.size), strict=True):
            groups = [dataclasses.replace(group, samples=None) for group in part]
            samples = [group.samples for group in part]
            arguments = (batch.epoch, groups, batch.samples_per_step, self._keeps, *samples)
            ranks.append(actor.update.options(num_returns=3).remote(*arguments))
        results = await self._ranks.ask(what, [refs[0] for refs in ranks])
        self._agree([result.adapters for result in results])
        self._fresh, self._version = False, results[0].version
        if self._keeps:
            self._keep(ranks[0][2])
        else:
            self._state = None
        return dataclasses.replace(results[0], adapters=self._published(results[0].adapters, ranks[0][1]))

    def _published(self, adapters: Adapters, weights: Any) -> Adapters:
        """With its weights, which samplers that come later must find, too."""
        if self._keeps:
            self._weights.append(Kept(weights, "weights to keep", self._config.learner.timeout_s))
        return dataclasses.replace(adapters, weights=weights)

    def _keep(self, ref: Any) -> None:
        self._state = Kept(ref, "a state to keep", self._config.learner.timeout_s)

    async def _surely(self, work: Callable[[], Awaitable[T]], *, at_state: bool = True) -> T:
        """`work` on the group that lives, else on the next one; `at_state`: it needs what was learned."""
        async with self._turn:
            if self._over:
                raise RuntimeError(self._over)
            try:
                while True:
                    try:
                        return await work()
                    except GroupError as failure:
                        await self._start_again(failure, at_state=at_state)
            except (ObjectsLostError, StateLostError):
                raise  # the group lives
            except Exception as error:
                self._over = self._over or f"the learners failed: {one_line(error)}"
                self.close()
                raise

    async def _start_again(self, failure: GroupError, *, at_state: bool) -> None:
        """A new group at the state of the newest finished epoch. StateLostError where that is nowhere any more."""
        while True:
            self._ranks.kill()
            self._count(failure)
            self._lives += 1
            self._ranks = Ranks(self._config, self._bundles, self._make, self._lives)
            try:
                await self._ranks.come_up(self._config.learner.min_workers or self._config.learner.num_workers)
                if at_state and not self._fresh:
                    await self._restore(await self._kept_ref())
                return
            except GroupError as next_one:
                failure = next_one

    async def _kept_ref(self) -> Any:
        try:
            if self._state is not None:
                await self._state.value()
                return self._state.ref
            why = "tuning: full keeps it in checkpoints only" if not self._keeps else "it was never kept"
        except (RayError, DeadlineError) as error:
            why = one_line(error)
        self._state, self._fresh, self._version = None, True, 0
        raise StateLostError(f"the learners started again, and what they had learned is lost: {why}")

    def _count(self, failure: GroupError) -> None:
        """One more restart, said in one line; RuntimeError where it would be one too many."""
        learner, before = self._config.learner, self._restarts.count
        memory = failures.out_of_memory(failure.__cause__)
        advice = f"; {_advice(learner)}" if memory else ""
        if not self._restarts.take():
            after = f" after {before} restarts within {learner.restart_window_s:g} s (learner.max_restarts)"
            self._end(f"{failure}{after if before else ''}{advice}", failure)
        smaller = ""
        accident = not memory or self._ooms.take()
        if learner.shrink_on_oom and not accident and learner.micro_batch_size > 1:
            size = learner.micro_batch_size // 2
            learner = learner.model_copy(update={"micro_batch_size": size})
            self._config = self._config.model_copy(update={"learner": learner})
            smaller = f" with learner.micro_batch_size = {size} (set it so; the last bits of an update change)"
        logger.warning(
            "%s; all learners start again%s, after epoch %d (restart %d of %d)%s",
            failure,
            smaller,
            self._version,
            self._restarts.count,
            learner.max_restarts,
            "" if smaller or accident else advice,
        )
        put_aside(failure.__cause__)

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


def _advice(learner: LearnerConfig) -> str:
    """What to set where the device's memory is too small."""
    if learner.micro_batch_size > 1:
        return f"lower learner.micro_batch_size, which is {learner.micro_batch_size}"
    if not learner.gradient_checkpointing:
        return "set learner.gradient_checkpointing to true"
    return "use learner.sharding: fsdp with more learners, or a larger GPU"


def _shards(batch: Batch, size: int) -> Sequence[Any]:
    """The batch for so many ranks: as it is, or split anew as `make_batch` does, groups in the order of their ids."""
    if len(batch.shards) == size:
        return batch.shards
    return shard(sorted((group for part in batch.shards for group in part), key=lambda group: group.group_id), size)


async def _check_samples(what: str, batch: Batch) -> None:
    groups = [group for part in batch.shards for group in part]
    gone = await lost([group.samples for group in groups])
    ids = tuple(sorted(group.group_id for group, is_gone in zip(groups, gone, strict=True) if is_gone))
    if ids:
        raise ObjectsLostError(f"{what}: the samples of {len(ids)} of {len(groups)} groups are lost with a node", ids)
