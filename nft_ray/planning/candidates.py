"""The layouts that are worth a look: who shares a card with whom, and how many of each. Pure, and quick to throw away.

    colocated        pairs on all cards but those of the rewards; or rewards beside the pairs, on the very cards
    disaggregated    samplers, learners and rewards on cards of their own; or rewards beside the samplers

A layout is what it changes of the experiment: dotted key -> value. It changes where things run, not what comes out.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from nft_ray.config import ExperimentConfig
from nft_ray.planning.calls import rollout_call, score_s, update_s
from nft_ray.planning.places import Nodes
from nft_ray.planning.work import Work

Changes = Mapping[str, Any]
NEAR = 1
"""Cards around the balance that are looked at on either side."""
LITTLE_S = 1.0
"""Of an epoch: a reward that takes less on one CPU needs no second one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """Seconds of one worker alone for a whole epoch: `rewards` by name, those that train; `gpu`: which need a GPU."""

    draw: float
    learn: float
    rewards: Mapping[str, float]
    gpu: tuple[str, ...]

    @property
    def score(self) -> float:
        """Of one card, for all rewards that need one."""
        return sum(self.rewards[name] for name in self.gpu)


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """`about`: the layout in words; `seconds`: an epoch by rule of thumb, to choose what is simulated."""

    about: str
    seconds: float
    changes: Changes


def demand(stages: Sequence[tuple[ExperimentConfig, Work]]) -> Demand:
    """Of one epoch of the stage with the most to do; of a reward, where it has the most."""
    found = [_of_stage(config, work) for config, work in stages]
    most = max(found, key=lambda one: one.draw + one.learn)
    names = dict.fromkeys(name for one in found for name in one.rewards)
    return Demand(
        draw=most.draw,
        learn=most.learn,
        rewards={name: max(one.rewards.get(name, 0.0) for one in found) for name in names},
        gpu=tuple(name for name in names if any(name in one.gpu for one in found)),
    )


