"""What a connected Ray has, and what its autoscaler may add: read here, judged in placement.py, waited for here.

Ray tells that there is an autoscaler, and what of it: a managed cluster says its kinds of nodes (GCS: cluster config),
the head of `ray up` has them in a file, KubeRay keeps them to itself. Where nobody says them, a run that does not fit
now waits up to `cluster.wait_s` seconds, and the log says for what.
"""

import json
import logging
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
import yaml
from ray._private.state import state
from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply  # type: ignore[attr-defined]
from ray.exceptions import RayError
from ray.experimental.internal_kv import _internal_kv_get
from ray.util import placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.answers import DeadlineError, free_resources, one_line, waiting
from actors.footprint import Stores, footprint, memory_warnings, store_warnings, usable
from actors.packing import Node, Piece
from actors.placement import Cluster, check, pieces
from nft_ray.config import ExperimentConfig
from nft_ray.rewards.base import RewardConfig, TorchRewardConfig, reward_files
from nft_ray.rewards.weights import missing_weights
from nft_ray.roles import TryAgainError

logger = logging.getLogger(__name__)
ASK_S, LOOK_S = 5.0, 60.0
GIB = 2**30
WITHOUT_AUTOSCALER = "node_"
"""What Ray calls the kind of a node that nobody else named."""
BOOTSTRAP = "ray_bootstrap_config.yaml"
"""In the home folder of a head that `ray up` started."""


def cluster_now() -> Cluster:
    """The living nodes, and what may be added to them."""
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return Cluster(nodes=tuple(_node(resources) for resources in alive), possible=_possible())


async def room_for(config: ExperimentConfig, *, training: bool = True) -> None:
    """Return when the run fits the cluster: at once, or when it has grown. See `placement.check` for what never fits.

    TryAgainError where it did not grow within `cluster.wait_s` seconds.
    """
    lacks = check(config, cluster_now(), training=training)
    if lacks is not None:
        logger.info("the cluster has to grow, for up to %g s (cluster.wait_s): %s", config.cluster.wait_s, lacks)
        await _grown(config, pieces(config, training=training), lacks)


def check_weights(config: ExperimentConfig) -> None:
    """Rewards' files, looked for on every node that has room for a replica; a warning where only some lack them.

    ValueError, one line, where all nodes lack them and no other can come. Where nothing can be asked, nothing is said.
    """
    for name, reward in config.reward_configs.items():
        if not isinstance(reward, TorchRewardConfig) or not reward_files(name, reward):
            continue
        alive = [node for node in ray.nodes() if node["Alive"] and _holds(node["Resources"], reward)]
        try:
            found = _everywhere(_missing, alive, {name: reward})
        except (RayError, ImportError) as error:
            logger.warning("rewards.%s: its files could not be looked for on the cluster: %s", name, one_line(error))
            continue
        lacking = [(node["NodeManagerAddress"], lines[0]) for node, lines in zip(alive, found, strict=True) if lines]
        where = ", ".join(sorted({address for address, _ in lacking}))
        if lacking and len(lacking) == len(alive) and cluster_now().possible == ():
            raise ValueError(f"{lacking[0][1]} (looked for on {where}, all nodes that have room for it)")
        if lacking:
            logger.warning(
                "%s: a replica on %s would not start (%d of %d nodes)", lacking[0][1], where, len(lacking), len(alive)
            )


def store_lines(config: ExperimentConfig, *, joined: bool, training: bool = True) -> list[str]:
    """Warnings: one epoch against the object stores, the disks behind them and the memory of the nodes (footprint.py).

    ValueError where an epoch has no place. Of `joined` nodes a disk is asked for only where it is needed; of a cluster
    that may grow nothing is said.
    """
    cluster = cluster_now()
    if cluster.possible != ():
        return []
    lines = memory_warnings(config, [node.memory_gib for node in cluster.nodes], training=training)
    plan = footprint(config) if training else None
    if plan is None:
        return lines
    alive = [node for node in ray.nodes() if node["Alive"]]
    store, spill = int(sum(node["Resources"].get("object_store_memory", 0.0) for node in alive)), None
    if plan.epoch > store:
        spill = sum(_everywhere(_spill_room, alive)) if joined else spill_room()
    shm = None if joined else _shm()
    return [*lines, *store_warnings(plan, Stores(object_store=store, spill=spill, shm=shm))]


