"""Batching without Serve; with it, the deployment is tested in tests/test_roles.py."""

from pathlib import Path

import numpy as np
import pytest

from deployments.reward_app import score_requests
from nft_ray.rewards.base import Scores
from tests.fakes import FakeReward, MortalReward, NamedReward


@pytest.mark.parametrize("sizes", [[3], [2, 1, 4]])
def test_every_request_gets_its_own_rows(sizes: list[int]) -> None:
    requests = []
    for i, size in enumerate(sizes):
        images = np.zeros((size, 8, 8, 3), dtype=np.uint8)
        images[:] = (10 * i + np.arange(size)).reshape(-1, 1, 1, 1)
        images.flags.writeable = False  # as they come out of the object store
        requests.append((images, [f"prompt {i}"] * size, [{}] * size))
    for (images, _, _), scores in zip(requests, score_requests(FakeReward(), requests), strict=True):
        assert isinstance(scores, Scores)
        np.testing.assert_array_equal(scores.values, images[:, 0, 0, 0])
        np.testing.assert_array_equal(scores.details["negative"], -scores.values)


def request(value: int, size: int = 8, prompt: str = "good") -> tuple[np.ndarray, list[str], list[dict[str, str]]]:
    return np.full((2, size, size, 3), value, np.uint8), [prompt] * 2, [{}] * 2


def test_images_of_several_sizes_are_scored_size_by_size() -> None:
    reward = NamedReward(0)
    answers = score_requests(reward, [request(1), request(2, size=5), request(3)])
    values = [answer.values.tolist() for answer in answers if isinstance(answer, Scores)]
    assert values == [[1, 1], [2, 2], [3, 3]]
    assert reward.calls == 2


def test_where_the_device_is_broken_nothing_is_tried_again_there(tmp_path: Path) -> None:
    (tmp_path / "device-reward").touch()
    answers = score_requests(MortalReward(tmp_path), [request(1), request(2)])
    assert [str(answer) for answer in answers] == ["CUDA error: an illegal memory access was encountered"] * 2


def test_a_bad_request_fails_alone() -> None:
    good, bad, other = score_requests(NamedReward(0), [request(1), request(2, prompt="bad"), request(3)])
    assert isinstance(bad, ValueError)
    assert str(bad) == "the prompt is bad"
    assert isinstance(good, Scores)
    assert isinstance(other, Scores)
    assert (good.values[0], other.values[0]) == (1, 3)
