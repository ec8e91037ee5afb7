"""From scored evaluation rollouts to figures: means over the test lines, per tag, each line counted once.

A line whose reward is missing is left out of that mean and counted: `counts` says how many lines stand behind each.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nft_ray.types import EvalResult, Rewards, RolloutRequest


def summarise(
    requests: Sequence[RolloutRequest],
    rewards: Sequence[Rewards],
    images: Mapping[int, np.ndarray],
    *,
    seconds: float,
) -> EvalResult:
    """Mean per reward (`geneval`), detail (`geneval/strict`) and, where lines have it, tag (`.../strict/colors`)."""
    prompts = [item.prompt for request in requests for item in request.items for _ in range(item.num_images)]
    tags = np.array([str(prompt.metadata.get("tag", "")) for prompt in prompts])
    metrics: dict[str, float] = {}
    counts: dict[str, int] = {}
    right: dict[int, bool] = {}
    for name in sorted({name for r in rewards for name in (*r.raw, *r.details)}):
        values = np.concatenate([r.values(name) for r in rewards])
        if name.endswith("/strict"):
            lines = zip(prompts, values.tolist(), strict=True)
            right |= {prompt.id: value == 1 for prompt, value in lines if prompt.id in images}
        for tag in ("", *sorted(set(tags) - {""})):
            chosen = values[np.isfinite(values) & ((tags == tag) | (tag == ""))]
            key = f"{name}/{tag}" if tag else name
            counts[key] = len(chosen)
            if len(chosen):
                metrics[key] = float(chosen.mean())
    return EvalResult(metrics=metrics, counts=counts, images=dict(images), seconds=seconds, right=right)


def save_evaluation(folder: Path, epoch: int, result: EvalResult) -> None:
    """Write FOLDER/evaluations/epoch-000010.{json,npz}: the figures and the pictures' pixels."""
    target = folder / "evaluations"
    target.mkdir(parents=True, exist_ok=True)
    figures = {
        "epoch": epoch,
        "metrics": result.metrics,
        "counts": result.counts,
        "seconds": result.seconds,
        "right": {str(line): right for line, right in result.right.items()},
    }
    pictures: dict[str, Any] = {str(line): image for line, image in result.images.items()}
    np.savez_compressed(target / f"epoch-{epoch:06d}.npz", **pictures)
    (target / f"epoch-{epoch:06d}.json").write_text(json.dumps(figures, indent=1))


def load_evaluation(folder: Path, epoch: int) -> EvalResult:
    """What `save_evaluation` wrote; FileNotFoundError where it did not."""
    target = folder / "evaluations"
    figures = json.loads((target / f"epoch-{epoch:06d}.json").read_text())
    with np.load(target / f"epoch-{epoch:06d}.npz") as arrays:
        images = {int(line): arrays[line] for line in arrays}
    return EvalResult(
        metrics=figures["metrics"],
        counts=figures["counts"],
        images=images,
        seconds=figures["seconds"],
        right={int(line): right for line, right in figures["right"].items()},
    )
