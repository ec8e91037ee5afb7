"""Images, samples and who holds them, between a rollout and the update: what is scored when, and what is let go."""

import asyncio
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nft_ray.config import ExperimentConfig
from nft_ray.local import LocalSamplers
from nft_ray.prompts.draw import PromptSet
from nft_ray.roles import Roles, Seen, StateLostError
from nft_ray.runs.folder import RunFolder
from nft_ray.trainer import Trainer
from nft_ray.types import Adapters, Batch, Rewards, Rollout, RolloutRequest, UpdateResult
from tests.fakes import FakeSamplerCore, fake_config
from tests.test_trainer import LINES, Diary, World, policy, train


class Streaming(World):
    """Its clean samples wait until its images are scored."""

    def __init__(self, config: ExperimentConfig) -> None:
        super().__init__(config)
        self.scored = asyncio.Semaphore(0)

    async def rollout(self, request: RolloutRequest, seen: Seen | None = None) -> Rollout:
        rollout = await super().rollout(request)
        if seen is not None:
            seen(rollout.images)
            seen(np.zeros_like(rollout.images))  # a second time, of a worker that replaces another: no news
            await self.scored.acquire()
        return rollout

    async def score(self, request: RolloutRequest, images: Any) -> Rewards:
        self.scored.release()
        return await super().score(request, images)


def test_images_are_scored_while_their_samples_are_computed(tmp_path: Path) -> None:
    config = fake_config(learner={"num_workers": 1})
    straight, _ = train(config, tmp_path / "straight")
    streamed = Streaming(config)
    train(config, tmp_path / "streamed", world=streamed)
    np.testing.assert_array_equal(policy(streamed), policy(straight))


def test_in_one_process_a_group_is_scored_before_the_next_one_is_drawn(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Or all images of an epoch would be held at once, and a reward that fails would be noticed at its end."""
    order: list[tuple[str, int]] = []

    class Core(FakeSamplerCore):
        def rollout(self, request: RolloutRequest) -> Any:
            order.append(("drawn", request.items[0].group_id))
            return super().rollout(request)

    class Scoring(World):
        async def score(self, request: RolloutRequest, images: Any) -> Rewards:
            order.append(("scored", request.items[0].group_id))
            return await super().score(request, images)

    monkeypatch.setattr("nft_ray.local.SamplerCore", Core)
    config = fake_config(learner={"num_workers": 1}, run={"num_epochs": 1}, evaluation={"every": 100})
    world = Scoring(config)
    roles: Any = Roles(samplers=LocalSamplers(config), scorers=world, learners=world)
    prompts = PromptSet(lines=LINES)
    trainer = Trainer(config, roles, RunFolder(tmp_path), Diary(), prompts, prompts)

    async def main() -> None:
        await trainer.restore()
        order.clear()
        await trainer.collect(0)

    asyncio.run(main())
    groups = [group for what, group in order if what == "drawn"]
    assert order == [(what, group) for group in groups for what in ("drawn", "scored")]


class Redrawn(World):
    """The worker that drew is lost with the samples; another one draws other last bits."""

    async def rollout(self, request: RolloutRequest, seen: Seen | None = None) -> Rollout:
        rollout = await super().rollout(request)
        if seen is not None:
            seen(np.zeros_like(rollout.images))
            await asyncio.sleep(0.01)
        return rollout


def test_what_is_scored_in_the_end_is_what_is_learnt(tmp_path: Path) -> None:
    config = fake_config(learner={"num_workers": 1})
    straight, _ = train(config, tmp_path / "straight")
    redrawn, _ = train(config, tmp_path / "redrawn", world=Redrawn(config))
    np.testing.assert_array_equal(policy(redrawn), policy(straight))


class Watched(World):
    """Remembers the samples of its rollouts by weak references, and how many there are when an epoch is published.

    Once its learners are lost.
    """

    def __init__(self, config: ExperimentConfig) -> None:
        super().__init__(config)
        self.drawn: list[weakref.ref[np.ndarray]] = []
        self.alive: list[int] = []
        self.lost = False

    async def rollout(self, request: RolloutRequest, seen: Seen | None = None) -> Rollout:
        rollout = await super().rollout(request)
        if request.split == "train":
            self.drawn.append(weakref.ref(rollout.samples.x0))
        return rollout

    async def update(self, batch: Batch) -> UpdateResult:
        if batch.epoch == 1 and not self.lost:
            self.lost = True
            raise StateLostError("the learners are gone")
        return await super().update(batch)

    async def load(self, adapters: Adapters) -> None:
        self.alive.append(sum(samples() is not None for samples in self.drawn))
        await super().load(adapters)


def test_samples_are_gone_once_they_are_learnt(tmp_path: Path) -> None:
    """They are most of what the object store holds."""
    config = fake_config(learner={"num_workers": 1}, run={"num_epochs": 3})
    world = Watched(config)
    train(config, tmp_path, world=world)
    assert len(world.drawn) == 16, "an epoch is drawn twice: its learners were lost"
    assert world.alive == [0] * len(world.alive)
