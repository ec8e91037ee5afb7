import pytest
import torch

from nft_ray.flow.path import interpolate, x0_from_velocity

G = torch.Generator().manual_seed(0)
X0, NOISE = torch.randn(3, 2, 4, 4, generator=G), torch.randn(3, 2, 4, 4, generator=G)


def test_ends_of_the_path() -> None:
    t = torch.tensor([0.0, 1.0, 0.25])
    x_t = interpolate(X0, NOISE, t)
    assert torch.equal(x_t[0], X0[0])
    assert torch.equal(x_t[1], NOISE[1])
    torch.testing.assert_close(x_t[2], 0.75 * X0[2] + 0.25 * NOISE[2])


def test_the_velocity_is_the_derivative_and_leads_back_to_x0() -> None:
    t, h = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64), 1e-3
    x0, noise = X0.double(), NOISE.double()
    v = noise - x0
    derivative = (interpolate(x0, noise, t + h) - interpolate(x0, noise, t - h)) / (2 * h)
    torch.testing.assert_close(v, derivative)
    torch.testing.assert_close(x0_from_velocity(interpolate(x0, noise, t), v, t), x0)


@pytest.mark.parametrize("t", [torch.tensor(0.5), torch.zeros(3, 1), torch.zeros(4)])
def test_a_time_that_is_not_one_per_sample_is_refused(t: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"t must be \(B,\) = \(3,\)"):
        interpolate(X0, NOISE, t)
