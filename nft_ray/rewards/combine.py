"""Several rewards as one number per image. A missing one is NaN and makes the whole missing, never 0."""

from collections.abc import Mapping

import numpy as np

from nft_ray.rewards.base import Scores, check_scores, without_infinite
from nft_ray.types import Rewards

LARGEST = float(np.finfo(np.float32).max)


def combine_total(raw: Mapping[str, np.ndarray], weights: Mapping[str, float]) -> np.ndarray:
    """`weighted_sum` as float32 (G,): what `Rewards.total` holds. NaN where it is beyond float32."""
    total = weighted_sum(raw, weights)
    return np.where(np.abs(total) > LARGEST, np.nan, total).astype(np.float32)


def without_excess(raw: Mapping[str, np.ndarray], weights: Mapping[str, float]) -> dict[str, np.ndarray]:
    """`raw`, with NaN in place of the score that takes a total beyond float32: the one with the largest |w_k r_k|."""
    (beyond,) = np.nonzero(np.abs(weighted_sum(raw, weights)) > LARGEST)
    found = {name: values.copy() for name, values in raw.items()} if len(beyond) else dict(raw)
    for image in beyond:
        found[max(weights, key=lambda name: abs(weights[name] * float(raw[name][image])))][image] = np.nan
    return found


def weighted_sum(raw: Mapping[str, np.ndarray], weights: Mapping[str, float]) -> np.ndarray:
    """sum_k w_k r_k over the trained rewards, float64 (N,), NaN where any of them is.

    raw: name -> (N,), NaN = missing; weights: name -> w_k of the trained rewards; a weight of 0 trains nothing and is
    passed over, like a reward without a weight. Raises ValueError where no weight is left, a trained reward is not in
    `raw`, or the lengths differ.
    """
    trained = {name: weight for name, weight in weights.items() if weight}
    if not trained:
        raise ValueError("no reward has a weight to train on")
    absent = sorted(trained.keys() - raw.keys())
    if absent:
        raise ValueError(f"no scores of the trained reward {absent[0]!r}; there are: {', '.join(sorted(raw))}")
    shapes = {name: np.shape(raw[name]) for name in trained}
    if len(set(shapes.values())) > 1 or any(len(shape) != 1 for shape in shapes.values()):
        raise ValueError(f"rewards must all be (N,), not {shapes}")
    return np.sum([weight * np.asarray(raw[name], np.float64) for name, weight in trained.items()], axis=0)


def assemble(scores: Mapping[str, Scores | None], num_images: int, weights: Mapping[str, float]) -> Rewards:
    """What every reward said of one rollout, as one record; None = that reward could not be had: NaN and missing.

    A finite score whose weighted sum is beyond float32 is missing, too.

    scores: reward name -> Scores of (num_images,), details become "reward/detail"; weights: as in `weighted_sum`.
    ValueError, naming the reward, where they are not one number per image: who answered under its name was not ours.
    """
    raw: dict[str, np.ndarray] = {}
    details: dict[str, np.ndarray] = {}
    infinite: set[str] = set()
    for name, found in scores.items():
        if found is None:
            raw[name] = np.full(num_images, np.nan, np.float32)
            continue
        try:
            checked = check_scores(found, num_images)
        except ValueError as error:
            raise ValueError(f"reward {name}: {error}") from None
        raw[name] = without_infinite(checked.values)
        if np.isinf(checked.values).any():
            infinite.add(name)
        details |= {f"{name}/{detail}": value for detail, value in checked.details.items()}
    sums = without_excess(raw, weights)
    infinite |= {name for name in raw if np.isnan(sums[name]).sum() > np.isnan(raw[name]).sum()}
    raw = sums
    return Rewards(
        raw=raw,
        details=details,
        total=combine_total(raw, weights),
        missing={name: np.isnan(values) for name, values in raw.items()},
        infinite=frozenset(infinite),
    )
