"""How sure a mean is: percentile bootstrap (Efron 1979), seeded, so the same values give the same interval.

Lines are drawn with replacement; an interval over values that are all equal has no width, which says that none of the
drawn lines differed, not that no other line could.
"""

from collections.abc import Sequence

import numpy as np

from nft_ray.seeding import mix

RESAMPLES = 2000
COVERAGE = 0.95
CHUNK = 2**20
"""Values drawn at once: bounds the memory, not the result."""


def interval(values: np.ndarray | Sequence[float]) -> tuple[float, float]:
    """The middle 95 % of the means of RESAMPLES resamples of values (N,); needs N >= 1."""
    lines = np.asarray(values, dtype=np.float64)
    rng = np.random.default_rng(mix("bootstrap", len(lines)))
    means: list[np.ndarray] = []
    for rows in np.array_split(np.arange(RESAMPLES), max(1, RESAMPLES * len(lines) // CHUNK)):
        means.append(lines[rng.integers(len(lines), size=(len(rows), len(lines)))].mean(axis=1))
    low, high = np.quantile(np.concatenate(means), [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2])
    return float(low), float(high)
