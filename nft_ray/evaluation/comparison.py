"""Two evaluations of the same lines with the same noise: what B changed, line by line, against A."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nft_ray.config import differences
from nft_ray.evaluation.bootstrap import COVERAGE, interval
from nft_ray.evaluation.results import COMPARISON, LineResult, read_identity, read_results
from nft_ray.evaluation.summary import values_by_metric
from nft_ray.runs.checkpoint import write_atomically
from nft_ray.runs.report import table_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Paired:
    """B minus A over the lines that both scored: mean, its 95 % bootstrap interval, how many got better and worse."""

    a: float
    b: float
    difference: float
    low: float
    high: float
    count: int
    better: int
    worse: int
    missing: int


def compare(a: Sequence[LineResult], b: Sequence[LineResult], names: tuple[str, str]) -> dict[str, Paired]:
    """Metric -> paired difference, of the metrics that both have. `names` are told where they cannot be paired.

    ValueError with one line where lines, prompts or seeds differ, or no metric is in both.
    """
    for result in (a, b):
        assert [line.line for line in result] == sorted(line.line for line in result)
    _check(a, b, names)
    left, right = values_by_metric(a), values_by_metric(b)
    shared = [metric for metric in left if metric in right]
    if not shared:
        raise ValueError(f"{names[0]} and {names[1]} have no metric in common: {_some(left)}; {_some(right)}")
    pairs: dict[str, Paired] = {}
    for metric in shared:
        (before, prompts), (after, _) = left[metric], right[metric]
        both = np.isfinite(before) & np.isfinite(after)
        if both.any():
            pairs[metric] = _paired(before[both], after[both], prompts[both], missing=int((~both).sum()))
    return pairs


def compare_folders(a: Path, b: Path, names: tuple[str, str], output: Path) -> tuple[list[str], dict[str, Paired]]:
    """(what the two evaluations differ in, the pairs); both are written to OUTPUT/compare.json as well.

    ValueError with one line where one of them is not finished, or they cannot be paired.
    """
    pairs = compare(_finished(a), _finished(b), names)
    changed = differences(read_identity(a), read_identity(b))
    found = {
        "a": names[0],
        "b": names[1],
        "differs_in": changed,
        "coverage": COVERAGE,
        "metrics": {name: asdict(pair) for name, pair in pairs.items()},
    }
    output.mkdir(parents=True, exist_ok=True)
    write_atomically(output / COMPARISON, json.dumps(found, indent=1) + "\n")
    return changed, pairs


def comparison_table(pairs: dict[str, Paired]) -> str:
    """As for one evaluation, a row per metric: both means, the difference with its interval, lines better and worse."""
    shown = table_rows(pairs)
    width = max(len(name) for name in [*shown, "B minus A"])
    head = f"{'B minus A':<{width}}  {'lines':>6}  {'A':>9}  {'B':>9}  {'difference':>10}  {'95 % interval':>20}"
    rows = [f"{head}  {'better':>6}  {'worse':>6}"]
    rows.append("-" * len(rows[0]))
    for name in shown:
        pair = pairs[name]
        bounds = f"{pair.low:+.4f} to {pair.high:+.4f}"
        rows.append(
            f"{name:<{width}}  {pair.count:>6}  {pair.a:>9.4f}  {pair.b:>9.4f}  {pair.difference:>+10.4f}"
            f"  {bounds:>20}  {pair.better:>6}  {pair.worse:>6}"
        )
    return "\n".join(rows)


def _finished(folder: Path) -> list[LineResult]:
    """Every line of an evaluation, in order; ValueError where it is not finished: two halves compare other prompts."""
    found, wanted = read_results(folder, whole=False), read_identity(folder)["prompts"]["lines"]
    if len(found) != wanted:
        raise ValueError(f"{folder}: has {len(found)} of {wanted} lines: run its command again to finish it")
    return sorted(found, key=lambda result: result.line)  # killed at its very end, it is not in order yet


def _paired(a: np.ndarray, b: np.ndarray, prompts: np.ndarray, *, missing: int) -> Paired:
    change = b - a
    low, high = interval(change, prompts)
    return Paired(
        a=float(a.mean()),
        b=float(b.mean()),
        difference=float(change.mean()),
        low=low,
        high=high,
        count=len(change),
        better=int((change > 0).sum()),
        worse=int((change < 0).sum()),
        missing=missing,
    )


def _check(a: Sequence[LineResult], b: Sequence[LineResult], names: tuple[str, str]) -> None:
    if len(a) != len(b):
        raise ValueError(f"{names[0]} has {len(a)} lines and {names[1]} has {len(b)}: finish both, on the same prompts")
    for one, other in zip(a, b, strict=True):
        for what in ("line", "prompt", "seed"):
            left: Any = getattr(one, what)
            right: Any = getattr(other, what)
            if left != right:
                raise ValueError(
                    f"line {one.line}: {what} is {left!r} in {names[0]} and {right!r} in {names[1]}; only the same "
                    "prompts with the same evaluation.seed can be paired"
                )


def _some(metrics: Iterable[str]) -> str:
    return ", ".join(list(metrics)[:4])
