"""What a simulated run leaves: who did what from when to when, and when each epoch was over."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """What one worker did: `role` is sampler, learner, or a reward's name. Seconds; epochs from 1."""

    role: str
    worker: int
    what: str
    start: float
    end: float
    work_s: float
    """Of the device alone: less than `end - start` where a card is shared."""
    epoch: int
    images: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What happened. ends: when each epoch was over, evaluation included; collected, updated: when its parts were."""

    spans: tuple[Span, ...]
    collected: tuple[float, ...]
    updated: tuple[float, ...]
    loaded: tuple[float, ...]
    ends: tuple[float, ...]
    store: tuple[tuple[float, int], ...]
    """(seconds, bytes in the object store from then on): images, samples, conditioning, published weights."""
