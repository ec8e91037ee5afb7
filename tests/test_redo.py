"""What is lost with a node, in the loop with fakes: drawn and scored again, and the run is as if nothing had been."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nft_ray.config import ExperimentConfig
from nft_ray.roles import ObjectsLostError, StateLostError
from nft_ray.types import Adapters, Batch, Rewards, RolloutRequest, UpdateResult
from tests.fakes import FakeLearnerCore
from tests.test_trainer import World, config_for, policy, train


class LossyWorld(World):
    """Nodes go: with images that nobody scored yet, with samples before an update, with weights before a load."""

    def __init__(self, config: ExperimentConfig, times: int) -> None:
        super().__init__(config)
        self.left = dict.fromkeys(("images", "eval", "samples", "weights"), times)
        self.drawn_again: list[RolloutRequest] = []

    def lose(self, what: str) -> bool:
        self.left[what] -= 1
        return self.left[what] >= 0

    async def load(self, adapters: Adapters) -> None:
        if adapters.version == 2 and self.lose("weights"):
            raise ObjectsLostError("weights of version 2 are lost")
        await super().load(adapters)

    async def score(self, request: RolloutRequest, images: Any) -> Rewards:
        if request.epoch == 2 and self.lose("eval" if request.split == "eval" else "images"):
            raise ObjectsLostError("images are lost")
        return await super().score(request, images)

    async def update(self, batch: Batch) -> UpdateResult:
        if batch.epoch == 3 and self.lose("samples"):
            self.requests.clear()
            raise ObjectsLostError("samples of 2 groups are lost", tuple(g.group_id for g in batch.shards[0][1:3]))
        if batch.epoch == 3:
            self.drawn_again = [request for request in self.requests if request.epoch == 3]
        return await super().update(batch)


@pytest.mark.parametrize("staleness", [0, 1])
def test_what_is_lost_with_a_node_is_drawn_and_scored_again(
    staleness: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_for(staleness, epochs=5)
    straight, expected = train(config, tmp_path / "straight")
    world, tracker = train(config, tmp_path / "lossy", world=LossyWorld(config, times=1))
    assert tracker.epochs == [1, 2, 3, 4, 5]
    assert [request.policy_version for request in world.drawn_again] == [3 - staleness] * 2  # type: ignore[attr-defined]
    assert all(metrics["reward/missing"] == 0 for metrics in tracker.metrics)
    assert tracker.evaluations[2].metrics == expected.evaluations[2].metrics
    np.testing.assert_array_equal(policy(world), policy(straight))
    lines = [record.getMessage() for record in caplog.records]
    assert "samples of 2 groups are lost; made again (attempt 2 of 3)" in lines
    assert len(lines) == 4


@pytest.mark.parametrize("what", ["images", "samples", "weights"])
def test_what_is_lost_again_and_again_stops_the_run(what: str, tmp_path: Path) -> None:
    config = config_for(epochs=5)
    world = LossyWorld(config, times=0)
    world.left[what] = 1000
    with pytest.raises(ObjectsLostError, match="lost"):
        train(config, tmp_path, world=world)
    assert world.left[what] >= 1000 - 4 * 3  # each of 4 groups, three times


@pytest.mark.parametrize("staleness", [0, 1])
@pytest.mark.parametrize(("tuning", "again"), [("lora", [3]), ("full", [2, 3])])
def test_a_lost_state_takes_the_run_back_to_the_newest_that_is_here(
    tuning: str, again: list[int], staleness: int, tmp_path: Path
) -> None:
    """That of a LoRA is here after every epoch, that of a whole transformer in each second epoch's checkpoint."""

    class Forgetful(World):
        async def update(self, batch: Batch) -> UpdateResult:
            if batch.epoch == 3 and "update 3" not in self.diary:
                self.note("update 3")
                self.learner = FakeLearnerCore(self.config)
                raise StateLostError("learner 0 died")
            return await super().update(batch)

    config = config_for(staleness, epochs=5)
    config = config.model_copy(update={"model": config.model.model_copy(update={"tuning": tuning})})
    straight, _ = train(config, tmp_path / "straight")
    world, tracker = train(config, tmp_path / "forgetful", world=Forgetful(config))
    updates = [int(note.split()[1]) for note in world.diary if note.startswith("update")]
    assert updates == [0, 1, 2, 3, *again, 4]
    assert tracker.epochs == [1, 2, 3, 4, 5]
    np.testing.assert_array_equal(policy(world), policy(straight))
