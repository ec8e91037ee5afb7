"""`nft-ray train`: an experiment is checked, run to its end or what is left of it, and reported on."""

import argparse
import logging
import os
import shutil
import time
from collections.abc import Sequence

from actors.footprint import disk_warnings, footprint
from actors.placement import local_needs, needs, table
from nft_ray.cli.console import Console, say
from nft_ray.cli.failures import log_to
from nft_ray.cli.place import STOPPED, Interrupted, Place, run_until_stopped
from nft_ray.cli.watch import Ending
from nft_ray.config import ExperimentConfig, dump, load
from nft_ray.evaluation.summary import headline
from nft_ray.models.base import check_model
from nft_ray.models.lora import check_layers, read_lora
from nft_ray.models.resolve import resolve
from nft_ray.prompts.draw import experiment_prompts
from nft_ray.prompts.sets import missing
from nft_ray.rewards.weights import missing_weights
from nft_ray.runs import closing
from nft_ray.runs.checkpoint import RunFolder, in_submitted_job, run_root, whole_checkpoints
from nft_ray.runs.closing import PromptSets
from nft_ray.runs.stages import Stage, stages_of
from nft_ray.runs.tracking import RunTracker, ui_command
from nft_ray.trainer import Trainer

logger = logging.getLogger(__name__)
StagesWithPrompts = Sequence[tuple[Stage, PromptSets]]


def train(args: argparse.Namespace) -> int:
    """Run an experiment to its end, or what is left of it; returns the exit status."""
    config = resolve(load(args.config, args.set))
    stages = stages_of(config)
    check_model(config.model)
    if config.model.lora.start is not None:
        check_layers(read_lora(config.model.lora.start)[0], config.model, config.model.lora.start)
    if args.dry_run:
        return _dry_run(config, stages, local=args.local)
    prompts = [experiment_prompts(stage.config) for stage in stages]
    for stage in stages:
        Place(local=args.local, address=args.address, say=say).check(stage.config)
    folder = RunFolder(run_root(config, os.environ) / config.run.name, keep=config.run.keep_checkpoints)
    _check_disk(stages, folder)
    folder.claim(config, overwrite=args.overwrite)
    log_to(folder.path)
    if in_submitted_job(os.environ):
        say(f"this run is kept in {folder.path}")
    start, table = folder.latest(), closing.closed(folder)
    if start is not None and start.epoch >= config.run.num_epochs and table is not None:
        say(f"{table}\nrun {config.run.name} is finished: {folder.path}")
        return 0
    return _run(args, config, folder, list(zip(stages, prompts, strict=True)), start.epoch if start else 0)


def _check_disk(stages: Sequence[Stage], folder: RunFolder) -> None:
    """ValueError where the disk has no room for one checkpoint, a warning where it has none for all that are kept."""
    there = next(path for path in (folder.path, *folder.path.parents) if path.exists())
    free, kept = shutil.disk_usage(there).free, len(whole_checkpoints(folder.path / "checkpoints"))
    plans = [plan for plan in (footprint(stage.config) for stage in stages) if plan is not None]
    if plans:
        largest = max(plans, key=lambda plan: plan.checkpoint)
        for line in disk_warnings(largest, folder.keep, free, str(there), kept):
            logger.warning("%s", line)


def _dry_run(config: ExperimentConfig, stages: Sequence[Stage], *, local: bool) -> int:
    """Print the resolved experiment, what each stage needs, and what has to be fetched first."""
    say(dump(config))
    absent: dict[str, None] = {}
    for stage in stages:
        sets = (stage.config.prompts.train, stage.config.prompts.test)
        lines = [line for line in map(missing, sets) if line is not None]
        if not lines:
            experiment_prompts(stage.config)
        absent |= dict.fromkeys([*lines, *missing_weights(stage.config.reward_configs)])
        if stage.name:
            say(f"stage {stage.name}: epochs {stage.first_epoch + 1} to {stage.last_epoch}")
        say(table(local_needs(stage.config) if local else needs(stage.config)))
        if plan := footprint(stage.config):
            say(str(plan))
    if local:
        say("--local: one process, one thing after the other; nothing is reserved, no Ray is started")
    for line in absent:
        say(f"not here yet: {line}")
    return 0


def _run(
    args: argparse.Namespace, config: ExperimentConfig, folder: RunFolder, stages: StagesWithPrompts, start_epoch: int
) -> int:
    tracker = RunTracker(folder.path, config, start_epoch=start_epoch)
    console = Console(tracker, config.run.num_epochs, metric=headline(config))
    place = Place(local=args.local, address=args.address, say=console.say, owner=str(folder.path))
    left = [(stage, prompts) for stage, prompts in stages if stage.is_left(folder.path, start_epoch)]
    console.say(f"run {config.run.name}: {folder.path}")
    console.say(f"MLflow: {ui_command(config, folder.path.parent)}")
    if start_epoch:
        console.say(f"going on after epoch {start_epoch}")
    started, finished = time.monotonic(), False
    ending = Ending(kept=lambda: _kept(folder), close=lambda: tracker.close(failed=True))
    try:
        closing.reopen(folder)
        if left:  # else it ended between its last checkpoint and its report
            with place.ray(config, ending) as dashboard_url:
                place.check_connected([stage.config for stage, _ in left])
                run_until_stopped(_train(place, left, folder, console, dashboard_url))
        made = closing.close(config, stages, folder, seconds=time.monotonic() - started)
        tracker.log_artifacts(made.artifacts)
        console.say(f"\n{made.table}\n")
        for path in made.files:
            console.say(str(path))
        finished = True
    except STOPPED:
        raise Interrupted(f"interrupted: {_kept(folder)}") from None
    except Exception as error:
        if whole_checkpoints(folder.path / "checkpoints"):
            error.add_note(_kept(folder))
        raise
    finally:
        tracker.close(failed=not finished)
    return 0


def _kept(folder: RunFolder) -> str:
    """What a stopped run has left, for the line that says why it stopped."""
    whole = whole_checkpoints(folder.path / "checkpoints")
    kept = f"epoch {int(whole[-1].name.removeprefix('epoch-'))} is kept in {whole[-1]}" if whole else ""
    return f"{kept or 'before the first checkpoint'}; run the same command to go on"


async def _train(
    place: Place, stages: StagesWithPrompts, folder: RunFolder, console: Console, dashboard_url: str | None
) -> None:
    """Every stage with roles of its own: what one leaves for the next is in the checkpoint that ends it."""
    for stage, prompts in stages:
        if stage.name:
            console.say(f"stage {stage.name}: epochs {stage.first_epoch + 1} to {stage.last_epoch}")
        console.metric = headline(stage.config)
        results = RunFolder(folder.path, folder.keep, results=stage.results(folder.path))
        async with place.roles(stage.config, dashboard_url) as roles:
            await Trainer(stage.config, roles, results, console, *prompts, first_epoch=stage.first_epoch).run()
