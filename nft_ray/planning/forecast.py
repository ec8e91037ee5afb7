"""What a run takes, read from its simulated epochs: seconds, hours, money, who is busy, what bounds it, what it holds.

A stage is forecast from a few epochs after its first ones, which with `max_staleness: 1` are not yet like the others;
the run is the sum of its stages, with the evaluations that their settings ask for.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from nft_ray.config import ExperimentConfig
from nft_ray.planning.bounds import Bound, bound_of
from nft_ray.planning.places import Seats
from nft_ray.planning.simulation import System, simulate
from nft_ray.planning.spans import Run, Span
from nft_ray.planning.work import Footprint, Work

AVERAGED = 3
"""Epochs; what differs between them is how the optimizer steps cut the samples of the learners."""
COPIES = 2 + 2
"""Of what is trained, in a learner's state: policy and EMA, two moments; and per version an old policy and an EMA."""
GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """One stage, or the run where it has none. Seconds and bytes.

    phases: what the trainer waits for in an epoch, in order; busy: role -> share of the epoch in which it works;
    start, end: the epoch of `run` that is shown; store: bytes in the object store at most; disk: of the checkpoints.
    """

    config: ExperimentConfig
    work: Work
    seats: Seats
    run: Run
    epochs: int
    evaluations: int
    epoch_s: float
    evaluation_s: float
    phases: Mapping[str, float]
    busy: Mapping[str, float]
    bound: Bound
    start: float
    end: float
    store: int
    checkpoint: int

    @property
    def seconds(self) -> float:
        return self.epochs * self.epoch_s + self.evaluations * self.evaluation_s

    @property
    def disk(self) -> int:
        """The best checkpoint, those that are kept, and the one that is being written."""
        return self.checkpoint * (self.config.run.keep_checkpoints + 2)

    def over(self, stage: ExperimentConfig, first_epoch: int) -> "Forecast":
        """Of another stage, which differs only in when it begins and ends."""
        epochs, counted = stage.run.num_epochs - first_epoch, evaluations(stage, first_epoch)
        return replace(self, config=stage, epochs=epochs, evaluations=counted)


def forecast(
    config: ExperimentConfig,
    work: Work,
    seats: Seats,
    *,
    num_lines: int,
    first_epoch: int = 0,
    system: System | None = None,
    averaged: int = AVERAGED,
) -> Forecast:
    """Of the epochs after `first_epoch`; `num_lines`: what an evaluation draws."""
    stale = config.run.max_staleness
    first, last = 1 + stale, stale + averaged  # the epochs that count, from 0
    epochs = last + 1 + stale
    run = evaluated = simulate(config, work, seats, epochs=epochs, system=system)
    if num_lines:
        when = {first + 1}
        evaluated = simulate(
            config, work, seats, epochs=epochs, evaluate_after=when, num_lines=num_lines, system=system
        )
    start, end = run.ends[first - 1], run.ends[first]
    spans = [span for span in run.spans if span.epoch == first + 1]
    checkpoint = work.adapter_bytes // 2 * (COPIES + 2 * (stale + 1))
    return Forecast(
        config=config,
        work=work,
        seats=seats,
        run=run,
        epochs=config.run.num_epochs - first_epoch,
        evaluations=evaluations(config, first_epoch),
        epoch_s=(run.ends[last] - run.ends[first - 1]) / (last - first + 1),
        evaluation_s=evaluated.ends[-1] - run.ends[-1],
        phases=phases(run, first),
        busy=busy(run.spans, seats, start, end),
        bound=bound_of(config, seats, spans, waits_s=run.collected[first] - run.ends[first - 1]),
        start=start,
        end=end,
        store=max(held for _, held in run.store) + checkpoint,
        checkpoint=checkpoint,
    )


def evaluations(config: ExperimentConfig, first_epoch: int) -> int:
    """The base model on the stage's lines, every so many epochs, and the last one."""
    every, last = config.evaluation.every, config.run.num_epochs
    inside = last // every - first_epoch // every
    return 1 + inside + (last % every != 0)


def phases(run: Run, epoch: int) -> dict[str, float]:
    """Where the trainer's time goes in an epoch (from 0): what it waits for, one after the other."""
    start, collected, updated = run.ends[epoch - 1], run.collected[epoch], run.updated[epoch]
    own = [span for span in run.spans if span.epoch == epoch + 1]
    drawn = max(span.end for span in own if span.role == "sampler" and span.what in ("draw", "decode", "velocities"))
    scores = min(max(0.0, collected - drawn), collected - start)
    swaps = [_whole(own, role, what) for role, what in SWAPS]
    to_learners, to_samplers = sum(swaps[:2]), sum(swaps[2:])
    publish = _whole(own, "learner", "publish")
    return {
        "draw": collected - start - scores,
        "last scores": scores,
        "swap": to_learners + to_samplers,
        "update": updated - collected - to_learners - publish,
        "publish and load": run.loaded[epoch] - updated - to_samplers + publish,
    }


SWAPS = (("sampler", "park"), ("learner", "wake"), ("learner", "park"), ("sampler", "wake"))


def _whole(spans: Sequence[Span], role: str, what: str) -> float:
    """From the first begin to the last end of what all workers of a role do at once."""
    found = [span for span in spans if (span.role, span.what) == (role, what)]
    return max(span.end for span in found) - min(span.start for span in found) if found else 0.0


def busy(spans: Collection[Span], seats: Seats, start: float, end: float) -> dict[str, float]:
    """Of each role, the share of its workers' time between two moments in which their device works for them."""
    counts = {"sampler": len(seats.samplers), "learner": len(seats.learners)}
    counts |= {name: len(places) for name, places in seats.rewards.items()}
    worked = dict.fromkeys(counts, 0.0)
    for span in spans:
        inside = min(span.end, end) - max(span.start, start)
        if inside > 0 and span.what not in ("park", "wake"):
            worked[span.role] += span.work_s * inside / (span.end - span.start)
    return {role: seconds / (counts[role] * (end - start)) for role, seconds in worked.items()}


def host_bytes(config: ExperimentConfig, footprint: Footprint, seats: Seats, store: int) -> dict[int, int]:
    """Node -> bytes of host memory: its workers, and its part of the object store."""
    rewards = config.reward_configs
    nodes = sorted({seat.node for _, _, seat in seats.named()})
    found = dict.fromkeys(nodes, math.ceil(store / len(nodes)))
    for role, _, seat in seats.named():
        if role in rewards:
            found[seat.node] += int(rewards[role].memory_gib * GIB)
        else:
            found[seat.node] += footprint.host_sampler if role == "sampler" else footprint.host_learner
    return found


def card_bytes(
    config: ExperimentConfig, footprint: Footprint, seats: Seats, runtime: int = 0
) -> dict[int, tuple[int, tuple[str, ...]]]:
    """Card -> (bytes at most, who is on it): of sides that share it only one is awake; the other one's process keeps
    `runtime` bytes on it.
    """
    colocated = config.cluster.placement == "colocated"
    on: dict[int, list[str]] = {}
    for role, _, seat in seats.named():
        if seat.card >= 0:
            on.setdefault(seat.card, []).append(role)
    found = {}
    for card, roles in on.items():
        sides = [roles.count("sampler") * footprint.sampler, roles.count("learner") * footprint.learner]
        rewards = sum(footprint.rewards.get(role, 0) for role in roles if role not in ("sampler", "learner"))
        parked = min(roles.count("sampler"), roles.count("learner")) * runtime
        workers = max(sides) + parked if colocated else sum(sides)
        found[card] = (workers + rewards, tuple(roles))
    return found
