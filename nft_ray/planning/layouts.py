"""The best layouts of an experiment on so many cards: candidates, made to fit the card's memory, placed, simulated.

    candidates.py ──► micro-batches that fit ──► placement rules ──► one simulated epoch of each ──► the best few
                                                                           larger micro-batches? ──► whole runs

What a layout changes is marked `placement`: the algorithm stays, and its results but for rounding. What places a run
(actors.placement) and what it costs (estimate.py) are handed in: this file knows neither Ray nor models.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from nft_ray.config import ExperimentConfig, parse
from nft_ray.planning.candidates import Candidate, Changes, candidates, demand
from nft_ray.planning.forecast import AVERAGED, Forecast, card_bytes, forecast
from nft_ray.planning.places import Nodes, num_gpus, seats
from nft_ray.planning.work import Footprint, Work

Estimate = Callable[[ExperimentConfig], tuple[Work, Footprint]]
Lines = Callable[[ExperimentConfig], int]
"""How many lines an evaluation draws."""
Check = Callable[[ExperimentConfig], Any]
"""ValueError where the run cannot be placed."""
SIMULATED = 10
"""Candidates, the best by rule of thumb, that are simulated."""
BETTER = 0.99
"""Of an epoch's seconds, at most, for larger micro-batches to be worth a line."""
MOST_PAIRS = 128
"""(sample, time) pairs of a learner's forward: what is larger was counted by nobody."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """`lines`: for --set; `stages`: of the run, one after the other."""

    about: str
    config: ExperimentConfig
    changes: Changes
    lines: tuple[str, ...]
    stages: tuple[Forecast, ...]

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages)

    @property
    def epoch_s(self) -> float:
        """On average over the run."""
        return sum(stage.epochs * stage.epoch_s for stage in self.stages) / sum(stage.epochs for stage in self.stages)

    @property
    def gpus(self) -> float:
        return num_gpus(self.config)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ground:
    """What layouts are looked for on. memory: bytes of one card; runtime: what a parked process keeps of them."""

    nodes: Nodes
    memory: int
    estimate: Estimate
    lines: Lines
    check: Check
    runtime: int = 0


def best(config: ExperimentConfig, ground: Ground, count: int = 3, *, configured: bool = True) -> list[Layout]:
    """The shortest runs, at most `count`; of those that take equally long the one that needs the fewest cards.

    configured: the layout that the experiment has is one of them.
    """
    stages = config.stage_configs
    works = [ground.estimate(stage)[0] for stage in stages]
    needs = demand(list(zip(stages, works, strict=True)))
    swap_s = 2 * sum(works[0].swap_s.values())
    found = list[Layout]()
    made = candidates(config, needs, ground.nodes, swap_s=swap_s)
    if configured and num_gpus(config):
        made.insert(0, Candidate(about="the layout of the YAML", seconds=0.0, changes={}))
    for candidate in made:
        layout = _layout(config, candidate, ground)
        if layout is not None and not any(_alike(layout, other) for other in found):
            found.append(layout)
        if len(found) > SIMULATED:
            break
    chosen = sorted(found, key=_worth)[:count]
    larger = [_with_larger_batches(config, layout, ground) for layout in chosen]
    whole = [replace(layout, stages=forecasts(layout.config, ground)) for layout in larger]
    return sorted(whole, key=_worth)


def _alike(one: Layout, other: Layout) -> bool:
    """The same workers on the same cards, whatever shares are written down for them."""
    if [list(stage.seats.named()) for stage in one.stages] != [list(stage.seats.named()) for stage in other.stages]:
        return False
    return all(key.endswith(".num_gpus") or _at(other.config, key) == value for key, value in one.changes.items())


def _worth(layout: Layout) -> tuple[float, float, int]:
    """Seconds to a half percent, then cards, then what has to be said."""
    return float(f"{layout.epoch_s:.3g}"), layout.gpus, len(layout.lines)


def changed(config: ExperimentConfig, changes: Changes) -> ExperimentConfig:
    """The experiment with dotted keys set anew; ValueError as the loader has it."""
    data = config.model_dump()
    data["rewards"] = {name: dict(section or {}) for name, section in data["rewards"].items()}
    for key, value in changes.items():
        *path, last = key.split(".")
        section = data
        for name in path:
            section = section[name]
        section[last] = value
    return parse(data)


def set_lines(config: ExperimentConfig, changes: Changes) -> tuple[str, ...]:
    """What of it has to be said, as `key=value`."""
    return tuple(f"{key}={_text(value)}" for key, value in changes.items() if _at(config, key) != value)


def forecasts(config: ExperimentConfig, ground: Ground, *, spread: bool = True) -> tuple[Forecast, ...]:
    """Of every stage; ValueError where a worker has no place."""
    return _forecasts(config.stage_configs, ground, quick=False, spread=spread)


def _forecasts(
    stages: Sequence[ExperimentConfig], ground: Ground, *, quick: bool, spread: bool = True
) -> tuple[Forecast, ...]:
    """Stages that are alike are simulated once. `quick`: one epoch, no evaluation."""
    found, known, first = list[Forecast](), dict[str, Forecast](), 0
    for stage in stages:
        key = stage.model_copy(update={"run": stage.run.model_copy(update={"num_epochs": 1})}).model_dump_json()
        if key not in known:
            places = seats(stage, ground.nodes, spread=spread)
            work, lines = ground.estimate(stage)[0], 0 if quick else ground.lines(stage)
            averaged = 1 if quick else AVERAGED
            known[key] = forecast(stage, work, places, num_lines=lines, first_epoch=first, averaged=averaged)
        found.append(known[key].over(stage, first))
        first = stage.run.num_epochs
    return tuple(found)


def _layout(config: ExperimentConfig, candidate: Candidate, ground: Ground) -> Layout | None:
    """None where it is no experiment, has no place, or does not fit a card with any micro-batch."""
    changes = dict(candidate.changes)
    try:
        made = changed(config, changes)
        ground.check(made)
        while who := too_full(parts := made.stage_configs, ground):
            smaller = _smaller(made, who)
            if not smaller:
                return None
            changes |= smaller
            made = changed(config, changes)
        stages = _forecasts(parts, ground, quick=True)
    except ValueError:
        return None
    return Layout(about=candidate.about, config=made, changes=changes, lines=set_lines(config, changes), stages=stages)


def too_full(stages: Sequence[ExperimentConfig], ground: Ground) -> str:
    """The role that needs the most on a card that is too small, in any stage; "" where none is."""
    for stage in stages:
        footprint = ground.estimate(stage)[1]
        for held, roles in card_bytes(stage, footprint, seats(stage, ground.nodes), ground.runtime).values():
            if held > ground.memory:
                needed = {"sampler": footprint.sampler, "learner": footprint.learner}
                return max((role for role in roles if role in needed), key=needed.__getitem__, default=roles[0])
    return ""


def _smaller(config: ExperimentConfig, who: str) -> dict[str, Any]:
    """The next setting of a role that needs less memory, the cheapest first; {} where there is none."""
    sampler, learner = config.sampler, config.learner
    if who == "sampler":
        decode = sampler.decode_batch_size or sampler.micro_batch_size
        if decode > 4:
            return {"sampler.decode_batch_size": max(4, decode // 2)}
        if config.model.text_encoders == "resident":
            return {"model.text_encoders": "offload"}
        if sampler.micro_batch_size > 1:
            return {"sampler.micro_batch_size": sampler.micro_batch_size // 2}
        return {"sampler.decode_batch_size": decode // 2} if decode > 1 else {}
    if who == "learner":
        if learner.micro_batch_size > 4:
            return {"learner.micro_batch_size": learner.micro_batch_size // 2}
        if not learner.gradient_checkpointing:
            return {"learner.gradient_checkpointing": True}
        return {"learner.micro_batch_size": learner.micro_batch_size // 2} if learner.micro_batch_size > 1 else {}
    return {}


def _with_larger_batches(config: ExperimentConfig, layout: Layout, ground: Ground) -> Layout:
    """The layout with whatever makes its epochs shorter and still fits: nothing computed twice, more at once."""
    for change in (_without_checkpointing, _resident, _more_pairs, _more_images):
        while update := change(layout.config):
            changes = {**layout.changes, **update}
            made = changed(config, changes)
            parts = made.stage_configs
            if too_full(parts, ground):
                break
            stages = _forecasts(parts, ground, quick=True)
            lines = set_lines(config, changes)
            further = replace(layout, config=made, changes=changes, lines=lines, stages=stages)
            if further.epoch_s > BETTER * layout.epoch_s:
                break
            layout = further
    return layout


def _without_checkpointing(config: ExperimentConfig) -> dict[str, Any]:
    return {"learner.gradient_checkpointing": False} if config.learner.gradient_checkpointing else {}


def _resident(config: ExperimentConfig) -> dict[str, Any]:
    return {"model.text_encoders": "resident"} if config.model.text_encoders == "offload" else {}


def _more_pairs(config: ExperimentConfig) -> dict[str, Any]:
    twice = 2 * config.learner.micro_batch_size
    pairs = config.prompts.images_per_group * config.sampler.num_times
    return {"learner.micro_batch_size": twice} if twice <= min(pairs, MOST_PAIRS) else {}


def _more_images(config: ExperimentConfig) -> dict[str, Any]:
    size, most = config.sampler.micro_batch_size, config.prompts.images_per_group
    return {"sampler.micro_batch_size": min(2 * size, most)} if size < most else {}


def _at(config: ExperimentConfig, key: str) -> Any:
    head, *path = key.split(".")
    if head == "rewards":
        return getattr(config.reward_configs[path[0]], path[1])
    value: Any = getattr(config, head)
    for name in path:
        value = getattr(value, name)
    return value


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)
