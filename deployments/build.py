"""Deploys the rewards of an experiment as Serve applications, one each; attaches to those that others deployed.

Applications are detached: they outlive the job that made them, so who deploys deletes, failures included, unless that
was `nft-ray rewards serve`, whose purpose it is that they stay. `deploy` returns what IT made, and only that.

Failure policy: an application of the same name is someone else's and never overwritten; jobs that start together look
and deploy one after the other. Without `scorers.attach` it is refused; with it, it is used if it was made from the same
configuration (placement apart: see nft_ray.types.Mark), else refused with the keys that differ. One that cannot start
takes the others of this call down with it and raises a single line with its cause. Who attaches to an application of a
job that ends loses it: its rewards are then missing, and the run stops by `scorers.max_missing_fraction`. What is meant
to be shared is best deployed by `nft-ray rewards serve`.
"""

import asyncio
import logging
import os
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve import RunTarget
from ray.serve.exceptions import DeploymentUnavailableError, RayServeException
from ray.serve.schema import ApplicationStatusOverview

from deployments.plane import NAMESPACE, PREFIX, Dashboard, delete, drop_server, serve_details, server_name
from deployments.reward_app import Load, application
from deployments.sglang_server import serve_sglang
from nft_ray.config import ExperimentConfig, HttpConfig, changes, differences, mark_of
from nft_ray.rewards.base import Autoscaling, RewardConfig, RewardUse, load_reward
from nft_ray.types import Mark

logger = logging.getLogger(__name__)

LOCK = "deploying-rewards"
POLL_S = 0.1
REPORT_S = 10.0
PROBE_S = 60.0
SHOWN = 3
"""Settings that the error about another configuration names, at most."""


async def deploy(config: ExperimentConfig, load: Load = load_reward, *, dashboard_url: str | None = None) -> list[str]:
    """Start the replicas of every reward that is not attached to; wait until they run; return the names made here.

    Cancelled, it takes down what it has made. `dashboard_url` is needed where `scorers.http` is set. Raises ValueError
    for a name that is taken, another configuration, a port in use or a `py_executable` that does not fit; RuntimeError
    where a reward, or the server of its model, does not start.
    """
    described = {name: describe(name, reward) for name, reward in config.reward_configs.items()}
    shared = [name for name in described if f"{PREFIX}{name}" in serve.status().applications]
    for name in shared:
        await _attach(name, described[name], config)
    for name, reward in config.reward_configs.items():
        if name not in shared:
            check_py_executable(name, reward)
    names: list[str] = []
    try:
        async with _alone(config.cluster.wait_s):
            deployed = serve.status().applications
            wanted = {name: one for name, one in config.reward_configs.items() if f"{PREFIX}{name}" not in deployed}
            late = described.keys() - wanted.keys() - set(shared)  # another job was faster
            if late and not config.scorers.attach:
                raise _exists(min(late))
            _start_serve(config.scorers.http, dashboard_url)
            names = [f"{PREFIX}{name}" for name in wanted]
            await _run(config, wanted, load)
        for name in late:
            await _attach(name, described[name], config)
        await _wait_until_running(names, config.cluster.wait_s)
    except BaseException:
        delete(names)
        raise
    return names


async def _run(config: ExperimentConfig, wanted: Mapping[str, RewardConfig], load: Load) -> None:
    """Ask Serve for these applications, the servers of their models started before. They take time to run."""
    http = config.scorers.http
    token = http.token.get_secret_value() if http and http.token else None
    targets = [
        _target(
            name,
            await _with_server(name, config.rewards[name] or {}, reward),
            reward,
            load,
            token=token,
            routed=http is not None,
        )
        for name, reward in wanted.items()
    ]
    if targets:
        serve.run_many(targets, wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)


@ray.remote(num_cpus=0)
class _Lock:
    """Whoever has an actor of this name may deploy. It ends with the process that made it, however that ends."""


