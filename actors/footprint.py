"""What one epoch takes of object store and disk, in bytes, known before anything is loaded; and what is too small.

    object store   groups x (x0, times, v_old, v_ref, conditioning) x (1 + max_staleness), the images until they are
                   scored, and the newest state of the learners
    disk           a checkpoint x (keep_checkpoints + 2): the best one, and the one that is being written

All groups of an epoch have to be there for its update, so nothing is gained by holding rollouts back: what does not
fit the store, Ray spills to its disk, and what waits for a place there waits by itself (Ray's own backpressure). Past
that disk a run ends with one line, and its checkpoint is safe (nft_ray/cli/failures.py).

Failure policy: what can never work (a spilled epoch without the disk for it, a disk without room for one checkpoint)
is a ValueError with both numbers; what is only slower, or expected, is a warning.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from actors.placement import needs
from nft_ray.config import ExperimentConfig
from nft_ray.planning.payloads import payloads

SPARE = 0.05
"""Of a disk: past 95 % Ray calls it full (RAY_local_fs_capacity_threshold)."""
GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """Bytes. group: the samples of one; images: of one group; epoch: what the object store holds at most."""

    group: int
    images: int
    epoch: int
    checkpoint: int

    def __str__(self) -> str:
        return f"one epoch puts {size(self.epoch)} into the object store, a checkpoint takes {size(self.checkpoint)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stores:
    """What there is, in bytes, all nodes together. spill: free disk for what the stores do not hold; None = not known.

    shm: the memory that the object store of this machine is made of; None = of others.
    """

    object_store: int
    spill: int | None = None
    shm: int | None = None


def footprint(config: ExperimentConfig) -> Footprint | None:
    """None where the model's configuration is not at hand, such as a Hub that cannot be reached."""
    sent = payloads(config)
    if sent is None:
        return None
    num_images, groups = config.prompts.images_per_group, config.prompts.groups_per_epoch
    group, images = num_images * sent.sample + sent.conditioning, num_images * sent.image
    return Footprint(
        group=group,
        images=images,
        epoch=groups * (group * (config.run.max_staleness + 1) + images) + sent.checkpoint,
        checkpoint=sent.checkpoint,
    )


def store_warnings(plan: Footprint, have: Stores) -> list[str]:
    """Lines to tell, for what is slower than it need be; ValueError where an epoch has no place at all."""
    found, spilled = [], plan.epoch - have.object_store
    if have.shm is not None and have.shm < min(have.object_store, plan.epoch):
        found.append(
            f"/dev/shm has {size(have.shm)}, less than an epoch needs: Ray keeps the object store on disk, which is "
            "slower; give the container more (docker run --shm-size)"
        )
    if spilled <= 0:
        return found
    what = f"{plan}, and the cluster's object store has {size(have.object_store)}"
    change = "lower prompts.groups_per_epoch, or start Ray with a larger --object-store-memory"
    if have.spill is not None and spilled > have.spill:
        raise ValueError(f"{what}, the disk that it spills to {size(have.spill)} free: {change}")
    return [*found, f"{what}: the rest is spilled to disk, which is slower; {change}"]


def disk_warnings(plan: Footprint, keep: int, free: int, folder: str, kept: int = 0) -> list[str]:
    """The same of the disk of the run's folder, `free` bytes of it; `kept` checkpoints are there already."""
    needed = plan.checkpoint * max(1, keep + 2 - kept)
    if plan.checkpoint > free:
        raise ValueError(
            f"the disk of {folder} has {size(free)} free and a checkpoint takes {size(plan.checkpoint)}: free some, or "
            "set run.root to another"
        )
    if needed <= free:
        return []
    return [
        f"the disk of {folder} has {size(free)} free and the checkpoints of this run will take {size(needed)} "
        f"(run.keep_checkpoints = {keep}, the best one, one in work): free some, or lower run.keep_checkpoints"
    ]


def memory_warnings(config: ExperimentConfig, nodes_gib: Sequence[float | None], *, training: bool = True) -> list[str]:
    """The same of host memory: what the workers are expected to need (`memory_gib`) of all that the nodes have."""
    if not nodes_gib or any(gib is None for gib in nodes_gib):
        return []
    has = sum(gib for gib in nodes_gib if gib is not None)
    needed = sum(row.num_workers * row.memory_gib for row in needs(config, training=training))
    if needed <= has:
        return []
    return [
        f"the workers are expected to need {needed:.1f} GiB of host memory (memory_gib of each), the cluster has "
        f"{has:.1f}: Ray ends workers where memory runs out; use fewer workers or larger nodes"
    ]


def usable(free: int, total: int) -> int:
    """Of a disk, what Ray fills."""
    return max(0, int(free - SPARE * total))


def size(num_bytes: float) -> str:
    """For a person."""
    return f"{num_bytes / GIB:.1f} GiB" if num_bytes >= GIB else f"{num_bytes / 2**20:.1f} MiB"
