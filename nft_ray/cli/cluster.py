"""Ray for one run: a local one that ends with it, or one that is joined and left as it was."""

import logging
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import ray
from ray._private.accelerators import get_accelerator_manager_for_resource

from actors.nodes import check_weights, cluster_now, room_for, store_lines
from actors.packing import Node
from actors.placement import Cluster, check
from actors.roles import ray_evaluation_roles, ray_roles
from deployments.build import deploy, release
from deployments.interpreter import check_py_executable
from deployments.proxy import check_port
from nft_ray.cli.connection import check_reachable, joins, no_cluster
from nft_ray.cli.failures import MESSAGES
from nft_ray.cli.watch import Ending, watched
from nft_ray.config import ExperimentConfig
from nft_ray.rewards.weights import missing_weights
from nft_ray.roles import EvaluationRoles, Roles

logger = logging.getLogger(__name__)
LOOPBACK = "127.0.0.1"
Say = Callable[[str], None]


def check_before_start(config: ExperimentConfig, address: str | None, *, training: bool = True) -> None:
    """ValueError for what is known to fail before a process starts: a port in use, weights not there, too few CPUs."""
    if joins(address):
        return
    port = config.cluster.dashboard_port
    if port is not None and _in_use(port):
        raise ValueError(f"cluster.dashboard_port = {port}: the port is in use; choose another, or leave it out")
    if config.scorers.http is not None:
        check_port(config.scorers.http)
    if absent := missing_weights(config.reward_configs):
        raise ValueError(absent[0])
    node = Node(num_cpus=config.cluster.num_cpus or os.cpu_count() or 1, num_gpus=_gpus())
    check(config, Cluster(nodes=(node,)), training=training)


def check_connected(configs: Sequence[ExperimentConfig], address: str | None, *, training: bool = True) -> None:
    """ValueError for what is known to fail in any of these parts of a run, however late: right after connecting.

    Places, room for an epoch, Pythons of replicas and, of a cluster that was joined, the rewards' files on its nodes:
    what this machine has of them is of no interest there. Rewards that may be deployed already (`scorers.attach`) are
    not looked at.
    """
    lines: dict[str, None] = {}  # stages that are alike lack the same
    for config in configs:
        check(config, cluster_now(), training=training)
        lines |= dict.fromkeys(store_lines(config, joined=joins(address), training=training))
    for line in lines:
        logger.warning("%s", line)
    for config in [one for one in configs if not one.scorers.attach]:
        for name, reward in config.reward_configs.items():
            check_py_executable(name, reward)
        if joins(address):
            check_weights(config)


def _nothing() -> None:
    """A cluster that was joined is others' to end."""


NOTHING_KEPT = Ending(kept=lambda: "what it deployed is gone, too", close=_nothing)


@contextmanager
def cluster(
    config: ExperimentConfig, address: str | None, say: Say, ending: Ending | None = None
) -> Iterator[str | None]:
    """A connected Ray; gives its dashboard's host:port. One started here is shut down in the end, whatever happens.

    One that goes away ends this process: see watch.py.
    """
    joined = joins(address)
    if joined:
        say("joining the Ray cluster")
        check_reachable(address)
        try:
            context = ray.init(address=address or "auto", log_to_driver=False, logging_level=logging.WARNING)
        except ConnectionError:
            raise no_cluster(address) from None
    else:
        say("starting a local Ray")
        before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # a closed terminal ends the run, which then ends its Ray
        try:
            context = ray.init(
                num_cpus=config.cluster.num_cpus,
                include_dashboard=True,
                dashboard_host=LOOPBACK,
                dashboard_port=config.cluster.dashboard_port,
                log_to_driver=False,
                logging_level=logging.WARNING,
            )
        finally:
            signal.signal(signal.SIGHUP, before)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    ray._private.worker.print_to_stdstream = _log_message  # type: ignore[attr-defined]  # else on standard output
    try:
        say(f"Ray dashboard: http://{context.dashboard_url}" if context.dashboard_url else "no Ray dashboard")
        with watched(
            ray.get_runtime_context().gcs_address, ending or NOTHING_KEPT, _nothing if joined else _kill_local
        ):
            yield context.dashboard_url or None
    finally:
        ray.shutdown()


@asynccontextmanager
async def planes(
    config: ExperimentConfig, say: Say, dashboard_url: str | None, owner: str | None = None
) -> AsyncIterator[Roles]:
    """Rewards deployed, samplers and learners placed; applications that nobody else uses are deleted in the end."""
    await room_for(config)
    async with _rewards(config, say, dashboard_url, owner) as applications:
        say(f"starting {config.sampler.num_workers} samplers and {config.learner.num_workers} learners")
        async with ray_roles(config, applications=applications) as roles:
            yield roles


@asynccontextmanager
async def evaluation_planes(
    config: ExperimentConfig, say: Say, dashboard_url: str | None, owner: str | None = None
) -> AsyncIterator[EvaluationRoles]:
    """The same without learners."""
    await room_for(config, training=False)
    async with _rewards(config, say, dashboard_url, owner) as applications:
        say(f"starting {config.sampler.num_workers} samplers")
        async with ray_evaluation_roles(config, applications=applications) as roles:
            yield roles


@asynccontextmanager
async def _rewards(
    config: ExperimentConfig, say: Say, dashboard_url: str | None, owner: str | None
) -> AsyncIterator[dict[str, str]]:
    say(f"deploying {', '.join(config.rewards)} on Ray Serve")
    applications = await deploy(config, owner=owner, dashboard_url=dashboard_url)
    try:
        yield applications
    finally:
        release(applications.values(), owner=owner or config.run.name)


def _log_message(data: Mapping[str, Any], ignore_prefix: bool) -> None:
    """What Ray would print of a cluster's troubles: tracebacks, too, of what is retried and told in a line of ours."""
    for line in data["lines"]:
        logging.getLogger(MESSAGES).warning("%s", line.rstrip())


def _kill_local() -> None:
    """The processes of the Ray that was started here, which nobody else would end. Asks none of them."""
    node = ray._private.worker._global_node  # type: ignore[attr-defined]
    if node is not None:
        node.kill_all_processes(check_alive=False, allow_graceful=False)


def _in_use(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return True
    return False


def _gpus() -> int:
    """Of this machine, as a Ray that starts here counts them: torch, which would count them too, takes seconds."""
    vendor = get_accelerator_manager_for_resource("GPU")
    assert vendor is not None
    visible = vendor.get_current_process_visible_accelerator_ids()
    there: int = vendor.get_current_node_num_accelerators()
    return there if visible is None else min(there, len(visible))
