"""Solvers of the sampling ODE dx/dsigma = v(x, sigma), from noise (sigma 1) down to the clean latent (sigma 0).

On the straight path (flow/path.py) DDIM with eta 0 and first-order DPM-Solver++ ARE the Euler step, written
differently: put x0 = x - s v and noise = x + (1 - s) v into (1 - t) x0 + t noise and x + (t - s) v is left. So `euler`,
`ddim` and `dpm1` share one line. DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095) is that step plus a correction
from the last x0 prediction, and `heun` averages the velocities at both ends of the step: 2 evaluations per step, the
others take 1. No solver knows a model: `velocity` is a function. DiffusionNFT trains on clean images only, so any of
them may collect the data.
"""

import difflib
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import get_args

import torch

from nft_ray.types import Solver

Velocity = Callable[[torch.Tensor, float], torch.Tensor]
"""velocity(x (B, ...), sigma in [0, 1]) -> v (B, ...) of any floating dtype."""


def solve(solver: Solver, velocity: Velocity, x: torch.Tensor, sigmas: torch.Tensor | Sequence[float]) -> torch.Tensor:
    """Follow the ODE through `sigmas` and return x at the last of them.

    x (B, ...) is the start at sigmas[0]; sigmas (S+1,) fall strictly within [0, 1], the last is usually 0. The state is
    float32 or better throughout, whatever dtype x or the velocities have, and so is what returns. The velocity is never
    asked at sigma 0 (no training time): there `heun` ends with an Euler step. Gradients are the caller's business.
    Matches the published solvers (eta 0). Raises ValueError for an unknown solver or sigmas that do not fall.
    """
    if solver not in get_args(Solver):
        close = difflib.get_close_matches(str(solver), get_args(Solver), n=1, cutoff=0.0)[0]
        raise ValueError(f"unknown solver {solver!r}: use one of {', '.join(get_args(Solver))}; nearest: {close!r}")
    points = [float(sigma) for sigma in sigmas]
    falling = all(s > t for s, t in pairwise(points))
    if len(points) < 2 or not falling or points[0] > 1 or points[-1] < 0:
        raise ValueError(f"sigmas must be at least 2, falling strictly within [0, 1], not {points}")

    x = x.to(torch.promote_types(x.dtype, torch.float32))
    x0_before: torch.Tensor | None = None
    for i, (s, t) in enumerate(pairwise(points)):
        v = velocity(x, s).to(x.dtype)
        x_next = x + (t - s) * v
        if solver == "heun" and t > 0:
            x_next = x + (t - s) * (v + velocity(x_next, t).to(x.dtype)) / 2
        elif solver == "dpm2":
            x0 = x - s * v
            if x0_before is not None and i < len(points) - 2:  # the first and the last step are of first order
                inverse_r = (_log_snr(t) - _log_snr(s)) / (_log_snr(s) - _log_snr(points[i - 1]))
                x_next = x_next + (1 - t / s) * inverse_r / 2 * (x0 - x0_before)
            x0_before = x0
        x = x_next
    return x


def _log_snr(sigma: float) -> float:
    """lambda = log(alpha / sigma), alpha = 1 - sigma; minus infinity for pure noise."""
    return math.log((1 - sigma) / sigma) if sigma < 1 else -math.inf
