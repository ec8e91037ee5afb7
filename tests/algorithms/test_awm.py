"""Advantage-weighted matching against its formulas, written out for one pair at a time."""

import math

import numpy as np
import pytest
import torch

from nft_ray.algorithms.awm import AWM, Config, matching_likelihood
from nft_ray.algorithms.base import EpochRewards, Pairs

SHAPE = (5, 3, 4, 4)
ADVANTAGES = [-1.0, -0.3, 0.0, 0.4, 1.0]


def example(old_is_near: float = 0.0) -> tuple[torch.Tensor, Pairs]:
    g = torch.Generator().manual_seed(3)
    v, x0, noise, v_ref, step = (torch.randn(SHAPE, generator=g, dtype=torch.float64) for _ in range(5))
    t = torch.tensor([0.1, 0.3, 0.5, 0.8, 1.0], dtype=torch.float64)
    at = t.reshape(-1, 1, 1, 1)
    batch = Pairs(
        x0=x0,
        x_t=(1 - at) * x0 + at * noise,
        noise=noise,
        t=t,
        v_old=v + old_is_near * step,
        v_ref=v_ref,
        ref_scale=torch.ones(5, dtype=torch.float64),
        sample_weight=torch.tensor(ADVANTAGES, dtype=torch.float64),
    )
    return v.requires_grad_(), batch


@pytest.mark.parametrize("weighting", ["uniform", "t", "t_squared"])
@pytest.mark.parametrize("power", [1.0, 0.25])
def test_the_loss_of_the_published_code_pair_by_pair(weighting: str, power: float) -> None:
    config = Config(weighting=weighting, power=power, clip=0.2, old_kl_weight=0.7, kl_weight=0.3)
    v, batch = example(old_is_near=0.3)
    found = AWM(config).loss(v, batch)
    clipped = 0
    for i, advantage in enumerate(ADVANTAGES):
        t = float(batch.t[i])

        def likelihood(velocity: torch.Tensor, i: int = i, t: float = t) -> float:
            error = float((velocity[i] - batch.noise[i] + batch.x0[i]).pow(2).mean())
            if power != 1:
                error = ((error + 1e-10) ** power - 1e-10**power) / power
            return -error * {"uniform": 1.0, "t": t, "t_squared": t * t}[weighting]

        assert batch.v_old is not None
        assert batch.v_ref is not None
        ratio = math.exp(likelihood(v.detach()) - likelihood(batch.v_old))
        policy = max(-advantage * ratio, -advantage * min(max(ratio, 0.8), 1.2))
        kl, old_kl = (float((v.detach()[i] - o[i]).pow(2).mean()) for o in (batch.v_ref, batch.v_old))
        assert found.measured[0][i].item() == pytest.approx(policy, rel=1e-9)
        assert found.total[i].item() == pytest.approx(policy + 0.3 * kl + 0.7 * old_kl, rel=1e-6)
        clipped += policy > -advantage * ratio
    assert found.measured[3].sum() == clipped


def test_at_the_old_policy_it_is_the_advantage_times_the_matching_loss() -> None:
    v, batch = example()
    settings = {"weighting": "t", "power": 1.0, "old_kl_weight": 0.0, "kl_weight": 0.0}
    (with_ratio,) = torch.autograd.grad(AWM(Config(clip=0.2, **settings)).loss(v, batch).total.sum(), v)
    (without,) = torch.autograd.grad(AWM(Config(clip=None, **settings)).loss(v, batch).total.sum(), v)
    error = v.detach() - (batch.noise - batch.x0)
    by_hand = (batch.sample_weight * batch.t).reshape(-1, 1, 1, 1) * 2 * error / error[0].numel()
    torch.testing.assert_close(with_ratio, by_hand)
    torch.testing.assert_close(without, by_hand)


def test_past_the_clip_a_pair_pulls_no_more() -> None:
    """Good samples whose ratio is above 1 + clip, and bad ones below 1 - clip, have no gradient; the others keep it."""
    v, batch = example(old_is_near=2.0)
    config = Config(weighting="uniform", power=1.0, clip=0.2, old_kl_weight=0.0, kl_weight=0.0)
    (gradient,) = torch.autograd.grad(AWM(config).loss(v, batch).total.sum(), v)
    assert batch.v_old is not None
    ratio = matching_likelihood(v, batch.x0, batch.noise, batch.t) - matching_likelihood(
        batch.v_old, batch.x0, batch.noise, batch.t
    )
    for i, advantage in enumerate(ADVANTAGES):
        r = math.exp(ratio[i].item())
        done = (advantage > 0 and r > 1.2) or (advantage < 0 and r < 0.8) or advantage == 0
        assert (gradient[i].abs().max() == 0) == done


def test_without_clip_and_old_kl_no_old_velocity_is_asked_for() -> None:
    assert AWM(Config()).needs.old
    assert AWM(Config(clip=None)).needs.old
    assert not AWM(Config(clip=None, old_kl_weight=0.0)).needs.old


def test_a_perfect_match_has_a_finite_gradient() -> None:
    v, batch = example()
    v = (batch.noise - batch.x0).clone().requires_grad_()
    likelihood = matching_likelihood(v, batch.x0, batch.noise, batch.t, weighting="t", power=0.25)
    assert likelihood.abs().max() == 0
    (gradient,) = torch.autograd.grad(likelihood.sum(), v)
    assert gradient.isfinite().all()


def test_weights_are_clipped_advantages_of_at_most_1() -> None:
    rewards = EpochRewards(
        raw={"a": np.array([0.0] * 99 + [100.0], np.float32)},
        weights={"a": 1.0},
        group_ids=np.zeros(100, np.int64),
        combine="sum",
    )
    found = AWM(Config(advantage_clip=2.0)).sample_weights(rewards)
    assert found.values[-1] == 1.0
    assert found.values[0] == pytest.approx(-0.1 / 2, rel=0.02)
    assert found.metrics["advantages_clipped"] == pytest.approx(0.01)
