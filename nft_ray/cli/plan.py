"""`nft-ray plan`: whether a run fits, what it takes and what bounds it, how to split the cards. No GPU, no weights.

Also the lines that `nft-ray train --dry-run` says of it.
"""

import argparse
import json
import math
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nft_ray.cli.console import say
from nft_ray.config import ExperimentConfig, load, profiles

if TYPE_CHECKING:
    from nft_ray.planning.devices import Device
    from nft_ray.planning.layouts import Ground, Layout
    from nft_ray.planning.places import Nodes

PLENTY = 10_000
"""CPUs of a node of which nobody said how many it has: then they are no limit."""
DEVICE, WITHOUT = "h100", "cpu"
"""The device that a plan is for where nobody says: of a run with GPUs, and of one without."""


def add_parser(commands: Any) -> None:
    """Add the command."""
    command = commands.add_parser("plan", help="what a run takes, what bounds it, how to split the cards")
    command.add_argument("config", help="the experiment, such as configs/sd3_geneval.yaml")
    command.add_argument("--set", action="append", default=[], metavar="a.b=c", help="override a field")
    command.add_argument("--gpus", type=int, metavar="N", help="cards, on nodes of 8 (default: what the YAML reserves)")
    command.add_argument("--nodes", metavar="MxK", help="M nodes with K cards each, such as 4x8")
    command.add_argument(
        "--device", metavar="NAME", help="h100, h200, a100, l40s, 4090, cpu, or a file (nft-ray profile)"
    )
    command.add_argument("--price", type=float, metavar="X", help="money for an hour of one card, such as 2.5")
    command.add_argument("--output", metavar="DIR", default="plans", help="for the picture (default: plans)")


def plan(args: argparse.Namespace) -> int:
    """Print the plan, write its picture; returns the exit status."""
    from nft_ray.models.base import quiet_libraries
    from nft_ray.models.resolve import resolve
    from nft_ray.planning import words
    from nft_ray.planning.layouts import best
    from nft_ray.planning.picture import draw

    quiet_libraries()
    nodes = _nodes(args.gpus, args.nodes)
    config, profile = configured(args.config, args.set, nodes.gpus if nodes else None)
    config = resolve(config)
    device = _device(args.device, config, nodes)
    nodes = nodes or _reserved(config)
    price = args.price if args.price is not None else device.price_per_hour
    ground = ground_of(config, nodes, device)
    title = f"{config.run.name} on {nodes} ({device.name})" if nodes.cards else f"{config.run.name} on CPUs"
    say(f"{title}{f', profile {profile}' if profile else ''}")
    if "assumed" in device.sources.get("utilisation", ""):
        shares = ", ".join(f"{part} {share:g}" for part, share in device.utilisation.model_dump().items())
        say(f"assumed       utilisation of {device.name}: {shares} (docs/planning.md)")
    stages, trouble = stages_of(config, ground)
    names = [stage.name for stage in config.stages] or [config.run.name]
    if stages:
        for line in words.table(stages, names, ground, price):
            say(line)
        host = words.Host(what="a node", memory=device.host_memory_bytes)
        trouble += words.warnings(stages, ground, host)
    for line in trouble:
        say(f"warning: {line}")
    chosen = [f"cluster={profile}"] if profile else []
    found = [_after(chosen, layout) for layout in best(config, ground)] if nodes.cards else []
    _say_layouts(found, nodes, price, sum(stage.seconds for stage in stages) or None)
    _say_overlapped(config, ground, price, chosen)
    shown = stages or (found[0].stages if found else ())
    if not shown:
        raise ValueError(
            f"{config.run.name} does not fit {nodes} ({device.name}, {words.size(ground.memory)} each) in any layout; "
            "use more or larger cards"
        )
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    on = re.sub(r"[^0-9A-Za-z_.-]", "_", device.name)
    stem = folder / f"{config.run.name}-{f'{nodes.gpus}x' if nodes.cards else ''}{on}"
    slowest = max(shown, key=lambda stage: stage.epoch_s)
    draw(slowest, f"{title}: an epoch, {slowest.epoch_s:.1f} s", Path(f"{stem}.png"))
    Path(f"{stem}.json").write_text(json.dumps(_numbers(config, shown, found), indent=1) + "\n")
    say(f"\n{stem}.png, {stem}.json")
    return 0


