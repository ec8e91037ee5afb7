"""Seeds as pure functions of what they are for: never of a worker, a batch or an order of arrival.

`torch.Generator.manual_seed` on the CPU uses the low 32 bits only, so every key is mixed to 64 bits first and cut
to 32 afterwards. Noise is always drawn on the CPU in float32 at the full shape of ONE sample, then moved: so that a
sampler, a learner and a resumed run draw the same numbers on any device and in any batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

MASK = 0xFFFFFFFF


def mix(*keys: int | str) -> int:
    """A 32-bit seed from any sequence of integers and strings (blake2b over an unambiguous encoding)."""
    text = "\x1f".join(f"s{key}" if isinstance(key, str) else f"i{key:d}" for key in keys)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") & MASK


def image_seed(run_seed: int, epoch: int, prompt_id: int, image: int) -> int:
    """Seed of one training image: its initial noise, its training times and their noises all derive from it."""
    return mix("image", run_seed, epoch, prompt_id, image)


def evaluation_seed(seed: int, line: int) -> int:
    """Seed of one evaluation line: a function of `evaluation.seed` and the line index only."""
    return mix("evaluation", seed, line)


def noise(seeds: Sequence[int] | np.ndarray, shape: tuple[int, ...]) -> torch.Tensor:
    """Standard normal noise, float32 on the CPU, (len(seeds), *shape): row i depends on seeds[i] alone."""
    import torch

    rows = [torch.randn(shape, generator=torch.Generator().manual_seed(int(seed))) for seed in seeds]
    return torch.stack(rows) if rows else torch.empty(0, *shape)


def permutation(n: int, *keys: int | str) -> np.ndarray:
    """A permutation of range(n), int64, as a pure function of the keys."""
    return np.random.default_rng(mix(*keys)).permutation(n)
