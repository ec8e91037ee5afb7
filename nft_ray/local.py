"""The three roles in this process, one after the other: no Ray. For tests, debugging and one device.

The cores are the very ones that the Ray actors hold, so with one learner and equal threads both give the same LoRA to
the last bit. Nothing here runs beside anything else: a call returns when its work is done.
"""

import asyncio
import dataclasses
from typing import Any

import numpy as np

from nft_ray.config import ExperimentConfig
from nft_ray.cores.learner import LearnerCore
from nft_ray.cores.phases import alternate
from nft_ray.cores.publish import verify
from nft_ray.cores.sampler import SamplerCore
from nft_ray.rewards.base import Reward, Scores, load_reward
from nft_ray.rewards.combine import assemble
from nft_ray.rewards.monitored import Monitored
from nft_ray.rewards.outage import Outage
from nft_ray.rewards.unique import Unique, blamed
from nft_ray.roles import EvaluationRoles, Roles, Seen
from nft_ray.types import (
    Adapters,
    AdapterWeights,
    Batch,
    LearnerState,
    Rewards,
    Rollout,
    RolloutRequest,
    Split,
    UpdateResult,
)


class LocalSamplers:
    """One SamplerCore; references are the objects themselves."""

    size = 1

    def __init__(self, config: ExperimentConfig) -> None:
        self._core, self._turn = SamplerCore(config), asyncio.Lock()
        self._dtype = config.model.dtype

    async def park(self) -> None:
        self._core.park()

    async def wake(self) -> None:
        self._core.wake()

    async def load(self, adapters: Adapters) -> None:
        verify(adapters, self._core.load(adapters, adapters.weights), self._dtype)

    async def rollout(self, request: RolloutRequest, seen: Seen | None = None) -> Rollout:
        async with self._turn:  # a group is scored before the next one is drawn
            await asyncio.sleep(0)  # lets the loop see Ctrl-C and the other coroutines between groups
            info, images, samples = self._core.rollout(request)
            if seen is not None:
                seen(images)
                await asyncio.sleep(0)
            return Rollout(info=info, images=images, samples=samples)

    async def images(self, rollout: Rollout) -> np.ndarray:
        return rollout.images


class LocalScorers:
    """Every reward in this process. An exception is the user's to see, as a RewardError or a ValueError: there is no
    other replica to try.

    That of a reward that only monitors is not: training goes on without it.
    """

    def __init__(self, config: ExperimentConfig) -> None:
        self._rewards: dict[str, Reward] = {
            name: Unique(name, load_reward(name, section or {})) for name, section in config.rewards.items()
        }
        self._weights = config.trained_weights
        self._outages = {name: Outage(name) for name in config.rewards if name not in self._weights}
        self._monitored = Monitored(list(self._outages))

    async def score(self, request: RolloutRequest, images: np.ndarray) -> Rewards:
        prompts = [item.prompt for item in request.items for _ in range(item.num_images)]
        texts, metadata = [prompt.text for prompt in prompts], [prompt.metadata for prompt in prompts]
        scores: dict[str, Scores | None] = {}
        for name, reward in self._rewards.items():
            if name in self._weights:
                with blamed(name):
                    scores[name] = reward.score(images, texts, metadata)
                continue
            found = self._monitor(request.split, name, images, texts, metadata)
            if request.split == "eval":
                scores[name] = found
            else:
                self._monitored.add(request.epoch, name, request.items[0].group_id, request.num_images, found)
        return assemble(scores, request.num_images, self._weights)

    def monitored(self, epoch: int) -> dict[int, dict[str, float]]:
        return self._monitored.take([one for one in self._monitored.epochs() if one <= epoch])

    async def drained(self) -> dict[int, dict[str, float]]:
        return self._monitored.take(self._monitored.epochs())

    def _monitor(self, split: Split, name: str, *question: Any) -> Scores | None:
        outage = self._outages[name]
        if not outage.ask():
            return None
        try:
            scores = self._rewards[name].score(*question)
        except Exception as error:  # whatever it is, it ends no training
            if split == "eval" and type(error) is ValueError:
                raise
            outage.failed(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
            return None
        if np.isfinite(scores.values).any():
            outage.answered()
        else:
            outage.failed("it answers, and every score is missing")
        return scores


class LocalLearners:
    """One LearnerCore."""

    size = 1

    def __init__(self, config: ExperimentConfig) -> None:
        self.core = LearnerCore(config)

    async def park(self) -> None:
        self.core.park()

    async def wake(self) -> None:
        self.core.wake()

    async def restore(self, state: LearnerState) -> None:
        self.core.restore(state)

    async def state(self) -> LearnerState:
        state = self.core.state()
        assert state is not None, "a single learner is rank 0"
        return state

    async def probe(self) -> Adapters:
        return _with_weights(*self.core.probe())

    async def adapters(self) -> tuple[Adapters, ...]:
        return tuple(_with_weights(adapters, weights) for adapters, weights in self.core.adapters())

    async def update(self, batch: Batch) -> UpdateResult:
        (groups,) = batch.shards
        samples = [group.samples for group in groups]
        result, weights = self.core.update(batch.epoch, groups, samples, batch.samples_per_step)
        return dataclasses.replace(result, adapters=_with_weights(result.adapters, weights))


def local_roles(config: ExperimentConfig) -> Roles:
    """All three planes in this process."""
    scorers = LocalScorers(config)
    if config.cluster.placement == "disaggregated":
        return Roles(samplers=LocalSamplers(config), scorers=scorers, learners=LocalLearners(config))
    learners = LocalLearners(config)
    learners.core.park()  # before the sampler's model is loaded: both may not fit
    samplers, alternating = alternate(LocalSamplers(config), learners)
    return Roles(samplers=samplers, scorers=scorers, learners=alternating)


def local_evaluation_roles(config: ExperimentConfig) -> EvaluationRoles:
    """Samplers and scorers in this process; no learner is built."""
    return EvaluationRoles(samplers=LocalSamplers(config), scorers=LocalScorers(config))


def _with_weights(adapters: Adapters, weights: AdapterWeights | None) -> Adapters:
    return dataclasses.replace(adapters, weights=weights)
