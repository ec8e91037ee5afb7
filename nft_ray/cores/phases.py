"""Samplers and learners that share their devices: one side is awake, the other waits in host memory.

    rollouts ... ──► [samplers park, learners wake] ──► update ──► [learners park, samplers wake] ──► load ──► rollouts

The trainer does not know: `AlternatingSamplers` and `AlternatingLearners` are the roles in front of the roles. A call
waits until its side is awake; the sides change when the last call of the other one has returned.

Failure policy: each role replaces whom it cannot park or wake. Samplers that are new wait while samplers are parked;
learners start again, and are awake, only where the samplers are parked. What is raised in spite of that, the call that
needed the change raises, and neither side is awake: the next call parks the other side again, whichever it is of. So
`park` is also asked of who is parked, and must not wait there for what only `wake` lets go on.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Protocol

import numpy as np

from nft_ray.roles import Learners, Samplers, Seen
from nft_ray.types import Adapters, Batch, LearnerState, Rollout, RolloutRequest, UpdateResult


class Side(Protocol):
    """What can leave its devices and come back."""

    async def park(self) -> None:
        """Return when the devices' memory is free, at once where it is; what is asked of it later waits for `wake`."""
        ...

    async def wake(self) -> None: ...


class SharedSamplers(Samplers, Side, Protocol):
    """Samplers that share their devices."""


class SharedLearners(Learners, Side, Protocol):
    """Learners that share their devices."""


class Phases:
    """Which side is awake, and how many of its calls are under way."""

    def __init__(self, awake: Side) -> None:
        self._awake: Side | None = awake
        self._calls = 0
        self._changed = asyncio.Condition()

    @asynccontextmanager
    async def of(self, side: Side, other: Side) -> AsyncIterator[None]:
        """While the body runs, `side` is awake and `other` is parked."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._awake is side or not self._calls)
            if self._awake is not side:
                self._awake = None  # a failure half way leaves neither
                await other.park()
                await side.wake()
                self._awake = side
            self._calls += 1
        try:
            yield
        finally:
            self._calls -= 1
            async with self._changed:
                self._changed.notify_all()


class AlternatingSamplers:
    """roles.Samplers that wake their samplers first."""

    def __init__(self, samplers: SharedSamplers, learners: Side, phases: Phases) -> None:
        self._samplers, self._learners, self._phases = samplers, learners, phases

    @property
    def size(self) -> int:
        return self._samplers.size

    async def load(self, adapters: Adapters) -> None:
        async with self._phases.of(self._samplers, self._learners):
            await self._samplers.load(adapters)

    async def rollout(self, request: RolloutRequest, seen: Seen | None = None) -> Rollout:
        async with self._phases.of(self._samplers, self._learners):
            return await self._samplers.rollout(request, seen)

    async def images(self, rollout: Rollout) -> np.ndarray:
        return await self._samplers.images(rollout)  # host memory: no device is needed


class AlternatingLearners:
    """roles.Learners that wake their learners first."""

    def __init__(self, learners: SharedLearners, samplers: Side, phases: Phases) -> None:
        self._learners, self._samplers, self._phases = learners, samplers, phases

    @property
    def size(self) -> int:
        return self._learners.size

    async def restore(self, state: LearnerState) -> None:
        async with self._phases.of(self._learners, self._samplers):
            await self._learners.restore(state)

    async def state(self) -> LearnerState:
        async with self._phases.of(self._learners, self._samplers):
            return await self._learners.state()

    async def probe(self) -> Adapters:
        async with self._phases.of(self._learners, self._samplers):
            return await self._learners.probe()

    async def adapters(self) -> tuple[Adapters, ...]:
        async with self._phases.of(self._learners, self._samplers):
            return await self._learners.adapters()

    async def update(self, batch: Batch) -> UpdateResult:
        async with self._phases.of(self._learners, self._samplers):
            return await self._learners.update(batch)


def alternate(samplers: SharedSamplers, learners: SharedLearners) -> tuple[Samplers, Learners]:
    """Both roles over the same devices. The samplers are awake now, the learners parked."""
    phases = Phases(samplers)
    return AlternatingSamplers(samplers, learners, phases), AlternatingLearners(learners, samplers, phases)
