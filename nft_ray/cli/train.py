"""`nft-ray train`: an experiment is checked, run to its end or what is left of it, and reported on."""

import argparse
import logging
import os
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import cast

from actors.footprint import disk_warnings, footprint
from actors.placement import local_needs, needs, table
from nft_ray.cli.console import Console, say
from nft_ray.cli.failures import explained, log_no_more, log_to, retryable
from nft_ray.cli.place import PREEMPTED, Interrupted, Place, no_more_sigterm, run_until_stopped, sigterm_raises
from nft_ray.cli.plan import dry_run_lines
from nft_ray.cli.track import catch_up
from nft_ray.cli.watch import SAVE_S, Ending
from nft_ray.config import ExperimentConfig, dump, load, lost
from nft_ray.evaluation.summary import headline
from nft_ray.models.base import check_model
from nft_ray.models.layers import check_layers
from nft_ray.models.lora_files import lora_shapes
from nft_ray.models.resolve import resolve
from nft_ray.prompts.draw import experiment_prompts
from nft_ray.prompts.sets import missing
from nft_ray.rewards.weights import missing_weights
from nft_ray.runs import closing
from nft_ray.runs.checkpoint import whole_checkpoints
from nft_ray.runs.closing import PromptSets
from nft_ray.runs.folder import RunFolder
from nft_ray.runs.ledger import Ended
from nft_ray.runs.metrics import read_metrics
from nft_ray.runs.root import in_submitted_job, run_root
from nft_ray.runs.stages import Stage, stages_of
from nft_ray.runs.tracking import CLOSE_S, RunTracker, ui_command
from nft_ray.trainer import Trainer

logger = logging.getLogger(__name__)
StagesWithPrompts = Sequence[tuple[Stage, PromptSets]]
GRACE_S, MLFLOW_S = 15.0, 3.0
"""Seconds of the 30 that a machine which is taken away usually gives: for the checkpoint's copy, and for MLflow."""
END_S = 1800.0
"""Seconds that a finished run waits for the copy."""


def train(args: argparse.Namespace) -> int:
    """Run an experiment to its end, or what is left of it; returns the exit status."""
    config = resolve(load(args.config, args.set))
    if masks := list(lost(config.model_dump())):
        raise ValueError(f"{masks[0]}: a secret is masked in the files of a run; write it again, as ${{oc.env:NAME}}")
    stages = stages_of(config)
    check_model(config.model)
    if config.model.lora.start is not None:
        check_layers(lora_shapes(config.model.lora.start), config.model, config.model.lora.start)
    if args.dry_run:
        return _dry_run(config, stages, local=args.local, joined=args.address is not None)
    prompts = [experiment_prompts(stage.config) for stage in stages]
    place = Place(local=args.local, address=args.address, say=say)
    for stage in stages:
        place.check(stage.config)
    folder = RunFolder(
        run_root(config, os.environ) / config.run.name,
        keep=config.run.keep_checkpoints,
        metric=headline(config),
        url=config.run.checkpoint_url,
    )
    with sigterm_raises() as listen:
        try:
            folder.check(config, overwrite=args.overwrite)
            _check_disk(stages, folder)
            with folder.locked():
                return _run(place, config, folder, list(zip(stages, prompts, strict=True)), args.overwrite, listen)
        except PREEMPTED as stopped:  # while it waits for a lock, or for a copy, too
            no_more_sigterm()
            if isinstance(stopped.__context__, Exception):  # it came while a failed run was put in order
                logger.error("%s", explained(stopped.__context__)[0])
            say(f"preempted: {what_is_kept(folder)}")
            return 0


def _check_disk(stages: Sequence[Stage], folder: RunFolder) -> None:
    """ValueError where the disk has no room for one checkpoint, a warning where it has none for all that are kept."""
    there = next(path for path in (folder.path, *folder.path.parents) if path.exists())
    free, kept = shutil.disk_usage(there).free, len(whole_checkpoints(folder.path / "checkpoints"))
    plans = [plan for plan in (footprint(stage.config) for stage in stages) if plan is not None]
    if plans:
        largest = max(plans, key=lambda plan: plan.checkpoint)
        for line in disk_warnings(largest, folder.keep, free, str(there), kept):
            logger.warning("%s", line)


def _dry_run(config: ExperimentConfig, stages: Sequence[Stage], *, local: bool, joined: bool) -> int:
    """Print the resolved experiment, what each stage needs, what the run takes, and what has to be fetched first."""
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
    else:
        for line in dry_run_lines(config, None if joined else run_root(config, os.environ)):
            say(line)
    for line in absent:
        say(f"not here yet: {line}")
    return 0


