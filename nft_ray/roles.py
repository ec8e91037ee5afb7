"""The Protocols that the trainer is written against: one loop, in one process (local.py) or on Ray (actors/).

Every implementation runs through the contract tests in tests/test_roles.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from nft_ray.types import (
    Adapters,
    Batch,
    EvalResult,
    LearnerState,
    Rewards,
    Rollout,
    RolloutRequest,
    UpdateResult,
)

Seen = Callable[[Any], None]
"""Told of the reference to a rollout's images."""


class TryAgainError(RuntimeError):
    """Something went away that comes back, or did not come in time: the same command may succeed. Exit status 75."""


class ObjectsLostError(RuntimeError):
    """What rollouts left on a node is gone with it; they can be made again, bit for bit, from their requests.

    group_ids: of those groups; empty where it is the rollout that the call was about.
    """

    def __init__(self, message: str, group_ids: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.group_ids = group_ids


class StateLostError(RuntimeError):
    """The learners started anew and the newest finished epoch is nowhere any more: the newest checkpoint is."""


class RewardError(RuntimeError):
    """A reward raised what is no word about its input: "reward NAME: KeyError: 'x' (FILE:LINE)", from that error."""


class Samplers(Protocol):
    """A pool of samplers: any of them can serve any request, none keeps anything that cannot be sent again."""

    @property
    def size(self) -> int: ...

    async def load(self, adapters: Adapters) -> None:
        """Give every worker this version; raises RuntimeError naming both values when a receipt does not match."""
        ...

    async def rollout(self, request: RolloutRequest, seen: Seen | None = None) -> Rollout:
        """Draw the images (and, for split "train", the clean samples) with the named adapter and version.

        `seen` is given the images' reference as soon as they exist, while the samples are still computed; again, with
        another one, where the worker is lost meanwhile: the rollout's own are those that belong to its samples.
        """
        ...

    async def images(self, rollout: Rollout) -> np.ndarray:
        """The rollout's images on the driver, uint8 (N, H, W, 3): for pictures, never for training."""
        ...


class Scorers(Protocol):
    """Every reward of the experiment, asked at once."""

    async def score(self, request: RolloutRequest, images: Any) -> Rewards:
        """Scores of the request's images (a reference); what could not be had within deadline and retries is missing.

        Missing is NaN. Raises ObjectsLostError where the images are lost: that is no missing reward. Of a split "train"
        these are the rewards that train; those that only monitor are asked beside it, and nobody waits for them.
        """
        ...

    def monitored(self, epoch: int) -> dict[int, dict[str, float]]:
        """What the rewards that only monitor said: epoch -> metrics, of the epochs up to this one that are complete.

        Each once, at once; "complete": answered, or past the deadline. An epoch that is redone is said again.
        """
        ...

    async def drained(self) -> dict[int, dict[str, float]]:
        """The same of all that is left, waited for within one deadline."""
        ...


class Learners(Protocol):
    """The data-parallel group that owns the trained policy. It fails together and is restored together.

    Every call may raise StateLostError: the group lives again, and waits for `restore`.
    """

    @property
    def size(self) -> int: ...

    async def restore(self, state: LearnerState) -> None: ...

    async def state(self) -> LearnerState: ...

    async def probe(self) -> Adapters:
        """A RANDOM LoRA as version -1: at version 0 the real one is a no-op, so loading it proves nothing."""
        ...

    async def adapters(self) -> tuple[Adapters, ...]:
        """The versions that rollouts may still ask for, oldest first."""
        ...

    async def update(self, batch: Batch) -> UpdateResult:
        """One epoch. ObjectsLostError with the ids of the lost groups: nothing has changed, and it may be asked again.

        The batch may be split for another `size` than the group has now.
        """
        ...


class Tracker(Protocol):
    """Where metrics go. Logging the same epoch again (after a resume) must not append it twice."""

    def log_epoch(self, epoch: int, metrics: dict[str, float], steps: tuple[dict[str, float], ...]) -> None: ...

    def log_evaluation(self, epoch: int, result: EvalResult) -> None: ...

    def log_late(self, epoch: int, metrics: dict[str, float]) -> None:
        """Figures of an epoch that came after the rest: added to its line, or kept for it where it is not there yet."""
        ...

    def rewind(self, epoch: int) -> None:
        """The run goes on after `epoch` finished epochs: what was logged of later ones is dropped."""
        ...

    def log_progress(self, what: str, done: int, total: int) -> None:
        """Within an epoch: for a person who watches; nothing is kept."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationRoles:
    """What draws images and scores them: all that an evaluation needs."""

    samplers: Samplers
    scorers: Scorers


@dataclass(frozen=True, slots=True, kw_only=True)
class Roles(EvaluationRoles):
    """The three planes of one run, in one process or on Ray."""

    learners: Learners
