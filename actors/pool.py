"""Interchangeable Ray actors behind one `call`: bounded in flight, retried elsewhere, replaced when dead.

    call ──► a worker with room ──► answer
                 │ died, unavailable, past its deadline, or its device failed
                 ▼
             killed ──► every request that it held goes to another worker
                 └────► its seat is filled again (seats.py); meanwhile the pool goes on with who is left

Failure policy
- A worker that fails a request for any reason but the core's own exception is killed and replaced: one rule for a
  crash, a lost node, a lost connection, a CUDA error, a stopped process and a hang (a running actor method cannot be
  cancelled). Requests must be repeatable.
- A worker is overdue when it holds calls and has answered none for `timeout_s`: however slowly Ray notices a dead
  node, and however many calls are queued there.
- The core's own exception is the same on any worker: it is raised as itself, at once, with the remote traceback as
  its cause.
- A request fails with RuntimeError after `max_attempts` workers that failed while it was in work; those that were only
  queued there do not count. A full object store is waited for, as often.
- While no worker serves, calls wait for one that is being prepared, else `place_s`, then fail with RuntimeError.

This file knows neither samplers nor models; what a replacement needs before it serves is the caller's `prepare`.
"""

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any

from ray.exceptions import RayError

from actors.answers import DeadlineError, Pending, answer, one_line, together
from actors.seats import Seats, Worker, worker_failure
from nft_ray.failures import lost, store_full

STORE_PAUSE_S = 2.0
"""Before a call is made again whose result found no room: scorers and learners free what they have read."""


class WorkerPool:
    """Workers in seats: see seats.py for `spawn`, `prepare`, `least`, `most` and `advice`.

    `mend(name, error)` is told which worker failed a call and how: what it has changed so that the replacement bears
    the same call, in words, or nothing. Such a failure is not counted against the call.
    """

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
        least: int | None = None,
        most: int | None = None,
        mend: Callable[[str, BaseException], str] = lambda name, error: "",
        advice: Callable[[BaseException], str] = lambda error: "",
    ) -> None:
        self._role, self._timeout_s, self._mend = role, timeout_s, mend
        self._max_in_flight, self._max_attempts = max_in_flight, max_attempts
        self._seats = Seats(
            role,
            wanted=num_workers,
            least=least or num_workers,
            most=most or num_workers,
            spawn=spawn,
            prepare=prepare,
            place=place,
            place_s=place_s,
            max_attempts=max_attempts,
            advice=advice,
        )
        self._pending = Pending(self._say)

    @property
    def names(self) -> list[str]:
        """Of those who serve."""
        return [worker.name for worker in self._seats.workers.values()]

    @property
    def most(self) -> int:
        """How many there may be."""
        return self._seats.most

    async def start(self) -> None:
        """`least` seats taken and prepared, or what keeps them from it is raised."""
        with self._pending.one():
            await self._seats.start()

    async def settle(self) -> None:
        """Return when no replacement that has a place is being prepared."""
        await self._seats.settle()

    def grow(self, room: int) -> None:
        """Up to `room` more workers, at most `most` in all, come to serve by and by."""
        self._seats.grow(room)

    def close(self) -> None:
        """Kill every worker; calls that still wait fail."""
        self._seats.close(RuntimeError(f"{self._role}: the pool is closed"))

    async def call(self, what: str, send: Callable[[Any], Sequence[Any]]) -> tuple[Any, Sequence[Any]]:
        """`send(actor)` returns the references of one actor call; gives back the first one's value, and all of them."""
        failures: list[BaseException] = []
        with self._pending.one():
            while len(failures) < self._max_attempts:
                worker, call = await self._worker_with_room(), object()
                try:
                    return await self._ask(worker, call, what, send, self._mend)
                except Exception as error:
                    if not (worker_failure(error) or store_full(error)):
                        raise
                    if worker.culprit is call or store_full(error):
                        failures.append(error)
                    if store_full(error):
                        await asyncio.sleep(STORE_PAUSE_S * len(failures))
        raise RuntimeError(
            f"{self._role}: {what} failed on {len(failures)} workers; last: {self._seats.told(failures[-1])}"
        ) from failures[-1]

    async def broadcast(self, what: str, send: Callable[[Any], Sequence[Any]]) -> list[Any]:
        """The answer of every worker that serves; one that fails is replaced, and `prepare` sees to its replacement."""

        async def ask(worker: Worker) -> list[Any]:
            try:
                return [(await self._ask(worker, object(), what, send))[0]]
            except Exception as error:
                if not (worker_failure(error) or store_full(error)):
                    raise
                self._seats.retire(worker, error)
                return []

        with self._pending.one():
            answers = await together([ask(worker) for worker in self._seats.workers.values()])
        return [answer for part in answers for answer in part]

    async def _ask(
        self,
        worker: Worker,
        call: object,
        what: str,
        send: Callable[[Any], Sequence[Any]],
        mend: Callable[[str, BaseException], str] = lambda name, error: "",
    ) -> tuple[Any, Sequence[Any]]:
        """One call of one worker, which is retired if it fails in any way but its own."""
        if not worker.calls:
            worker.since = time.monotonic()
        worker.calls.append(call)
        try:
            refs = send(worker.actor)
            return await self._answer(worker, refs[0], f"{worker.name}: {what}"), refs
        except Exception as error:
            if not worker_failure(error):
                if isinstance(error, RayError) and not (store_full(error) or lost(error)):  # it runs over many lines
                    raise RuntimeError(f"{worker.name}: {what}: {one_line(error)}") from error
                raise
            if not worker.gone.done():
                self._seats.retire(worker, error, mend(worker.name, error))
            raise
        finally:
            if worker.calls[0] is call:
                worker.since = time.monotonic()
            worker.calls.remove(call)
            self._seats.changed.set()

    async def _answer(self, worker: Worker, ref: Any, what: str) -> Any:
        """The value, while the worker is not retired, and gives any answer at all within `timeout_s`."""
        asked = asyncio.ensure_future(answer(ref, what, math.inf))
        try:
            while not asked.done():
                left_s = worker.since + self._timeout_s - time.monotonic()
                if left_s <= 0:
                    raise DeadlineError(f"{what}: no answer within {self._timeout_s:g} s")
                await asyncio.wait((asked, worker.gone), timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
                if worker.gone.done() and not asked.done():
                    raise DeadlineError(f"{what}: {worker.name} is gone")
            return asked.result()
        finally:
            asked.cancel()

    async def _worker_with_room(self) -> Worker:
        """The worker with the fewest calls in flight; waits while all are full, or none is there but one may come."""
        seats, since = self._seats, time.monotonic()
        while True:
            seats.check()
            free = [worker for worker in seats.workers.values() if len(worker.calls) < self._max_in_flight]
            if free:
                return min(free, key=lambda worker: len(worker.calls))
            patience_s = None if seats.workers else seats.patience_s(since)
            seats.changed.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(seats.changed.wait(), patience_s)

    def _say(self, count: int) -> str:
        return f"{self._role}: {count} calls outstanding, {self._seats.waiting()}"
