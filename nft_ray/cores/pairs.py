"""Micro-batches of (sample, time) pairs: from the records that samplers send to the tensors of one forward.

An optimizer step's pairs stand in one flat list, a sample's times together, and are cut into micro-batches anywhere.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from nft_ray.algorithms.base import Needs, Pairs
from nft_ray.cores.device import Copies
from nft_ray.flow.path import interpolate
from nft_ray.models.base import Conditioning
from nft_ray.seeding import noise
from nft_ray.types import CleanSamples, TrainGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class PairBatch:
    """B pairs on the device with what the model needs to know of them: conditioning (B, ...).

    filled f32 (B,): 1, or 0 where a row only fills up the batch.
    """

    pairs: Pairs
    filled: torch.Tensor
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
    needs: Needs,
    size: int | None = None,
) -> PairBatch:
    """The tensors of rows (group, sample, time); conditioning in `dtype`. Nothing here waits for the device.

    With `size`, the last row is repeated, `filled` 0, until there are that many: compiled blocks know one size.
    """
    filled = np.ones(size or len(rows), dtype=np.float32)
    filled[len(rows) :] = 0
    rows = np.concatenate([rows, np.repeat(rows[-1:], len(filled) - len(rows), axis=0)])
    of = [(samples[g], i, k) for g, i, k in rows]

    def tensor(values: Sequence[np.ndarray | np.floating]) -> torch.Tensor:
        return copies.upload(torch.from_numpy(np.stack(values).astype(np.float32, copy=False)))

    x0, t = tensor([s.x0[i] for s, i, _ in of]), tensor([s.t[i, k] for s, i, k in of])
    e = copies.upload(noise([s.noise_seeds[i, k] for s, i, k in of], tuple(x0.shape[1:])))
    references = [_reference(s, i, k) for s, i, k in of] if needs.reference else []
    names = of[0][0].conditioning
    return PairBatch(
        pairs=Pairs(
            x0=x0,
            x_t=interpolate(x0, e, t),
            noise=e,
            t=t,
            v_old=tensor([_old(s, i, k) for s, i, k in of]) if needs.old else None,
            v_ref=tensor([v for v, _ in references]) if references else None,
            ref_scale=tensor([np.float32(scale) for _, scale in references] or list(np.zeros_like(filled))),
            sample_weight=tensor([groups[g].weight[i] for g, i, _ in rows]),
        ),
        filled=tensor(list(filled)),
        conditioning={name: tensor([s.conditioning[name][0] for s, _, _ in of]).to(dtype) for name in names},
    )


def _old(samples: CleanSamples, sample: int, time: int) -> np.ndarray:
    assert samples.v_old is not None, "the loss needs v_old, and the sampler sent none"
    velocity: np.ndarray = samples.v_old[sample, time]
    return velocity


def _reference(samples: CleanSamples, sample: int, time: int) -> tuple[np.ndarray, float]:
    """v_ref of one pair and its scale: 1 / (the share of the sample's times that have one), or 0."""
    assert samples.v_ref is not None, "the loss needs v_ref, and the sampler sent none"
    if samples.ref_times is None:
        return samples.v_ref[sample, time], 1.0
    found = np.flatnonzero(samples.ref_times[sample] == time)
    if not len(found):
        return np.zeros_like(samples.v_ref[sample, 0]), 0.0
    return samples.v_ref[sample, found[0]], samples.t.shape[1] / samples.ref_times.shape[1]
