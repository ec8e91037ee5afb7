"""Trackers at work, and what a trainer tells them."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from nft_ray.config import ExperimentConfig
from nft_ray.runs.evaluations import save_evaluation
from nft_ray.runs.tracking import RunTracker
from nft_ray.types import EvalResult

UNUSABLE = "tracking.uri=no-such-store://nowhere"
BEGUN: list[RunTracker] = []
FULL_S = 120.0
"""The first use of MLflow imports it and creates its tables: 11 s on an idle machine."""


def evaluation(value: float, color: int = 0) -> EvalResult:
    images = {line: np.full((32, 32, 3), color, dtype=np.uint8) for line in (0, 3)}
    return EvalResult(metrics={"geneval/strict": value}, counts={"geneval/strict": 6}, images=images, seconds=0.5)


def steps(epoch: int) -> tuple[dict[str, float], ...]:
    """Two optimizer steps per epoch."""
    return tuple({"nft/loss": 0.1 * n, "nft/optimizer_step": float(n)} for n in (2 * epoch - 1, 2 * epoch))


def begun(folder: Path, config: ExperimentConfig, *, epoch: int = 0) -> RunTracker:
    """A tracker at work."""
    tracker = RunTracker(folder, config)
    tracker.begin(epoch)
    BEGUN.append(tracker)
    return tracker


def abandon() -> None:
    """End the threads of trackers that were never closed: one that tries again would meet the next test's stand-ins."""
    for tracker in BEGUN:
        tracker._begun._complete = True
        tracker._begun.wake()
    BEGUN.clear()


def train(tracker: RunTracker, epochs: range) -> None:
    """What the trainer does; an evaluation is saved, then logged."""

    def evaluate(epoch: int) -> None:
        result = evaluation(0.5 + epoch / 100, color=epoch)
        save_evaluation(tracker._folder, epoch, result)
        tracker.log_evaluation(epoch, result)

    if epochs.start == 1:
        evaluate(0)
    for epoch in epochs:
        if epoch % 2 == 0:
            evaluate(epoch)
        tracker.log_epoch(epoch, {"reward/total": epoch / 10, "nft/loss": float("nan")}, steps(epoch))


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
