"""Micro-batches of (sample, time) pairs: from the records that samplers send to the tensors of one forward.

An optimizer step's pairs stand in one flat list, a sample's times together, and are cut into micro-batches anywhere.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from nft_ray.cores.device import Copies
from nft_ray.flow.path import interpolate
from nft_ray.models.base import Conditioning
from nft_ray.seeding import noise
from nft_ray.types import CleanSamples, TrainGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class PairBatch:
    """B pairs on the device; x0, x_t, v_old, v_ref f32 (B, *latent), the others f32 (B,), conditioning (B, ...).

    weight: 1, or 0 where a row only fills up the batch. ref_weight: T/K where the pair has one of the K v_ref of its
    sample's T times, else 0 (and its v_ref is 0); v_ref is None where there is none at all.
    """

    x0: torch.Tensor
    x_t: torch.Tensor
    t: torch.Tensor
    v_old: torch.Tensor
    v_ref: torch.Tensor | None
    optimality: torch.Tensor
    weight: torch.Tensor
    ref_weight: torch.Tensor
    conditioning: Conditioning


def micro_batches(
    step: int, groups: Sequence[TrainGroup], samples: Sequence[CleanSamples], size: int
) -> Iterator[np.ndarray]:
    """Rows (group, sample, time), i64 (at most `size`, 3), of one optimizer step: a sample's times stand together."""
    rows = [
        (g, int(i), k)
        for g, group in enumerate(groups)
        for i in np.flatnonzero(group.step == step)
        for k in range(samples[g].t.shape[1])
    ]
    for start in range(0, len(rows), size):
        yield np.array(rows[start : start + size], dtype=np.int64)


def gather(
    rows: np.ndarray,
    groups: Sequence[TrainGroup],
    samples: Sequence[CleanSamples],
    copies: Copies,
    *,
    dtype: torch.dtype,
    with_reference: bool,
    size: int | None = None,
) -> PairBatch:
    """The tensors of rows (group, sample, time); conditioning in `dtype`. Nothing here waits for the device.

    With `size`, the last row is repeated, with weight 0, until there are that many: compiled blocks know one size.
    """
    weight = np.ones(size or len(rows), dtype=np.float32)
    weight[len(rows) :] = 0
    rows = np.concatenate([rows, np.repeat(rows[-1:], len(weight) - len(rows), axis=0)])
    of = [(samples[g], i, k) for g, i, k in rows]

    def tensor(values: Sequence[np.ndarray | np.floating]) -> torch.Tensor:
        return copies.upload(torch.from_numpy(np.stack(values).astype(np.float32, copy=False)))

    x0, t = tensor([s.x0[i] for s, i, _ in of]), tensor([s.t[i, k] for s, i, k in of])
    e = copies.upload(noise([s.noise_seeds[i, k] for s, i, k in of], tuple(x0.shape[1:])))
    references = [_reference(s, i, k) for s, i, k in of] if with_reference else []
    ref_weight = np.array([w for _, w in references], dtype=np.float32) if references else np.ones_like(weight)
    names = of[0][0].conditioning
    return PairBatch(
        x0=x0,
        x_t=interpolate(x0, e, t),
        t=t,
        v_old=tensor([s.v_old[i, k] for s, i, k in of]),
        v_ref=tensor([v for v, _ in references]) if references else None,
        optimality=tensor([groups[g].optimality[i] for g, i, _ in rows]),
        weight=tensor(list(weight)),
        ref_weight=tensor(list(weight * ref_weight)),
        conditioning={name: tensor([s.conditioning[name][0] for s, _, _ in of]).to(dtype) for name in names},
    )


def _reference(samples: CleanSamples, sample: int, time: int) -> tuple[np.ndarray, float]:
    """v_ref of one pair and its weight: 1 / (the share of the sample's times that have one), or 0."""
    assert samples.v_ref is not None, "the KL term needs v_ref, and the sampler sent none"
    if samples.ref_times is None:
        return samples.v_ref[sample, time], 1.0
    found = np.flatnonzero(samples.ref_times[sample] == time)
    if not len(found):
        return np.zeros_like(samples.v_ref[sample, 0]), 0.0
    return samples.v_ref[sample, found[0]], samples.t.shape[1] / samples.ref_times.shape[1]
