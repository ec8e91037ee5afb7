"""`nft-ray train`: the composition root. Everything is checked, then built, run, and reported on."""

import argparse
import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from actors.placement import needs, table
from nft_ray import report
from nft_ray.checkpoint import RunFolder, in_submitted_job, run_root, write_atomically
from nft_ray.cli.console import Console
from nft_ray.config import ExperimentConfig, dump, load
from nft_ray.evaluation import load_evaluation
from nft_ray.export import export_policy
from nft_ray.models.base import check_model
from nft_ray.prompts import PromptSet, check_prompts, load_prompts
from nft_ray.rewards.base import check_lines
from nft_ray.roles import Roles
from nft_ray.tracking import RunTracker, read_metrics, ui_command
from nft_ray.trainer import Trainer

REPORTED = "table.txt"
"""Written last: where it is, the report is complete."""


class Interrupted(Exception):  # noqa: N818
    """Ctrl-C or SIGTERM; the message says what was kept."""


def train(args: argparse.Namespace) -> int:
    """Run an experiment to its end, or what is left of it; returns the exit status."""
    config = load(args.config, args.set)
    prompts = (load_prompts(config.prompts.train), load_prompts(config.prompts.test))
    check_prompts(prompts[0], config)
    for name in config.rewards:
        check_lines(name, ((line.text, line.metadata) for part in prompts for line in part.lines))
    check_model(config.model)
    if args.dry_run:
        sys.stdout.write(f"{dump(config)}\n{table(needs(config))}\n")
        return 0
    if not args.local:
        from nft_ray.cli.cluster import check_before_start

        check_before_start(config, args.address)
    folder = RunFolder(run_root(config, os.environ) / config.run.name, keep=config.run.keep_checkpoints)
    folder.claim(config, overwrite=args.overwrite)
    if in_submitted_job(os.environ):
        sys.stdout.write(f"this run is kept in {folder.path}\n")
    start, reported = folder.latest(), folder.path / REPORTED
    if start is not None and start.epoch >= config.run.num_epochs and reported.exists():
        sys.stdout.write(f"{reported.read_text()}\nrun {config.run.name} is finished: {folder.path}\n")
        return 0
    return _run(args, config, folder, prompts, start.epoch if start else 0)


def _run(
    args: argparse.Namespace,
    config: ExperimentConfig,
    folder: RunFolder,
    prompts: tuple[PromptSet, PromptSet],
    start_epoch: int,
) -> int:
    tracker = RunTracker(folder.path, config, start_epoch=start_epoch)
    console = Console(tracker, config.run.num_epochs, metric=headline(config))
    console.say(f"run {config.run.name}: {folder.path}")
    console.say(f"MLflow: {ui_command(config, folder.path.parent)}")
    if start_epoch:
        console.say(f"going on after epoch {start_epoch}")
    started, finished = time.monotonic(), False
    try:
        (folder.path / REPORTED).unlink(missing_ok=True)
        if start_epoch < config.run.num_epochs:  # else it ended between its last checkpoint and its report
            with _ray(args, config, console) as dashboard_url:
                asyncio.run(_train(args, config, folder, console, prompts, dashboard_url))
        _report(config, folder, tracker, console, seconds=time.monotonic() - started)
        finished = True
    except (KeyboardInterrupt, asyncio.CancelledError):
        latest = folder.latest()
        kept = f"epoch {latest.epoch} is kept in {latest.path}" if latest else "before the first checkpoint"
        raise Interrupted(f"interrupted: {kept}; run the same command to go on") from None
    finally:
        tracker.close(failed=not finished)
    return 0


def headline(config: ExperimentConfig) -> str:
    """The metric that the console shows of an evaluation."""
    return "geneval/strict" if "geneval" in config.rewards else next(iter(config.trained_weights))


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
    config: ExperimentConfig,
    folder: RunFolder,
    console: Console,
    prompts: tuple[PromptSet, PromptSet],
    dashboard_url: str | None,
) -> None:
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    async with _roles(args, config, console, dashboard_url) as roles:
        await Trainer(config, roles, folder, console, *prompts).run()


def _report(
    config: ExperimentConfig, folder: RunFolder, tracker: RunTracker, console: Console, *, seconds: float
) -> None:
    """Everything that a finished run leaves behind: LoRA, pictures, summary and table."""
    latest = folder.latest()
    assert latest is not None
    base, trained = load_evaluation(folder.path, 0), load_evaluation(folder.path, latest.epoch)
    exported = export_policy(latest.state.ema, config.model, folder.path).name
    small = [exported] if config.model.tuning == "lora" else []  # a transformer is gigabytes: it stays here
    train_set, test_set = load_prompts(config.prompts.train), load_prompts(config.prompts.test)
    report.before_after(
        base.images,
        trained.images,
        {line: test_set.lines[line].text for line in base.images},
        folder.path / "before_after.png",
        verdicts={line: (base.right[line], trained.right[line]) for line in base.right.keys() & trained.right.keys()},
    )
    report.reward_curve(read_metrics(folder.path), folder.path / "reward_curve.png")
    summary = report.summary(config, base, trained, seconds=seconds, epochs=latest.epoch)
    write_atomically(folder.path / "summary.json", json.dumps(summary, indent=1) + "\n")
    shown = report.table(base.metrics, trained.metrics, trained.counts, shared_tags=shared_tags(train_set, test_set))
    tracker.log_artifacts(
        [folder.path / name for name in (*small, "before_after.png", "reward_curve.png", "summary.json")]
    )
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
