"""What a run needs of a cluster, as records, as a table (`--dry-run`) and as a check. Imports no Ray: it starts
nothing.

Failure policy: asking for more than the whole cluster has, or will have when its autoscaler is done, is the user's
mistake and raises ValueError at once; so is a node that somebody means to add by hand: it has to be there. Asking for
more than is free right now, or for nodes that an autoscaler may add, is a wait, which says what it waits for (pool.py,
nodes.py).
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from actors.packing import Node, Piece, without_room
from nft_ray.config import ExperimentConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """One role: so many workers, each with so much."""

    role: str
    num_workers: int
    num_cpus: float
    num_gpus: float
    memory_gib: float


def needs(config: ExperimentConfig, *, training: bool = True) -> tuple[Need, ...]:
    """Every role of the run, in the order of the data: sampler, learner, then one Serve application per reward.

    An evaluation (`training` false) has no learners. Colocated, a sampler and its learner are one row: one bundle,
    which an evaluation's sampler has to itself.
    """
    colocated = config.cluster.placement == "colocated"
    workers = [
        Need(
            role=role,
            num_workers=section.num_workers,
            num_cpus=section.num_cpus,
            num_gpus=section.num_gpus,
            memory_gib=section.memory_gib,
        )
        for role, section in (("sampler", config.sampler), ("learner", config.learner))
        if training or colocated or role != "learner"
    ]
    rewards = [
        Need(
            role=f"reward-{name}",
            num_workers=reward.autoscaling.max_replicas if reward.autoscaling else reward.num_replicas,
            num_cpus=reward.num_cpus,
            num_gpus=reward.num_gpus,
            memory_gib=reward.memory_gib,
        )
        for name, reward in config.reward_configs.items()
    ]
    if colocated:
        sampler, learner = workers
        workers = [
            Need(
                role="sampler + learner" if training else "sampler",
                num_workers=sampler.num_workers,
                num_cpus=sampler.num_cpus + learner.num_cpus,
                num_gpus=sampler.num_gpus + learner.num_gpus,
                memory_gib=sampler.memory_gib + (learner.memory_gib if training else 0),
            )
        ]
    return (*workers, *rewards)


def at_least(config: ExperimentConfig) -> ExperimentConfig:
    """The run with the fewest samplers that it starts with."""
    fewest = config.sampler.min_workers or config.sampler.num_workers
    return config.model_copy(update={"sampler": config.sampler.model_copy(update={"num_workers": fewest})})


def local_needs(config: ExperimentConfig) -> tuple[Need, ...]:
    """What --local runs, as such rows: one of each in one process, with nothing reserved."""
    apart = config.model_copy(update={"cluster": config.cluster.model_copy(update={"placement": "disaggregated"})})
    return tuple(replace(row, num_workers=1, num_cpus=0, num_gpus=0) for row in needs(apart))


def table(rows: Sequence[Need]) -> str:
    """The placement table: totals per role, and the sum at the foot."""
    cells = [("role", "workers", "CPUs", "GPUs", "memory GiB")]
    for row in rows:
        cpus, gpus = row.num_workers * row.num_cpus, row.num_workers * row.num_gpus
        cells.append(
            (row.role, str(row.num_workers), f"{cpus:g}", f"{gpus:g}", f"{row.num_workers * row.memory_gib:g}")
        )
    cpus, gpus = _total(rows)
    memory_gib = sum(row.num_workers * row.memory_gib for row in rows)
    cells.append(("total", str(sum(row.num_workers for row in rows)), f"{cpus:g}", f"{gpus:g}", f"{memory_gib:g}"))
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))])
        for line in cells
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """The nodes that are there, and those that an autoscaler may add: () = there is none; None = nobody says which."""

    nodes: tuple[Node, ...]
    possible: tuple[Node, ...] | None = ()


def pieces(config: ExperimentConfig, *, training: bool = True) -> list[Piece]:
    """What has to be on one node each: every worker that the run starts with, every bundle, every replica."""
    return [
        Piece(role=row.role, num_cpus=row.num_cpus, num_gpus=row.num_gpus)
        for row in needs(at_least(config), training=training)
        for _ in range(row.num_workers)
    ]


def check(config: ExperimentConfig, cluster: Cluster, *, training: bool = True) -> str | None:
    """None where the run fits the nodes that are there; what it lacks, as a line, where the cluster may grow to it.

    ValueError, one line with both numbers, where it never fits: more than all nodes have, or a piece without room.
    """
    lacks = _lacks(config, cluster.nodes, training)
    if lacks is None:
        return None
    if cluster.possible == ():
        raise ValueError(lacks)
    if cluster.possible is not None:
        grown = _lacks(config, (*cluster.nodes, *cluster.possible), training)
        if grown is not None:
            may = ", ".join(map(str, cluster.possible))
            raise ValueError(f"{grown}; what its autoscaler may add is counted ({may})")
    return lacks


def _lacks(config: ExperimentConfig, nodes: Sequence[Node], training: bool) -> str | None:
    """What these nodes lack, with what to change."""
    rows = needs(at_least(config), training=training)
    for kind, needed in zip(("CPUs", "GPUs"), _total(rows), strict=True):
        field = f"num_{kind.lower()}"
        has = sum(node.count * (node.num_cpus if kind == "CPUs" else node.num_gpus) for node in nodes)
        if needed > has + 1e-4:  # Ray counts in units of 1e-4
            return (
                f"the run needs {needed:g} {kind} ({_asked(rows, field)}), the cluster has {has:g}: lower num_workers, "
                f"num_replicas or {field} (fractions are fine), or use a larger cluster"
            )
    piece = without_room(pieces(config, training=training), nodes)
    if piece is None:
        return None
    asked = _asked(rows, "num_gpus" if piece.num_gpus else "num_cpus")
    return (
        f"no node has room for {piece} beside the rest ({asked}): the nodes have {_shown(nodes)}, and a worker is on "
        "one node, a part of a GPU on one card; change num_cpus or num_gpus so that the pieces fill them, or use a "
        "larger cluster"
    )


def _asked(rows: Sequence[Need], field: str) -> str:
    parts = [(row.role, row.num_workers, row.num_cpus if field == "num_cpus" else row.num_gpus) for row in rows]
    return ", ".join(f"{role} {workers} x {each:g}" for role, workers, each in parts if each)


def _shown(nodes: Sequence[Node]) -> str:
    """Nodes that are alike are one entry."""
    alike: Counter[Node] = Counter()
    for node in nodes:
        alike[replace(node, count=1, memory_gib=None)] += node.count
    return ", ".join(str(replace(node, count=count)) for node, count in alike.items())


def _total(rows: Sequence[Need]) -> tuple[float, float]:
    """CPUs and GPUs, rounded to Ray's own precision so that ten times 0.1 is 1."""
    cpus = sum(row.num_workers * row.num_cpus for row in rows)
    gpus = sum(row.num_workers * row.num_gpus for row in rows)
    return round(cpus, 4), round(gpus, 4)
