"""How often something may start again: so many times within a sliding window, and then no more."""

import time
from collections import deque
from collections.abc import Callable


class Restarts:
    """At most `limit` within any `window_s` seconds of `clock`."""

    def __init__(self, limit: int, window_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit, self.window_s = limit, window_s
        self._clock = clock
        self._times: deque[float] = deque()

    @property
    def count(self) -> int:
        """Those that are not forgotten yet."""
        while self._times and self._clock() - self._times[0] >= self.window_s:
            self._times.popleft()
        return len(self._times)

    def take(self) -> bool:
        """Count one more and say so, or refuse."""
        if self.count >= self.limit:
            return False
        self._times.append(self._clock())
        return True
