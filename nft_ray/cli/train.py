"""`nft-ray train`: the composition root. Everything is checked, then built, run, and reported on."""

import argparse
import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager

from actors.placement import needs, table
from nft_ray.cli.console import Console
from nft_ray.config import ExperimentConfig, dump, load
from nft_ray.evaluation.summary import headline
from nft_ray.models.base import check_model
from nft_ray.models.lora import check_layers, read_lora
from nft_ray.prompts.draw import PromptSet, check_prompts, load_prompts
from nft_ray.prompts.sets import missing
from nft_ray.rewards.base import TorchRewardConfig, check_lines, reward_files
from nft_ray.rewards.weights import require, weights_root
from nft_ray.roles import Roles
from nft_ray.runs import report
from nft_ray.runs.checkpoint import RunFolder, in_submitted_job, run_root, write_atomically
from nft_ray.runs.evaluations import load_evaluation
from nft_ray.runs.export import export_policy
from nft_ray.runs.stages import Stage, stages_of
from nft_ray.runs.tracking import RunTracker, read_metrics, ui_command
from nft_ray.trainer import Trainer

PromptSets = tuple[PromptSet, PromptSet]
"""(train, test)."""
REPORTED = "table.txt"
"""Written last: where it is, the report is complete."""


class Interrupted(Exception):  # noqa: N818
    """Ctrl-C or SIGTERM; the message says what was kept."""


def train(args: argparse.Namespace) -> int:
    """Run an experiment to its end, or what is left of it; returns the exit status."""
    config = load(args.config, args.set)
    stages = stages_of(config)
    check_model(config.model)
    if config.model.lora.start is not None:
        check_layers(read_lora(config.model.lora.start)[0], config.model, config.model.lora.start)
    if args.dry_run:
        return _dry_run(config, stages)
    prompts = [_checked_prompts(stage.config) for stage in stages]
    if not args.local:
        from nft_ray.cli.cluster import check_before_start

        for stage in stages:
            check_before_start(stage.config, args.address)
    folder = RunFolder(run_root(config, os.environ) / config.run.name, keep=config.run.keep_checkpoints)
    folder.claim(config, overwrite=args.overwrite)
    if in_submitted_job(os.environ):
        sys.stdout.write(f"this run is kept in {folder.path}\n")
    start, reported = folder.latest(), folder.path / REPORTED
    if start is not None and start.epoch >= config.run.num_epochs and reported.exists():
        sys.stdout.write(f"{reported.read_text()}\nrun {config.run.name} is finished: {folder.path}\n")
        return 0
    return _run(args, config, folder, list(zip(stages, prompts, strict=True)), start.epoch if start else 0)


def _dry_run(config: ExperimentConfig, stages: Sequence[Stage]) -> int:
    """Print the resolved experiment, what each stage needs of the cluster, and what has to be fetched first."""
    sys.stdout.write(f"{dump(config)}\n")
    absent: dict[str, None] = {}
    for stage in stages:
        sets = (stage.config.prompts.train, stage.config.prompts.test)
        lines = [line for line in map(missing, sets) if line is not None]
        if not lines:
            _checked_prompts(stage.config)
        absent |= dict.fromkeys([*lines, *_missing_weights(stage.config)])
        heading = f"stage {stage.name}: epochs {stage.first_epoch + 1} to {stage.last_epoch}\n" if stage.name else ""
        sys.stdout.write(f"{heading}{table(needs(stage.config))}\n")
    for line in absent:
        sys.stdout.write(f"not here yet: {line}\n")
    return 0


def _missing_weights(config: ExperimentConfig) -> list[str]:
    """A line for each reward whose published files are not here."""
    lines = []
    for name, reward in config.reward_configs.items():
        if isinstance(reward, TorchRewardConfig):
            try:
                require(name, reward_files(name, reward), weights_root(reward.weights))
            except ValueError as error:
                lines.append(str(error))
    return lines


def _checked_prompts(config: ExperimentConfig) -> PromptSets:
    """(train, test); ValueError with one line where they are not there, too few, or not what a reward needs."""
    prompts = (load_prompts(config.prompts.train), load_prompts(config.prompts.test))
    check_prompts(prompts[0], config)
    for name, reward in config.reward_configs.items():
        check_lines(name, ((line.text, line.metadata) for part in prompts for line in part.lines), reward)
    return prompts


