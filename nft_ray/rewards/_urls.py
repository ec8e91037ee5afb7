"""URLs of servers that answer the same requests: asked in turn, and put aside while they fail.

The pause of a URL doubles with each failure in a row, from `backoff_s` to MAX_PAUSE_S, with jitter; on HTTP 429
Retry-After says how long (at most MAX_RETRY_AFTER_S). Then ONE request tries the URL, and the others follow when it was
answered: a URL that hangs holds one of them, not all. What a failure is, and when to give up, is the asker's to know.
All calls come from one asyncio loop.
"""

import asyncio
import logging
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from openai import AsyncOpenAI

logger = logging.getLogger(__name__)

MAX_PAUSE_S = 30.0
MAX_RETRY_AFTER_S = 60.0
CONNECT_S = 5.0


@dataclass(slots=True)
class Server:
    """One URL. failures: in a row; why: the cause of the last; tried_by: who finds out whether it works again.

    where: how the log names who asks.
    """

    where: str
    url: str
    client: "AsyncOpenAI"
    failures: int = 0
    why: str = ""
    tried_by: asyncio.Task[Any] | None = None
    failed_at: float = -math.inf
    aside_until: float = -math.inf

    def is_free(self) -> bool:
        return not self.failures or (self.tried_by is None and time.monotonic() >= self.aside_until)

    def succeeded(self) -> None:
        if self.failures:
            logger.info("%s: %s answers again", self.where, self.url)
        self.failures, self.aside_until = 0, -math.inf

    def failed(self, sent_at: float, why: str, backoff_s: float, retry_after_s: float | None) -> None:
        """Put it aside. Requests that were under way when it failed before are the same failure, not further ones."""
        now = time.monotonic()
        if sent_at >= self.failed_at:
            self.failures += 1
            self.failed_at, self.why = now, why
            pause_s = min(MAX_PAUSE_S, backoff_s * 2 ** (self.failures - 1)) * random.uniform(0.75, 1.25)
            self.aside_until = now + (pause_s if retry_after_s is None else retry_after_s)
            if self.failures == 1:
                logger.warning("%s: %s fails (%s) and is put aside", self.where, self.url, why)
        elif retry_after_s is not None:
            self.aside_until = max(self.aside_until, now + retry_after_s)


class Servers:
    """All URLs, in turn."""

    def __init__(self, servers: Sequence[Server]) -> None:
        self._servers = servers
        self._turn = 0

    @property
    def num_rounds_failed(self) -> int:
        """How often in a row every single URL has failed."""
        return min(server.failures for server in self._servers)

    @property
    def trouble(self) -> str:
        """What every URL did last."""
        return "every URL fails, " + "; ".join(f"{server.url}: {server.why}" for server in self._servers)

    def forgive(self) -> None:
        """A new call begins: pauses go on, and start to grow afresh."""
        for server in self._servers:
            server.failures = min(server.failures, 1)

    def take(self) -> Server | None:
        """The next URL that is not aside, or None. One that has failed is free for one request at a time."""
        for step in range(len(self._servers)):
            server = self._servers[(self._turn + step) % len(self._servers)]
            if server.is_free():
                self._turn += step + 1
                server.tried_by = asyncio.current_task() if server.failures else None
                return server
        return None


def parse_retry_after(header: str | None) -> float | None:
    """Seconds, from 0 to MAX_RETRY_AFTER_S, of a Retry-After header (seconds or an HTTP date); None: no such thing."""
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            date = parsedate_to_datetime(header)
        except ValueError:
            return None
        seconds = (date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds()
    return min(max(seconds, 0.0), MAX_RETRY_AFTER_S) if math.isfinite(seconds) else None


def client_of(url: str, key: str | None, timeout_s: float) -> "AsyncOpenAI":
    """The HTTP client of one URL: no retries of its own."""
    from openai import AsyncOpenAI, Timeout

    timeout = Timeout(timeout_s, connect=min(CONNECT_S, timeout_s))
    # A word instead of no key: with None it would take OPENAI_API_KEY, which is not these servers' business.
    return AsyncOpenAI(base_url=url, api_key=key or "none", max_retries=0, timeout=timeout)
