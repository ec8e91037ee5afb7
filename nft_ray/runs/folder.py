"""The folder of one run: whose it is, who is at work in it, and which of its checkpoints stay.

    RUNS/.NAME.lock                         who is at work in it now (lock.py)
    RUNS/NAME/identity                      this run, and no other of its name; in every checkpoint, too
    RUNS/NAME/config.yaml                   the resolved experiment, the newest
    RUNS/NAME/configs/epoch-000010.yaml     the one with which the run went on after 10 finished epochs; 0: it began
    RUNS/NAME/checkpoints/epoch-000010/     checkpoint.py; also at run.checkpoint_url, where that is set (remote.py)

    check (reads only) ──► with locked() ──► check, connect, ... ──► claim (the first write) ──► save, save, ...

After each save the older ones go, but for the newest few and the best that was evaluated: whatever fails, the last
whole one is there.
"""

import copy
import logging
import shutil
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from nft_ray.config import ExperimentConfig, changes, dump, parse, resolved
from nft_ray.runs.checkpoint import (
    BEYOND,
    DAMAGED,
    Checkpoint,
    DamagedError,
    checkpoint_folders,
    epoch_of,
    facts_of,
    holds_an_epoch,
    name_of,
    outline_of,
    promote_partial,
    put_aside,
    read_checkpoint,
    write_atomically,
    write_checkpoint,
)
from nft_ray.runs.evaluations import drop_evaluations, figures
from nft_ray.runs.experiment import CONFIG, completed, differing, experiment_in, experiment_of
from nft_ray.runs.lock import RunLock
from nft_ray.runs.metrics import read_metrics
from nft_ray.runs.remote import IDENTITY, Remote
from nft_ray.runs.root import check_place
from nft_ray.types import LearnerState, Mark

SHOWN = 8
"""Keys that an error or a warning names, at most."""
_log = logging.getLogger(__name__)


