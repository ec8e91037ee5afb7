"""Means over what came, what did not, and a group that is scored again."""

import numpy as np

from nft_ray.rewards.base import Scores
from nft_ray.rewards.monitored import Monitored


def scores(*values: float, **details: list[float]) -> Scores:
    return Scores(
        values=np.array(values, np.float32),
        details={name: np.array(column, np.float32) for name, column in details.items()},
    )


def test_means_over_what_is_there() -> None:
    monitored = Monitored(["ocr", "clipscore"])
    monitored.add(3, "ocr", 0, 2, scores(1.0, np.nan, exact=[1.0, 0.0]))
    monitored.add(3, "ocr", 1, 2, None)
    monitored.add(3, "clipscore", 0, 2, None)
    monitored.add(4, "ocr", 0, 2, scores(9.0, 9.0))
    assert monitored.epochs() == [3, 4]
    assert monitored.take([3]) == {
        3: {"reward/ocr": 1.0, "reward/ocr/exact": 0.5, "reward/missing/ocr": 0.75, "reward/missing/clipscore": 1.0}
    }
    assert monitored.take([3, 5]) == {}
    assert monitored.epochs() == [4]


def test_a_group_that_is_scored_again_counts_once() -> None:
    monitored = Monitored(["ocr"])
    monitored.add(0, "ocr", 7, 2, None)
    monitored.add(0, "ocr", 7, 2, scores(1.0, 2.0))
    assert monitored.take([0]) == {0: {"reward/ocr": 1.5, "reward/missing/ocr": 0.0}}
