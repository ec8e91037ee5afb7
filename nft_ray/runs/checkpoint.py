"""One checkpoint: a FINISHED epoch, whole or absent, and known to be what was written.

    epoch-000010/    policy, ema, optimizer, old-NNNNNN, ema-NNNNNN (safetensors)
                     state.json: the facts, the sha256 of every file, whose run it is, and its own sha256

It is written beside its place, flushed to the disk and renamed into it; state.json is the last file, so a directory
whose sums are right is whole, wherever it lies. There is no random state to keep: every prompt, seed and permutation is
a function of (run seed, epoch), and state.json says which.
"""

import errno
import hashlib
import json
import logging
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from nft_ray.types import AdapterWeights, LearnerState, Weights

PACKAGES = ("nft_ray", "torch", "diffusers", "peft", "transformers", "ray", "mlflow", "numpy")
PARTIAL, REPLACED, DAMAGED, BEYOND = ".partial", ".replaced", ".damaged", ".beyond"
"""Suffixes of what is no checkpoint: while it is written, while it is replaced, put aside."""
STATE = "state.json"
SUMMING = 4
"""Threads that read a checkpoint's files and sum them up."""
GIT_S = 10.0
_log = logging.getLogger(__name__)


class DamagedError(ValueError):
    """A checkpoint that cannot be used; the message names the file, and what is wrong with it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """What was read: `epoch` epochs are finished."""

    epoch: int
    state: LearnerState
    path: Path


def name_of(epoch: int) -> str:
    return f"epoch-{epoch:06d}"


def epoch_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("epoch-"))


def checkpoint_folders(folder: Path) -> list[Path]:
    """RUN/checkpoints/epoch-000010, ...: those that took their place, oldest first; damaged by now, perhaps."""
    return sorted(path for path in folder.glob("epoch-*") if not path.suffix and path.name[6:].isdecimal())


def whole_checkpoints(folder: Path) -> list[Path]:
    """Those that have a state.json, oldest first; whether they are still what was written says `facts_of`."""
    return [path for path in checkpoint_folders(folder) if (path / STATE).is_file()]


def newest_whole(folder: Path) -> Path | None:
    """The newest that is what was written; a line in the log about each that is not. None where there is none."""
    for path in reversed(checkpoint_folders(folder)):
        try:
            facts_of(path)
        except DamagedError as error:
            _log.warning("checkpoint %s is damaged and not used: %s", path, error)
        else:
            return path
    return None


def write_checkpoint(target: Path, state: LearnerState, facts: Mapping[str, Any]) -> None:
    """Write TARGET, or leave what is there as it was. OSError with one line where the disk is full."""
    partial, replaced = (target.with_name(target.name + suffix) for suffix in (PARTIAL, REPLACED))
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for name, tensors in _tensors(state).items():
            save_file(tensors, partial / f"{name}.safetensors")
        files = {file.name: _sum(file) for file in sorted(partial.iterdir())}
        (partial / STATE).write_text(
            _sealed({**facts, **_counts(state), "packages": package_versions(), "files": files})
        )
        for file in [*partial.iterdir(), partial]:
            _flush(file)
        if target.exists():  # of an epoch that was trained again
            shutil.rmtree(replaced, ignore_errors=True)
            target.rename(replaced)
        partial.rename(target)
        _flush(target.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        if replaced.exists() and not target.exists():
            replaced.rename(target)
        raise _save_error(target, error) from error


def read_checkpoint(path: Path, facts: Mapping[str, Any]) -> Checkpoint:
    """What lies there, by what `facts_of` says of it; DamagedError otherwise."""
    if "files" not in facts:
        _log.warning("checkpoint %s has no sums of its files: it was written before there were any", path)
    try:
        state = LearnerState(
            version=facts["version"],
            optimizer_step=facts["optimizer_step"],
            loss_scale=facts.get("loss_scale"),
            policy=_load(path, "policy"),
            ema=_load(path, "ema"),
            versions={
                number: AdapterWeights(old=_load(path, f"old-{number:06d}"), ema=_load(path, f"ema-{number:06d}"))
                for number in facts["versions"]
            },
            optimizer=_load(path, "optimizer"),
        )
        return Checkpoint(epoch=facts["epoch"], state=state, path=path)
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, DamagedError):
            raise
        raise DamagedError(f"{STATE}: lacks what a checkpoint says ({_one_line(error)})") from None


def read_ema(path: Path) -> Weights:
    """The EMA policy of a checkpoint, once every sum is right; ValueError with one line otherwise."""
    try:
        facts_of(path)
        return _load(path, "ema")
    except DamagedError as error:
        raise ValueError(f"checkpoint {path} is damaged: {error}") from None


def facts_of(path: Path) -> dict[str, Any]:
    """What state.json says, once its own sum and those of all files are right; DamagedError otherwise.

    One from before there were sums is taken as it is, if its files are there.
    """
    facts = outline_of(path)
    files = facts.get("files", {})
    with ThreadPoolExecutor(SUMMING) as threads:  # while a run starts there is nothing else to do
        found = dict(zip(files, threads.map(_sum, [path / name for name in files]), strict=True))
    for name, expected in files.items():
        if found[name] != expected:
            raise DamagedError(f"{name}: holds other bytes than were written (sha256)")
    return facts


def outline_of(path: Path) -> dict[str, Any]:
    """As `facts_of`, at once: of the files that they are there, with as many bytes as were written."""
    try:
        facts = json.loads((path / STATE).read_text(encoding="utf-8"))
        numbers, files, seal = facts["versions"], facts.get("files"), facts.get("sha256")
    except FileNotFoundError:
        raise DamagedError(f"{STATE}: is missing") from None
    except OSError as error:
        raise DamagedError(f"{STATE}: {_one_line(error)}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DamagedError(f"{STATE}: cannot be read; it was cut off or changed") from None
    if files is None and seal is None and "run" not in facts:
        names = [
            "policy",
            "ema",
            "optimizer",
            *(f"{kind}-{number:06d}" for number in numbers for kind in ("old", "ema")),
        ]
        files = {f"{name}.safetensors": None for name in names}
    elif files is None or seal != _seal(facts):
        raise DamagedError(f"{STATE}: its sum is another than it says; it was changed")
    for name, expected in files.items():
        if not (path / name).is_file():
            raise DamagedError(f"{name}: is missing")
        if expected is not None and (size := (path / name).stat().st_size) != expected["bytes"]:
            raise DamagedError(f"{name}: has {size} bytes, {expected['bytes']} were written")
    return dict(facts)


def promote_partial(folder: Path) -> None:
    """Put what a kill left beside its place into it: the new one where it is whole, else the one it was to replace."""
    for suffix in (PARTIAL, REPLACED):
        for left in sorted(folder.glob(f"epoch-*{suffix}")):
            target = left.with_suffix("")
            if target.exists():
                continue
            if not _is_whole(left):
                continue
            left.rename(target)
            _log.warning("checkpoint %s: its save was killed when all was written; it is whole", target)


def holds_an_epoch(folder: Path) -> bool:
    """Is anything left there of a finished epoch, put aside or damaged? What a kill left of a first save is none."""
    for path in folder.glob("epoch-*"):
        if path.is_dir() and path.suffix != PARTIAL:
            return True
    return any(map(_is_whole, folder.glob(f"epoch-*{PARTIAL}")))


def put_aside(path: Path, suffix: str) -> Path:
    """PATH.damaged or PATH.beyond, in place of what has that name; it is no checkpoint any more."""
    aside = path.with_name(f"{path.name}{suffix}")
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)
    return aside


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
    _flush(partial)  # else a machine that loses its power keeps the name, and no text
    partial.replace(path)


def _is_whole(path: Path) -> bool:
    try:
        facts_of(path)
    except DamagedError:
        return False
    return True


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


def _counts(state: LearnerState) -> dict[str, Any]:
    return {
        "version": state.version,
        "optimizer_step": state.optimizer_step,
        "loss_scale": state.loss_scale,
        "versions": sorted(state.versions),
    }


def _load(path: Path, name: str) -> Weights:
    try:
        return dict(load_file(path / f"{name}.safetensors"))
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise DamagedError(f"{name}.safetensors: {_one_line(error)}") from None


def _sum(file: Path) -> dict[str, Any]:
    with file.open("rb") as data:
        digest = hashlib.file_digest(data, "sha256").hexdigest()
        return {"sha256": digest, "bytes": os.fstat(data.fileno()).st_size}


def _seal(facts: Mapping[str, Any]) -> str:
    """Of all that state.json says but this."""
    rest = {name: value for name, value in facts.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _sealed(facts: Mapping[str, Any]) -> str:
    return json.dumps({**facts, "sha256": _seal(facts)}, indent=1)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
