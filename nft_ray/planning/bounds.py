"""What an epoch waits for, in a sentence: of samplers, rewards and learners the one that has the most to do."""

import math
from collections.abc import Collection
from dataclasses import dataclass

from nft_ray.config import ExperimentConfig
from nft_ray.planning.places import Seat, Seats
from nft_ray.planning.spans import Span

NOTICEABLE = 1.02
"""Times too slow: less is even."""
TAIL = 0.05
"""Of the time in which the trainer waits for its groups: less is no tail."""
DRAWING, LEARNING = ("encode", "draw", "decode", "velocities"), ("update", "step", "publish")


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """role: samplers, learners, or the rewards that share devices, joined by `, `; factor: how many times too slow."""

    role: str
    factor: float
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rewards:
    """Rewards that share devices, and the seconds that each device needs for an epoch's images."""

    names: tuple[str, ...]
    replicas: int
    devices: int
    seconds: float


def bound_of(config: ExperimentConfig, seats: Seats, spans: Collection[Span], *, waits_s: float) -> Bound:
    """Of the spans of one epoch, without an evaluation. `waits_s`: how long the trainer waits for its groups.

    Without overlap samplers and learners take turns: neither is too slow for the other, the longer one is named. A
    reward is too slow where its replicas need longer than the samplers.
    """
    own = set(seats.samplers)
    beside = sum(_worked(spans, name) for name, places in seats.rewards.items() if own.issuperset(places))
    num_samplers, num_learners = len(seats.samplers), len(seats.learners)
    draw_s = (_worked(spans, "sampler", DRAWING) + beside) / num_samplers
    learn_s = max(_worked(spans, "learner", LEARNING, rank) for rank in range(num_learners))
    slowest = max(_apart(config, seats, spans), key=lambda one: one.seconds, default=None)
    scoring = f" ({beside / num_samplers:.1f} s of it scoring)" if beside else ""
    drawn = f"{_does(num_samplers, 'sampler', 'draw')} for {draw_s:.1f} s{scoring}"
    learnt = f"{_does(num_learners, 'learner', 'learn')} for {learn_s:.1f} s"
    is_scoring = slowest is not None and slowest.seconds > NOTICEABLE * draw_s
    if config.run.max_staleness:
        others_s = max(draw_s, slowest.seconds) if slowest else draw_s
        if learn_s > NOTICEABLE * others_s:
            return _slow("learners", num_learners, "learner", learn_s / others_s, f"{learnt}, {drawn}")
        if not is_scoring and draw_s > NOTICEABLE * learn_s:
            return _slow("samplers", num_samplers, "sampler", draw_s / max(learn_s, 1e-9), f"{drawn}, {learnt}")
    if slowest is not None and is_scoring:
        return _slow_rewards(slowest, draw_s, drawn)
    tail = _tail(config, draw_s, waits_s, num_samplers)
    if config.run.max_staleness:
        return Bound(role="samplers", factor=1.0, text=f"samplers and learners are even: {drawn}, {learnt}{tail}")
    role, factor = ("samplers", draw_s / max(learn_s, 1e-9)) if draw_s >= learn_s else ("learners", learn_s / draw_s)
    first, second = (drawn, learnt) if role == "samplers" else (learnt, drawn)
    return Bound(role=role, factor=factor, text=f"{role}: {first}, then {second}{tail}")


def _worked(spans: Collection[Span], role: str, what: tuple[str, ...] = (), worker: int | None = None) -> float:
    """Seconds of its devices alone."""
    return sum(
        span.work_s
        for span in spans
        if span.role == role and (not what or span.what in what) and worker in (None, span.worker)
    )


def _apart(config: ExperimentConfig, seats: Seats, spans: Collection[Span]) -> list[_Rewards]:
    """The rewards that are waited for and have devices of their own; those that share one are one."""
    own, together = set(seats.samplers), list[tuple[list[str], set[Seat]]]()
    for name in config.trained_weights:
        names, devices = [name], set(seats.rewards[name])
        if own.issuperset(devices):
            continue
        for other in [one for one in together if one[1] & devices]:
            together.remove(other)
            names, devices = [*other[0], *names], devices | other[1]
        together.append((names, devices))
    return [
        _Rewards(
            names=tuple(names),
            replicas=sum(len(seats.rewards[name]) for name in names),
            devices=len(devices),
            seconds=sum(_worked(spans, name) for name in names) / len(devices),
        )
        for names, devices in together
    ]


def _slow_rewards(slow: _Rewards, draw_s: float, drawn: str) -> Bound:
    factor = slow.seconds / max(draw_s, 1e-9)
    replicas, devices = _counted(slow.replicas, "replica"), _counted(slow.devices, "card")
    shared = slow.replicas > slow.devices
    who = f"{replicas} on {devices} {'are' if slow.replicas > 1 else 'is'}" if shared else _are(slow.replicas, replicas)
    enough = f"{math.ceil(slow.devices * factor - 1e-6)} {'cards ' if shared else ''}would do"
    names = f"reward{'s' * (len(slow.names) > 1)} {', '.join(slow.names)}"
    text = f"{names}: {who} {_times(factor)} too slow: scoring takes {slow.seconds:.1f} s, {drawn}; {enough}"
    return Bound(role=", ".join(slow.names), factor=factor, text=text)


def _slow(role: str, count: int, noun: str, factor: float, text: str) -> Bound:
    return Bound(
        role=role, factor=factor, text=f"{role}: {_are(count, _counted(count, noun))} {_times(factor)} too slow: {text}"
    )


def _tail(config: ExperimentConfig, draw_s: float, waits_s: float, samplers: int) -> str:
    """What the trainer waits for beyond what the samplers have to do, and why."""
    lost = waits_s - draw_s
    if lost < TAIL * waits_s:
        return ""
    groups = config.prompts.groups_per_epoch
    rounds, left = -(-groups // samplers), groups % samplers
    why = f" ({groups} groups on {samplers} samplers are {rounds} rounds, the last of {left})" if left else ""
    why = f" ({groups} groups for {samplers} samplers)" if groups < samplers else why
    return f"; {lost:.1f} s more are waited for the last ones{why}"


def _does(count: int, noun: str, verb: str) -> str:
    return f"{_counted(count, noun)} {verb}{'s' * (count == 1)}"


def _are(count: int, who: str) -> str:
    return f"{who} {'is' if count == 1 else 'are'}"


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


def _times(factor: float) -> str:
    return f"{factor:.1f}x" if factor >= 1.1 else f"{factor:.2f}x"
