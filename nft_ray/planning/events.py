"""Simulated time: processes that wait for each other, devices that are shared, workers with room. Pure and exact.

A process is a generator that yields what it waits for: a `Signal`. Equal times are served in the order in which they
were asked for, so a simulation gives the same records on every machine. It knows nothing of training.

    def drawn():
        yield turn.taken()          # one at a time, first come, first served
        yield card.work(2.0)        # 2 s alone; 4 s where another one works on the card all the while
        turn.give_back()
"""

import heapq
from collections import deque
from collections.abc import Callable, Generator, Iterable
from typing import Any

Process = Generator["Signal", Any, Any]
CLOSE = 1e-9
"""Seconds: less work than that is done."""


class Signal:
    """Something that happens once, with a value; who waits for it goes on then, in order."""

    __slots__ = ("_waiting", "fired", "value")

    def __init__(self) -> None:
        self.fired, self.value = False, None
        self._waiting: list[Callable[[Any], None]] = []

    def then(self, what: Callable[[Any], None]) -> None:
        """Call `what` with the value: now if it has fired."""
        if self.fired:
            what(self.value)
        else:
            self._waiting.append(what)

    def fire(self, value: Any = None) -> None:
        assert not self.fired, "a signal fires once"
        self.fired, self.value = True, value
        waiting, self._waiting = self._waiting, []
        for what in waiting:
            what(value)


class Clock:
    """The time, in seconds, and what happens when."""

    def __init__(self) -> None:
        self.now = 0.0
        self._order = 0
        self._due: list[tuple[float, int, Callable[[], None]]] = []

    def after(self, seconds: float, what: Callable[[], None]) -> None:
        self._order += 1
        heapq.heappush(self._due, (self.now + seconds, self._order, what))

    def wait(self, seconds: float) -> Signal:
        done = Signal()
        self.after(seconds, done.fire)
        return done

    def start(self, process: Process) -> Signal:
        """Run a process from now on; the signal fires with what it returns."""
        done = Signal()

        def go_on(value: Any) -> None:
            try:
                waits_for = process.send(value)
            except StopIteration as end:
                done.fire(end.value)
                return
            waits_for.then(lambda found: self.after(0, lambda: go_on(found)))

        self.after(0, lambda: go_on(None))
        return done

    def run(self) -> None:
        """Until nothing is due."""
        while self._due:
            self.now, _, what = heapq.heappop(self._due)
            what()


def together(signals: Iterable[Signal]) -> Signal:
    """Fires when all have, with their values in order."""
    found = list(signals)
    done, left = Signal(), len(found)

    def one(_: Any) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            done.fire([signal.value for signal in found])

    if not found:
        done.fire([])
    for signal in found:
        signal.then(one)
    return done


class Room:
    """At most so many at once, first come, first served."""

    def __init__(self, count: int) -> None:
        self._free, self._waiting = count, deque[Signal]()

    def taken(self) -> Signal:
        """Fires when there is room, which is the caller's from then on."""
        signal = Signal()
        if self._free:
            self._free -= 1
            signal.fire()
        else:
            self._waiting.append(signal)
        return signal

    def give_back(self) -> None:
        if self._waiting:
            self._waiting.popleft().fire()
        else:
            self._free += 1


class Card:
    """A device that works on all that is on it, each at an equal share of its speed. `busy_s`: while it worked."""

    def __init__(self, clock: Clock) -> None:
        self._clock, self._left = clock, dict[Signal, float]()
        self._since, self._turn = 0.0, 0
        self.busy_s = 0.0

    def work(self, seconds: float) -> Signal:
        """Fires when so many seconds of the whole card have gone into it."""
        done = Signal()
        if seconds <= 0:
            done.fire()
            return done
        self._advance()
        self._left[done] = seconds
        self._plan()
        return done

    def _advance(self) -> None:
        passed = self._clock.now - self._since
        self._since = self._clock.now
        if self._left:
            self.busy_s += passed
            share = passed / len(self._left)
            self._left = {signal: left - share for signal, left in self._left.items()}

    def _plan(self) -> None:
        self._turn += 1
        turn = self._turn
        if self._left:
            self._clock.after(max(0.0, min(self._left.values())) * len(self._left), lambda: self._finish(turn))

    def _finish(self, turn: int) -> None:
        if turn != self._turn:  # something came or went since
            return
        self._advance()
        least = min(self._left.values())
        done = [signal for signal, left in self._left.items() if left <= max(least, 0.0) + CLOSE]
        for signal in done:
            del self._left[signal]
        self._plan()
        for signal in done:
            signal.fire()


class Crew:
    """Interchangeable workers with room for `each` calls: whoever has the fewest gets the next one; among equals, who
    has been without a new one the longest."""

    def __init__(self, count: int, each: int) -> None:
        self._each, self._calls = each, [0] * count
        self._last = list(range(-count, 0))
        self._turn, self._waiting = 0, deque[Signal]()

    def taken(self) -> Signal:
        """Fires with a worker's number once one has room."""
        signal = Signal()
        self._waiting.append(signal)
        self._hand_out()
        return signal

    def add(self, worker: int) -> None:
        """A call that this worker gets whether it has room or not."""
        self._calls[worker] += 1

    def give_back(self, worker: int) -> None:
        self._calls[worker] -= 1
        self._hand_out()

    def _hand_out(self) -> None:
        while self._waiting:
            worker = min(range(len(self._calls)), key=lambda i: (self._calls[i], self._last[i]))
            if self._calls[worker] >= self._each:
                return
            self._turn += 1
            self._calls[worker] += 1
            self._last[worker] = self._turn
            self._waiting.popleft().fire(worker)
