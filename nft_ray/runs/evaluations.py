"""The held-out figures of a run, one evaluation after so many epochs: what is kept of it, and read again.

    RUN/evaluations/epoch-000010.json, .npz    the figures; the pixels of the fixed lines' pictures
    RUN/evaluations/epoch-000010/              its lines, while they are scored and after: see evaluation/results.py

A stage with test lines of its own has them under RUN/stages/NAME instead (`Stage.results`).
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from nft_ray.types import EvalResult


def lines_folder(results: Path, epoch: int) -> Path:
    """Where the lines of the evaluation after `epoch` epochs are kept."""
    return results / "evaluations" / f"epoch-{epoch:06d}"


def save_evaluation(results: Path, epoch: int, result: EvalResult) -> None:
    """Write RESULTS/evaluations/epoch-000010.{json,npz}."""
    target = lines_folder(results, epoch)
    target.parent.mkdir(parents=True, exist_ok=True)
    figures = {
        "epoch": epoch,
        "metrics": result.metrics,
        "counts": result.counts,
        "seconds": result.seconds,
        "right": {str(line): right for line, right in result.right.items()},
    }
    pictures: dict[str, Any] = {str(line): image for line, image in result.images.items()}
    np.savez_compressed(target.with_suffix(".npz"), **pictures)
    target.with_suffix(".json").write_text(json.dumps(figures, indent=1))


def load_evaluation(results: Path, epoch: int) -> EvalResult:
    """What `save_evaluation` wrote; FileNotFoundError where it did not."""
    target = lines_folder(results, epoch)
    figures = json.loads(target.with_suffix(".json").read_text())
    with np.load(target.with_suffix(".npz")) as arrays:
        images = {int(line): arrays[line] for line in arrays}
    return EvalResult(
        metrics=figures["metrics"],
        counts=figures["counts"],
        images=images,
        seconds=figures["seconds"],
        right={int(line): right for line, right in figures.get("right", {}).items()},  # old runs have none
    )


def evaluated_epochs(results: Path) -> list[int]:
    """The epochs after which there are figures, in order."""
    found = (results / "evaluations").glob("epoch-*.json")
    return sorted(int(path.stem.removeprefix("epoch-")) for path in found)
