"""A reward that only monitors and is down: asked now and then by one call, missing for the others, told once.

up ── a call fails ──► down: missing at once ── PAUSE_S ──► one call asks ── it answers ──► up
                          ▲                                      │ it fails
                          └──────────────────────────────────────┘
"""

import logging
import time
from collections.abc import Callable

logger = logging.getLogger(__name__)

PAUSE_S = 30.0


class Outage:
    """Of one reward. Whoever would ask it calls `ask` first, and says afterwards how it went."""

    def __init__(self, name: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._name, self._clock = name, clock
        self._since: float | None = None
        self._next = 0.0
        self._num_missed = 0

    def ask(self) -> bool:
        """Whether to ask; False: it is missing."""
        if self._since is None:
            return True
        if self._clock() < self._next:
            self._num_missed += 1
            return False
        self._next = self._clock() + PAUSE_S
        return True

    def failed(self, why: str) -> None:
        """It gave nothing, whatever the reason."""
        now = self._clock()
        self._num_missed += 1
        self._next = now + PAUSE_S
        if self._since is None:
            self._since = now
            logger.warning(
                "reward %s is down: %s; it only monitors, so training goes on without it, and it is asked again every "
                "%.0f s",
                self._name,
                why,
                PAUSE_S,
            )

    def answered(self) -> None:
        """It gave scores."""
        if self._since is not None:
            seconds = self._clock() - self._since
            logger.warning(
                "reward %s answers again after %.0f s; %d calls miss it", self._name, seconds, self._num_missed
            )
        self._since, self._num_missed = None, 0
