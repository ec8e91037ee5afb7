"""The straight path between an image and noise: the one time convention of this package.

    t = 0: the clean latent x0        t = 1: noise
    x_t = (1 - t) x0 + t noise        v = dx_t/dt = noise - x0        x0 = x_t - t v

It is rectified flow (Liu et al. 2022, arXiv 2209.03003) as Stable Diffusion 3 uses it (arXiv 2403.03206), where sigma
is t. Times are floats in [0, 1]; a model that wants another scale (1000 of them, say) converts in its own adapter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def interpolate(x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """x_t = (1 - t) x0 + t noise. x0, noise (B, ...); t (B,) in [0, 1]; returns (B, ...).

    Raises ValueError where t is not (B,).
    """
    t = per_sample(t, x0)
    return (1 - t) * x0 + t * noise


def x0_from_velocity(x_t: torch.Tensor, v: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """x0_hat = x_t - t v: where the path ends if v is right. x_t, v (B, ...); t (B,); returns (B, ...).

    Raises ValueError where t is not (B,).
    """
    return x_t - per_sample(t, x_t) * v


def per_sample(t: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """t (B,) as (B, 1, ..., 1), to multiply `like` (B, ...) sample by sample. Raises ValueError unless it is (B,)."""
    if t.shape != like.shape[:1]:
        raise ValueError(f"t must be (B,) = ({like.shape[0]},), one time per sample, not {tuple(t.shape)}")
    return t.reshape(-1, *[1] * (like.ndim - 1))
