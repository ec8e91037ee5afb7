"""What a finished evaluation shows beside its lines: summary.json, contact_sheet.png and a table."""

import json
from collections.abc import Sequence

from nft_ray.config import ExperimentConfig
from nft_ray.evaluation.results import SHEET, SUMMARY, EvaluationFolder, LineResult
from nft_ray.evaluation.summary import headline, summarise_results
from nft_ray.runs import report
from nft_ray.runs.checkpoint import write_atomically


def write_report(folder: EvaluationFolder, config: ExperimentConfig, shown: Sequence[int]) -> str:
    """Write both files, `shown` being the lines with a picture there; returns the table."""
    results = folder.replace(folder.results())  # in order, even where it was killed at its very end
    summary = summarise_results(results)
    write_atomically(folder.path / SUMMARY, json.dumps(summary, indent=1) + "\n")
    metric = headline(config)
    strict = {line: results[line].details.get("geneval/strict") for line in shown}
    report.captioned_sheet(
        {line: folder.image(line) for line in shown},
        {line: [results[line].prompt, _caption(results[line], metric)] for line in shown},
        folder.path / SHEET,
        right={line: value == 1 for line, value in strict.items() if value is not None},
    )
    return report.evaluation_table(summary)


def _caption(result: LineResult, metric: str) -> str:
    value = result.scores.get(metric, result.details.get(metric))
    return f"{metric} {'missing' if value is None else f'{value:.3f}'}"
