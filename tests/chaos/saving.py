"""A training loop of nothing but a run folder, for ckpt-chaos to kill: `python -m tests.chaos.saving FOLDER KEEP`.

What an epoch computes depends on the whole state that was loaded, so a checkpoint that comes back wrong shows in the
result. ckpt-chaos counts what Python opens and what safetensors.torch writes; we write by safetensors.numpy and flush
by file descriptor, so both are shown to it here, by its own wrappers.
"""

import hashlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import safetensors.numpy

EPOCHS = 4


def show_what_we_write() -> None:
    """Where ckpt-chaos is armed: its wrapper around numpy's writer, and which file a descriptor belongs to."""
    from ckpt_chaos import inject

    counted = inject._wrap(safetensors.numpy.save_file, "safetensors.save_file", 1, "filename")
    open_descriptor = os.open

    def save_file(tensors: Mapping[str, np.ndarray], filename: str | Path, *rest: object) -> None:
        if inject._state["unsynced"]:
            inject._note_open_for_write(inject._norm(filename))
        counted(tensors, filename, *rest)

    def opened(path: str | Path, *rest: int, **more: int) -> int:
        descriptor = open_descriptor(path, *rest, **more)
        inject._state["fd_path"][descriptor] = inject._norm(path)
        return descriptor

    safetensors.numpy.save_file = save_file
    os.open = opened  # type: ignore[assignment]


if "CKPT_CHAOS_WATCH" in os.environ:
    show_what_we_write()

from nft_ray.runs.folder import RunFolder  # noqa: E402
from nft_ray.types import AdapterWeights, LearnerState, Weights  # noqa: E402
from tests.examples import example_config  # noqa: E402


def fingerprint(state: LearnerState | None) -> int:
    """Of everything that a checkpoint keeps."""
    digest = hashlib.sha256()
    if state is not None:
        digest.update(f"{state.version} {state.optimizer_step} {sorted(state.versions)}".encode())
        parts: list[Weights] = [state.policy, state.ema, state.optimizer]
        parts += [part for number in sorted(state.versions) for part in vars_of(state.versions[number])]
        for part in parts:
            for name in sorted(part):
                digest.update(name.encode() + np.asarray(part[name]).tobytes())
    return int.from_bytes(digest.digest()[:4], "big")


def vars_of(weights: AdapterWeights) -> list[Weights]:
    return [weights.old, weights.ema]


def after(state: LearnerState | None, epoch: int) -> LearnerState:
    """One more epoch: numbers that only this very state leads to."""
    rng = np.random.default_rng(fingerprint(state))

    def weights() -> Weights:
        return {name: rng.standard_normal((64, 32), dtype=np.float32) for name in ("lora_A", "lora_B")}

    versions = {number: AdapterWeights(old=weights(), ema=weights()) for number in range(max(0, epoch - 1), epoch + 1)}
    return LearnerState(
        version=epoch,
        optimizer_step=2 * epoch,
        policy=weights(),
        ema=versions[epoch].ema,
        versions=versions,
        optimizer={"exp_avg/lora_A": weights()["lora_A"]},
    )


def main(out: Path, keep: int) -> None:
    config = example_config(f"run.num_epochs={EPOCHS}", f"run.keep_checkpoints={keep}")
    folder = RunFolder(out / config.run.name, keep=keep)
    folder.claim(config)
    found = folder.latest()
    epoch, state = (found.epoch, found.state) if found else (0, None)
    sys.stdout.write(f"going on after epoch {epoch}\n")
    for number in range(epoch + 1, EPOCHS + 1):
        state = after(state, number)
        folder.save(number, state)
    partial = out / "result.partial"
    partial.write_text(f"{fingerprint(state)}\n")
    partial.replace(out / "result.txt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