def _of_stage(config: ExperimentConfig, work: Work) -> Demand:
    groups, size = config.prompts.groups_per_epoch, config.prompts.images_per_group
    steps = config.learner.optimizer_steps
    trained, sections = config.trained_weights, config.reward_configs
    return Demand(
        draw=groups * rollout_call(work, images=size, prompts=1, split="train").total,
        learn=update_s(work, [groups * size // steps] * steps),
        rewards={name: groups * score_s(work, name, size) if name in trained else 0.0 for name in sections},
        gpu=tuple(name for name, section in sections.items() if section.num_gpus),
    )


def candidates(config: ExperimentConfig, needs: Demand, nodes: Nodes, *, swap_s: float) -> list[Candidate]:
    """All of them for so many cards, the shortest epoch by rule of thumb first. `swap_s`: per colocated epoch."""
    found = list[Candidate]()
    for cards, changes, about in _rewards(config, needs, nodes.gpus):
        pairs = nodes.gpus - cards
        for count in sorted({pairs, _as_quick(config, pairs)} - {0}):
            found += _colocated(config, needs, count, cards, changes, about, swap_s)
        found += _disaggregated(config, needs, nodes.gpus, cards, changes, about)
    heard = [replace(one, changes={**one.changes, **_in_flight(config, one.changes)}) for one in found]
    return sorted(heard, key=lambda one: one.seconds)


def _in_flight(config: ExperimentConfig, changes: Changes) -> dict[str, Any]:
    """A replica that nobody may call is of no use."""
    most = max((value for key, value in changes.items() if key.endswith(".num_replicas")), default=0)
    wanted = min(most, config.prompts.groups_per_epoch)
    return {"scorers.max_in_flight": wanted} if wanted > config.scorers.max_in_flight else {}


def _rewards(config: ExperimentConfig, needs: Demand, gpus: int) -> Iterator[tuple[int, Changes, str]]:
    """(cards of their own, what that changes, in words): 0 cards = beside the samplers, or no reward needs one.

    Around the balance, and what is left by so many pairs as fewer of them would need another round of groups.
    """
    if not needs.gpu:
        yield 0, {}, ""
        return
    yield 0, {}, f"{_named(needs.gpu)} beside the samplers"
    balance = gpus * needs.score / (needs.score + needs.draw + needs.learn)
    counts = {math.floor(balance) + near for near in range(-NEAR, NEAR + 2)} | {gpus - _as_quick(config, gpus - 1)}
    for cards in sorted(count for count in counts if 1 <= count < gpus):
        share = math.floor(100 / len(needs.gpu)) / 100
        yield cards, _replicas(needs.gpu, cards, share), f"{_cards(cards)} for {_named(needs.gpu)}"
        if len(needs.gpu) > 1 and cards >= len(needs.gpu):
            own: dict[str, Any] = {}
            for name, count in _split(needs, cards).items():
                own |= _replicas([name], count, 1)
            yield cards, own, f"{_cards(cards)} for {_named(needs.gpu)}, each its own"


def _replicas(names: Sequence[str], count: int, share: float) -> dict[str, Any]:
    """Of each of these rewards so many, each with a share of a card."""
    found: dict[str, Any] = {}
    for name in names:
        found |= {f"rewards.{name}.num_gpus": share if share < 1 else 1, f"rewards.{name}.num_replicas": count}
    return found


def _split(needs: Demand, cards: int) -> dict[str, int]:
    """Whole cards to rewards: one each, every further one to whoever is slowest then."""
    counts = dict.fromkeys(needs.gpu, 1)
    for _ in range(cards - len(counts)):
        counts[max(counts, key=lambda name: needs.rewards[name] / counts[name])] += 1
    return counts


def beside(names: tuple[str, ...]) -> tuple[dict[str, float], float]:
    """(share of a card of each reward, what is left), so that every card takes one replica of each.

    Ray puts a part on the fullest card that has room: a share is more than half of what those before it leave.
    """
    left, shares = 100, dict[str, float]()
    for name in names:
        part = left // 2 + 1
        shares[name], left = part / 100, left - part
    return shares, left / 100


def _colocated(
    config: ExperimentConfig, needs: Demand, pairs: int, cards: int, rewards: Changes, about: str, swap_s: float
) -> Iterator[Candidate]:
    if config.run.max_staleness or config.learner.sharding == "fsdp":
        return
    changes, left, extra = dict(rewards), 1.0, 0.0
    if needs.gpu and not cards:
        shares, left = beside(needs.gpu)
        extra = needs.score
        for name, share in shares.items():
            changes |= _replicas([name], pairs, share)
    half = round(left / 2, 4)
    changes |= {"cluster.placement": "colocated"}
    changes |= _workers("sampler", pairs, half) | _workers("learner", pairs, half)
    collect = _collect(config, needs, pairs, max(1, cards), extra)
    changes |= _on_cpus(config, needs, pairs)
    seconds = collect + _shared(config, needs.learn, pairs) + swap_s
    yield Candidate(about=f"{_pairs(pairs)}{f', {about}' if about else ''}", seconds=seconds, changes=changes)


def _disaggregated(
    config: ExperimentConfig, needs: Demand, gpus: int, cards: int, rewards: Changes, about: str
) -> Iterator[Candidate]:
    workers = gpus - cards
    if workers < 2:
        return
    ratio = needs.learn / max(needs.draw, 1e-9)
    balance = workers * (ratio / (1 + ratio) if config.run.max_staleness else ratio**0.5 / (1 + ratio**0.5))
    for learners in sorted({round(balance) + near for near in range(-NEAR, NEAR + 1)}):
        samplers = workers - learners
        if learners < 1 or samplers < 1:
            continue
        changes, left, extra = dict(rewards), 1.0, 0.0
        if needs.gpu and not cards:
            shares, left = beside(needs.gpu)
            extra = needs.score
            for name, share in shares.items():
                changes |= _replicas([name], samplers, share)
        changes |= {"cluster.placement": "disaggregated"}
        changes |= _workers("sampler", samplers, left if left < 1 else 1) | _workers("learner", learners, 1)
        collect = _collect(config, needs, samplers, max(1, cards), extra)
        changes |= _on_cpus(config, needs, samplers)
        update = _shared(config, needs.learn, learners)
        seconds = max(collect, update) if config.run.max_staleness else collect + update
        who = f"{_count(samplers, 'sampler')} and {_count(learners, 'learner')}"
        yield Candidate(about=f"{who}{f', {about}' if about else ''}", seconds=seconds, changes=changes)


def _as_quick(config: ExperimentConfig, pairs: int) -> int:
    """The fewest pairs that draw the groups in as many rounds."""
    groups = config.prompts.groups_per_epoch
    return math.ceil(groups / math.ceil(groups / pairs)) if pairs else 0


def _workers(role: str, count: int, gpus: float) -> dict[str, Any]:
    return {f"{role}.num_workers": count, f"{role}.num_gpus": gpus}


def _shared(config: ExperimentConfig, seconds: float, workers: int) -> float:
    """Whole groups to workers."""
    groups = config.prompts.groups_per_epoch
    return seconds * math.ceil(groups / workers) / groups


def _collect(config: ExperimentConfig, needs: Demand, samplers: int, cards: int, beside_s: float) -> float:
    """Until the last group is scored: whole groups; rewards on cards of their own, or (`beside_s`) on the samplers'."""
    drawn = _shared(config, needs.draw + beside_s, samplers)
    return drawn if beside_s else max(drawn, needs.score / cards)


def _on_cpus(config: ExperimentConfig, needs: Demand, samplers: int) -> dict[str, Any]:
    """Replicas of rewards without a GPU: as many as the samplers' groups, which end at the same moments, ask for at
    once until they are scored.
    """
    changes, groups = {}, config.prompts.groups_per_epoch
    for name, seconds in needs.rewards.items():
        section = config.reward_configs[name]
        if name not in needs.gpu and section.autoscaling is None and seconds > LITTLE_S:
            rounds = math.ceil(seconds / max(needs.draw, 1e-9))
            wanted = min(samplers * rounds, groups)
            if wanted > section.num_replicas:
                changes[f"rewards.{name}.num_replicas"] = wanted
    return changes


def _named(names: tuple[str, ...]) -> str:
    return " + ".join(names)


def _cards(count: int) -> str:
    return _count(count, "card")


def _pairs(count: int) -> str:
    return "1 sampler and learner in turns" if count == 1 else f"{count} pairs of sampler and learner in turns"


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"
