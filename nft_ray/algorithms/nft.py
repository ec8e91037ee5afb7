"""The DiffusionNFT loss: pull the policy towards its good images and away from its bad ones, on the forward process.

The paper (arXiv 2509.16117) trains two implicit policies, mirrored at the old policy v_old,

    v+ = beta v + (1 - beta) v_old        v- = (1 + beta) v_old - beta v

to restore the same clean image x0 from x_t: v+ as much as the image is good (r), v- as much as it is not (1 - r).
A good image thus draws v to it; a bad one draws v- to it, hence v away. This file is that formula, how an advantage
becomes r, and its section of the YAML. It knows no model, no sampler and no optimizer.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, get_args, overload

import numpy as np
from pydantic import Field

from nft_ray.algorithms.advantages import combine_advantages
from nft_ray.algorithms.base import (
    AdvantageConfig,
    Algorithm,
    EpochRewards,
    KLConfig,
    Needs,
    PairLoss,
    Pairs,
    SampleWeights,
)
from nft_ray.flow.path import x0_from_velocity

if TYPE_CHECKING:
    import torch

Mode = Literal["all", "positive_only", "negative_only", "one_only", "binary"]


class Config(AdvantageConfig, KLConfig):
    TITLE = "DiffusionNFT"
    TAG = "diffusion-nft"
    PAPER = "https://arxiv.org/abs/2509.16117"

    name: Literal["nft"] = "nft"
    beta: Annotated[float, Field(gt=0)] = 1.0
    """Strength of the implicit positive and negative policies."""
    advantage_mode: Mode = "all"
    """How a clipped advantage is shaped before it becomes an optimality: see `optimality`."""


class NFT:
    """The paper's policy loss and KL term; an advantage weighs a sample as its optimality r in [0, 1]."""

    name = "nft"
    measures: tuple[str, ...] = ("policy_loss", "kl")

    def __init__(self, config: Config) -> None:
        self._config = config

    @property
    def needs(self) -> Needs:
        return Needs(old=True, reference=self._config.reference)

    def sample_weights(self, rewards: EpochRewards) -> SampleWeights:
        config = self._config
        advantages = combine_advantages(
            rewards.raw, rewards.weights, rewards.group_ids, combine=rewards.combine, std=config.advantage_std
        )
        r = optimality(advantages, clip=config.advantage_clip, mode=config.advantage_mode)
        metrics = {
            "advantage_abs": float(np.nanmean(np.abs(advantages))),
            "optimality_mean": float(np.nanmean(r)),
        }
        return SampleWeights(r.astype(np.float32), metrics)

    def loss(self, v: torch.Tensor, pairs: Pairs) -> PairLoss:
        assert pairs.v_old is not None, "v_old is among the needs"
        policy, kl = nft_loss_per_pair(
            v,
            pairs.v_old,
            pairs.x0,
            pairs.x_t,
            pairs.t,
            pairs.sample_weight,
            beta=self._config.beta,
            scale=self._config.advantage_clip,
            v_ref=pairs.v_ref,
        )
        kl = kl * pairs.ref_scale
        return PairLoss(policy + self._config.kl_weight * kl, (policy, kl))


def build(config: Config) -> Algorithm:
    """The algorithm of a checked section."""
    return NFT(config)


@dataclass(frozen=True, slots=True, kw_only=True)
class NFTLoss:
    """Scalars: total = policy + kl_weight * kl. `kl` is the unweighted mean squared velocity difference."""

    policy: torch.Tensor
    kl: torch.Tensor
    total: torch.Tensor


class NFTLossPerPair(NamedTuple):
    """policy (B,), kl (B,): the same per (sample, time) pair."""

    policy: torch.Tensor
    kl: torch.Tensor


def nft_loss(
    v: torch.Tensor,
    v_old: torch.Tensor,
    x0: torch.Tensor,
    x_t: torch.Tensor,
    t: torch.Tensor,
    optimality: torch.Tensor,
    *,
    beta: float,
    scale: float,
    v_ref: torch.Tensor | None = None,
    kl_weight: float = 0.0,
) -> NFTLoss:
    """Mean over the batch of `nft_loss_per_pair` (which see for shapes and dtypes), and the weighted sum of both parts.

    Raises ValueError where shapes do not fit, beta is not positive, or kl_weight is not 0 and v_ref is missing.
    """
    if kl_weight and v_ref is None:
        raise ValueError(f"kl_weight = {kl_weight}: the KL term needs v_ref, the reference velocity")
    policy, kl = nft_loss_per_pair(v, v_old, x0, x_t, t, optimality, beta=beta, scale=scale, v_ref=v_ref)
    return NFTLoss(policy=policy.mean(), kl=kl.mean(), total=policy.mean() + kl_weight * kl.mean())