@asynccontextmanager
async def _alone(wait_s: float) -> AsyncIterator[None]:
    """Between two jobs that look for the same reward and do not find it, the second would overwrite the first's."""
    started = reported = time.monotonic()
    while True:
        try:
            lock = _Lock.options(name=LOCK, namespace=NAMESPACE).remote()  # type: ignore[attr-defined]
            break
        except ValueError:  # the name is taken
            now = time.monotonic()
        if now - started > wait_s:
            raise RuntimeError(f"another job deploys rewards since {wait_s:g} s (cluster.wait_s); try again")
        if now - reported >= REPORT_S:
            reported = now
            logger.info("waiting for another job that deploys rewards (%.0f s)", now - started)
        await asyncio.sleep(POLL_S)
    try:
        yield
    finally:
        ray.kill(lock)


async def _with_server(name: str, section: Mapping[str, Any], config: RewardConfig) -> Mapping[str, Any]:
    """The section that the replicas get: where it asks for a server, that is started and its URL stands there."""
    server = getattr(config, "server", None)
    if server is None:
        return section
    drop_server(f"{PREFIX}{name}")  # of a job that was killed before it had deployed the reward
    actor = await serve_sglang(server.model_copy(update={"name": server_name(f"{PREFIX}{name}")}))
    return {**section, "server": None, "urls": [await actor.url.remote()]}


def describe(name: str, config: RewardConfig) -> dict[str, Any]:
    """What a replica says of itself, and what is compared before it is shared: its configuration and our version.

    What a run makes of the scores (`RewardUse`) is not the replica's.
    """
    section = config.model_dump(mode="json", exclude=set(RewardUse.model_fields))
    return {"reward": name, "nft_ray": version("nft_ray"), "rewards": {name: section}}


async def rebound(name: str, bounds: Autoscaling, load: Load = load_reward, *, routed: bool, wait_s: float) -> None:
    """Deploy a running reward again, as it is but with these autoscaling bounds. Serve replaces every replica.

    The bounds are part of what `serve.run` deploys, and that gives a deployment a new version: there is no way to
    change them alone. Requests in work on a replaced replica are finished, or retried by who sent them.
    """
    section, config, token = await _ask(name, "bound", wait_s)
    rescaled = config.model_copy(update={"autoscaling": bounds})
    serve.run_many(
        [_target(name, section, rescaled, load, token=token, routed=routed)],
        wait_for_ingress_deployment_creation=False,
        wait_for_applications_running=False,
    )
    await _wait_until_running([f"{PREFIX}{name}"], wait_s)


def check_py_executable(name: str, config: RewardConfig) -> None:
    """ValueError where `py_executable` is not a Python with this Ray and nft_ray: Serve would wait for ever, silently.

    Looked at on this machine; where the file is not here, on a worker of the cluster.
    """
    if config.py_executable is None:
        return
    if os.path.exists(config.py_executable):
        problem = _probe(config.py_executable)
    else:
        try:
            problem = ray.get(ray.remote(num_cpus=0)(_probe).remote(config.py_executable), timeout=2 * PROBE_S)
        except RayError as error:
            problem = f"could not be looked at: {type(error).__name__}"
    if problem:
        raise ValueError(f"rewards.{name}.py_executable = {config.py_executable!r}: {problem}")


