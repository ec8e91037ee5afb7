"""Faults that no signal makes, ordered by a file: every Python process of a chaos test's Ray loads this at its start.

    touch $NFT_RAY_FAULTS/sampler-oom.1       the next rollout, in whichever process, raises; the file is gone

A file is one fault: whoever renames it away has it. Without NFT_RAY_FAULTS nothing is touched.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

FOLDER = os.environ.get("NFT_RAY_FAULTS", "")
Method = Callable[..., Any]


def taken(fault: str) -> bool:
    """Whether this call is the one that the fault was ordered for."""
    for file in sorted(Path(FOLDER).glob(f"{fault}.*")):
        try:
            file.rename(file.with_name(f"happened-{file.name}"))
        except OSError:
            continue
        return True
    return False


def out_of_memory(role: str) -> Callable[[Method], Method]:
    """torch's own error for a card whose memory is full, and for one that is broken."""

    def patch(method: Method) -> Method:
        def call(*args: Any, **kwargs: Any) -> Any:
            import torch

            if taken(f"{role}-oom"):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB (a fault of the test)")
            if taken(f"{role}-xid"):
                raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered (a fault)")
            if taken(f"{role}-hang"):
                time.sleep(3600)
            return method(*args, **kwargs)

        return call

    return patch


def not_finite(method: Method) -> Method:
    """One velocity of one sample is NaN: so is the gradient of its optimizer step."""

    def call(*args: Any, **kwargs: Any) -> Any:
        info, samples = method(*args, **kwargs)
        if samples is not None and taken("velocity-nan"):
            samples.v_old.setflags(write=True)
            samples.v_old[0] = float("nan")
        return info, samples

    return call


def scores(method: Method) -> Method:
    """What a reward may return: inf for some images, or the same for all."""

    def call(*args: Any, **kwargs: Any) -> Any:
        found = method(*args, **kwargs)
        if taken("reward-inf"):
            found.values.setflags(write=True)
            found.values[0] = float("inf")
        if (Path(FOLDER) / "reward-constant").exists():
            found.values[:] = 0.5
        return found

    return call


PATCHES: dict[str, tuple[tuple[str, str, Callable[[Method], Method]], ...]] = {
    "nft_ray.cores.sampler": (
        ("SamplerCore", "clean", not_finite),
        ("SamplerCore", "draw", out_of_memory("sampler")),
    ),
    "nft_ray.cores.learner": (("LearnerCore", "update", out_of_memory("learner")),),
    "nft_ray.rewards.geneval": (("GenEval", "score", scores), ("GenEval", "score", out_of_memory("reward"))),
}


class Sabotage(importlib.abc.MetaPathFinder):
    """Patches a module of PATCHES once it is loaded."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in PATCHES:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is None or spec.loader is None:
            return None
        load = spec.loader.exec_module

        def load_and_patch(module: ModuleType) -> None:
            load(module)
            for owner, method, patch in PATCHES[name]:
                kind = getattr(module, owner)
                setattr(kind, method, patch(getattr(kind, method)))

        spec.loader.exec_module = load_and_patch  # type: ignore[method-assign]
        return spec


if FOLDER:
    sys.meta_path.insert(0, Sabotage())
