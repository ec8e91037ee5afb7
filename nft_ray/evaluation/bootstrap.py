"""How sure a mean is: percentile bootstrap (Efron 1979), seeded, so the same values give the same interval.

Prompts are drawn with replacement, and of each drawn prompt its lines: GenEval's 553 prompts stand four times in its
file, and four images of one prompt are not four prompts. (The second draw, somewhat too careful where lines are many,
keeps an interval over three prompts from having no width.) An interval over values that are all equal has none, which
says that none of the drawn lines differed, not that no other line could.
"""

from collections.abc import Sequence

import numpy as np

from nft_ray.seeding import mix

RESAMPLES = 2000
COVERAGE = 0.95
CHUNK = 2**20
"""Values drawn at once: bounds the memory, not the result."""


def interval(values: np.ndarray | Sequence[float], prompts: np.ndarray | None = None) -> tuple[float, float]:
    """The middle 95 % of the means of RESAMPLES resamples of values (N,); needs N >= 1.

    `prompts`, i64 (N,): lines with the same number are of one prompt; without, each line is a prompt of its own.
    """
    lines = np.asarray(values, dtype=np.float64)
    of = np.arange(len(lines)) if prompts is None else np.unique(prompts, return_inverse=True)[1]
    lines, counts = lines[np.argsort(of, kind="stable")], np.bincount(of)
    firsts, most = np.cumsum(counts) - counts, int(counts.max())
    which_prompt, which_line = (np.random.default_rng(mix("bootstrap", what, len(counts))) for what in (0, 1))
    means: list[np.ndarray] = []
    for rows in np.array_split(np.arange(RESAMPLES), max(1, RESAMPLES * len(counts) * most // CHUNK)):
        drawn = which_prompt.integers(len(counts), size=(len(rows), len(counts)))
        offsets = which_line.random((*drawn.shape, most)) * counts[drawn][..., None]
        picked = lines[firsts[drawn][..., None] + offsets.astype(np.int64)]
        totals = np.where(np.arange(most) < counts[drawn][..., None], picked, 0).sum(axis=(1, 2))
        means.append(totals / counts[drawn].sum(axis=1))
    low, high = np.quantile(np.concatenate(means), [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2])
    return float(low), float(high)
