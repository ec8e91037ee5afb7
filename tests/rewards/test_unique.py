"""What has been scored is not scored again, what has not been had is; what is no score is refused here."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from nft_ray.rewards.base import Scores
from nft_ray.rewards.combine import assemble
from nft_ray.rewards.unique import Unique, blamed
from nft_ray.roles import RewardError


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
    scores = Unique("mine", reward).score(images(1, 2, 1, 1), ["a", "a", "a", "bb"], [{}] * 4)
    assert reward.asked == [3]
    assert scores.values.tolist() == [2, 3, 2, 3]
    assert scores.details["half"].tolist() == [1, 1.5, 1, 1.5]
    assert scores.values.dtype == scores.details["half"].dtype == np.float32


def test_a_known_pair_is_not_asked_again_and_a_new_one_is() -> None:
    reward = Counting()
    unique = Unique("mine", reward)
    first = unique.score(images(1, 2), ["a", "a"], [{}, {}])
    again = unique.score(images(2, 7, 1), ["a"] * 3, [{}] * 3)
    assert reward.asked == [2, 1]
    assert again.values.tolist() == [first.values[1], 8, first.values[0]]
    assert unique.score(images(7), ["a"], [{}]).values.tolist() == [8]
    assert reward.asked == [2, 1]


def test_another_prompt_other_metadata_or_another_shape_is_another_pair() -> None:
    reward = Counting()
    unique = Unique("mine", reward)
    unique.score(images(1), ["a"], [{}])
    unique.score(images(1), ["b"], [{}])
    unique.score(images(1), ["a"], [{"tag": "colors"}])
    unique.score(images(1).reshape(1, 2, 8, 3), ["a"], [{}])
    assert reward.asked == [1, 1, 1, 1]


def test_a_missing_score_is_asked_for_again() -> None:
    reward = Counting()
    unique = Unique("mine", reward)
    reward.away = True
    assert np.isnan(unique.score(images(1), ["a"], [{}]).values).all()
    reward.away = False
    assert unique.score(images(1), ["a"], [{}]).values.tolist() == [2]


def test_the_memory_is_bounded_and_forgets_the_oldest() -> None:
    reward = Counting()
    unique = Unique("mine", reward, capacity=2)
    for value in (1, 2, 3):
        unique.score(images(value), ["a"], [{}])
    unique.score(images(3, 2), ["a", "a"], [{}] * 2)
    assert reward.asked == [1, 1, 1]
    unique.score(images(1), ["a"], [{}])
    assert reward.asked == [1, 1, 1, 1]


def test_images_that_differ_in_one_pixel_are_other_images() -> None:
    """Also where the sketch, which does not look at every pixel, is the same."""
    reward = Counting()
    unique = Unique("mine", reward)
    pair = np.zeros((2, 16, 16, 3), np.uint8)
    pair[1, 3, 3, 1] = 1
    unique.score(pair[:1], ["a"], [{}])
    unique.score(pair[1:], ["a"], [{}])
    unique.score(pair, ["a", "a"], [{}, {}])
    unique.score(pair[:1] + 2, ["a"], [{}])
    assert reward.asked == [1, 1, 1]
    other = Counting()
    assert len(Unique("mine", other).score(pair, ["a", "a"], [{}, {}]).values) == 2
    assert other.asked == [2]


class Saying:
    """Says what it was told to say, whatever it is asked; raises an exception."""

    def __init__(self, said: Any) -> None:
        self.said = said

    def score(self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Scores:
        if isinstance(self.said, Exception):
            raise self.said
        return self.said


THREE, FOUR = np.zeros(3, np.float32), np.zeros(4, np.float32)
RULE = r" for 4 images; return float32 \(4,\)"
DETAILS = r"; return a dict: name \(str\) -> float32 \(B,\)"


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (Scores(values=THREE), r"returned values as float32 \(3,\)" + RULE),
        (
            Scores(values=FOUR, details={"exact": THREE}),
            r"returned values of the detail 'exact' as float32 \(3,\)" + RULE,
        ),
        (Scores(values=FOUR[:, None]), r"returned values as float32 \(4, 1\)" + RULE),
        (Scores(values=np.float32(1)), "returned values as a float32" + RULE),  # type: ignore[arg-type]
        (Scores(values=[0.0] * 4), "returned values as a list" + RULE),  # type: ignore[arg-type]
        (Scores(values=np.array(["0"] * 4)), r"returned values as <U1 \(4,\)" + RULE),
        (Scores(values=np.array([0.0, None, 0, 0])), r"returned values as object \(4,\)" + RULE),
        (Scores(values=FOUR.astype(complex)), r"returned values as complex128 \(4,\)" + RULE),
        (Scores(values=FOUR, details=None), "returned details as a NoneType" + DETAILS),  # type: ignore[arg-type]
        (Scores(values=FOUR, details=[FOUR]), "returned details as a list" + DETAILS),  # type: ignore[arg-type]
        (Scores(values=FOUR, details={1: FOUR}), "returned a detail named 1" + DETAILS),  # type: ignore[dict-item]
        (FOUR, "returned a ndarray; return nft_ray.rewards.base.Scores"),
        (ValueError("prompt 0 has no tag"), "prompt 0 has no tag"),
    ],
)
def test_what_is_no_score_per_image_is_one_line_that_names_the_reward(said: Any, message: str) -> None:
    """Of a whole batch, and of the part of a batch that has not been scored before."""
    unique = Unique("mine", Saying(said))
    for values in ((1, 2, 3, 4), (1, 2, 3, 4, 4)):
        with pytest.raises(ValueError, match=f"^reward mine: {message}$"):
            unique.score(images(*values), ["a"] * len(values), [{}] * len(values))


@pytest.mark.parametrize("beyond", [np.inf, -np.inf, 1e39])
def test_an_infinite_score_is_a_missing_one(beyond: float) -> None:
    given = np.array([0, beyond, 2])
    found = Unique("mine", Saying(Scores(values=given, details={"exact": given}))).score(
        images(1, 2, 3), ["a"] * 3, [{}] * 3
    )
    np.testing.assert_array_equal(found.details["exact"], np.array([0, np.nan, 2], np.float32))
    rewards = assemble({"mine": found, "other": None}, 3, {"mine": 1.0})
    for array in (rewards.raw["mine"], rewards.total):
        np.testing.assert_array_equal(array, np.array([0, np.nan, 2], np.float32))
    assert rewards.missing["mine"].tolist() == [False, True, False]
    assert rewards.infinite == {"mine"}


@pytest.mark.parametrize("dtype", [np.float64, np.float16, np.int64, np.uint8, bool])
def test_numbers_of_another_dtype_become_float32(dtype: Any) -> None:
    """NumPy makes float64 of a Python number: no reward needs to think of that."""
    given = np.array([1, 0, 1], dtype)
    scores = Unique("mine", Saying(Scores(values=given, details={"exact": given}))).score(
        images(1, 2, 3), ["a"] * 3, [{}] * 3
    )
    for array in (scores.values, scores.details["exact"]):
        assert (array.dtype, array.tolist()) == (np.float32, [1, 0, 1])


def test_a_missing_score_is_no_mistake_and_other_errors_are_not_the_users() -> None:
    nothing = np.array([np.nan] * 2)
    assert np.isnan(
        Unique("mine", Saying(Scores(values=nothing))).score(images(1, 2), ["a"] * 2, [{}] * 2).values
    ).all()
    for error in (ConnectionError("away"), UnicodeError("of the world")):
        with pytest.raises(type(error), match=f"^{error}$"):
            Unique("mine", Saying(error)).score(images(1), ["a"], [{}])


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (KeyError("x"), "KeyError: 'x'"),
        (OSError("no\nsuch file"), "OSError: no such file"),
        (UnicodeError("of the world"), "UnicodeError: of the world"),
        (AssertionError(), "AssertionError"),
    ],
)
def test_where_it_cannot_be_asked_elsewhere_what_it_raises_names_it_and_the_place(error: Exception, said: str) -> None:
    with pytest.raises(RewardError, match=rf"^reward mine: {said} \(test_unique\.py:\d+\)$") as raised, blamed("mine"):
        Unique("mine", Saying(error)).score(images(1), ["a"], [{}])
    assert raised.value.__cause__ is error
    with pytest.raises(ValueError, match=r"^reward mine: prompt 0 has no tag$"), blamed("mine"):
        Unique("mine", Saying(ValueError("prompt 0 has no tag"))).score(images(1), ["a"], [{}])


@pytest.mark.parametrize(
    "bad",
    [
        np.zeros((1, 8, 8, 3)),
        np.zeros((1, 3, 8, 8), np.uint8),
        np.zeros((8, 8, 3), np.uint8),
        np.zeros((1, 0, 8, 3), np.uint8),
    ],
)
def test_what_is_no_batch_of_images_is_refused_before_the_reward_is_asked(bad: np.ndarray) -> None:
    reward = Counting()
    with pytest.raises(ValueError, match=r"^reward mine: images must be uint8 \(B, H, W, 3\)"):
        Unique("mine", reward).score(bad, ["a"], [{}])
    assert reward.asked == []


def test_one_prompt_and_one_metadata_per_image() -> None:
    reward = Counting()
    with pytest.raises(ValueError, match="reward mine: 2 images need one prompt and one metadata each, not 2 and 1"):
        Unique("mine", reward).score(images(1, 2), ["a", "a"], [{}])
    assert reward.asked == []
