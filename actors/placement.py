"""What a run needs of a cluster, as records, as a table (`--dry-run`) and as a check. Imports no Ray: it starts
nothing.

Failure policy: asking for more than the whole cluster has is the user's mistake and raises ValueError at once; asking
for more than is free right now is a wait, which says what it waits for (pool.py).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

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


def check(config: ExperimentConfig, cluster_resources: Mapping[str, float], *, training: bool = True) -> None:
    """ValueError, one line with both numbers, where the run needs more CPUs or GPUs than the whole cluster has."""
    rows = needs(config, training=training)
    for kind, key, needed in zip(("CPUs", "GPUs"), ("CPU", "GPU"), _total(rows), strict=True):
        has = cluster_resources.get(key, 0.0)
        if needed > has + 1e-4:  # Ray counts in units of 1e-4
            field = f"num_{kind.lower()}"
            parts = [(row.role, row.num_workers, row.num_cpus if key == "CPU" else row.num_gpus) for row in rows]
            asked = ", ".join(f"{role} {workers} x {each:g}" for role, workers, each in parts if each)
            raise ValueError(
                f"the run needs {needed:g} {kind} ({asked}), the cluster has {has:g}: lower num_workers, num_replicas "
                f"or {field} (fractions are fine), or use a larger cluster"
            )


def _total(rows: Sequence[Need]) -> tuple[float, float]:
    """CPUs and GPUs, rounded to Ray's own precision so that ten times 0.1 is 1."""
    cpus = sum(row.num_workers * row.num_cpus for row in rows)
    gpus = sum(row.num_workers * row.num_gpus for row in rows)
    return round(cpus, 4), round(gpus, 4)
