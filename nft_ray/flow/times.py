"""At which times a sample is trained: some of the sigmas that it was sampled with, each at most once."""

from collections.abc import Sequence

import numpy as np

from nft_ray.seeding import permutation


def training_times(
    sigmas: Sequence[float] | np.ndarray, num_times: int, seeds: Sequence[int] | np.ndarray
) -> np.ndarray:
    """T training times for each of G samples, in random order: float32 (G, T), in (0, 1].

    sigmas (S+1,): the sampler's schedule; its last 0 is no training time. num_times = T: how many of the others.
    seeds (G,): row g depends on seeds[g] alone, not on its neighbours. As published: a subset without replacement,
    in random order. Raises ValueError where num_times is not in 1..S.
    """
    schedule = np.asarray(sigmas, dtype=np.float32)
    available = schedule[schedule > 0]
    if not 1 <= num_times <= len(available):
        raise ValueError(
            f"num_times = {num_times}: training times are drawn without replacement from the sampler's "
            f"{len(available)} sigmas above 0; use 1 to {len(available)}"
        )
    rows = [available[permutation(len(available), "times", int(seed))[:num_times]] for seed in seeds]
    return np.stack(rows) if rows else np.empty((0, num_times), dtype=np.float32)


def reference_times(num_times: int, fraction: float, seeds: Sequence[int] | np.ndarray) -> np.ndarray:
    """Which of each sample's T = num_times times get a v_ref: int64 (G, K), K = fraction T rounded, at least 1.

    Every time is as likely as any other, and every sample has K, so a sum over them times T/K is the sum over all T in
    expectation. Row g depends on seeds[g] alone; with fraction 1 it is 0 .. T-1 in order.
    """
    count = max(1, round(fraction * num_times))
    rows = [np.sort(permutation(num_times, "reference times", int(seed))[:count]) for seed in seeds]
    return np.stack(rows) if rows else np.empty((0, count), dtype=np.int64)
