"""Who serves, who is on the way, and who is tried again when: the seats of a pool of Ray actors.

    empty ──► an actor waits for a place ──► placed: it is prepared ──► serves ──► dies ──► empty
                        ▲                             │ fails: again, ever more slowly
                        └─────────────────────────────┘

No seat is ever given up. An actor that waits for a place is itself what sees that there is room again, a node that
comes back or an autoscaler that brings one; failures on the way are tried again after 1, 2, 4 ... 60 s. After
`max_attempts` failures, or `place_s` without a place, the seat counts as vacant: nothing waits for it any more.
An exception of the actor's own code would be the same anywhere: it stops the pool.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import (
    ActorPlacementGroupRemoved,
    ActorUnschedulableError,
    NodeDiedError,
    OutOfMemoryError,
    RayActorError,
    RaySystemError,
    RuntimeEnvSetupError,
    WorkerCrashedError,
)

from actors.answers import DeadlineError, answer, free_resources, one_line, put_aside
from nft_ray.failures import device_failure, lost, store_full
from nft_ray.roles import TryAgainError

logger = logging.getLogger(__name__)

PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0
"""Before a seat is tried again: doubled with every failure."""
GROWN_PLACE_S = 30.0
"""For a place of a seat beyond those of the run: there was room a moment ago."""
WORKER_FAILURES = (
    RayActorError,
    WorkerCrashedError,
    OutOfMemoryError,
    NodeDiedError,
    ActorUnschedulableError,
    ActorPlacementGroupRemoved,
    RuntimeEnvSetupError,
    RaySystemError,
    DeadlineError,
)


def worker_failure(error: BaseException) -> bool:
    """Of the process, its node, its connection or its device; the same call may succeed on another worker."""
    return isinstance(error, WORKER_FAILURES) or device_failure(error)


class NoPlaceError(DeadlineError):
    """The cluster has had no room for an actor."""


@dataclass(slots=True, eq=False)
class Worker:
    """One Ray actor while it serves. It works off its calls one after the other."""

    seat: int
    name: str
    actor: Any
    gone: "asyncio.Future[None]"
    """Done once it is retired: whoever waits for an answer goes elsewhere at once."""
    calls: list[object] = field(default_factory=list)
    """Those that it holds, oldest first: one in work, the others queued."""
    since: float = 0.0
    """When the oldest of them became the oldest (time.monotonic)."""
    culprit: object = None
    """Once retired: the call that was in work, unless its replacement is made to bear it."""


class Seats:
    """`wanted` seats, of which `least` must be taken for a start, and up to `most` while there is room.

    `spawn(name, seat)` starts an actor at once; `prepare(actor)` makes it ready to serve. `changed` is set whenever
    something has. `advice(error)` ends the line about it.
    """

    def __init__(
        self,
        role: str,
        *,
        wanted: int,
        least: int,
        most: int,
        spawn: Callable[[str, int], Any],
        prepare: Callable[[Any], Awaitable[None]],
        place: str,
        place_s: float,
        max_attempts: int,
        advice: Callable[[BaseException], str],
    ) -> None:
        self._role, self._wanted, self._least, self._most = role, wanted, least, most
        self._spawn, self._prepare, self._advice = spawn, prepare, advice
        self._place, self._place_s, self._max_attempts = place, place_s, max_attempts
        self.workers: dict[int, Worker] = {}
        self.changed = asyncio.Event()
        self._filling: dict[int, asyncio.Task[None]] = {}
        self._starting: set[Any] = set()
        self._preparing: set[Any] = set()
        self._vacant: dict[int, BaseException] = {}
        self._lives: dict[int, int] = {}
        self._error: BaseException | None = None
        self._started = False
        self._alone_since = 0.0

    async def start(self) -> None:
        """Return when `least` serve, while the others may still come; raises what keeps too many from it.

        An exception of the actor's own code is raised whichever seat it comes from.
        """
        self._alone_since = time.monotonic()
        for seat in range(self._wanted):
            self._fill(seat)
        while len(self.workers) < self._least:
            self.check()
            if self._wanted - len(self._vacant) < self._least:
                error = next(iter(self._vacant.values()))
                if isinstance(error, NoPlaceError):
                    raise error
                raise RuntimeError(f"{self._role}: {self.told(error)}") from error
            self.changed.clear()
            await self.changed.wait()
        self._started = True
        if len(self.workers) < self._wanted:
            logger.info("%s: %s; the others join when there is room", self._role, self.summary)

    def close(self, why: BaseException) -> None:
        """Kill every actor."""
        self._error = self._error or why
        for task in self._filling.values():
            task.cancel()
        for actor in [*self._starting, *(worker.actor for worker in self.workers.values())]:
            ray.kill(actor)
        self.workers.clear()
        self._starting.clear()
        self.changed.set()

    async def settle(self) -> None:
        """Return when no actor that has a place is being prepared: each step of that has a deadline."""
        while self._preparing:
            self.changed.clear()
            await self.changed.wait()

    def check(self) -> None:
        """Raise what has stopped the pool."""
        if self._error is not None:
            raise self._error

    def patience_s(self, since: float) -> float | None:
        """How long a call that has waited since then goes on while nobody serves (None: somebody is being prepared).

        TryAgainError: no longer, and why.
        """
        errors = list(self._vacant.values())
        failed = [error for error in errors if not isinstance(error, NoPlaceError)]
        if len(failed) == len(self._filling):
            why = self.told(failed[-1]) if failed else "the log says why"
            raise TryAgainError(f"{self._role}: no worker is left of {self._wanted}; {why}")
        if self._preparing:
            return None
        left = max(self._alone_since, since) + self._place_s - time.monotonic()
        if left <= 0:
            raise TryAgainError(
                f"{self._role}: no worker is left of {self._wanted}, and none could start within {self._place_s:g} s"
                + (f"; last: {self.told(errors[-1])}" if errors else "")
            )
        return left

    def retire(self, worker: Worker, error: BaseException, mended: str = "") -> None:
        """Kill it, send its calls elsewhere, fill its seat again. `mended`: why the next one may bear the same call."""
        if self.workers.get(worker.seat) is not worker:
            return  # another of its calls was first
        del self.workers[worker.seat]
        worker.culprit = None if mended or not worker.calls else worker.calls[0]
        worker.gone.set_result(None)
        ray.kill(worker.actor)
        self._alone_since = time.monotonic()
        why = f"{one_line(error)}; {mended}" if mended else self.told(error)
        logger.warning("%s failed and is replaced; %s: %s", worker.name, self.summary, why)
        put_aside(error)
        self._fill(worker.seat)
        self.changed.set()

    def grow(self, room: int) -> None:
        """Fill up to `room` seats beyond those of the run, if all of these are taken."""
        if len(self.workers) < self._wanted or any(seat not in self.workers for seat in self._filling):
            return
        free = [seat for seat in range(self._wanted, self._most) if seat not in self.workers]
        for seat in free[:room]:
            self._fill(seat)

    @property
    def most(self) -> int:
        return self._most

    @property
    def summary(self) -> str:
        seats = max(self._wanted, len(self.workers))
        return f"{len(self.workers)} of {seats} {self._role.rpartition('/')[2]}s serve"

    def waiting(self) -> str:
        """What a line about a wait says of those who do not serve."""
        missing = self._wanted - len(self.workers)
        return f"{self.summary}, {missing} {self._place}; {free_resources()}" if missing > 0 else self.summary

    def told(self, error: BaseException) -> str:
        """An error in one line, with advice."""
        return "; ".join(filter(None, (one_line(error), self._advice(error))))

    def _fill(self, seat: int) -> None:
        task = self._filling[seat] = asyncio.create_task(self._taken(seat))
        task.add_done_callback(lambda done: self._filled(seat, done))

    def _filled(self, seat: int, task: "asyncio.Task[None]") -> None:
        if self._filling.get(seat) is task:
            del self._filling[seat]
        if not task.cancelled() and task.exception() is not None:  # the actor's own: it would fail anywhere
            self._error = self._error or task.exception()
        self.changed.set()

    async def _taken(self, seat: int) -> None:
        """Return when somebody serves there; a seat beyond those of the run is left alone at its first failure."""
        extra, failures, pause_s = seat >= self._wanted, 0, PAUSE_S
        while True:
            try:
                await self._occupy(seat, min(self._place_s, GROWN_PLACE_S) if extra else self._place_s)
            except NoPlaceError as error:
                if extra:
                    return
                if self._started and seat not in self._vacant:
                    logger.warning("%s; %s, it joins when there is room", one_line(error), self.summary)
                self._leave(seat, error)
            except Exception as error:
                own = not (worker_failure(error) or lost(error) or store_full(error))
                if own and not extra:
                    raise
                failures += 1
                if failures <= self._max_attempts:
                    logger.warning("%s-%d did not come up: %s", self._role, seat, self.told(error))
                if extra:
                    self._most = self._wanted if own else self._most  # where it cannot serve, nobody is added again
                    return
                if failures == self._max_attempts and self._started:
                    logger.warning("%s-%d is tried again, at last every %g s", self._role, seat, LONGEST_PAUSE_S)
                if failures >= self._max_attempts:
                    self._leave(seat, error)
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
            else:
                return

    def _leave(self, seat: int, error: BaseException) -> None:
        self._vacant[seat] = error
        self.changed.set()

    async def _occupy(self, seat: int, place_s: float) -> None:
        life = self._lives[seat] = self._lives.get(seat, -1) + 1
        name = f"{self._role}-{seat}" + (f".{life}" if life else "")
        actor = self._spawn(name, seat)
        self._starting.add(actor)
        try:
            await self._placed(actor, f"{name} {self._place}", place_s)
            self._preparing.add(actor)
            await self._prepare(actor)
        except BaseException:
            ray.kill(actor)
            raise
        finally:
            self._starting.discard(actor)
            self._preparing.discard(actor)
            self.changed.set()
        # no await since `prepare` returned: what it loaded is still all there is
        self._vacant.pop(seat, None)
        self.workers[seat] = Worker(seat, name, actor, asyncio.get_running_loop().create_future())
        if self._started:
            logger.info("%s serves; %s", name, self.summary)

    async def _placed(self, actor: Any, what: str, place_s: float) -> None:
        try:
            await answer(actor.__ray_ready__.remote(), what, place_s)
        except DeadlineError as error:
            raise NoPlaceError(str(error)) from None
