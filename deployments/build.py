"""Deploys the rewards of an experiment as Serve applications, one each, and deletes them again.

Applications are detached: they outlive the job that made them, so who calls `deploy` calls `delete`, failures
included.

Failure policy: an application of the same name is someone else's and is refused, never overwritten (attaching comes
later); one that cannot start takes the others down with it and raises a single line with its cause; `delete` removes
applications by name and never shuts Serve down, for others may use it.
"""

import logging
import time
from collections.abc import Sequence

import ray
from ray import serve
from ray.serve import RunTarget
from ray.serve.schema import ApplicationStatusOverview

from deployments.reward_app import Load, application
from nft_ray.config import ExperimentConfig
from nft_ray.rewards.base import load_reward

logger = logging.getLogger(__name__)

POLL_S = 0.1
REPORT_S = 10.0


def deploy(config: ExperimentConfig, load: Load = load_reward) -> list[str]:
    """Start every reward's replicas, wait until they run, return the applications' names. Blocks; starts no HTTP proxy.

    `external_scaler_enabled` lets `nft-ray` (or a person) change the number of replicas later, without a restart.
    """
    names = [f"reward-{name}" for name in config.rewards]  # the interface to actors/scorers.py
    for name in names:
        if name in serve.status().applications:
            raise ValueError(
                f"Serve application {name} exists on this cluster already: another run uses it; delete it first"
            )
    serve.start(proxy_location="Disabled")
    targets = [
        RunTarget(
            target=application(name, config.rewards[name] or {}, reward, load),
            name=f"reward-{name}",
            route_prefix=None,
            external_scaler_enabled=True,
        )
        for name, reward in config.reward_configs.items()
    ]
    try:
        serve.run_many(targets, wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
        _wait_until_running(names, config.cluster.wait_s)
    except BaseException:
        delete(names)
        raise
    return names


def delete(names: Sequence[str]) -> None:
    """Delete these applications and wait until they are gone; one that does not exist is no error."""
    for name in names:
        serve.delete(name, _blocking=False)
    for name in names:
        serve.delete(name)


def _wait_until_running(names: Sequence[str], wait_s: float) -> None:
    started = reported = time.monotonic()
    while True:
        applications = {name: serve.status().applications.get(name) for name in names}
        for name, status in applications.items():
            if status is not None and status.status in ("DEPLOY_FAILED", "UNHEALTHY"):
                raise RuntimeError(f"Serve application {name} does not start: {_cause(status)}")
        waiting = [name for name, status in applications.items() if status is None or status.status != "RUNNING"]
        if not waiting:
            return
        now = time.monotonic()
        if now - started > wait_s:
            raise RuntimeError(f"{', '.join(waiting)}: not running after {wait_s:g} s (cluster.wait_s); {_free()}")
        if now - reported >= REPORT_S:
            reported = now
            logger.info("waiting for %s (%.0f s); %s", ", ".join(waiting), now - started, _free())
        time.sleep(POLL_S)


def _cause(status: ApplicationStatusOverview) -> str:
    """The last line of the deployment's message: the exception of the constructor."""
    messages = [deployment.message for deployment in status.deployments.values() if deployment.message]
    lines = [line.strip() for line in (messages or [status.message])[0].splitlines() if line.strip()]
    return lines[-1] if lines else "no cause given"


def _free() -> str:
    free = ray.available_resources()
    return f"the cluster has {free.get('CPU', 0.0):g} CPUs and {free.get('GPU', 0.0):g} GPUs free"