class RunFolder:
    """The folder of one run. Nothing is written before `claim`."""

    def __init__(
        self,
        path: Path,
        keep: int = 2,
        results: Path | None = None,
        *,
        metric: str | None = None,
        url: str | None = None,
    ) -> None:
        """`results`: where evaluations go, `path` unless a stage has a folder of its own for them. `metric`: of these
        evaluations, the one whose highest value names the best checkpoint. `url`: where checkpoints go as well.
        """
        self.path = path
        self.keep = keep
        self.results = results or path
        self.metric = metric
        self.remote = Remote(url, path.name) if url else None
        self.lock = RunLock(path)
        self._made = self._told = False
        self._last: int | None = None
        self._config: dict[str, Any] | None = None

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def identity(self) -> str:
        """Of this run: 32 hexadecimal digits from its first claim on, empty before. Another of its name has another."""
        return _text(self.path / IDENTITY)

    def for_stage(self, results: Path, metric: str) -> "RunFolder":
        """The same folder, for a part of the run with evaluations of its own."""
        of_stage = copy.copy(self)
        of_stage.results, of_stage.metric = results, metric
        return of_stage

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep every other process out. ValueError or TryAgainError, one line, where one is at work: see RunLock."""
        with self.lock:
            yield

    def check_lock(self) -> None:
        """RuntimeError, one line, where another process has taken the run over: nothing may be written any more."""
        self.lock.check()

    @property
    def lost(self) -> bool:
        """Has another process taken the run over? Nothing in it, at its URL or in MLflow is this one's any more."""
        return self.lock.lost

    def check(self, config: ExperimentConfig, *, overwrite: bool = False) -> None:
        """ValueError where this experiment cannot begin or go on here; writes nothing.

        What differs says by its marks whether it can: other settings of placement are nothing, of rounding one
        warning, any else is refused with the keys. Refused, too, is an epoch to end at that is finished and not kept,
        and a place that is no folder, or somebody else's.
        """
        self._last = config.run.num_epochs
        there = self.remote.identity() if self.remote else None
        check_place(self.path, {CONFIG, IDENTITY}, overwrite=overwrite, is_copy=there is not None)
        if overwrite:
            return
        if self.remote and there and self.identity and there != self.identity:
            raise ValueError(
                f"run.checkpoint_url: {self.remote.url} holds the checkpoints of another run of this name; choose "
                "another URL or name, or begin anew with --overwrite, which moves both aside"
            )
        before = self._before()
        if before is not None and not self._is_blank():
            self._check_same(before, config)
        done, last = self._finished_epochs(), config.run.num_epochs
        if done and last < done[-1] and last not in done:
            raise ValueError(
                f"run.num_epochs = {last}: {done[-1]} epochs are finished in {self.path}; use at least {done[-1]}"
                + (f", or one that is kept ({', '.join(map(str, done[:-1]))})" if done[:-1] else "")
                + ", or replace that run with --overwrite"
            )

    def claim(self, config: ExperimentConfig, *, overwrite: bool = False) -> None:
        """Make the folder this experiment's, or go on in it, as `check` allows."""
        self.check(config, overwrite=overwrite)
        before = None if overwrite else self._before()  # what is moved aside may be damaged
        if overwrite:
            self._move_aside("--overwrite")
        elif before is not None and self._is_blank() and differing(before, config):
            self._move_aside("no epoch was finished with its settings, which were others")
        self._made = not self.path.exists()
        self.path.mkdir(parents=True, exist_ok=True)
        if self.remote:
            self.remote.bring(self.path, config.run.num_epochs)
        if not self.identity:
            write_atomically(self.path / IDENTITY, f"{uuid.uuid4().hex}\n")
        self._config = resolved(config)
        self._mend()
        self._write_config(config)
        if self.remote:
            self.remote.own(self.path)
            if (kept := self.kept()) and not self.is_sent():  # killed, or cut off, before it was sent
                self.remote.put(self.path, kept[1], self._best)

    def abandon(self) -> bool:
        """A start that failed leaves nothing: the folder goes if this claim made it and it holds no result. Did it?

        It raises nothing, and asks no storage: the error that ended the start is on its way.
        """
        try:
            worked = any(file.stat().st_size for file in self.path.rglob("results.jsonl"))
            if self.lost or not self._made or worked or holds_an_epoch(self.checkpoints):
                return False
        except OSError:
            return False
        shutil.rmtree(self.path, ignore_errors=True)
        return True

    def save(self, epoch: int, state: LearnerState) -> Path:
        """Write the checkpoint of `epoch` finished epochs; at the URL it is soon after.

        OSError with one line where the disk is full, RuntimeError where another process has taken the run over.
        """
        self.check_lock()
        target = self.checkpoints / name_of(epoch)
        write_checkpoint(target, state, self._facts(epoch))
        self._rotate(target)
        if self.remote:
            self.remote.put(self.path, target, self._best)
        return target

    def drop_after(self, epoch: int) -> None:
        """The run goes back: newer checkpoints and figures are put aside, at the URL too, and no start finds them.

        As `save`, RuntimeError where another process has taken the run over.
        """
        self.check_lock()
        for path in checkpoint_folders(self.checkpoints):
            if epoch_of(path) > epoch:
                aside = put_aside(path, BEYOND)
                _log.warning("the run goes back to epoch %d: %s is put aside as %s", epoch, path, aside.name)
        drop_evaluations(self.results, epoch)
        if self.remote:
            self.remote.drop_after(self.path, epoch)

    def latest(self, before: int | None = None) -> Checkpoint | None:
        """The newest whole checkpoint, of at most `before` epochs, or None; a line in the log about each damaged one.

        ValueError where there are some, and none is whole. Those beyond `run.num_epochs` are not looked at.
        """
        limits = [limit for limit in (before, self._last) if limit is not None]
        damaged: list[str] = []
        for path in reversed(checkpoint_folders(self.checkpoints)):
            if limits and epoch_of(path) > min(limits):
                continue
            try:
                found = read_checkpoint(path, self._facts_of_ours(path))
            except DamagedError as error:
                damaged.append(f"{path}: {error}")
                continue
            for line in damaged:
                _log.warning("damaged checkpoint %s; epoch %d, which is whole, is used", line, found.epoch)
            return found
        if damaged:
            raise ValueError(
                f"no whole checkpoint is left of run {self.path.name}: {'; '.join(sorted(damaged))}; put a whole one "
                "there, or begin anew with --overwrite, which keeps what is there"
            )
        return None

    def finished(self) -> int:
        """Epochs of the newest whole checkpoint here, as `latest` finds it; 0 where there is none."""
        for path in reversed(checkpoint_folders(self.checkpoints)):
            try:
                self._facts_of_ours(path)
            except DamagedError:
                continue
            if self._last is None or epoch_of(path) <= self._last:
                return epoch_of(path)
        return 0

    def send_all(self, timeout_s: float, say: Callable[[str], None]) -> None:
        """Wait until the URL has what is here; one line where it has not, after so many seconds."""
        if self.lost or not self.remote or not self.path.exists():
            return
        if not self.remote.finish(self.path, timeout_s, say):
            there = self.remote.newest_sent
            what = f"epoch {there}" if there else "no checkpoint"
            _log.warning("%s was not reached within %.0f s: it has %s of this run", self.remote.url, timeout_s, what)

    def is_sent(self) -> bool:
        """Has the URL, where there is one, the newest checkpoint?"""
        kept = self.kept()
        return self.remote is None or kept is None or self.remote.has(kept[1])

    def kept(self) -> tuple[int, Path] | None:
        """(epoch, path) of the newest checkpoint, as it was written: nothing is read."""
        there = checkpoint_folders(self.checkpoints)
        return (epoch_of(there[-1]), there[-1]) if there else None

    def _finished_epochs(self) -> list[int]:
        """Of the checkpoints here and at the URL."""
        here = {epoch_of(path) for path in checkpoint_folders(self.checkpoints) if self._seems_whole(path)}
        return sorted(here.union(self.remote.epochs() if self.remote else ()))

    def _is_blank(self) -> bool:
        """No epoch was finished in it: there is nothing that other settings could spoil."""
        return not holds_an_epoch(self.checkpoints) and not (self.remote and self.remote.epochs())

    def _before(self) -> dict[str, Any] | None:
        """The experiment that is here, or at the URL. ValueError, one line, where it cannot be read."""
        if not (self.path / CONFIG).exists():
            text = self.remote.config_text() if self.remote else None
            return experiment_in(text) if text else None
        tell, self._told = not self._told, True  # of one that cannot be read, once
        return experiment_of(self.path, tell=tell)

    def _check_same(self, before: Mapping[str, Any], config: ExperimentConfig) -> None:
        after = resolved(config)
        if others := differing(before, config):
            raise ValueError(
                f"run {config.run.name} exists in {self.path} with another config (differs in: "
                f"{changes(before, after, others, most=SHOWN)}): choose another name with --set run.name=..., or "
                "replace that run with --overwrite"
            )

    def _move_aside(self, why: str) -> None:
        """To NAME.old-TIME: nothing is deleted."""
        suffix = time.strftime(".old-%Y%m%d-%H%M%S")
        number = 1
        while self.path.with_name(self.path.name + suffix).exists():
            number += 1
            suffix = f"{suffix.partition('+')[0]}+{number}"
        if self.path.exists() and any(self.path.iterdir()):
            self.path.rename(self.path.with_name(self.path.name + suffix))
            _log.warning("the run in %s is kept as %s%s: %s", self.path, self.path.name, suffix, why)
        if self.remote:
            self.remote.move_aside(suffix)

    def _mend(self) -> None:
        """What kills left is put right; what is damaged, or beyond the end, is put aside: no rotation counts it."""
        promote_partial(self.checkpoints)
        for path in checkpoint_folders(self.checkpoints):
            if self._last is not None and epoch_of(path) > self._last and self._seems_whole(path):
                aside = put_aside(path, BEYOND)
                _log.warning("run.num_epochs = %d: %s is put aside as %s", self._last, path, aside.name)
                continue
            try:
                self._facts_of_ours(path)
            except DamagedError as error:
                aside = put_aside(path, DAMAGED)
                _log.warning("checkpoint %s is damaged and put aside as %s: %s", path, aside.name, error)
        if not checkpoint_folders(self.checkpoints) and (lost := list(self.checkpoints.glob(f"*{DAMAGED}"))):
            names = ", ".join(sorted(path.name for path in lost))
            raise ValueError(
                f"no whole checkpoint is left of run {self.path.name}: {names} are damaged "
                f"in {self.checkpoints}; put a whole one there, or begin anew with --overwrite, which keeps "
                "what is there"
            )

    def _seems_whole(self, path: Path) -> bool:
        """Without a look at what its files hold."""
        try:
            self._facts_of_ours(path, outline_of)
        except DamagedError:
            return False
        return True

    def _facts_of_ours(self, path: Path, read: Callable[[Path], dict[str, Any]] = facts_of) -> dict[str, Any]:
        """What state.json says; DamagedError where the sums are wrong, or another run wrote it."""
        facts = read(path)
        if facts.get("epoch") != epoch_of(path):
            raise DamagedError(f"state.json: is of epoch {facts.get('epoch')}")
        run, ours = facts.get("run"), self.identity
        if run and ours and run != ours:
            raise DamagedError(f"state.json: is of another run ({run}; this one is {ours})")
        before, there = self._config, facts.get("config")
        if not run and before is not None and there is not None:  # from before there were identities
            config = parse(before)
            if others := differing(completed(there), config):
                what = changes(completed(there), before, others, most=SHOWN)
                raise DamagedError(f"state.json: is of another experiment (differs in: {what})")
        return facts

    def _write_config(self, config: ExperimentConfig) -> None:
        target, history = self.path / CONFIG, self.path / "configs"
        before = self._before()
        if before is not None and (rounded := differing(before, config, Mark.ROUNDING)):
            what = changes(before, resolved(config), rounded, most=SHOWN)
            _log.warning("run %s goes on with other last bits: %s", config.run.name, what)
        history.mkdir(parents=True, exist_ok=True)
        if before is not None and not any(history.iterdir()):  # the run began before there was a history
            shutil.copyfile(target, history / f"{name_of(0)}.yaml")
        if before != resolved(config):
            done = self._finished_epochs()
            write_atomically(history / f"{name_of(done[-1] if done else 0)}.yaml", dump(config))
        write_atomically(target, dump(config))

    def _rotate(self, written: Path) -> None:
        """The newest stay, the best that was evaluated, what is just being sent, and what was just written."""
        there = checkpoint_folders(self.checkpoints)
        best = self._best([epoch_of(path) for path in there])
        sending = self.remote.sending if self.remote else None
        for path in there[: -self.keep]:
            if epoch_of(path) != best and path not in (sending, written):
                shutil.rmtree(path)

    def _best(self, epochs: Collection[int]) -> int | None:
        """Of these epochs the one with the highest held-out figure; the newest of equals; None without figures.

        Before the first of them is evaluated, the one whose policy earned most in training, which is the next epoch's
        reward: a policy may collapse by then.
        """
        if self.metric is None:
            return None
        found = {epoch: figures(self.results, epoch).get(self.metric) for epoch in epochs}
        if all(value is None for value in found.values()):
            earned = {line["epoch"] - 1: line.get("reward/total") for line in read_metrics(self.path)}
            found = {epoch: earned.get(epoch) for epoch in epochs}
        return max(((value, epoch) for epoch, value in found.items() if value is not None), default=(0.0, None))[1]

    def _facts(self, epoch: int) -> dict[str, Any]:
        if self._config is None and (self.path / CONFIG).exists():
            self._config = yaml.safe_load(_text(self.path / CONFIG))
        return {
            "epoch": epoch,
            "run": self.identity or None,
            "random_state": "none: every seed is a function of (run.seed, epoch, prompt line, image)",
            "tracker_run_id": _text(self.path / "mlflow_run_id.txt") or None,
            "config": self._config,
        }


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