def dry_run_lines(config: ExperimentConfig, root: Path | None) -> list[str]:
    """Of `nft-ray train --dry-run`: the estimate in two lines, then a warning for each thing that will not fit.

    root: the run's folder where this machine is to do it; None = some other cluster.
    """
    from nft_ray.planning import words

    device, nodes = _device(None, config, None), _reserved(config)
    host = words.Host(what="a node", memory=device.host_memory_bytes) if root is None else _here(root)
    try:
        ground = ground_of(config, nodes, device)
        stages, trouble = stages_of(config, ground)
    except ValueError as error:
        return [f"no estimate: {error}"]
    where = f"{nodes} ({device.name})" if nodes.cards else "CPUs"
    lines = [f"estimate for {where} (nft-ray plan says more):"] if stages else []
    lines += [f"  {line}" for line in words.in_short(stages, None, nodes.gpus)] if stages else []
    return [*lines, *(f"warning: {line}" for line in [*trouble, *words.warnings(stages, ground, host)])]


def configured(path: str, overrides: Sequence[str], gpus: int | None) -> tuple[ExperimentConfig, str]:
    """The experiment, and the name of its profile where it was chosen here: the one that uses the most of `gpus`."""
    from nft_ray.planning.places import num_gpus

    config = load(path, overrides)
    chosen = any(override.partition("=")[0] == "cluster" for override in overrides)
    if gpus is None or chosen:
        return config, ""
    found = [(num_gpus(config), config, "")]
    for name in profiles(path):
        made = load(path, [*overrides, f"cluster={name}"])
        found.append((num_gpus(made), made, name))
    fitting = [one for one in found if one[0] <= gpus + 1e-4]
    if not fitting:
        return config, ""
    most = max(count for count, _, _ in fitting)
    _, config, name = next(one for one in fitting if one[0] == most)
    return config, name


def ground_of(config: ExperimentConfig, nodes: "Nodes", device: "Device") -> "Ground":
    """What plans of this experiment stand on. Workers that reserve no GPU are on CPUs, whatever the cards are."""
    from actors.packing import Node
    from actors.placement import Cluster, check
    from nft_ray.planning.devices import device_named
    from nft_ray.planning.estimate import estimate
    from nft_ray.planning.layouts import Ground
    from nft_ray.prompts.sets import num_lines

    node = Node(num_cpus=device.cpus or PLENTY, num_gpus=nodes.cards, count=nodes.count)
    return Ground(
        nodes=nodes,
        memory=device.memory_bytes,
        runtime=device.runtime_bytes,
        estimate=lambda one: estimate(one, device if one.sampler.num_gpus else device_named(WITHOUT)),
        lines=lambda one: num_lines(one.prompts.test),
        check=lambda one: check(one, Cluster(nodes=(node,))),
    )


def stages_of(config: ExperimentConfig, ground: "Ground") -> tuple[tuple[Any, ...], list[str]]:
    """The forecast of every stage as configured, () where it has no place there; and what is wrong with it."""
    from nft_ray.planning.layouts import forecasts

    try:
        return forecasts(config, ground), []
    except ValueError as error:
        first = str(error)
    try:
        return forecasts(config, ground, spread=False), []  # the warnings say it
    except ValueError:
        return (), [f"as configured: {first}"]


def _say_layouts(found: Sequence["Layout"], nodes: "Nodes", price: float | None, configured_s: float | None) -> None:
    from nft_ray.planning.words import layout_lines

    if nodes.cards and not found:
        say(f"\nno layout fits {nodes} of this memory: use larger cards, or more of them")
    if found:
        say(f"\nthe best layouts for {nodes}, all the same algorithm:")
    for number, layout in enumerate(found, start=1):
        for line in layout_lines(number, layout, price, nodes.gpus, configured_s):
            say(line)


