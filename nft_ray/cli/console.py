"""What a person sees while a run is going on: one line per epoch, and a line that is rewritten in between.

Where standard output is no terminal, progress becomes a plain line every ten seconds.
"""

import sys
import time
from typing import TextIO

from nft_ray.roles import Tracker
from nft_ray.types import EvalResult

EVERY_S = 10.0


def say(line: str) -> None:
    """A line on standard output, for a command that has no more to show."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


class Screen:
    """Lines that stay, and one that says how far something is."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout
        self._terminal = self._stream.isatty()
        self._shown = time.monotonic()
        self._width = 0

    def say(self, line: str) -> None:
        """A line that stays."""
        self._clear()
        self._stream.write(f"{line}\n")
        self._stream.flush()
        self._shown = time.monotonic()

    def progress(self, what: str, done: int, total: int) -> None:
        """Rewritten on a terminal; elsewhere a line now and then."""
        if self._terminal:
            line = f"{what}: {done}/{total}"
            self._stream.write(f"\r{line:<{self._width}}")
            self._stream.flush()
            self._width = len(line)
        elif time.monotonic() - self._shown > EVERY_S:
            self.say(f"  {what}: {done}/{total}")

    def _clear(self) -> None:
        if self._terminal and self._width:
            self._stream.write(f"\r{'':<{self._width}}\r")
            self._width = 0


class Console(Tracker):
    """A Tracker in front of another: shows, then passes on. `metric` is what it shows of an evaluation."""

    def __init__(self, tracker: Tracker, num_epochs: int, metric: str, stream: TextIO | None = None) -> None:
        self._tracker, self._num_epochs, self.metric = tracker, num_epochs, metric
        self._screen = Screen(stream)
        self._evaluated = ""

    def say(self, line: str) -> None:
        """A line that stays."""
        self._screen.say(line)

    def log_progress(self, what: str, done: int, total: int) -> None:
        self._tracker.log_progress(what, done, total)
        self._screen.progress(what, done, total)

    def log_evaluation(self, epoch: int, result: EvalResult) -> None:
        self._tracker.log_evaluation(epoch, result)
        value = result.metrics.get(self.metric, float("nan"))
        self._evaluated = f"  held-out {self.metric} {value:.3f}"
        if epoch == 0:
            self.say(f"base: {self._evaluated.strip()} ({result.seconds:.0f} s)")

    def log_late(self, epoch: int, metrics: dict[str, float]) -> None:
        self._tracker.log_late(epoch, metrics)

    def rewind(self, epoch: int) -> None:
        self._tracker.rewind(epoch)
        self._evaluated = ""

    def log_epoch(self, epoch: int, metrics: dict[str, float], steps: tuple[dict[str, float], ...]) -> None:
        self._tracker.log_epoch(epoch, metrics, steps)
        rewards = [name for name in metrics if name.startswith("reward/") and name.count("/") == 1]
        shown = [name for name in rewards if name not in ("reward/missing", "reward/groups_without_signal")]
        if len(shown) == 2:
            shown.remove("reward/total")  # one reward: the total is that reward
        parts = [f"{name.removeprefix('reward/')} {metrics[name]:.3f}" for name in shown]
        if metrics["reward/missing"]:
            parts.append(f"missing {metrics['reward/missing']:.1%}")
        norms = [value for name, value in metrics.items() if name.endswith("/grad_norm")]  # of whichever algorithm
        parts += [f"grad norm {norm:.2f}" for norm in norms]
        parts.append(f"{metrics['time/epoch_s']:.1f} s")
        self.say(f"epoch {epoch:>3}/{self._num_epochs}  {'  '.join(parts)}{self._evaluated}")
        self._evaluated = ""
