"""One job at a time looks at what is deployed and claims it: an actor of one name is the lock.

It ends with the process that made it, however that ends, so nobody waits for a dead one.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import ray

from deployments.claims import NAMESPACE
from nft_ray.roles import TryAgainError

logger = logging.getLogger(__name__)

LOCK = "deploying-rewards"
POLL_S = 0.1
REPORT_S = 10.0
RELEASE_S = 20.0


@ray.remote(num_cpus=0)
class _Lock:
    """Whoever has an actor of this name may claim."""


def _take() -> Any | None:
    """The lock, or None where another has it."""
    try:
        return _Lock.options(name=LOCK, namespace=NAMESPACE).remote()  # type: ignore[attr-defined]
    except ValueError:  # the name is taken
        return None


@asynccontextmanager
async def alone(wait_s: float) -> AsyncIterator[None]:
    """Between two jobs that look for the same reward and do not find it, the second would overwrite the first's.

    TryAgainError where another has it for so long.
    """
    started = reported = time.monotonic()
    while (lock := _take()) is None:
        now = time.monotonic()
        if now - started > wait_s:
            raise TryAgainError(f"another job deploys rewards since {wait_s:g} s (cluster.wait_s); try again")
        if now - reported >= REPORT_S:
            reported = now
            logger.info("waiting for another job that deploys rewards (%.0f s)", now - started)
        await asyncio.sleep(POLL_S)
    try:
        yield
    finally:
        ray.kill(lock)


@contextmanager
def alone_at_the_end() -> Iterator[None]:
    """The same for who leaves: it has no time to lose, and goes on without the lock after RELEASE_S."""
    deadline = time.monotonic() + RELEASE_S
    while (lock := _take()) is None and time.monotonic() < deadline:
        time.sleep(POLL_S)
    try:
        yield
    finally:
        if lock is not None:
            with contextlib.suppress(ValueError):
                ray.kill(lock)
