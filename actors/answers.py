"""Waiting for Ray: with a deadline, and with a line that says what for."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import ray
from ray.exceptions import RayTaskError

from nft_ray.failures import death
from nft_ray.roles import TryAgainError

logger = logging.getLogger(__name__)
T = TypeVar("T")

REPORT_S = 10.0
"""Seconds between two lines that say what is being waited for."""
MESSAGES = "ray.messages"
"""Logger of what Ray says; the command line shows none of it, and keeps it in the run's log."""


class DeadlineError(TryAgainError):
    """An answer that did not come in time."""


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
    return f"{type(error).__name__}: {death(error) or ' '.join(str(error).split())[:300]}"


def put_aside(error: BaseException | None) -> None:
    """All that Ray says of a death, for the log file alone; `one_line` leaves it out."""
    if death(error) and len(str(error)) > 100:
        logging.getLogger(MESSAGES).warning("%s: %s", type(error).__name__, error)
