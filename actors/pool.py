"""Interchangeable Ray actors behind one `call`: bounded in flight, retried elsewhere, replaced when dead.

    call ──► a worker with room ──► answer
                 │ died, unavailable, or past its deadline
                 ▼
             killed ──► every request that it held goes to another worker
                 └────► a replacement is started, prepared and joins; meanwhile the pool goes on with who is left

Failure policy
- A worker that fails a request for any reason but the core's own exception is killed and replaced: one rule for a
  crash, a lost node, a lost connection and a hang (a running actor method cannot be cancelled). Requests must be
  repeatable.
- The core's own exception is the same on any worker: it is raised as itself, at once, with the remote traceback as
  its cause.
- A request fails with RuntimeError after `max_attempts` workers; a seat is given up after `max_attempts` replacements
  that did not come up; when no seat is left, every call fails with RuntimeError. Nothing waits without a deadline.

This file knows neither samplers nor models; what a replacement needs before it serves is the caller's `prepare`.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import ray
from ray.exceptions import (
    NodeDiedError,
    OutOfMemoryError,
    RayActorError,
    RayTaskError,
    WorkerCrashedError,
)

from nft_ray.roles import TryAgainError

logger = logging.getLogger(__name__)
T = TypeVar("T")

REPORT_S = 10.0
"""Seconds between two lines that say what is being waited for."""


class DeadlineError(TryAgainError):
    """An answer that did not come in time."""


WORKER_FAILURES = (RayActorError, WorkerCrashedError, OutOfMemoryError, NodeDiedError, DeadlineError)


@dataclass(slots=True, eq=False)
class Worker:
    """One Ray actor while it lives; `in_flight` counts the calls that it holds, the one in work included."""

    seat: int
    name: str
    actor: Any
    in_flight: int = 0


class WorkerPool:
    """`num_workers` seats. `spawn(name, seat)` starts an actor at once; `prepare(actor)` makes it ready to serve."""

    def __init__(
        self,
        role: str,
        num_workers: int,
        *,
        spawn: Callable[[str, int], Any],
        prepare: Callable[[Any], Awaitable[None]],
        place: str,
        place_s: float,
        timeout_s: float,
        max_in_flight: int,
        max_attempts: int,
    ) -> None:
        self._role, self._num_workers = role, num_workers
        self._spawn, self._prepare = spawn, prepare
        self._place, self._place_s, self._timeout_s = place, place_s, timeout_s
        self._max_in_flight, self._max_attempts = max_in_flight, max_attempts
        self._workers: dict[int, Worker] = {}  # by seat: those that serve
        self._starting: set[Any] = set()
        self._lives = [0] * num_workers
        self._replacing: set[asyncio.Task[None]] = set()
        self._error: BaseException | None = None
        self._changed = asyncio.Event()
        self._pending = Pending(self._say)

    async def start(self) -> None:
        """Every seat taken and prepared; the first that fails is raised: a run does not start half."""
        with self._pending.one():
            await together([self._occupy(seat) for seat in range(self._num_workers)])

    async def settle(self) -> None:
        """Return when no replacement is under way: each has its own deadlines."""
        while self._replacing:
            await asyncio.wait(self._replacing)

    def close(self) -> None:
        """Kill every worker; calls that still wait fail."""
        self._error = self._error or RuntimeError(f"{self._role}: the pool is closed")
        for task in self._replacing:
            task.cancel()
        for actor in [*self._starting, *(worker.actor for worker in self._workers.values())]:
            ray.kill(actor)
        self._workers.clear()
        self._starting.clear()
        self._changed.set()

    async def call(self, what: str, send: Callable[[Any], Sequence[Any]]) -> tuple[Any, Sequence[Any]]:
        """`send(actor)` returns the references of one actor call; gives back the first one's value, and all of them."""
        failure: BaseException | None = None
        with self._pending.one():
            for _ in range(self._max_attempts):
                worker = await self._worker_with_room()
                try:
                    return await self._ask(worker, what, send)
                except WORKER_FAILURES as error:
                    failure = error
        raise RuntimeError(
            f"{self._role}: {what} failed on {self._max_attempts} workers; last: {one_line(failure)}"
        ) from failure

    async def broadcast(self, what: str, send: Callable[[Any], Sequence[Any]]) -> list[Any]:
        """The answer of every worker that serves; one that fails is replaced, and `prepare` sees to its replacement."""

        async def ask(worker: Worker) -> list[Any]:
            try:
                return [(await self._ask(worker, what, send))[0]]
            except WORKER_FAILURES:
                return []

        with self._pending.one():
            answers = await together([ask(worker) for worker in self._workers.values()])
        return [answer for part in answers for answer in part]

    async def _ask(self, worker: Worker, what: str, send: Callable[[Any], Sequence[Any]]) -> tuple[Any, Sequence[Any]]:
        worker.in_flight += 1
        try:
            refs = send(worker.actor)
            return await answer(refs[0], f"{worker.name}: {what}", self._timeout_s * worker.in_flight), refs
        except WORKER_FAILURES as error:
            self._retire(worker, error)
            raise
        finally:
            worker.in_flight -= 1
            self._changed.set()

    async def _worker_with_room(self) -> Worker:
        """The worker with the fewest calls in flight; waits while all are full, raises when none is left or coming."""
        while True:
            if self._error is not None:
                raise self._error
            free = [worker for worker in self._workers.values() if worker.in_flight < self._max_in_flight]
            if free:
                return min(free, key=lambda worker: worker.in_flight)
            if not self._workers and not self._replacing:
                raise RuntimeError(f"{self._role}: no worker is left of {self._num_workers}; the log says why")
            self._changed.clear()
            await self._changed.wait()

    def _retire(self, worker: Worker, error: BaseException) -> None:
        if self._workers.get(worker.seat) is not worker:
            return  # another of its calls was first
        logger.warning("%s failed and is replaced: %s", worker.name, one_line(error))
        del self._workers[worker.seat]
        ray.kill(worker.actor)
        task = asyncio.create_task(self._replace(worker.seat))
        self._replacing.add(task)
        task.add_done_callback(self._replaced)

    async def _replace(self, seat: int) -> None:
        for _ in range(self._max_attempts):
            try:
                return await self._occupy(seat)
            except WORKER_FAILURES as error:
                logger.warning("%s-%d: a replacement did not come up: %s", self._role, seat, one_line(error))
        logger.error("%s-%d is given up after %d replacements", self._role, seat, self._max_attempts)

    def _replaced(self, task: "asyncio.Task[None]") -> None:
        self._replacing.discard(task)
        if not task.cancelled() and task.exception() is not None:  # the core's own: it would fail anywhere
            self._error = self._error or task.exception()
        self._changed.set()

    async def _occupy(self, seat: int) -> None:
        life, self._lives[seat] = self._lives[seat], self._lives[seat] + 1
        name = f"{self._role}-{seat}" + (f".{life}" if life else "")
        actor = self._spawn(name, seat)
        self._starting.add(actor)
        try:
            await answer(actor.__ray_ready__.remote(), f"{name} {self._place}", self._place_s)
            await self._prepare(actor)
        except BaseException:
            ray.kill(actor)
            raise
        finally:
            self._starting.discard(actor)
        # no await since `prepare` returned: what it loaded is still all there is
        self._workers[seat] = Worker(seat, name, actor)
        self._changed.set()

    def _say(self, count: int) -> str:
        serve = f"{self._role}: {count} calls outstanding, {len(self._workers)} of {self._num_workers} workers serve"
        starting = self._num_workers - len(self._workers)
        return f"{serve}, {starting} {self._place}; {free_resources()}" if starting else serve