def nft_loss_per_pair(
    v: torch.Tensor,
    v_old: torch.Tensor,
    x0: torch.Tensor,
    x_t: torch.Tensor,
    t: torch.Tensor,
    optimality: torch.Tensor,
    *,
    beta: float,
    scale: float,
    v_ref: torch.Tensor | None = None,
) -> NFTLossPerPair:
    """The loss of each of B (sample, time) pairs, so that a learner can sum micro-batches of any size.

    v, v_old, v_ref (B, ...): velocities noise - x0 at (x_t, t) of the trained, the old and the reference policy;
    x0, x_t (B, ...); t (B,) in [0, 1]; optimality (B,) = r in [0, 1]; scale: the published advantage clip c.

        x0_hat = x_t - t v+-,   L+- = mean (x0_hat - x0)^2 / max(mean |x0_hat - x0|, 1e-5)
        policy = scale (r L+ + (1 - r) L-) / beta,   kl = mean (v - v_ref)^2 (0 without v_ref)

    16-bit input is lifted to float32 first; policy is float64, kl like v or float32. Gradients reach v only, and not
    through the denominators.
    Source: the paper's policy loss with its adaptive weighting, in the form of the published code.
    Raises ValueError where shapes do not fit or beta is not positive.
    """
    if beta <= 0:
        raise ValueError(f"beta = {beta}: must be above 0")
    for name, tensor in {"v_old": v_old, "x0": x0, "x_t": x_t, "v_ref": v if v_ref is None else v_ref}.items():
        if tensor.shape != v.shape:
            raise ValueError(f"{name} must have the shape of v, {tuple(v.shape)}, not {tuple(tensor.shape)}")
    if optimality.shape != v.shape[:1]:
        raise ValueError(f"optimality must be (B,) = ({v.shape[0]},), not {tuple(optimality.shape)}")

    v, x0, x_t, t, r = (_lift(tensor) for tensor in (v, x0, x_t, t, optimality))
    v_old = _lift(v_old).detach()
    v_plus = beta * v + (1 - beta) * v_old
    v_minus = (1 + beta) * v_old - beta * v
    loss_plus = _normalised_error(x0_from_velocity(x_t, v_plus, t), x0)
    loss_minus = _normalised_error(x0_from_velocity(x_t, v_minus, t), x0)
    policy = scale * (r * loss_plus / beta + (1 - r) * loss_minus / beta)
    kl = policy.new_zeros(policy.shape) if v_ref is None else (v - _lift(v_ref).detach()).square().flatten(1).mean(1)
    return NFTLossPerPair(policy, kl)


@overload
def optimality(advantages: np.ndarray, *, clip: float, mode: Mode = "all") -> np.ndarray: ...


@overload
def optimality(advantages: torch.Tensor, *, clip: float, mode: Mode = "all") -> torch.Tensor: ...


def optimality(advantages: Any, *, clip: float, mode: Mode = "all") -> Any:
    """r = clamp(advantage, -clip, clip) / clip / 2 + 1/2: how good a sample is, in [0, 1], 1/2 for an average one.

    advantages: a tensor, or an array for those who have no torch, of any shape; what is given is its like. NaN
    (missing) stays NaN. `mode` shapes the clipped advantage first, as published:
    positive_only and negative_only set the other sign to 0; one_only makes it 1 where positive, else 0; binary takes
    its sign. (The last two are divided by clip as well: with clip 5, binary gives 0.4, 0.5 and 0.6.)
    Returns the same shape, float32 or better. Raises ValueError for an unknown mode or a clip that is not positive.
    """
    if mode not in get_args(Mode):
        close = difflib.get_close_matches(str(mode), get_args(Mode), n=1, cutoff=0.0)[0]
        raise ValueError(f"unknown advantage mode {mode!r}: use one of {', '.join(get_args(Mode))}; nearest: {close!r}")
    if clip <= 0:
        raise ValueError(f"clip = {clip}: must be above 0")
    if not isinstance(advantages, np.ndarray):
        import torch

        found = optimality(_lift(advantages).detach().cpu().numpy(), clip=clip, mode=mode)
        return torch.from_numpy(found).to(advantages.device)
    clipped = advantages.astype(np.result_type(advantages, np.float32)).clip(-clip, clip)
    if mode == "positive_only":
        clipped = clipped.clip(min=0)
    elif mode == "negative_only":
        clipped = clipped.clip(max=0)
    elif mode == "one_only":
        clipped = np.sign(clipped).clip(min=0)
    elif mode == "binary":
        clipped = np.sign(clipped)
    return np.asarray((clipped / clip / 2 + 0.5).clip(0, 1))


def _normalised_error(x0_hat: torch.Tensor, x0: torch.Tensor) -> torch.Tensor:
    """(B,) float64: squared error over absolute error, the latter without gradient: every time weighs alike.

    The order of the operations and the float64 from the denominator on are the published ones: gradients match to the
    last bit, also where two terms nearly cancel.
    """
    absolute = (x0_hat.detach().double() - x0.double()).abs().flatten(1).mean(1, keepdim=True)
    return ((x0_hat - x0).square().flatten(1) / absolute.clamp(min=1e-5)).mean(1)


def _lift(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.is_floating_point() and tensor.dtype.itemsize >= 4 else tensor.float()
