"""What has been scored is not scored again, and what has not been had is."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nft_ray.rewards.base import Scores
from nft_ray.rewards.unique import Unique


class Counting:
    """Scores by the first pixel and the length of the prompt; remembers what it was asked; `away`: all missing."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.away = False

    def score(self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Scores:
        self.asked.append(len(images))
        values = images[:, 0, 0, 0] + np.array([len(prompt) for prompt in prompts], np.float32)
        return Scores(values=np.full_like(values, np.nan) if self.away else values, details={"half": values / 2})


def images(*values: int) -> np.ndarray:
    return np.array(values, np.uint8).reshape(-1, 1, 1, 1) * np.ones((1, 4, 4, 3), np.uint8)


def test_a_pair_that_occurs_twice_in_a_batch_is_asked_once() -> None:
    reward = Counting()
    scores = Unique(reward).score(images(1, 2, 1, 1), ["a", "a", "a", "bb"], [{}] * 4)
    assert reward.asked == [3]
    assert scores.values.tolist() == [2, 3, 2, 3]
    assert scores.details["half"].tolist() == [1, 1.5, 1, 1.5]
    assert scores.values.dtype == scores.details["half"].dtype == np.float32


def test_a_known_pair_is_not_asked_again_and_a_new_one_is() -> None:
    reward = Counting()
    unique = Unique(reward)
    first = unique.score(images(1, 2), ["a", "a"], [{}, {}])
    again = unique.score(images(2, 7, 1), ["a"] * 3, [{}] * 3)
    assert reward.asked == [2, 1]
    assert again.values.tolist() == [first.values[1], 8, first.values[0]]
    assert unique.score(images(7), ["a"], [{}]).values.tolist() == [8]
    assert reward.asked == [2, 1]


def test_another_prompt_other_metadata_or_another_shape_is_another_pair() -> None:
    reward = Counting()
    unique = Unique(reward)
    unique.score(images(1), ["a"], [{}])
    unique.score(images(1), ["b"], [{}])
    unique.score(images(1), ["a"], [{"tag": "colors"}])
    unique.score(images(1).reshape(1, 2, 8, 3), ["a"], [{}])
    assert reward.asked == [1, 1, 1, 1]


def test_a_missing_score_is_asked_for_again() -> None:
    reward = Counting()
    unique = Unique(reward)
    reward.away = True
    assert np.isnan(unique.score(images(1), ["a"], [{}]).values).all()
    reward.away = False
    assert unique.score(images(1), ["a"], [{}]).values.tolist() == [2]


def test_the_memory_is_bounded_and_forgets_the_oldest() -> None:
    reward = Counting()
    unique = Unique(reward, capacity=2)
    for value in (1, 2, 3):
        unique.score(images(value), ["a"], [{}])
    unique.score(images(3, 2), ["a", "a"], [{}] * 2)
    assert reward.asked == [1, 1, 1]
    unique.score(images(1), ["a"], [{}])
    assert reward.asked == [1, 1, 1, 1]


def test_images_that_differ_in_one_pixel_are_other_images() -> None:
    """Also where the sketch, which does not look at every pixel, is the same."""
    reward = Counting()
    unique = Unique(reward)
    pair = np.zeros((2, 16, 16, 3), np.uint8)
    pair[1, 3, 3, 1] = 1
    unique.score(pair[:1], ["a"], [{}])
    unique.score(pair[1:], ["a"], [{}])
    unique.score(pair, ["a", "a"], [{}, {}])
    unique.score(pair[:1] + 2, ["a"], [{}])
    assert reward.asked == [1, 1, 1]
    other = Counting()
    assert len(Unique(other).score(pair, ["a", "a"], [{}, {}]).values) == 2
    assert other.asked == [2]