def _run(
    place: Place,
    config: ExperimentConfig,
    folder: RunFolder,
    stages: StagesWithPrompts,
    overwrite: bool,
    listen: Callable[[], None],
) -> int:
    """All of it, under the folder's lock. Nothing is written before a cluster is there that has passed the checks."""
    folder.check(config, overwrite=overwrite)
    done = 0 if overwrite else folder.finished()
    kept, table = folder.kept(), closing.closed(folder)
    closed = table is not None and kept is not None and kept[0] == done == config.run.num_epochs
    whole = closed and not any(stage.is_left(folder.path, done) for stage, _ in stages)  # figures may be lost
    if not overwrite and whole and folder.is_sent():
        say(f"{table}\nrun {config.run.name} is finished: {folder.path}")
        catch_up(folder, config)
        return 0
    started, ended = time.monotonic(), cast(Ended, "failed")
    tracker: RunTracker | None = None
    trainers: list[Trainer] = []  # the one at work
    ending = Ending(
        kept=lambda: what_is_kept(folder),
        close=lambda: tracker.close("failed", timeout_s=MLFLOW_S) if tracker and not folder.lost else None,
        save=lambda: _save(trainers),
    )
    try:
        with ExitStack() as stack:
            is_left = [stage.config for stage, _ in stages if overwrite or stage.is_left(folder.path, done)]
            dashboard_url = stack.enter_context(place.ray(config, ending)) if is_left else None  # else: its report
            listen()  # to SIGTERM again: Ray has set a handler of its own
            if is_left:
                place.check_connected(is_left)
            folder.claim(config, overwrite=overwrite)
            log_to(folder.path)
            tracker = RunTracker(folder.path, config)
            tracker.begin(folder.finished())
            console = Console(tracker, config.run.num_epochs, metric=headline(config))
            _say_where(config, folder, console)
            closing.reopen(folder)
            left = [(stage, sets) for stage, sets in stages if stage.is_left(folder.path, folder.finished())]
            if left:
                there = replace(place, say=console.say, owner=folder.identity)
                run_until_stopped(_train(there, left, folder, console, dashboard_url, trainers))
        made = closing.close(config, stages, folder, seconds=time.monotonic() - started)
        tracker.log_artifacts(made.artifacts)
        console.say(f"\n{made.table}\n")
        for path in made.files:
            console.say(str(path))
        ended = "finished"
    except PREEMPTED:
        no_more_sigterm()
        ended = "preempted"
        raise
    except KeyboardInterrupt:
        ended = "interrupted"
        raise Interrupted(f"interrupted: {what_is_kept(folder)}") from None
    except Exception as error:
        if folder.kept():
            error.add_note(what_is_kept(folder, again=retryable(error)))
        raise
    finally:
        close_s = MLFLOW_S if ended == "preempted" else CLOSE_S
        try:
            folder.send_all(END_S if ended == "finished" else GRACE_S, say)
        except PREEMPTED:
            close_s = MLFLOW_S
            raise
        finally:
            if folder.lost:  # not even MLflow hears how this one ended
                log_no_more()
            elif tracker is not None:
                tracker.close(ended, timeout_s=close_s)
            if ended in ("failed", "interrupted") and folder.abandon():
                log_no_more()
    return 0


def _say_where(config: ExperimentConfig, folder: RunFolder, console: Console) -> None:
    console.say(f"run {config.run.name}: {folder.path}")
    if in_submitted_job(os.environ):
        console.say(f"this run is kept in {folder.path}")
        console.say('(a job\'s folder carries its user: --metadata-json \'{"user": "NAME"}\' of ray job submit)')
    if config.run.checkpoint_url:
        console.say(f"checkpoints go to {config.run.checkpoint_url.rstrip('/')}/{config.run.name} as well")
    console.say(f"MLflow: {ui_command(config, folder.path.parent)}")
    if done := folder.finished():
        console.say(f"going on after epoch {done}")


def what_is_kept(folder: RunFolder, *, again: bool = True) -> str:
    """Of a run that was stopped: what the same command goes on with, and what it lost; `again`: that it is worth it."""
    kept = folder.kept()
    trained = max((line["epoch"] for line in read_metrics(folder.path)), default=0)
    lost = max(0, trained - (kept[0] if kept else 0))
    gone = f"{lost} finished epoch{'s' * (lost != 1)} {'is' if lost == 1 else 'are'} lost"
    if kept is not None:
        where = f"epoch {kept[0]} is kept in {kept[1]}"
        return f"{where}{f', {gone}' if lost else ''}" + ("; run the same command to go on" if again else "")
    if lost:
        return f"no checkpoint is kept, {gone}; the same command begins anew"
    return "before the first epoch was finished; run the same command to begin"


def _save(trainers: Sequence[Trainer]) -> None:
    """From another thread, whatever they wait for: the newest epoch that is finished and in order is kept."""
    for trainer in trainers:
        trainer.saving.keep_now(trainer.good, SAVE_S)


async def _train(
    place: Place,
    stages: StagesWithPrompts,
    folder: RunFolder,
    console: Console,
    dashboard_url: str | None,
    trainers: list[Trainer],
) -> None:
    """Every stage with roles of its own: what one leaves for the next is in the checkpoint that ends it.

    `trainers` holds that of the stage at work.
    """
    for stage, prompts in stages:
        if stage.name:
            console.say(f"stage {stage.name}: epochs {stage.first_epoch + 1} to {stage.last_epoch}")
        console.metric = headline(stage.config)
        of_stage = folder.for_stage(stage.results(folder.path), headline(stage.config))
        async with place.roles(stage.config, dashboard_url) as roles:
            trainer = Trainer(stage.config, roles, of_stage, console, *prompts, first_epoch=stage.first_epoch)
            trainers[:] = [trainer]
            await trainer.run()
