"""One call of the reward `unified_reward` to stand-ins of its servers."""

from typing import Any

import numpy as np
import pytest

from nft_ray.rewards.base import Scores, reward_config
from nft_ray.rewards.unified_reward import UnifiedReward, build
from tests.rewards.misbehaving_server import honest_score

QUICK = {"backoff_s": 0.05, "timeout_s": 30.0, "deadline_s": 60.0}
"""Short pauses. No honest answer takes so long, on however busy a machine; a test of a time-out has its own."""


def greys(*values: int, size: tuple[int, int] = (16, 16)) -> np.ndarray:
    return np.array(values, np.uint8).reshape(-1, 1, 1, 1) * np.ones((1, *size, 3), np.uint8)


def ask(urls: list[str], images: np.ndarray, prompts: list[str] | None = None, **section: Any) -> Scores:
    """Score with a reward that lives for one call."""
    config = reward_config("unified_reward", {"urls": urls, **QUICK, **section})
    reward = build(config)  # type: ignore[arg-type]
    assert isinstance(reward, UnifiedReward)
    try:
        return reward.score(images, prompts or ["a cat"] * len(images), [{}] * len(images))
    finally:
        reward.close()


def expected(images: np.ndarray) -> list[float]:
    return [pytest.approx(honest_score(image), abs=1e-6) for image in images]
