"""The folder of one run: checkpoints that are whole or absent, what belongs to it, and what may go on in it.

    RUNS/NAME/config.yaml                   the resolved experiment, the newest
    RUNS/NAME/configs/epoch-000010.yaml     the one with which the run went on after 10 finished epochs; 0: it began
    RUNS/NAME/checkpoints/epoch-000010/     policy, ema, optimizer, old-NNNNNN, ema-NNNNNN (safetensors), state.json

A checkpoint is a FINISHED epoch. It is written beside its place, flushed to the disk and renamed into it, and only
then are older ones removed: whatever fails, the last whole one is there. There is no random state to keep: every
prompt, seed and permutation is a function of (run seed, epoch), and state.json says which.
"""

import errno
import json
import logging
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from nft_ray.config import ExperimentConfig, changes, differences, dump, mark_of, parse, resolved
from nft_ray.types import AdapterWeights, LearnerState, Mark

PACKAGES = ("nft_ray", "torch", "diffusers", "peft", "transformers", "ray", "mlflow", "numpy")
SHOWN = 8
"""Keys that an error or a warning names, at most."""
PARTIAL = ".partial"
GIT_S = 10.0
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """What `RunFolder.latest` found: `epoch` epochs are finished."""

    epoch: int
    state: LearnerState
    path: Path


class RunFolder:
    """The folder of one run. Nothing is written before `claim`."""

    def __init__(self, path: Path, keep: int = 2, results: Path | None = None) -> None:
        """`results`: where evaluations go, `path` unless a stage has a folder of its own for them."""
        self.path = path
        self.keep = keep
        self.results = results or path

    def claim(self, config: ExperimentConfig, *, overwrite: bool = False) -> None:
        """Make the folder this experiment's, or go on in it: what differs says by its marks whether it can.

        Other settings of placement are nothing, of rounding one warning, any else a ValueError that lists the keys.
        ValueError, too, for fewer epochs than are finished.
        """
        target, history = self.path / "config.yaml", self.path / "configs"
        if overwrite and self.path.exists():
            shutil.rmtree(self.path)
        before = _completed(yaml.safe_load(target.read_text())) if target.exists() else None
        if before is not None:
            self._check(before, config)
        done = self._finished_epochs()
        if done > config.run.num_epochs:
            raise ValueError(
                f"run.num_epochs = {config.run.num_epochs}: {done} epochs are finished in {self.path}; use at least "
                f"{done}, or replace that run with --overwrite"
            )
        history.mkdir(parents=True, exist_ok=True)
        if before is not None and not any(history.iterdir()):  # the run began before there was a history
            shutil.copyfile(target, _in_history(history, 0))
        if before != resolved(config):
            write_atomically(_in_history(history, done), dump(config))
        write_atomically(target, dump(config))

    def _finished_epochs(self) -> int:
        """Of the newest checkpoint."""
        done = whole_checkpoints(self.path / "checkpoints")
        return _epoch_of(done[-1]) if done else 0

    def _check(self, before: Mapping[str, Any], config: ExperimentConfig) -> None:
        after = resolved(config)
        changed = {key: mark_of(config, key) for key in differences(before, after)}
        if others := [key for key, mark in changed.items() if mark is Mark.RESULT]:
            raise ValueError(
                f"run {config.run.name} exists in {self.path} with another config (differs in: "
                f"{changes(before, after, others, most=SHOWN)}): choose another name with --set run.name=..., or "
                "replace that run with --overwrite"
            )
        if rounded := [key for key, mark in changed.items() if mark is Mark.ROUNDING]:
            what = changes(before, after, rounded, most=SHOWN)
            _log.warning("run %s goes on with other last bits: %s", config.run.name, what)

    def save(self, epoch: int, state: LearnerState) -> Path:
        """Write the checkpoint of `epoch` finished epochs. OSError with one line where the disk is full."""
        target = self.path / "checkpoints" / f"epoch-{epoch:06d}"
        partial = target.with_name(target.name + PARTIAL)
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir(parents=True)
            for name, tensors in _tensors(state).items():
                save_file(tensors, partial / f"{name}.safetensors")
            (partial / "state.json").write_text(json.dumps(self._facts(epoch, state), indent=1))
            for file in [*partial.iterdir(), partial]:
                _flush(file)
            if target.exists():
                shutil.rmtree(target)
            partial.rename(target)
            _flush(target.parent)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise _save_error(target, error) from error
        for old in whole_checkpoints(target.parent)[: -self.keep]:
            shutil.rmtree(old)
        return target

    def latest(self) -> Checkpoint | None:
        """The newest whole checkpoint, or None."""
        whole = whole_checkpoints(self.path / "checkpoints")
        if not whole:
            return None
        path = whole[-1]
        facts = json.loads((path / "state.json").read_text())
        optimizer = load_file(path / "optimizer.safetensors")
        state = LearnerState(
            version=facts["version"],
            optimizer_step=facts["optimizer_step"],
            policy=load_file(path / "policy.safetensors"),
            ema=load_file(path / "ema.safetensors"),
            versions={
                number: AdapterWeights(
                    old=load_file(path / f"old-{number:06d}.safetensors"),
                    ema=load_file(path / f"ema-{number:06d}.safetensors"),
                )
                for number in facts["versions"]
            },
            optimizer=optimizer,
        )
        return Checkpoint(epoch=facts["epoch"], state=state, path=path)

    def _facts(self, epoch: int, state: LearnerState) -> dict[str, Any]:
        config, run_id = self.path / "config.yaml", self.path / "mlflow_run_id.txt"
        return {
            "epoch": epoch,
            "version": state.version,
            "optimizer_step": state.optimizer_step,
            "versions": sorted(state.versions),
            "random_state": "none: every seed is a function of (run.seed, epoch, prompt line, image)",
            "tracker_run_id": run_id.read_text().strip() if run_id.exists() else None,
            "packages": package_versions(),
            "config": yaml.safe_load(config.read_text()) if config.exists() else None,
        }