def spill_room() -> int:
    """Bytes that Ray may still spill on this node."""
    told = json.loads(state.get_system_config().get("object_spilling_config") or "{}")
    folder = told.get("params", {}).get("directory_path")
    paths = folder if isinstance(folder, list) else [folder]
    here = [path for path in paths if path and Path(path).is_dir()]
    session = ray._private.worker._global_node.get_session_dir_path()  # type: ignore[attr-defined]
    disk = shutil.disk_usage(here[0] if here else session)
    return usable(disk.free, disk.total)


def _shm() -> int | None:
    return shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else None


def _everywhere(task: Any, nodes: Sequence[Mapping[str, Any]], *arguments: Any) -> list[Any]:
    """A task's answer of each of these nodes; RayError where one does not come."""
    return list(
        ray.get(
            [
                task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(
                    *arguments
                )
                for node in nodes
            ],
            timeout=LOOK_S,
        )
    )


@ray.remote(num_cpus=0)
def _spill_room() -> int:
    return spill_room()


@ray.remote(num_cpus=0)
def _missing(rewards: Mapping[str, RewardConfig]) -> list[str]:
    """`missing_weights`, of the node that this runs on."""
    return missing_weights(rewards)


def _holds(resources: Mapping[str, float], reward: RewardConfig) -> bool:
    return resources.get("CPU", 0.0) >= reward.num_cpus and resources.get("GPU", 0.0) >= reward.num_gpus


async def _grown(config: ExperimentConfig, wanted: Sequence[Piece], lacks: str) -> None:
    """Ask for all places at once, which is what an autoscaler looks at; given back as soon as they are there."""
    bundles = [
        {kind: amount for kind, amount in (("CPU", piece.num_cpus), ("GPU", piece.num_gpus)) if amount}
        for piece in wanted
    ]
    group = placement_group([bundle for bundle in bundles if bundle], name=f"{config.run.name}/room")
    try:
        await waiting(group.ready(), "the cluster to grow", config.cluster.wait_s, free_resources)
    except DeadlineError as error:
        raise TryAgainError(
            f"the cluster did not grow within cluster.wait_s = {config.cluster.wait_s:g} s: {lacks}"
        ) from error
    finally:
        remove_placement_group(group)


def _node(resources: Mapping[str, float], count: int = 1) -> Node:
    memory = resources.get("memory")
    return Node(
        num_cpus=resources.get("CPU", 0.0),
        num_gpus=resources.get("GPU", 0.0),
        memory_gib=memory / GIB if memory else None,
        count=count,
    )


def _possible() -> tuple[Node, ...] | None:
    told, kinds = _told(), _kinds()
    if told is None and not kinds:
        return ()
    if told is None:
        return None
    left = [(resources, most - kinds[kind]) for kind, (resources, most) in told.items()]
    return tuple(_node(resources, count) for resources, count in left if count > 0)


def _kinds() -> Counter[str]:
    client = ray._private.worker.global_worker.gcs_client  # type: ignore[attr-defined]
    return working_kinds(client.get_cluster_status(timeout_s=ASK_S), _internal_kv_get("__autoscaling_status"))


def working_kinds(second: bytes, first: bytes | None) -> Counter[str]:
    """Kind -> how many of the living nodes are of it, where an autoscaler is at work: what each version reports."""
    reply = GetClusterStatusReply.FromString(second)
    if reply.autoscaling_state.autoscaler_state_version:
        names = (node.ray_node_type_name for node in reply.cluster_resource_state.node_states)
        return Counter(name for name in names if name)
    named = (json.loads(first or b"{}").get("autoscaler_report") or {}).get("node_type_mapping") or {}
    return Counter(kind for kind in named.values() if not kind.startswith(WITHOUT_AUTOSCALER))


def _told() -> dict[str, tuple[Mapping[str, float], int]] | None:
    """Kind -> (its resources, how many there may be), where somebody says so."""
    config = state.get_cluster_config()
    if config is not None and config.node_group_configs:
        return {group.name: (dict(group.resources), _most(group.max_count)) for group in config.node_group_configs}
    file = Path("~", BOOTSTRAP).expanduser()
    if not _kinds() or not file.is_file():
        return None
    return described(yaml.safe_load(file.read_text()))


def described(bootstrap: Mapping[str, Any]) -> dict[str, tuple[Mapping[str, float], int]]:
    """What the configuration of `ray up` says of its kinds of nodes; the head's is there already."""
    most = bootstrap.get("max_workers", 0)
    return {
        kind: (about.get("resources", {}), min(about.get("max_workers", most), most))
        for kind, about in bootstrap.get("available_node_types", {}).items()
        if kind != bootstrap.get("head_node_type")
    }


def _most(count: int) -> int:
    return 10**6 if count < 0 else count
