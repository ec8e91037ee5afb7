"""The held-out figures of a run, one evaluation after so many epochs: what is kept of it, and read again.

    RUN/evaluations/epoch-000010.npz           the pixels of the fixed lines' pictures
    RUN/evaluations/epoch-000010.json          the figures, and the sha256 of the pixels: written last
    RUN/evaluations/epoch-000010/              its lines, while they are scored and after: see evaluation/results.py

A stage with test lines of its own has them under RUN/stages/NAME instead (`Stage.results`).
"""

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np

from nft_ray.runs.checkpoint import BEYOND, PARTIAL, write_atomically
from nft_ray.types import EvalResult

_log = logging.getLogger(__name__)


def lines_folder(results: Path, epoch: int) -> Path:
    """Where the lines of the evaluation after `epoch` epochs are kept."""
    return results / "evaluations" / f"epoch-{epoch:06d}"


def save_evaluation(results: Path, epoch: int, result: EvalResult) -> None:
    """Write RESULTS/evaluations/epoch-000010.{npz,json}, each whole or not at all."""
    target = lines_folder(results, epoch)
    target.parent.mkdir(parents=True, exist_ok=True)
    pictures: dict[str, Any] = {str(line): image for line, image in result.images.items()}
    partial = target.with_suffix(f".npz{PARTIAL}")
    with partial.open("wb") as file:
        np.savez_compressed(file, **pictures)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(target.with_suffix(".npz"))
    figures = {
        "epoch": epoch,
        "metrics": result.metrics,
        "counts": result.counts,
        "seconds": result.seconds,
        "right": {str(line): right for line, right in result.right.items()},
        "pictures": _sum(target.with_suffix(".npz")),
    }
    write_atomically(target.with_suffix(".json"), json.dumps(figures, indent=1))


def load_evaluation(results: Path, epoch: int) -> EvalResult:
    """What `save_evaluation` wrote; ValueError, one line, where it is lost or damaged."""
    target = lines_folder(results, epoch)
    if reason := _damage(target):
        raise ValueError(f"the evaluation after {epoch} epochs cannot be read: {reason}")
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
    """The epochs after which there are figures, whole, in order; a line in the log about each that is damaged."""
    found = []
    for path in sorted((results / "evaluations").glob("epoch-*.json")):
        epoch = int(path.stem.removeprefix("epoch-"))
        if reason := _damage(lines_folder(results, epoch)):
            _log.warning("the evaluation after %d epochs does not count: %s", epoch, reason)
        else:
            found.append(epoch)
    return found


def drop_evaluations(results: Path, epoch: int) -> None:
    """Those after more than `epoch` epochs count no more, for their policy is given up: they are put aside."""
    for path in sorted((results / "evaluations").glob("epoch-*")):
        if path.suffix in (".json", ".npz") and int(path.stem.removeprefix("epoch-")) > epoch:
            path.replace(path.with_name(path.name + BEYOND))


def figures(results: Path, epoch: int) -> dict[str, float]:
    """The metrics of one evaluation, its pictures unread; empty where there is none."""
    try:
        found: dict[str, float] = json.loads(lines_folder(results, epoch).with_suffix(".json").read_text())["metrics"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return found


def _damage(target: Path) -> str | None:
    """What is wrong with the two files of an evaluation; None where they are what was written."""
    text, pixels = target.with_suffix(".json"), target.with_suffix(".npz")
    try:
        found = json.loads(text.read_text())
        whole = {"metrics", "counts", "seconds"} <= found.keys()
        expected = found.get("pictures")
        if expected is None:  # from before there were sums
            with np.load(pixels) as arrays:
                for line in arrays:
                    arrays[line]
        elif _sum(pixels) != expected:
            return f"{pixels}: other bytes than were written (sha256)"
    except FileNotFoundError as error:
        return f"{error.filename}: is missing"
    except OSError as error:
        return " ".join(str(error).split())
    except Exception:  # noqa: BLE001  what a damaged zip raises is not to be foreseen: zlib.error, BadZipFile, KeyError
        return f"{text if not pixels.exists() else pixels}: cannot be read; it was cut off or changed"
    return None if whole else f"{text}: lacks figures"


def _sum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