class Pending:
    """Counts what is outstanding; when nothing has finished for REPORT_S seconds, says so in one line."""

    def __init__(self, say: Callable[[int], str]) -> None:
        self._say = say
        self._count = self._finished = 0
        self._timer: asyncio.TimerHandle | None = None

    @contextmanager
    def one(self) -> Iterator[None]:
        self._count += 1
        self._timer = self._timer or self._in_a_while()
        try:
            yield
        finally:
            self._count -= 1
            self._finished += 1
            if not self._count and self._timer:
                self._timer.cancel()
                self._timer = None

    def _in_a_while(self) -> asyncio.TimerHandle:
        return asyncio.get_running_loop().call_later(REPORT_S, self._tick)

    def _tick(self) -> None:
        if not self._finished:
            logger.info("waiting for %s", self._say(self._count))
        self._finished = 0
        self._timer = self._in_a_while()


async def answer(ref: Any, what: str, timeout_s: float, detail: Callable[[], str] | None = None) -> Any:
    """The value of a Ray reference. Past the deadline, or cancelled, the Ray task is cancelled too, if it still waits.

    An exception of the remote code is raised as itself. With `detail`, a long wait is logged every REPORT_S seconds.
    """
    try:
        return await waiting(ref, what, timeout_s, detail)
    except RayTaskError as error:
        raise error.cause from error
    except (DeadlineError, asyncio.CancelledError):
        ray.cancel(ref)
        raise


async def waiting(work: Awaitable[T], what: str, timeout_s: float, detail: Callable[[], str] | None = None) -> T:
    """Await with a deadline: DeadlineError says what was waited for, and so does the log if `detail` is given."""
    task, started = asyncio.ensure_future(work), time.monotonic()
    try:
        while not task.done():
            waited = time.monotonic() - started
            if waited >= timeout_s:
                raise DeadlineError(f"{what}: no answer within {timeout_s:g} s")
            if detail and waited >= REPORT_S:
                logger.info("waiting for %s (%.0f s) %s", what, waited, await asyncio.to_thread(detail))
            await asyncio.wait([task], timeout=min(REPORT_S, timeout_s - waited))
        return task.result()
    finally:
        task.cancel()


async def together(work: Sequence[Awaitable[T]]) -> list[T]:
    """All results in order; the first failure cancels the rest and is raised as itself, not in a group."""
    tasks = [asyncio.ensure_future(item) for item in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def free_resources() -> str:
    """What a wait for a place adds to its log line; a place is on one node, so what one has counts, too."""
    free = ray.available_resources()
    line = f"the cluster has {free.get('CPU', 0.0):g} CPUs and {free.get('GPU', 0.0):g} GPUs free"
    nodes = list(ray._private.state.available_resources_per_node().values())  # type: ignore[attr-defined]
    if len(nodes) < 2:
        return line
    cpus, gpus = (max(node.get(kind, 0.0) for node in nodes) for kind in ("CPU", "GPU"))
    return f"{line}, one node at most {cpus:g} and {gpus:g}"


def one_line(error: BaseException | None) -> str:
    """An error in one line: Ray's own run over many."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
