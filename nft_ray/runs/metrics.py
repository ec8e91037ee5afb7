"""The figures of a run on disk: the truth, whatever becomes of MLflow.

    RUN/metrics.jsonl   a line per finished epoch, with its evaluation; epoch 0 is the base
    RUN/steps.jsonl     a line per optimizer step

A line is appended and flushed to the disk, or the file is replaced as a whole. What a kill or a bad disk left of a line
is dropped, with a warning where it was not the last one.
"""

import json
import logging
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from nft_ray.runs.checkpoint import write_atomically

METRICS, STEPS = "metrics.jsonl", "steps.jsonl"
OWN = ("epoch", "time")
"""What a line says beside its figures; `time` is seconds since 1970."""
Line = dict[str, Any]
_log = logging.getLogger(__name__)


class Metrics:
    """Both files of one run, for the one process that writes them; another thread may read. Nothing is written by
    looking.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lines = {line["epoch"]: line for line in read_metrics(folder)}
        self.num_rewinds = 0
        """How often steps.jsonl was replaced: places in it hold until then."""

    def __contains__(self, epoch: int) -> bool:
        return epoch in self._lines

    @property
    def lines(self) -> list[Line]:
        """One per epoch, in no order. A line is never changed, only replaced by another."""
        return list(self._lines.values())

    def rewind(self, epoch: int) -> None:
        """Drop the lines after `epoch`, and what a kill left of one."""
        self._lines = {at: line for at, line in self._lines.items() if at <= epoch}
        self._write()
        if (self._folder / STEPS).exists():
            kept = [line for line in _whole_lines(self._folder / STEPS) if line["epoch"] <= epoch]
            _replace(self._folder / STEPS, kept)
        self.num_rewinds += 1

    def add(self, epoch: int, metrics: Mapping[str, float], steps: Iterable[Mapping[str, float]] = ()) -> None:
        """The line of an epoch that has none, and those of its steps. OSError where they cannot be written."""
        own = dict(zip(OWN, (epoch, time.time()), strict=True))
        line = own | {name: _finite(value) for name, value in metrics.items()}
        _append(self._folder / STEPS, [own | {name: _finite(value) for name, value in step.items()} for step in steps])
        _append(self._folder / METRICS, [line])
        self._lines[epoch] = line

    def add_late(self, epoch: int, metrics: Mapping[str, float]) -> None:
        """More figures for the line of an epoch."""
        self._lines[epoch] = self._lines[epoch] | {name: _finite(value) for name, value in metrics.items()}
        self._write()

    def steps_from(self, place: int) -> tuple[list[Line], int]:
        """The whole lines of steps.jsonl from a place in it on, and the place behind them."""
        path = self._folder / STEPS
        if not path.exists():
            return [], 0
        with path.open("rb") as file:
            file.seek(place)
            whole = file.read().rpartition(b"\n")[0]
        return list(_parsed(path, whole.decode("utf-8", "replace"))), place + (len(whole) + 1 if whole else 0)

    def _write(self) -> None:
        if self._lines or (self._folder / METRICS).exists():
            _replace(self._folder / METRICS, [self._lines[epoch] for epoch in sorted(self._lines)])


def read_metrics(folder: Path) -> list[Line]:
    """The lines of a run's metrics.jsonl that are whole."""
    return list(_whole_lines(folder / METRICS))


def _whole_lines(path: Path) -> Iterator[Line]:
    if path.exists():
        text = path.read_text(encoding="utf-8", errors="replace")
        yield from _parsed(path, text.rpartition("\n")[0])  # the last one may have been cut off by a kill


def _parsed(path: Path, text: str) -> Iterator[Line]:
    for number, line in enumerate(text.splitlines(), 1):
        try:
            found = json.loads(line)
            found["epoch"], found["time"]
        except (ValueError, TypeError, KeyError):
            _log.warning("%s: line %d is damaged, and left out", path, number)
        else:
            yield found


def _append(path: Path, lines: Iterable[Line]) -> None:
    text = "".join(map(_encoded, lines)).encode()
    if not text:
        return
    try:
        with path.open("ab", buffering=0) as file:  # a buffer would write what is left of it when it is closed
            before = file.tell()
            try:
                while text:
                    text = text[file.write(text) :]
                os.fsync(file.fileno())
            except OSError:
                file.truncate(before)  # or the next line would be glued to what is there of this one
                raise
    except OSError as error:
        raise OSError(f"{path} could not be written: {error.strerror or error}") from error


def _replace(path: Path, lines: Iterable[Line]) -> None:
    try:
        write_atomically(path, "".join(map(_encoded, lines)))
    except OSError as error:
        raise OSError(f"{path} could not be written: {error.strerror or error}") from error


def _finite(value: float | None) -> float | None:
    """JSON has no NaN and no infinity."""
    return value if value is not None and math.isfinite(value) else None


def _encoded(line: Mapping[str, Any]) -> str:
    return json.dumps(line, allow_nan=False) + "\n"
