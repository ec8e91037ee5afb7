"""What a person sees: a line per epoch on any output, a rewritten one in between on a terminal."""

import io
from types import SimpleNamespace
from typing import Any

import pytest

from nft_ray.cli import console as module
from nft_ray.cli.console import EVERY_S, Console
from nft_ray.types import EvalResult

METRICS = {
    "reward/missing": 0.0,
    "reward/total": 0.75,
    "reward/geneval": 0.75,
    "reward/geneval/strict": 0.5,
    "reward/groups_without_signal": 0.25,
    "nft/grad_norm": 0.123,
    "time/epoch_s": 6.54,
}


class Inner:
    """The tracker behind: it must get everything."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def log_epoch(self, *of: Any) -> None:
        self.calls.append(("epoch", *of))

    def log_evaluation(self, *of: Any) -> None:
        self.calls.append(("evaluation", *of))

    def log_late(self, *of: Any) -> None:
        self.calls.append(("late", *of))

    def rewind(self, *of: Any) -> None:
        self.calls.append(("rewind", *of))

    def log_progress(self, *of: Any) -> None:
        self.calls.append(("progress", *of))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=clock.monotonic))
    return clock


def console(stream: io.StringIO) -> tuple[Console, Inner]:
    inner = Inner()
    return Console(inner, num_epochs=40, metric="geneval/strict", stream=stream), inner


def evaluation(value: float) -> EvalResult:
    return EvalResult(metrics={"geneval/strict": value, "geneval": 0.9}, counts={}, images={}, seconds=12.4)


def seen(stream: io.StringIO) -> str:
    """What a terminal shows after the carriage returns."""
    shown = []
    for line in stream.getvalue().split("\n"):
        row = ""
        for part in line.split("\r"):
            row = part + row[len(part) :]
        shown.append(row.rstrip())
    return "\n".join(shown)


def test_an_epoch_is_one_line() -> None:
    stream = io.StringIO()
    shown, _ = console(stream)
    shown.log_epoch(7, METRICS, ())
    assert stream.getvalue() == "epoch   7/40  geneval 0.750  grad norm 0.12  6.5 s\n"


def test_several_rewards_come_with_their_total_and_what_is_missing_is_said() -> None:
    stream = io.StringIO()
    shown, _ = console(stream)
    shown.log_epoch(7, METRICS | {"reward/other": -0.25, "reward/total": 0.5, "reward/missing": 0.021}, ())
    (line,) = stream.getvalue().splitlines()
    for part in ("total 0.500", "geneval 0.750", "other -0.250", "missing 2.1%"):
        assert part in line
    assert "groups_without_signal" not in line
    assert "strict" not in line


def test_the_base_has_a_line_and_a_later_evaluation_ends_its_epochs_line() -> None:
    stream = io.StringIO()
    shown, _ = console(stream)
    shown.log_evaluation(0, evaluation(0.5))
    assert stream.getvalue() == "base: held-out geneval/strict 0.500 (12 s)\n"


def test_an_evaluation_is_shown_with_its_epoch_and_only_there() -> None:
    stream = io.StringIO()
    shown, _ = console(stream)
    shown.log_evaluation(10, evaluation(0.625))
    assert stream.getvalue() == ""
    shown.log_epoch(10, METRICS, ())
    shown.log_epoch(11, METRICS, ())
    first, second = stream.getvalue().splitlines()
    assert first.endswith("6.5 s  held-out geneval/strict 0.625")
    assert second.endswith("6.5 s")


def test_everything_is_passed_on() -> None:
    shown, inner = console(io.StringIO())
    result = evaluation(0.5)
    steps = ({"nft/loss": 1.0},)
    shown.log_progress("epoch 1", 1, 2)
    shown.log_evaluation(1, result)
    shown.log_epoch(1, METRICS, steps)
    shown.log_late(1, {"reward/ocr": 0.5})
    shown.rewind(0)
    expected = [("progress", "epoch 1", 1, 2), ("evaluation", 1, result), ("epoch", 1, METRICS, steps)]
    assert inner.calls == [*expected, ("late", 1, {"reward/ocr": 0.5}), ("rewind", 0)]


def test_without_a_terminal_progress_is_a_plain_line_now_and_then(clock: Clock) -> None:
    stream = io.StringIO()
    shown, inner = console(stream)
    for done in range(1, 31):
        clock.now += 1.0
        shown.log_progress("epoch 1", done, 30)
    assert stream.getvalue() == "  epoch 1: 11/30\n  epoch 1: 22/30\n"
    assert len(inner.calls) == 30


def test_a_line_that_was_said_puts_progress_off(clock: Clock) -> None:
    stream = io.StringIO()
    shown, _ = console(stream)
    clock.now += EVERY_S
    shown.say("hello")
    clock.now += EVERY_S
    shown.log_progress("epoch 1", 1, 2)
    assert stream.getvalue() == "hello\n"
    clock.now += 0.1
    shown.log_progress("epoch 1", 2, 2)
    assert stream.getvalue() == "hello\n  epoch 1: 2/2\n"


def test_a_terminal_shows_each_step_in_one_line_that_is_rewritten() -> None:
    stream = Terminal()
    shown, _ = console(stream)
    shown.log_progress("epoch 1: roll out", 1, 2)
    assert seen(stream) == "epoch 1: roll out: 1/2"
    shown.log_progress("evaluate", 2, 2)  # shorter: nothing of the longer one may stay
    assert seen(stream) == "evaluate: 2/2"
    shown.log_epoch(1, METRICS, ())
    assert seen(stream) == "epoch   1/40  geneval 0.750  grad norm 0.12  6.5 s\n"
    assert stream.getvalue().count("\n") == 1


def test_a_terminal_line_that_stays_is_not_erased() -> None:
    stream = Terminal()
    shown, _ = console(stream)
    shown.log_progress("a very long name of what is going on", 1, 2)
    shown.say("short")
    shown.say("shorter")
    shown.log_progress("x", 1, 2)
    assert seen(stream) == "short\nshorter\nx: 1/2"