def _probe(executable: str) -> str | None:
    """What is wrong with a Python, or None."""
    code = "import ray, nft_ray; print(ray.__version__)"
    try:
        done = subprocess.run([executable, "-c", code], capture_output=True, text=True, timeout=PROBE_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"cannot be run: {error}"
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return f"cannot import ray and nft_ray ({last}); install both into that environment"
    if (found := done.stdout.split()[-1]) != ray.__version__:
        return f"has ray {found}, this cluster {ray.__version__}; install ray=={ray.__version__} there"
    return None


def _target(
    name: str, section: Mapping[str, Any], config: RewardConfig, load: Load, *, token: str | None, routed: bool
) -> RunTarget:
    return RunTarget(
        target=application(name, section, config, load, describe(name, config), token),
        name=f"{PREFIX}{name}",
        route_prefix=f"/{name}" if routed else None,
        external_scaler_enabled=config.autoscaling is None,  # the scale endpoint excludes Serve's own autoscaling
    )


async def _ask(name: str, method: str, wait_s: float) -> Any:
    """Call a method without arguments of a deployed reward.

    A handle may hold for a moment that the application is unavailable: one of this name was deleted before, or the
    news that this one runs is on its way.
    """
    try:
        async with asyncio.timeout(wait_s):
            while True:
                try:
                    return await getattr(serve.get_app_handle(f"{PREFIX}{name}"), method).remote()
                except DeploymentUnavailableError:
                    await _wait_until_running([f"{PREFIX}{name}"], wait_s)
                    await asyncio.sleep(POLL_S)
    except (TimeoutError, RayError, RayServeException) as error:
        raise RuntimeError(
            f"Serve application {PREFIX}{name} does not say what it is within {wait_s:g} s: {type(error).__name__}"
        ) from None


async def _attach(name: str, wanted: Mapping[str, Any], config: ExperimentConfig) -> None:
    if not config.scorers.attach:
        raise _exists(name)
    check_shared(name, dict(await _ask(name, "describe", config.cluster.wait_s)), wanted, config)
    logger.info("using %s%s, which is deployed already", PREFIX, name)


def check_shared(name: str, found: Mapping[str, Any], wanted: Mapping[str, Any], config: ExperimentConfig) -> None:
    """ValueError where a deployed reward is not the one that is wanted, both as `describe` gives them."""
    if keys := [key for key in differences(found, wanted) if mark_of(config, key) is not Mark.PLACEMENT]:
        raise ValueError(
            f"Serve application {PREFIX}{name} was deployed with another configuration: "
            f"{changes(found, wanted, keys, most=SHOWN)}"
        )
    deadline_s = found["rewards"][name].get("deadline_s", 0.0)
    if deadline_s >= config.scorers.timeout_s:
        raise ValueError(
            f"Serve application {PREFIX}{name} was deployed with deadline_s = {deadline_s:g}: what is scored by then "
            f"is lost unless it is below scorers.timeout_s = {config.scorers.timeout_s:g}; raise that"
        )


def _exists(name: str) -> ValueError:
    return ValueError(
        f"Serve application {PREFIX}{name} exists on this cluster already; set scorers.attach=true to share it, or "
        f"delete it with `nft-ray rewards delete {name}`"
    )


def _start_serve(http: HttpConfig | None, dashboard_url: str | None) -> None:
    """Start Serve, or check that the one that runs listens where it should. Its HTTP options cannot change."""
    if http is None:
        serve.start(proxy_location="Disabled")
        return
    if dashboard_url is None:
        raise ValueError("scorers.http: this cluster has no Ray dashboard, which tells where Serve listens")
    running = serve_details(Dashboard(dashboard_url))
    if running.get("controller_info", {}).get("actor_id"):
        options, location = running.get("http_options") or {}, running.get("proxy_location")
        if location in (None, "Disabled") or (options.get("host"), options.get("port")) != (http.host, http.port):
            where = "without HTTP" if location in (None, "Disabled") else f"on {options['host']}:{options['port']}"
            raise ValueError(
                f"scorers.http = {http.host}:{http.port}: Serve runs on this cluster already {where}, and one cluster "
                "has one HTTP proxy; use that, or restart the cluster"
            )
        return
    check_port(http)
    serve.start(proxy_location="HeadOnly", http_options={"host": http.host, "port": http.port})


def check_port(http: HttpConfig) -> None:
    """ValueError where the port is in use on this machine."""
    with socket.socket(socket.AF_INET6 if ":" in http.host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((http.host, http.port))
        except OSError as error:
            raise ValueError(
                f"scorers.http.port = {http.port}: cannot listen on {http.host}:{http.port} ({error.strerror}); "
                "choose another port"
            ) from None


async def _wait_until_running(names: Sequence[str], wait_s: float) -> None:
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
        await asyncio.sleep(POLL_S)


def _cause(status: ApplicationStatusOverview) -> str:
    """The last line of the deployment's message: the exception of the constructor."""
    messages = [deployment.message for deployment in status.deployments.values() if deployment.message]
    lines = [line.strip() for line in (messages or [status.message])[0].splitlines() if line.strip()]
    return lines[-1] if lines else "no cause given"


def _free() -> str:
    free = ray.available_resources()
    return f"the cluster has {free.get('CPU', 0.0):g} CPUs and {free.get('GPU', 0.0):g} GPUs free"
