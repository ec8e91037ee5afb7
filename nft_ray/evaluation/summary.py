"""From scored lines to figures: means over the test lines, per tag, each line counted once.

A line whose reward is missing is left out of that mean and counted: `counts` says how many lines stand behind each.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from nft_ray.config import ExperimentConfig
from nft_ray.evaluation.bootstrap import interval
from nft_ray.evaluation.results import LineResult
from nft_ray.types import EvalResult

STRICT = "/strict"
"""A detail with this name says of an image whether it is exactly what was asked for: 1, or not."""


def summarise(results: Sequence[LineResult], images: Mapping[int, np.ndarray], *, seconds: float) -> EvalResult:
    """The figures of one evaluation of a run; `images`: line -> uint8 (H, W, 3), the pictures to keep."""
    strict = max((name for result in results for name in result.details if name.endswith(STRICT)), default=None)
    found = {name: values[np.isfinite(values)] for name, (values, _) in values_by_metric(results).items()}
    return EvalResult(
        metrics={name: float(values.mean()) for name, values in found.items() if len(values)},
        counts={name: len(values) for name, values in found.items()},
        images=dict(images),
        seconds=seconds,
        right={result.line: result.details.get(strict) == 1 for result in results if strict and result.line in images},
    )


def summarise_results(results: Sequence[LineResult]) -> dict[str, dict[str, float | int | None]]:
    """What summary.json holds: metric -> mean, the 95 % interval around it, lines with a score and without."""
    summary: dict[str, dict[str, float | int | None]] = {}
    for metric, (values, prompts) in values_by_metric(results).items():
        scored = np.isfinite(values)
        present = values[scored]
        low, high = interval(present, prompts[scored]) if len(present) else (None, None)
        mean = float(present.mean()) if len(present) else None
        missing = len(values) - len(present)
        summary[metric] = {"mean": mean, "low": low, "high": high, "count": len(present), "missing": missing}
    return summary


def values_by_metric(results: Sequence[LineResult]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Metric -> its lines, in their order: values f64 (N,), NaN where missing; a number of its prompt, i64 (N,)."""
    names = sorted({name for result in results for name in (*result.scores, *result.details)})
    prompts = np.unique([result.prompt for result in results], return_inverse=True)[1]
    tags = [result.tag for result in results]
    values = by_metric({name: np.array([_value(result, name) for result in results]) for name in names}, tags)
    numbers = by_metric(dict.fromkeys(names, prompts), tags)
    return {metric: (values[metric], numbers[metric]) for metric in values}


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


def headline(config: ExperimentConfig) -> str:
    """The metric that is shown where there is room for one."""
    return "geneval/strict" if "geneval" in config.rewards else next(iter(config.trained_weights))


def _value(result: LineResult, name: str) -> float:
    found = result.scores.get(name, result.details.get(name))
    return math.nan if found is None else found
