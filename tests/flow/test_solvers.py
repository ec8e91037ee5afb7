"""The solvers against the published numbers, against each other and against an exact solution."""

import math
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch

from nft_ray.flow.solvers import Solver, solve

SOLVERS = get_args(Solver)


@pytest.mark.parametrize("i", range(12))
def test_solvers_match_the_goldens(goldens: Path, i: int) -> None:
    with np.load(goldens / "solvers.npz") as file:
        assert int(file["n"]) == 12
        case = {key.split("/")[1]: file[key] for key in file if key.startswith(f"{i}/")}
    a, b = torch.from_numpy(case["A"]), torch.from_numpy(case["b"])

    def velocity(z: torch.Tensor, sigma: float) -> torch.Tensor:
        return torch.tanh(z.double() @ a.T + b * sigma).to(z.dtype)

    solver = {"flow": "euler"}.get(str(case["solver"]), str(case["solver"]))
    final = solve(solver, velocity, torch.from_numpy(case["z"]), torch.from_numpy(case["sigmas"]))
    np.testing.assert_allclose(final.numpy(), case["final"], rtol=1e-5, atol=1e-5)
    assert np.abs(final.numpy() - case["final"]).max() <= 1e-5 * np.abs(case["final"]).max()


X = torch.linspace(-2, 2, 7, dtype=torch.float64).view(1, 7)


def error(solver: Solver, num_steps: int) -> float:
    """Against the exact solution of dx/ds = -x + s, from 0.95 down to 0.05: no end is singular."""

    def exact(s: float, c: torch.Tensor) -> torch.Tensor:
        return s - 1 + c * math.exp(-s)

    c = (X - exact(0.95, torch.zeros(1))) * math.exp(0.95)
    sigmas = np.linspace(0.95, 0.05, num_steps + 1).tolist()
    return float((solve(solver, lambda x, s: s - x, X, sigmas) - exact(0.05, c)).abs().max())


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("ddim", 1), ("dpm1", 1), ("dpm2", 2), ("heun", 2)])
def test_order_of_convergence(solver: Solver, order: int) -> None:
    slope = math.log2(error(solver, 64) / error(solver, 128))
    assert order - 0.15 < slope < order + 0.35


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_straight_flow_is_solved_exactly_from_pure_noise_to_zero(solver: Solver) -> None:
    x0, noise = X[:, :3].float(), X[:, 4:].float()
    final = solve(solver, lambda x, s: noise - x0, noise, torch.tensor([1.0, 0.8, 0.5, 0.1, 0.0]))
    torch.testing.assert_close(final, x0)


@pytest.mark.parametrize(("solver", "num_calls"), [("euler", 4), ("ddim", 4), ("dpm1", 4), ("dpm2", 4), ("heun", 7)])
def test_the_velocity_is_never_asked_at_zero_nor_in_low_precision(solver: Solver, num_calls: int) -> None:
    asked: list[float] = []

    def velocity(x: torch.Tensor, sigma: float) -> torch.Tensor:
        assert x.dtype == torch.float32
        asked.append(float(sigma))
        return torch.tanh(x).bfloat16()

    final = solve(solver, velocity, X.half(), torch.tensor([1.0, 0.8, 0.5, 0.1, 0.0]))
    assert final.dtype == torch.float32
    assert len(asked) == num_calls
    assert min(asked) > 0


@pytest.mark.parametrize("solver", SOLVERS)
def test_samples_of_a_batch_do_not_see_each_other(solver: Solver) -> None:
    x, sigmas = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)), [1.0, 0.7, 0.3, 0.0]
    whole = solve(solver, lambda x, s: torch.tanh(x) * s, x, sigmas)
    alone = torch.cat([solve(solver, lambda x, s: torch.tanh(x) * s, row[None], sigmas) for row in x])
    torch.testing.assert_close(whole, alone)


def test_unknown_solver_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"unknown solver 'dpm3': use one of euler, .*; nearest: 'dpm[12]'"):
        solve("dpm3", lambda x, s: x, X, [1.0, 0.0])


@pytest.mark.parametrize("sigmas", [[1.0], [0.0, 1.0], [1.0, 0.5, 0.5, 0.0], [1000.0, 500.0, 0.0], [0.5, -0.1]])
def test_sigmas_must_fall_within_0_and_1(sigmas: list[float]) -> None:
    with pytest.raises(ValueError, match="falling strictly"):
        solve("euler", lambda x, s: x, X, sigmas)
