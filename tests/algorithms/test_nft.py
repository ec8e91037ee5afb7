"""The loss against the published numbers, and what must hold of it whatever the numbers are."""

from pathlib import Path

import numpy as np
import pytest
import torch

from nft_ray.algorithms.nft import NFTLoss, nft_loss, nft_loss_per_pair, optimality

SHAPE = (6, 4, 5, 5)


def inputs(seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(SHAPE, generator=g).to(dtype) for name in ("v", "v_old", "x0", "x_t")}
    return tensors | {"t": torch.rand(6, generator=g), "optimality": torch.rand(6, generator=g)}


def relative_error(value: torch.Tensor, expected: np.ndarray) -> float:
    expected = np.asarray(expected, dtype=np.float64)
    return float(np.abs(value.detach().numpy() - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("i", range(15))
def test_loss_gradient_and_optimality_match_the_goldens(goldens: Path, i: int) -> None:
    with np.load(goldens / "loss.npz") as file:
        assert int(file["n"]) == 15
        case = {key.split("/")[1]: file[key] for key in file if key.startswith(f"{i}/")}
    x = {key: torch.from_numpy(case[key]) for key in ("v", "v_old", "v_ref", "x0", "xt", "t", "adv")}
    v, clip = x["v"].requires_grad_(), float(case["adv_clip_max"])

    r = optimality(x["adv"], clip=clip, mode=str(case["adv_mode"]))
    loss = nft_loss(
        v,
        x["v_old"],
        x["x0"],
        x["xt"],
        x["t"],
        r,
        beta=float(case["beta"]),
        scale=clip,
        v_ref=x["v_ref"],
        kl_weight=float(case["kl_beta"]),
    )
    loss.total.backward()

    assert relative_error(r, case["r"]) < 1e-6
    assert relative_error(loss.policy, case["policy_loss"]) < 1e-5
    assert relative_error(loss.kl, case["kl"]) < 1e-5
    assert relative_error(loss.total, case["total"]) < 1e-5
    np.testing.assert_allclose(v.grad.numpy(), case["grad"], rtol=1e-5, atol=0)  # every element


def test_the_formula_of_the_paper_in_float64() -> None:
    x = {name: tensor.double() for name, tensor in inputs().items()}
    beta, scale = 0.3, 5.0
    expected = []
    for b in range(6):
        v, v_old, x0, x_t, t, r = (x[name][b] for name in ("v", "v_old", "x0", "x_t", "t", "optimality"))
        error_plus = x_t - t * (beta * v + (1 - beta) * v_old) - x0
        error_minus = x_t - t * ((1 + beta) * v_old - beta * v) - x0
        plus, minus = (e.square().mean() / e.abs().mean() for e in (error_plus, error_minus))
        expected.append(scale * (r * plus + (1 - r) * minus) / beta)
    policy, kl = nft_loss_per_pair(**x, beta=beta, scale=scale)
    torch.testing.assert_close(policy, torch.stack(expected), rtol=1e-12, atol=0)
    assert kl.tolist() == [0.0] * 6


def test_scalars_are_means_of_the_pairs_whatever_the_micro_batches() -> None:
    x, v_ref = inputs(), torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    whole = nft_loss(**x, beta=0.5, scale=2.0, v_ref=v_ref, kl_weight=0.1)
    pairs = [
        nft_loss_per_pair(**{name: tensor[part] for name, tensor in x.items()}, beta=0.5, scale=2.0, v_ref=v_ref[part])
        for part in (slice(0, 1), slice(1, 5), slice(5, 6))
    ]
    policy = torch.cat([pair.policy for pair in pairs]).sum() / 6
    kl = torch.cat([pair.kl for pair in pairs]).sum() / 6
    torch.testing.assert_close(whole.policy, policy, rtol=1e-12, atol=0)
    torch.testing.assert_close(whole.kl, kl)
    torch.testing.assert_close(whole.total, policy + 0.1 * kl)
    assert whole.policy.shape == whole.kl.shape == whole.total.shape == ()


def test_a_good_image_draws_the_policy_to_it_and_a_bad_one_pushes_it_away() -> None:
    x = inputs()
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(2))
    t = x["t"].view(-1, 1, 1, 1)
    x |= {"x_t": (1 - t) * x["x0"] + t * noise, "v": x["v_old"].clone().requires_grad_()}  # starting at the old policy
    towards = noise - x["x0"] - x["v_old"]
    for r, sign in ((1.0, 1), (0.0, -1)):
        loss = nft_loss(**x | {"optimality": torch.full((6,), r)}, beta=1.0, scale=5.0)
        (gradient,) = torch.autograd.grad(loss.total, x["v"])
        step = -(gradient * towards).flatten(1).sum(1) * sign
        assert (step > 0).all()


def test_gradients_reach_v_only() -> None:
    x = inputs()
    leaves = {name: x[name].requires_grad_() for name in ("v", "v_old")}
    v_ref = torch.zeros(SHAPE, requires_grad=True)
    nft_loss(**x, beta=1.0, scale=5.0, v_ref=v_ref, kl_weight=0.1).total.backward()
    assert leaves["v"].grad is not None
    assert leaves["v_old"].grad is None
    assert v_ref.grad is None


def test_the_denominator_passes_no_gradient() -> None:
    x = inputs() | {"optimality": torch.ones(6)}
    v = x["v"].requires_grad_()
    (gradient,) = torch.autograd.grad(nft_loss(**x, beta=1.0, scale=5.0).total, v)
    t = x["t"].view(-1, 1, 1, 1)
    error = (x["x_t"] - t * v - x["x0"]).detach()
    num_values = error[0].numel()
    by_hand = 5.0 / 6 * 2 * error * -t / num_values / error.abs().mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(gradient, by_hand)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_velocities_are_lifted_before_anything_is_computed(dtype: torch.dtype) -> None:
    low = inputs(dtype=dtype)
    exact = {name: tensor.float() for name, tensor in low.items()}
    losses: list[NFTLoss] = [nft_loss(**x, beta=0.1, scale=5.0, v_ref=x["v_old"]) for x in (low, exact)]
    assert losses[0] == losses[1]
    assert losses[0].policy.dtype == torch.float64


def test_a_perfect_prediction_is_not_divided_by_zero() -> None:
    x0 = torch.ones(SHAPE)
    loss = nft_loss(x0, x0, x0, 2 * x0, torch.ones(6), torch.ones(6), beta=1.0, scale=5.0)
    assert loss.policy == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta": 0.0}, "beta = 0.0: must be above 0"),
        ({"kl_weight": 0.1}, "kl_weight = 0.1: the KL term needs v_ref"),
        ({"v_old": torch.zeros(6, 4, 5, 4)}, r"v_old must have the shape of v, \(6, 4, 5, 5\)"),
        ({"optimality": torch.zeros(6, 1)}, r"optimality must be \(B,\) = \(6,\), not \(6, 1\)"),
        ({"t": torch.zeros(1)}, r"t must be \(B,\) = \(6,\)"),
    ],
)
def test_what_does_not_fit_is_refused_instead_of_broadcast(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        nft_loss(**inputs() | {"beta": 1.0, "scale": 5.0} | change)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("all", [0.0, 0.0, 0.25, 0.5, 0.75, 1.0]),
        ("positive_only", [0.5, 0.5, 0.5, 0.5, 0.75, 1.0]),
        ("negative_only", [0.0, 0.0, 0.25, 0.5, 0.5, 0.5]),
        ("one_only", [0.5, 0.5, 0.5, 0.5, 0.75, 0.75]),
        ("binary", [0.25, 0.25, 0.25, 0.5, 0.75, 0.75]),
    ],
)
def test_optimality_by_mode(mode: str, expected: list[float]) -> None:
    advantages = np.array([-9.0, -2.0, -1.0, 0.0, 1.0, 7.0, np.nan], np.float32)
    r = optimality(advantages, clip=2.0, mode=mode)
    assert r[:-1].tolist() == expected
    assert np.isnan(r[-1])
    assert r.dtype == np.float32
    of_tensor = optimality(torch.from_numpy(advantages), clip=2.0, mode=mode)
    assert of_tensor.numpy().tobytes() == r.tobytes()
    assert optimality(torch.ones(2, dtype=torch.bfloat16), clip=2.0, mode=mode).dtype == torch.float32


def test_unknown_mode_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"unknown advantage mode 'positive': use .*; nearest: 'positive_only'"):
        optimality(np.zeros(2), clip=5.0, mode="positive")
    with pytest.raises(ValueError, match=r"clip = 0\.0: must be above 0"):
        optimality(np.zeros(2), clip=0.0)