def _run(
    args: argparse.Namespace,
    config: ExperimentConfig,
    folder: RunFolder,
    stages: Sequence[tuple[Stage, PromptSets]],
    start_epoch: int,
) -> int:
    tracker = RunTracker(folder.path, config, start_epoch=start_epoch)
    console = Console(tracker, config.run.num_epochs, metric=headline(config))
    left = [(stage, prompts) for stage, prompts in stages if stage.last_epoch > start_epoch]
    console.say(f"run {config.run.name}: {folder.path}")
    console.say(f"MLflow: {ui_command(config, folder.path.parent)}")
    if start_epoch:
        console.say(f"going on after epoch {start_epoch}")
    started, finished = time.monotonic(), False
    try:
        (folder.path / REPORTED).unlink(missing_ok=True)
        if left:  # else it ended between its last checkpoint and its report
            with _ray(args, config, console) as dashboard_url:
                asyncio.run(_train(args, left, folder, console, dashboard_url))
        _report(config, stages, folder, tracker, console, seconds=time.monotonic() - started)
        finished = True
    except (KeyboardInterrupt, asyncio.CancelledError):
        latest = folder.latest()
        kept = f"epoch {latest.epoch} is kept in {latest.path}" if latest else "before the first checkpoint"
        raise Interrupted(f"interrupted: {kept}; run the same command to go on") from None
    finally:
        tracker.close(failed=not finished)
    return 0


@contextmanager
def _ray(args: argparse.Namespace, config: ExperimentConfig, console: Console) -> Iterator[str | None]:
    if args.local:
        yield None
        return
    from nft_ray.cli.cluster import cluster

    with cluster(config, args.address, console.say) as dashboard_url:
        yield dashboard_url


@asynccontextmanager
async def _roles(
    args: argparse.Namespace, config: ExperimentConfig, console: Console, dashboard_url: str | None
) -> AsyncIterator[Roles]:
    if args.local:
        from nft_ray.local import local_roles

        yield local_roles(config)
        return
    from nft_ray.cli.cluster import planes

    async with planes(config, console.say, dashboard_url) as roles:
        yield roles


async def _train(
    args: argparse.Namespace,
    stages: Sequence[tuple[Stage, PromptSets]],
    folder: RunFolder,
    console: Console,
    dashboard_url: str | None,
) -> None:
    """Every stage with roles of its own: what one leaves for the next is in the checkpoint that ends it."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    for stage, prompts in stages:
        if stage.name:
            console.say(f"stage {stage.name}: epochs {stage.first_epoch + 1} to {stage.last_epoch}")
        console.metric = headline(stage.config)
        place = RunFolder(folder.path, folder.keep, results=stage.results(folder.path))
        async with _roles(args, stage.config, console, dashboard_url) as roles:
            await Trainer(stage.config, roles, place, console, *prompts, first_epoch=stage.first_epoch).run()


def _report(
    config: ExperimentConfig,
    stages: Sequence[tuple[Stage, PromptSets]],
    folder: RunFolder,
    tracker: RunTracker,
    console: Console,
    *,
    seconds: float,
) -> None:
    """Everything that a finished run leaves behind: LoRA, pictures, summary and table.

    Pictures and summary are of the last stage's test lines; the table has a part for every stage, as it was at its end.
    """
    latest = folder.latest()
    assert latest is not None
    exported = export_policy(latest.state.ema, config.model, folder.path).name
    small = [exported] if config.model.tuning == "lora" else []  # a transformer is gigabytes: it stays here
    tables, figures = [], {}
    for stage, (train_set, test_set) in stages:
        results = stage.results(folder.path)
        epoch = latest.epoch if stage is stages[-1][0] else stage.last_epoch
        base, trained = load_evaluation(results, 0), load_evaluation(results, epoch)
        heading = f"stage {stage.name}, after {epoch} epochs\n" if stage.name else ""
        tags = shared_tags(train_set, test_set)
        tables.append(heading + report.table(base.metrics, trained.metrics, trained.counts, shared_tags=tags))
        figures[stage.name] = (base, trained)
    report.before_after(
        base.images,
        trained.images,
        {line: test_set.lines[line].text for line in base.images},
        folder.path / "before_after.png",
        verdicts={line: (base.right[line], trained.right[line]) for line in base.right.keys() & trained.right.keys()},
    )
    report.reward_curve(read_metrics(folder.path), folder.path / "reward_curve.png")
    summary = report.summary(config, figures, seconds=seconds, epochs=latest.epoch)
    write_atomically(folder.path / "summary.json", json.dumps(summary, indent=1) + "\n")
    tracker.log_artifacts(
        [folder.path / name for name in (*small, "before_after.png", "reward_curve.png", "summary.json")]
    )
    shown = "\n\n".join(tables)
    write_atomically(folder.path / REPORTED, shown + "\n")
    console.say(f"\n{shown}\n")
    for name in ("before_after.png", "reward_curve.png", "summary.json", "metrics.jsonl", exported):
        console.say(f"{folder.path / name}")


def shared_tags(train_set: PromptSet, test_set: PromptSet) -> set[str]:
    """Tags with a test prompt that is also trained on: their figures are not held out."""
    trained = {prompt.text for prompt in train_set.lines}
    return {
        str(prompt.metadata["tag"]) for prompt in test_set.lines if prompt.text in trained and "tag" in prompt.metadata
    }