def _in_history(folder: Path, epoch: int) -> Path:
    return folder / f"epoch-{epoch:06d}.yaml"


def _epoch_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("epoch-"))


def _completed(before: dict[str, Any]) -> dict[str, Any]:
    """A run's resolved experiment with the defaults of fields that came later: they say what was done before them."""
    try:
        return resolved(parse(before))
    except ValueError:  # of a field that is gone, say: what differs is listed
        return before


def whole_checkpoints(folder: Path) -> list[Path]:
    """RUN/checkpoints/epoch-000010, ...: those that are complete, oldest first."""
    found = folder.glob("epoch-*")
    return sorted(path for path in found if path.suffix != PARTIAL and (path / "state.json").is_file())


def run_root(config: ExperimentConfig, environment: Mapping[str, str]) -> Path:
    """The absolute folder of all runs: NFT_RAY_RUNS, else `run.root`.

    Inside a submitted job the working directory is a copy that Ray deletes with the session, so a relative root is
    taken from the home folder there.
    """
    root = Path(environment.get("NFT_RAY_RUNS") or config.run.root).expanduser()
    if not root.is_absolute() and in_submitted_job(environment):
        return Path.home() / "nft_ray" / root
    return root.absolute()


def in_submitted_job(environment: Mapping[str, str]) -> bool:
    """Whether this process is the entrypoint of `ray job submit` (Ray names its supervisor in the environment)."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in environment


def package_versions() -> dict[str, str]:
    """Versions of what a run depends on, without importing any of it; `commit` where nft_ray runs from a checkout."""
    found = {"python": platform.python_version()}
    if commit := source_commit():
        found["commit"] = commit
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


@cache
def source_commit() -> str | None:
    """The commit that nft_ray is at, with `-dirty` for uncommitted changes; None where it was installed."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():  # a .git further up belongs to something else
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=GIT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def write_atomically(path: Path, text: str) -> None:
    """Replace a file by another text, or leave it as it was."""
    partial = path.with_name(path.name + PARTIAL)
    partial.write_text(text)
    partial.replace(path)


def _tensors(state: LearnerState) -> dict[str, dict[str, Any]]:
    named = {"policy": state.policy, "ema": state.ema, "optimizer": state.optimizer}
    for number, weights in state.versions.items():
        named[f"old-{number:06d}"] = weights.old
        named[f"ema-{number:06d}"] = weights.ema
    # safetensors writes the memory as it lies: a transposed array would come back scrambled
    return {file: {name: np.asarray(value, order="C") for name, value in of.items()} for file, of in named.items()}


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _save_error(target: Path, error: Exception) -> OSError:
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    full = full or "No space left" in str(error) or "File too large" in str(error)
    what = "the disk is full" if full else " ".join(str(error).split())
    return OSError(f"checkpoint {target} could not be written: {what}; earlier checkpoints are intact")
