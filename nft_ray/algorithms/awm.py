"""Advantage-weighted matching: the flow matching loss of pretraining, each sample weighed by its advantage.

AWM (arXiv 2509.25050) puts the matching error in the place of a sample's log-likelihood,

    l(v) = -w(t) (mean |v - target|^2) ^ p / p,      target = noise - x0      (p = 1: the plain error)

and does policy gradients with it: with the ratio rho = exp(l(v) - l(v_old)) and PPO's clip,

    policy = max(-A rho, -A clamp(rho, 1 - clip, 1 + clip)),
    loss   = policy + old_kl_weight mean |v - v_old|^2 + kl_weight mean |v - v_ref|^2

The second term is the paper's EMA-KL: the old policy IS the slow copy that it holds on to. At rho = 1 the gradient is
that of A w(t) |v - target|^2: a good sample is learned, a bad one unlearned. Without a clip the ratio is left out,
policy = -A l(v), and with no EMA-KL either no v_old is computed: half of a sampler's work at training times.
Source: the objective of the paper's method section, in the form of the published code (scripts/train_sd3_awm.py,
compute_log_prob_awm and the loss after it): weighting `t` with power 0.25 is its `ghuber`, clip 1 and old_kl_weight 1
are its presets.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

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

if TYPE_CHECKING:
    import torch

FLOOR = 1e-10
"""Added to an error before it is raised to a power below 1, whose slope at 0 is infinite. As published."""


class Config(AdvantageConfig, KLConfig):
    TITLE = "Advantage-weighted matching"
    TAG = "awm"
    PAPER = "https://arxiv.org/abs/2509.25050"

    name: Literal["awm"] = "awm"
    weighting: Literal["uniform", "t", "t_squared"] = "t"
    """w(t): how much the matching error counts at time t (1 = noise)."""
    power: Annotated[float, Field(gt=0, le=1)] = 0.25
    """Exponent of the matching error: 1 = the plain squared error; below 1 large errors count for less."""
    clip: Annotated[float, Field(gt=0)] | None = 1.0
    """PPO's clip of the ratio to the old policy, to 1 +- this; null = no ratio: A times the matching error itself."""
    old_kl_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the squared velocity difference to the old policy: the paper's EMA-KL."""


class AWM:
    """PPO with the matching error for a log-likelihood; a sample weighs its clipped advantage, in [-1, 1]."""

    name = "awm"
    measures: tuple[str, ...] = ("policy_loss", "kl", "old_kl", "clipped")

    def __init__(self, config: Config) -> None:
        self._config = config

    @property
    def needs(self) -> Needs:
        config = self._config
        return Needs(old=config.clip is not None or config.old_kl_weight > 0, reference=config.reference)

    def sample_weights(self, rewards: EpochRewards) -> SampleWeights:
        config = self._config
        advantages = combine_advantages(
            rewards.raw, rewards.weights, rewards.group_ids, combine=rewards.combine, std=config.advantage_std
        )
        weights = np.clip(advantages, -config.advantage_clip, config.advantage_clip) / config.advantage_clip
        metrics = {
            "advantage_abs": float(np.nanmean(np.abs(advantages))),
            "advantages_clipped": float(np.nanmean(np.abs(weights[~np.isnan(weights)]) == 1)),
        }
        return SampleWeights(weights.astype(np.float32), metrics)

    def loss(self, v: torch.Tensor, pairs: Pairs) -> PairLoss:
        config, zero = self._config, v.new_zeros(len(v))
        policy, clipped = self._policy_loss(v, pairs)
        kl = zero if pairs.v_ref is None else _distance(v, pairs.v_ref) * pairs.ref_scale
        old_kl = zero if pairs.v_old is None else _distance(v, pairs.v_old)
        total = policy + config.kl_weight * kl + config.old_kl_weight * old_kl
        return PairLoss(total, (policy, kl, old_kl, clipped))

    def _policy_loss(self, v: torch.Tensor, pairs: Pairs) -> tuple[torch.Tensor, torch.Tensor]:
        """(B,), and where the clip decides, 1, else 0."""
        config, advantage = self._config, pairs.sample_weight
        likelihood = self._likelihood(v, pairs)
        if config.clip is None:
            return -advantage * likelihood, likelihood.new_zeros(likelihood.shape)
        assert pairs.v_old is not None, "v_old is among the needs"
        ratio = (likelihood - self._likelihood(pairs.v_old, pairs).detach()).exp()
        free, bound = -advantage * ratio, -advantage * ratio.clamp(1 - config.clip, 1 + config.clip)
        return free.maximum(bound), (bound > free).float()

    def _likelihood(self, v: torch.Tensor, pairs: Pairs) -> torch.Tensor:
        config = self._config
        return matching_likelihood(v, pairs.x0, pairs.noise, pairs.t, weighting=config.weighting, power=config.power)


def build(config: Config) -> Algorithm:
    """The algorithm of a checked section."""
    return AWM(config)


def matching_likelihood(
    v: torch.Tensor,
    x0: torch.Tensor,
    noise: torch.Tensor,
    t: torch.Tensor,
    *,
    weighting: str = "uniform",
    power: float = 1.0,
) -> torch.Tensor:
    """l(v) = -w(t) ((mean |v - (noise - x0)|^2 + floor) ^ p - floor ^ p) / p, float64 (B,): 0 for a perfect match.

    v, x0, noise (B, ...); t (B,) in [0, 1]; weighting: uniform, t, t_squared; 0 < p <= 1. The floor of 1e-10 is there
    for p below 1 only. In float64, as published: the difference of two of them is exponentiated.
    """
    error = (v.double() - (noise.double() - x0.double())).square().flatten(1).mean(1)
    if power != 1:
        error = ((error + FLOOR) ** power - FLOOR**power) / power
    scale = {"uniform": t.new_ones(t.shape), "t": t, "t_squared": t.square()}[weighting]
    return -error * scale.double()


def _distance(v: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Mean squared difference (B,); without gradient to the other."""
    return (v - other.detach()).square().flatten(1).mean(1)
