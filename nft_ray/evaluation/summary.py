"""From scored evaluation rollouts to figures: means over the test lines, per tag, each line counted once.

A line whose reward is missing is left out of that mean and counted: `counts` says how many lines stand behind each.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nft_ray.types import EvalResult, Prompt, Rewards, RolloutRequest


def summarise(
    requests: Sequence[RolloutRequest],
    rewards: Sequence[Rewards],
    images: Mapping[int, np.ndarray],
    *,
    seconds: float,
) -> EvalResult:
    """Mean per reward (`geneval`), detail (`geneval/strict`) and, where lines have it, tag (`.../strict/colors`)."""
    prompts = [item.prompt for request in requests for item in request.items for _ in range(item.num_images)]
    names = sorted({name for r in rewards for name in (*r.raw, *r.details)})
    values = {name: np.concatenate([r.values(name) for r in rewards]) for name in names}
    found = by_metric(values, [tag_of(prompt) for prompt in prompts])
    right: dict[int, bool] = {}
    for name in names:
        if name.endswith("/strict"):
            lines = zip(prompts, values[name].tolist(), strict=True)
            right |= {prompt.id: value == 1 for prompt, value in lines if prompt.id in images}
    present = {key: chosen[np.isfinite(chosen)] for key, chosen in found.items()}
    return EvalResult(
        metrics={key: float(chosen.mean()) for key, chosen in present.items() if len(chosen)},
        counts={key: len(chosen) for key, chosen in present.items()},
        images=dict(images),
        seconds=seconds,
        right=right,
    )


def tag_of(prompt: Prompt) -> str:
    """GenEval's tag of a line, or nothing."""
    return str(prompt.metadata.get("tag", ""))


def by_metric(values: Mapping[str, np.ndarray], tags: Sequence[str]) -> dict[str, np.ndarray]:
    """Reward or detail -> (N,) becomes metric -> the lines behind it: `geneval/strict`, `geneval/strict/colors`, ...

    NaN stays: a missing score belongs to its metric, too.
    """
    of = np.array(tags)
    return {
        f"{name}/{tag}" if tag else name: lines[(of == tag) | (tag == "")]
        for name, lines in values.items()
        for tag in ("", *sorted(set(tags) - {""}))
    }


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
        right={int(line): right for line, right in figures.get("right", {}).items()},  # old runs have none
    )