def _say_overlapped(config: ExperimentConfig, ground: "Ground", price: float | None, chosen: Sequence[str]) -> None:
    """The best layout with rollouts that are one epoch old: other results, so it is not among the others."""
    from nft_ray.planning.layouts import best, changed
    from nft_ray.planning.words import layout_lines

    if config.run.max_staleness or ground.nodes.gpus < 2:
        return
    apart = {"cluster.placement": "disaggregated", "run.max_staleness": 1}
    try:
        found = best(changed(config, apart), ground, 1, configured=False)
    except ValueError:
        return
    for layout in found:
        whole = _after([*chosen, *(f"{key}={value}" for key, value in apart.items())], layout)
        say("\nrollouts one epoch old, which is another algorithm:")
        for line in layout_lines(1, whole, price, ground.nodes.gpus, None):
            say(line)


def _after(lines: Sequence[str], layout: "Layout") -> "Layout":
    """The layout with what has to be said before its own lines: they stand on it."""
    return replace(layout, lines=tuple(dict.fromkeys([*lines, *layout.lines])))


def _nodes(gpus: int | None, nodes: str | None) -> "Nodes | None":
    from nft_ray.planning.places import Nodes, default_nodes

    if nodes is not None:
        match = re.fullmatch(r"(\d+)x(\d+)", nodes)
        if not match or not int(match[1]) or not int(match[2]):
            raise ValueError(f"--nodes {nodes}: write nodes x cards, such as 4x8")
        made = Nodes(count=int(match[1]), cards=int(match[2]))
        if gpus is not None and gpus != made.gpus:
            raise ValueError(f"--gpus {gpus}: --nodes {nodes} are {made.gpus}; leave one of them out")
        return made
    if gpus is not None and gpus < 1:
        raise ValueError(f"--gpus {gpus}: must be at least 1")
    return default_nodes(gpus) if gpus is not None else None


def _reserved(config: ExperimentConfig) -> "Nodes":
    """Cards that the YAML reserves; none is a node without."""
    from nft_ray.planning.places import Nodes, default_nodes, num_gpus

    count = math.ceil(num_gpus(config) - 1e-4)
    return default_nodes(count) if count else Nodes(count=1, cards=0)


def _device(name: str | None, config: ExperimentConfig, nodes: "Nodes | None") -> "Device":
    from nft_ray.planning.devices import device_named
    from nft_ray.planning.places import num_gpus

    return device_named(name or (DEVICE if nodes or num_gpus(config) else WITHOUT))


def _here(root: Path) -> Any:
    """This machine."""
    from nft_ray.planning.words import Host

    there = next(path for path in (root.absolute(), *root.absolute().parents) if path.exists())
    return Host(
        what="this machine",
        memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        shm=shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else None,
        disk=shutil.disk_usage(there).free,
    )


def _numbers(config: ExperimentConfig, stages: Sequence[Any], found: Sequence["Layout"]) -> dict[str, Any]:
    """The plan for a program."""
    names = [stage.name for stage in config.stages] or [config.run.name]
    return {
        "stages": [
            {
                "name": name,
                "epochs": stage.epochs,
                "epoch_s": stage.epoch_s,
                "evaluations": stage.evaluations,
                "evaluation_s": stage.evaluation_s,
                "phases_s": dict(stage.phases),
                "at_work": dict(stage.busy),
                "bound": stage.bound.text,
                "object_store_bytes": stage.store,
                "checkpoints_bytes": stage.disk,
            }
            for name, stage in zip(names, stages, strict=True)
        ],
        "seconds": sum(stage.seconds for stage in stages),
        "layouts": [
            {"about": one.about, "set": one.lines, "epoch_s": one.epoch_s, "seconds": one.seconds} for one in found
        ],
    }
