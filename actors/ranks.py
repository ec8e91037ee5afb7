"""The ranks of one process group while it lives: placed, connected, asked together, killed together.

What is asked goes to all of them under one deadline, and comes back from all of them, or ends the group: GroupError
where another group may do better, and the core's own exception, which would be the same anywhere, as itself.
"""

import asyncio
import logging
import re
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup

from actors.answers import DeadlineError, answer, free_resources, one_line, together, waiting
from actors.bundles import in_bundle
from actors.downloads import download
from actors.rank import LearnerFactory, spawn
from actors.seats import worker_failure
from nft_ray import failures
from nft_ray.config import ExperimentConfig

logger = logging.getLogger(__name__)

GRACE_S = 5.0
"""After a first failure, seconds for the other ranks to say theirs: a broken connection is the echo of a death."""
HEALTH_S = 3.0
"""For a rank that is late to say where it is."""
DEVICE, OWN, LOST, ECHO = range(4)
"""What weighs most first: a process or its device, the core itself, an object that is gone, a peer that went."""
PEER_GONE = re.compile(
    r"Connection (closed|reset) by (remote )?peer|gloo/transport|Timed out waiting \d+ms for (recv|send)|Broken pipe|"
    r"(NCCL|ProcessGroup\w*) .*(timeout|timed out|abort)|Application timeout caused pair closure"
)
"""How gloo and NCCL say that another rank is gone or silent, where torch has no class for it."""


class GroupError(RuntimeError):
    """What ends this process group, and not the run: a new one may do better."""


class Ranks:
    """One process group; `life` counts the groups of a run, and is in the names of its actors."""

    def __init__(self, config: ExperimentConfig, bundles: PlacementGroup, make: LearnerFactory, life: int) -> None:
        self._config, self._bundles, self._make, self._life = config, bundles, make, life
        self.actors: list[Any] = []

    async def come_up(self, least: int) -> None:
        """A process group of ranks whose models are loaded: all, or `least` of them where others find no place."""
        config = self._config
        self.actors = await self._placed(least)
        try:
            await together([download(actor, config.model, "a learner") for actor in self.actors])
        except (RayError, DeadlineError) as error:
            raise GroupError(f"a learner failed: files of {config.model.path} ({one_line(error)})") from error
        size = len(self.actors)
        ranks = dict(zip(self.actors, range(size), strict=True))
        if size > 1:
            ((host, port),) = await self.ask("open a store", [self.actors[0].open_store.remote(size)])
            await self.all("join the process group", lambda actor: actor.join.remote(ranks[actor], size, host, port))
        await self.all("load the model", lambda actor: actor.build.remote(ranks[actor], size))

    async def _placed(self, least: int) -> list[Any]:
        """The actors that have room, an actor per bundle: all, or after `cluster.wait_s` at least so many."""
        learner, wait_s, run = self._config.learner, self._config.cluster.wait_s, self._config.run.name
        life = f".{self._life}" if self._life else ""
        places = [
            (f"{run}/learner-{seat}{life}", in_bundle(self._bundles, seat)) for seat in range(learner.num_workers)
        ]
        self.actors = [spawn(self._make, self._config, *place) for place in places]  # known to `close` from here on
        what = f"to start with {learner.num_cpus:g} CPUs and {learner.num_gpus:g} GPUs each"
        tasks = [
            asyncio.ensure_future(waiting(actor.__ray_ready__.remote(), what, 2 * wait_s)) for actor in self.actors
        ]
        try:
            everyone = asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            await waiting(everyone, f"{len(tasks)} learners {what}", wait_s, free_resources)
        except DeadlineError as error:
            num_here = sum(task.done() for task in tasks)
            found = f"{num_here} of {len(tasks)} learners found room within {wait_s:g} s {what}"
            if num_here < least:
                raise GroupError(found) from error
            logger.warning("%s, and go on", found)
        finally:
            for task in tasks:
                task.cancel()
        for seat, task in enumerate(tasks):
            if task.done() and not task.cancelled() and (failed := task.exception()):
                raise GroupError(f"learner {seat} died: start ({one_line(failed)})") from failed
        here = [actor for actor, task in zip(self.actors, tasks, strict=True) if task.done() and not task.cancelled()]
        for actor in self.actors:
            if actor not in here:
                ray.kill(actor)
        return here

    async def all(self, what: str, send: Callable[[Any], Any]) -> list[Any]:
        """What `send(actor)` asks of each."""
        return await self.ask(what, [send(actor) for actor in self.actors])

    async def ask(self, what: str, refs: Sequence[Any]) -> list[Any]:
        """The answers of ranks 0, 1, ...: of all, or GroupError; a core's own exception ends the run."""
        timeout_s = self._config.learner.timeout_s
        tasks = [
            asyncio.ensure_future(answer(ref, f"learner {rank}: {what}", 2 * timeout_s))
            for rank, ref in enumerate(refs)
        ]
        try:
            everyone = asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            await waiting(everyone, f"{len(tasks)} learners: {what}", timeout_s)
            if not all(task.done() and task.exception() is None for task in tasks):
                await asyncio.wait(tasks, timeout=GRACE_S)
                self._fail(what, {rank: error for rank, task in enumerate(tasks) if (error := _error(task))})
        except DeadlineError as error:
            late, where = await self._late([rank for rank, task in enumerate(tasks) if not task.done()])
            raise GroupError(f"learner {late} did not finish within {timeout_s:g} s: {what} ({where})") from error
        finally:
            for task in tasks:
                task.cancel()
        return [task.result() for task in tasks]

    async def _late(self, silent: Sequence[int]) -> tuple[str, str]:
        """Who of those without an answer holds up the others, and where: who waits for a peer does not."""
        asked = [answer(self.actors[rank].doing.remote(), "where it is", HEALTH_S) for rank in silent]
        said: dict[int, Any] = dict(zip(silent, await asyncio.gather(*asked, return_exceptions=True), strict=True))
        dead = [rank for rank, doing in said.items() if isinstance(doing, BaseException)]
        if dead:
            return ", ".join(map(str, dead)), "its process does not answer"
        late = {rank: doing for rank, doing in said.items() if not doing.waits} or said
        return ", ".join(map(str, late)), "; ".join(doing.where for doing in late.values())

    def _fail(self, what: str, errors: dict[int, BaseException]) -> None:
        """Raise what ended the group: a death before an exception before a broken connection, which is an echo."""
        rank, error = min(errors.items(), key=lambda item: _weight(item[1]))
        if _weight(error) != OWN:
            how = "lost samples" if failures.lost(error) else "failed" if isinstance(error, RuntimeError) else "died"
            raise GroupError(f"learner {rank} {how}: {what} ({one_line(error)})") from error
        raise error

    def kill(self) -> None:
        """Every process."""
        for actor in self.actors:
            ray.kill(actor)
        self.actors = []


def _weight(error: BaseException) -> int:
    broken = any(kind.__name__ == "DistError" for kind in type(error).__mro__)  # of torch, which no driver loads for it
    if broken or (isinstance(error, RuntimeError) and PEER_GONE.search(str(error))):
        return ECHO
    if failures.lost(error):
        return LOST
    return DEVICE if worker_failure(error) else OWN


def _error(task: "asyncio.Task[Any]") -> BaseException | None:
    return task.exception() if task.done() and not task.cancelled() else None
