import numpy as np
import pytest

from nft_ray.flow.times import reference_times, training_times

SIGMAS = np.array([1.0, 0.9, 0.75, 0.5, 0.25, 0.0], dtype=np.float32)


def test_times_are_a_subset_of_the_schedule_without_repetition_or_zero() -> None:
    times = training_times(SIGMAS, 3, range(200))
    assert times.shape == (200, 3)
    assert times.dtype == np.float32
    assert all(len(set(row)) == 3 for row in times)
    assert set(times.ravel()) == set(SIGMAS[:-1])


def test_every_time_and_every_order_comes_up_alike() -> None:
    times = training_times(SIGMAS, 5, range(3000))
    assert (np.sort(times, axis=1) == np.sort(SIGMAS[:-1])).all()  # all of them is a permutation
    for place in range(5):
        counts = np.unique(times[:, place], return_counts=True)[1]
        assert np.abs(counts - 600).max() < 110  # five standard deviations


def test_a_row_depends_on_its_own_seed_only() -> None:
    seeds = np.array([5, 2**32 - 1, 7, 5])
    times = training_times(SIGMAS, 4, seeds)
    np.testing.assert_array_equal(times[0], times[3])
    np.testing.assert_array_equal(times[1:3], training_times(SIGMAS, 4, [2**32 - 1, 7]))
    assert training_times(SIGMAS, 4, []).shape == (0, 4)


@pytest.mark.parametrize("num_times", [0, 6])
def test_more_times_than_the_sampler_has(num_times: int) -> None:
    with pytest.raises(ValueError, match=rf"num_times = {num_times}: .* 5 sigmas above 0; use 1 to 5") as error:
        training_times(SIGMAS, num_times, [1])
    assert "\n" not in str(error.value)


def test_reference_times_are_a_fixed_share_of_each_samples_times() -> None:
    chosen = reference_times(9, 1 / 3, range(3000))
    assert chosen.shape == (3000, 3)
    assert (np.diff(chosen, axis=1) > 0).all()
    counts = np.bincount(chosen.ravel(), minlength=9) / 3000
    np.testing.assert_allclose(counts, 1 / 3, atol=0.05)  # each as likely as any other
    np.testing.assert_array_equal(reference_times(9, 1.0, [5])[0], np.arange(9))
    assert reference_times(9, 0.01, [5]).shape == (1, 1)
    np.testing.assert_array_equal(reference_times(9, 0.5, [7, 8])[1], reference_times(9, 0.5, [8])[0])
