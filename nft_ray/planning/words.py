"""A forecast in words: the table of `nft-ray plan`, the lines of a dry run, and warnings of what will not fit."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from nft_ray.config import ExperimentConfig
from nft_ray.planning.calls import rollout_call, score_s
from nft_ray.planning.forecast import Forecast, card_bytes, host_bytes
from nft_ray.planning.layouts import Ground, Layout
from nft_ray.planning.places import num_gpus, seats

GB = 1e9
STORE_SHARE = 0.3
"""Of a node's memory: what Ray gives its object store unless it is told otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """One node, in bytes; None = not known. `what`: how a warning calls it."""

    what: str
    memory: int | None = None
    shm: int | None = None
    disk: int | None = None


def duration(seconds: float) -> str:
    """For a person."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 3600:.0f} h"


def size(num_bytes: float) -> str:
    """GB of 1e9 bytes, as cards are sold."""
    return f"{num_bytes / GB:.1f} GB" if num_bytes >= GB / 10 else f"{num_bytes / 1e6:.1f} MB"


def money(seconds: float, gpus: float, price: float | None) -> str:
    """ ", 123 $", or nothing where nobody said the price of a GPU hour."""
    return "" if price is None else f", {seconds / 3600 * gpus * price:,.0f} $"


def cards_of(config: ExperimentConfig) -> int:
    """Whole cards that are paid for."""
    return math.ceil(num_gpus(config) - 1e-4)


def in_short(stages: Sequence[Forecast], price: float | None, gpus: float) -> list[str]:
    """What a run takes, in two lines."""
    seconds, epochs = sum(stage.seconds for stage in stages), sum(stage.epochs for stage in stages)
    mean_s = sum(stage.epochs * stage.epoch_s for stage in stages) / epochs
    evaluated_s = sum(stage.evaluations * stage.evaluation_s for stage in stages)
    whole = f"{duration(seconds)} for {epochs:,} epochs"
    share = f", {evaluated_s / seconds:.0%} of it evaluations" if evaluated_s else ""
    slowest = max(stages, key=lambda stage: stage.epoch_s)
    return [f"{mean_s:.1f} s an epoch, {whole}{share}{money(seconds, gpus, price)}", slowest.bound.text]


def table(stages: Sequence[Forecast], names: Sequence[str], ground: Ground, price: float | None) -> list[str]:
    """Everything that is known of a run, stage by stage."""
    short, bound = in_short(stages, price, cards_of(stages[0].config))
    found = [f"run           {short}", f"bound         {bound}"]
    if len(stages) > 1:
        for name, stage in zip(names, stages, strict=True):
            epochs = f"{stage.epochs} epochs of {stage.epoch_s:.1f} s"
            evaluations = f"{stage.evaluations} evaluations of {stage.evaluation_s:.1f} s"
            found.append(f"  stage {name}: {epochs}, {evaluations}: {duration(stage.seconds)}; {stage.bound.text}")
    shown = max(stages, key=lambda stage: stage.epoch_s)
    parts = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in shown.phases.items() if seconds >= 0.05)
    found.append(f"an epoch      {parts}")
    found.append(
        f"an evaluation {duration(shown.evaluation_s)}, {shown.evaluations} of them "
        f"(every {shown.config.evaluation.every} epochs, {ground.lines(shown.config):,} lines)"
    )
    footprint = ground.estimate(shown.config)[1]
    host = host_bytes(shown.config, footprint, shown.seats, shown.store)
    found.append(
        f"held          object store {size(shown.store)}, host memory {size(max(host.values()))} on the fullest of "
        f"{len(host)} node{'s' * (len(host) > 1)}, checkpoints {size(shown.disk)} of disk"
    )
    return [*found, "", *_roles(shown, ground)]


def _roles(stage: Forecast, ground: Ground) -> Iterator[str]:
    """A row per role: workers, where, how busy, how full its fullest card is."""
    footprint = ground.estimate(stage.config)[1]
    cards = card_bytes(stage.config, footprint, stage.seats, ground.runtime)
    rows = [("role", "workers", "on", "at work", "fullest card")]
    for role, share in stage.busy.items():
        places = [seat for name, _, seat in stage.seats.named() if name == role]
        own = {seat.card for seat in places if seat.card >= 0}
        held = max((cards[card][0] for card in own), default=0)
        full = f"{held / GB:.1f} of {ground.memory / GB:.0f} GB" if own else ""
        where = f"{len(own)} card{'s' * (len(own) != 1)}" if own else "CPUs"
        rows.append((role, str(len(places)), where, f"{share:.0%}", full))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        yield "  ".join([row[0].ljust(widths[0]), *(row[i].rjust(widths[i]) for i in range(1, len(row)))]).rstrip()


def layout_lines(number: int, layout: Layout, price: float | None, gpus: int, configured_s: float | None) -> list[str]:
    """One of the best layouts: what it is, why, and how it is said."""
    cards = cards_of(layout.config)
    used = f" on {cards} of {gpus} GPUs" if cards < gpus else ""
    short = in_short(layout.stages, price, cards)
    ratio = configured_s / layout.seconds if configured_s else 1.0
    gain = f" ({ratio:.2f}x)" if abs(ratio - 1) >= 0.01 else ""
    said = " ".join(f"--set {line}" for line in layout.lines) or "as configured"
    return [f"{number}. {layout.about}{used}: {short[0]}{gain}", f"   {short[1]}", f"   {said}"]


def warnings(stages: Sequence[Forecast], ground: Ground, host: Host) -> list[str]:
    """What will not fit, or not in time: cards, places, host memory, /dev/shm, object store, disk, deadlines."""
    found = dict[str, None]()
    for stage in stages:
        found |= dict.fromkeys([*_cards(stage, ground), *_places(stage, ground), *_host(stage, ground, host)])
        found |= dict.fromkeys(_late(stage))
    return list(found)


def _cards(stage: Forecast, ground: Ground) -> Iterator[str]:
    footprint = ground.estimate(stage.config)[1]
    fullest, roles = max(card_bytes(stage.config, footprint, stage.seats, ground.runtime).values(), default=(0, ()))
    if fullest > ground.memory:
        who = " + ".join(dict.fromkeys(roles))
        yield (
            f"a card has {size(ground.memory)} and {who} need {size(fullest)}: lower micro_batch_size or "
            "decode_batch_size, set learner.gradient_checkpointing=true, or use fewer replicas on it"
        )


def _places(stage: Forecast, ground: Ground) -> Iterator[str]:
    try:
        seats(stage.config, ground.nodes)
        ground.check(stage.config)
    except ValueError as error:
        yield f"Ray may not place it: {error}"


def _host(stage: Forecast, ground: Ground, host: Host) -> Iterator[str]:
    footprint = ground.estimate(stage.config)[1]
    needs = max(host_bytes(stage.config, footprint, stage.seats, stage.store).values())
    share = stage.store / stage.seats.num_nodes
    if host.memory is not None and needs > host.memory:
        yield f"{host.what} has {size(host.memory)} of memory, its workers and its object store need {size(needs)}"
    if host.memory is not None and share > STORE_SHARE * host.memory:
        yield (
            f"{host.what} gives Ray's object store {size(STORE_SHARE * host.memory)} by default, an epoch needs "
            f"{size(share)}: start Ray with a larger --object-store-memory, or it spills to disk"
        )
    if host.shm is not None and share > host.shm:
        yield f"/dev/shm of {host.what} has {size(host.shm)}, an epoch needs {size(share)}: docker run --shm-size"
    if host.disk is not None and stage.disk > host.disk:
        yield f"{host.what} has {size(host.disk)} of disk free, the checkpoints need {size(stage.disk)}"


def _late(stage: Forecast) -> Iterator[str]:
    """Calls that take longer than their deadlines."""
    config, work = stage.config, stage.work
    rollout = rollout_call(work, images=config.prompts.images_per_group, prompts=1, split="train").total
    lines = config.evaluation.batch_size
    evaluated = rollout_call(work, images=lines, prompts=lines, split="eval").total
    calls = [("sampler.timeout_s", config.sampler.timeout_s, max(rollout, evaluated), "a rollout")]
    calls.append(("learner.timeout_s", config.learner.timeout_s, stage.phases["update"], "an update"))
    for name in config.rewards:
        field, longest_s = config.deadline_of(name)
        seconds = score_s(work, name, max(config.prompts.images_per_group, lines))
        calls.append((f"scorers.{field}", longest_s, seconds, f"a call of {name}"))
    for field, longest_s, seconds, what in calls:
        if seconds > longest_s:
            yield f"{field} = {longest_s:g} is shorter than {what} takes, {duration(seconds)}: raise it"
