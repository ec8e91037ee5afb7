"""What a finished run leaves behind: its policy for plain diffusers, pictures, summary and table.

RUN/lora/ or RUN/transformer/    before_after.png    reward_curve.png    summary.json    table.txt (last)
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nft_ray.config import ExperimentConfig
from nft_ray.prompts.draw import PromptSet, shared_tags
from nft_ray.runs import report
from nft_ray.runs.checkpoint import write_atomically
from nft_ray.runs.evaluations import load_evaluation
from nft_ray.runs.export import export_policy
from nft_ray.runs.folder import RunFolder
from nft_ray.runs.metrics import METRICS, read_metrics
from nft_ray.runs.stages import Stage

PromptSets = tuple[PromptSet, PromptSet]
"""(train, test)."""
TABLE = "table.txt"
"""Written last: where it is, everything is."""
PICTURES, CURVE, SUMMARY = "before_after.png", "reward_curve.png", "summary.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Closing:
    """The table as text, the files to look at, and those that a tracker should have."""

    table: str
    files: tuple[Path, ...]
    artifacts: tuple[Path, ...]


def closed(folder: RunFolder) -> str | None:
    """The table of a run that has been closed."""
    path = folder.path / TABLE
    return path.read_text() if path.exists() else None


def reopen(folder: RunFolder) -> None:
    """It goes on: what it leaves behind is not yet all there."""
    (folder.path / TABLE).unlink(missing_ok=True)


def close(
    config: ExperimentConfig, stages: Sequence[tuple[Stage, PromptSets]], folder: RunFolder, *, seconds: float
) -> Closing:
    """Write all of it, of the newest checkpoint.

    Pictures and summary are of the last stage's test lines; the table has a part for every stage, as it was at its end.
    """
    latest = folder.latest()
    assert latest is not None
    exported = export_policy(latest.state.ema, config.model, folder.path)
    tables, figures = [], {}
    for stage, (train, test) in stages:
        results = stage.results(folder.path)
        epoch = latest.epoch if stage is stages[-1][0] else stage.last_epoch
        heading = f"stage {stage.name}, after {epoch} epochs\n" if stage.name else ""
        try:
            base, trained = load_evaluation(results, 0), load_evaluation(results, epoch)
        except ValueError as lost:
            if stage is stages[-1][0]:
                raise
            tables.append(f"{heading}{lost}")  # its policy is gone: nothing can evaluate it again
            continue
        tags = shared_tags(train, test)
        tables.append(heading + report.table(base.metrics, trained.metrics, trained.counts, shared_tags=tags))
        figures[stage.name] = (base, trained)
    report.before_after(
        base.images,
        trained.images,
        {line: test.lines[line].text for line in base.images},
        folder.path / PICTURES,
        verdicts={line: (base.right[line], trained.right[line]) for line in base.right.keys() & trained.right.keys()},
    )
    report.reward_curve(read_metrics(folder.path), folder.path / CURVE)
    summary = report.summary(config, figures, seconds=seconds, epochs=latest.epoch)
    write_atomically(folder.path / SUMMARY, json.dumps(summary, indent=1) + "\n")
    table = "\n\n".join(tables)
    write_atomically(folder.path / TABLE, table + "\n")
    made = [folder.path / name for name in (PICTURES, CURVE, SUMMARY)]
    small = [exported] if config.model.tuning == "lora" else []  # a transformer is gigabytes: it stays here
    return Closing(table=table, files=(*made, folder.path / METRICS, exported), artifacts=(*small, *made))
