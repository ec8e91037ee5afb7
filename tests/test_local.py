"""The roles in one process: what a reward raises is the user's to see."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from nft_ray.local import LocalScorers
from nft_ray.rewards.base import Scores
from nft_ray.roles import RewardError
from nft_ray.types import Prompt, RolloutItem, RolloutRequest
from tests.fakes import fake_config


class Flaky:
    """Looks for what is not there."""

    def score(self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Scores:
        return Scores(values=np.array([one["x"] for one in metadata], np.float32))


def test_a_reward_that_raises_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nft_ray.local.load_reward", lambda name, section: Flaky())
    scorers = LocalScorers(fake_config())
    item = RolloutItem(group_id=0, prompt=Prompt(id=0, text="a"), seeds=(1, 2))
    request = RolloutRequest(epoch=0, items=(item,), adapter="old", policy_version=0, split="train")
    with pytest.raises(RewardError, match=r"^reward \w+: KeyError: 'x' \(test_local\.py:\d+\)$") as raised:
        asyncio.run(scorers.score(request, np.zeros((2, 4, 4, 3), np.uint8)))
    assert isinstance(raised.value.__cause__, KeyError)
