"""The factor that keeps float16's gradients in range until they are float32, as a LoRA's are. torch only.

A velocity's gradient is about 1 / (pairs x its numbers): 1e-9 at 512 px, and float16 ends at 6e-8 and at 65504. Times
this factor it is about 1/256. Always a power of two: it changes no bit of what neither end cuts off.

    (loss x factor).backward() ──► gradients, float16 on their way, float32 at the LoRA ──► x ranks / factor

The number of ranks, over which gradients are averaged, is multiplied in float32: however many they are, the 16-bit part
is the same. docs/decisions/0014 measures the room.
"""

import math

import torch

GROWS_EVERY = 200
"""Optimizer steps. By their count, not since the last change, so that a resumed run grows at the same ones."""
SMALLEST = 2.0**-16
"""Of what it begins with: there float16 ends at the other side."""


class LossScale:
    """Of one learner. `relative` is what is kept: the share, at most 1, of what it begins with."""

    def __init__(self, dtype: torch.dtype, latent_shape: tuple[int, ...]) -> None:
        self._needed = dtype == torch.float16
        self._numbers = math.prod(latent_shape)
        self.relative = 1.0

    def of(self, num_pairs: int) -> float:
        """The factor of a step over so many (sample, time) pairs of all ranks; 1 where nothing is float16."""
        if not self._needed:
            return 1.0
        return self.relative * 2.0 ** (math.floor(math.log2(max(num_pairs, 1) * self._numbers)) - 8)

    def shrink(self) -> None:
        """A gradient was not finite and every loss was: perhaps it was too large for 16 bit."""
        if self._needed:
            self.relative = max(self.relative / 2, SMALLEST)

    def stepped(self, optimizer_step: int) -> None:
        """This step, counted from 1, was taken: the factor grows again now and then, up to what it began with."""
        if optimizer_step % GROWS_EVERY == 0:
            self.relative = min(2 * self.relative, 1.0)
