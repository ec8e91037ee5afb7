"""Deploys the rewards of an experiment as Serve applications, one each; uses again, or shares, those that are there.

    deploy:  claim (who else is there? what may be used again?) ─► servers of models ─► Serve ─► wait until all run
    release: the last one who uses an application takes it down

Applications are detached: they outlive the job that made them. Whose they are is kept in the GCS (claims.py), so
- a run that was killed and is started again by the same command uses its own again, as they are, or replaces what was
  deployed from another configuration;
- what only dead jobs used is deleted by the next one who deploys anything, whoever that is;
- two runs on one cluster have applications of their own, `RUN/REWARD`; where a live run has that name, with a number.
With `scorers.attach` the applications are shared, `shared/REWARD`: used where they were made from the same
configuration (placement apart: see nft_ray.types.Mark), else refused with the keys that differ; deployed where there
are none. They outlive their maker while others use them; those of `nft-ray rewards serve` stay.

Failure policy: an application that was not deployed from here is never touched. Looking and claiming is for one job at
a time and takes seconds; servers and replicas start outside of that. An application that cannot start takes down the
others that this call has made, and raises a single line with its cause.
"""

import asyncio
import hashlib
import json
import logging
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve import RunTarget
from ray.serve.exceptions import DeploymentUnavailableError, RayServeException
from ray.serve.schema import ApplicationStatusOverview

from deployments import claims
from deployments.claims import Claim, User
from deployments.interpreter import check_py_executable
from deployments.lock import alone, alone_at_the_end
from deployments.plane import delete, drop_server, server_name
from deployments.proxy import start_serve
from deployments.reward_app import Load, application
from deployments.sglang_actor import serve_sglang
from nft_ray.config import ExperimentConfig, HttpConfig, changes, differences, mark_of, masked
from nft_ray.rewards.applications import SHARED, reward_of, route
from nft_ray.rewards.applications import application as named
from nft_ray.rewards.base import Autoscaling, RewardConfig, RewardUse, load_reward
from nft_ray.roles import TryAgainError
from nft_ray.types import Mark

logger = logging.getLogger(__name__)

POLL_S = 0.1
REPORT_S = 10.0
SHOWN = 3
"""Settings that the error about another configuration names, at most."""
BROKEN = ("DEPLOY_FAILED", "UNHEALTHY", "DELETING")


async def deploy(
    config: ExperimentConfig,
    load: Load = load_reward,
    *,
    owner: str | None = None,
    dashboard_url: str | None = None,
    stays: bool = False,
) -> dict[str, str]:
    """Every reward of the experiment, running: its name -> its application, each used by this job until `release`.

    `owner` is the same when the command is started again: the folder of its run (null = the run's name). `stays`:
    what is deployed is for others, and stays when this job ends. `dashboard_url` is needed with `scorers.http`.
    Cancelled or failing, it takes down what it has made. Raises ValueError for another configuration of what is shared,
    a port in use or a `py_executable` that does not fit; RuntimeError where a reward, or the server of its model, does
    not start; TryAgainError where that takes longer than `cluster.wait_s`.
    """
    described = {name: describe(name, reward) for name, reward in config.reward_configs.items()}
    owner = config.run.name if owner is None else owner
    async with alone(config.cluster.wait_s):
        start_serve(config.scorers.http, dashboard_url)
        found, made = _claim(config, described, _me(owner), stays=stays)
    try:
        await _run(config, {name: found[name] for name in made}, load)
        for name in found.keys() - made:
            if config.scorers.attach:
                if not await _is_deployed(found[name], _me(owner), config.cluster.wait_s):
                    await _run(config, {name: found[name]}, load)
                await _attach(found[name], described[name], config)
        await _wait_until_running(list(found.values()), config.cluster.wait_s)
    except BaseException:
        release(found.values(), owner=owner, failed=[found[name] for name in made])
        raise
    return found


def release(applications: Collection[str], *, owner: str, failed: Collection[str] = ()) -> None:
    """This job uses them no longer; what no live job uses, and is not to stay, is deleted, and so is what `failed`."""
    with alone_at_the_end():
        known, live, unused = claims.read_claims(), claims.live_jobs(), []
        for name in applications:
            left = known[name].without(_me(owner), live) if name in known else None
            if left is None or name in failed or not left.lives(live):
                unused.append(name)
            else:
                claims.write(left)
        delete(unused)


def _claim(
    config: ExperimentConfig, described: Mapping[str, Any], me: User, *, stays: bool
) -> tuple[dict[str, str], set[str]]:
    """Reward -> application for all of them, and the rewards whose application is still to be made. Needs the lock."""
    status, known, live = serve.status().applications, claims.read_claims(), claims.live_jobs()
    attach, found = config.scorers.attach, {}
    for name in described:
        shared = named(SHARED, name)
        found[name] = (
            shared if attach else claims.own_name(config.run.name, name, me, known, status.keys(), live, shared)
        )
    _collect(known, live, keep=found.values())
    made = set()
    for name, app in found.items():
        digest = _digest(described[name], config.scorers.http)
        old, state = known.get(app), status.get(app)
        if old is None and state is not None:
            raise ValueError(f"Serve application {app} exists on this cluster, and is not nft_ray's: delete it first")
        in_use = old is not None and old.without(me, live).lives(live)
        whole = state is not None and state.status not in BROKEN
        if old is not None and in_use and attach:  # another's, perhaps still starting: asked what it is, later
            claims.write(replace(old.used_by(me), stays=old.stays or stays))
            logger.info("using %s, which is deployed already", app)
        elif old is not None and whole and old.made_from == digest:
            claims.write(replace(old.used_by(me), stays=stays))
            logger.info("using %s again, which an earlier start of this run has left", app)
        else:
            if state is not None or old is not None:
                delete([app])
                logger.info("replacing %s, which an earlier start of this run has left", app)
            claims.write(Claim(application=app, made_from=digest, users=(me,), stays=stays))
            made.add(name)
    return found, made


def _collect(known: Mapping[str, Claim], live: Collection[str], *, keep: Collection[str]) -> None:
    """Delete what only dead jobs used. Needs the lock."""
    for name, claim in known.items():
        if name not in keep and not claim.lives(live):
            delete([name])
            logger.info("deleted %s: the job that used it (%s) has ended", name, claim.owners)


def _me(owner: str) -> User:
    return User(job=ray.get_runtime_context().get_job_id(), owner=owner)


def _digest(described: Any, http: HttpConfig | None) -> str:
    """Of all that an application is deployed with; the token is in it, but cannot be read from it."""
    token = http.token.get_secret_value() if http and http.token else None
    where = [http.host, http.port, token] if http else None
    return hashlib.sha256(json.dumps([described, where], sort_keys=True).encode()).hexdigest()


async def _run(config: ExperimentConfig, wanted: Mapping[str, str], load: Load) -> None:
    """Ask Serve for these (reward -> application), the servers of their models started before. They take time to run.

    An application that another job deletes meanwhile is not noticed here: `_wait_until_running` does.
    """
    rewards = config.reward_configs
    for name in wanted:
        check_py_executable(name, rewards[name])
    for name, app in wanted.items():
        if (server := getattr(rewards[name], "server", None)) is not None:
            drop_server(app)  # of a start that was killed before it had deployed the reward
            await serve_sglang(server.model_copy(update={"name": server_name(app)}))
    targets = [
        _target(app, config.rewards[name] or {}, rewards[name], load, config.scorers.http)
        for name, app in wanted.items()
    ]
    if targets:
        serve.run_many(targets, wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)


def describe(name: str, config: RewardConfig) -> dict[str, Any]:
    """What a replica says of itself, and what is compared before it is shared: its configuration and our version.

    What a run makes of the scores (`RewardUse`) is not the replica's.
    """
    section = config.model_dump(mode="json", exclude=set(RewardUse.model_fields))
    return {"reward": name, "nft_ray": version("nft_ray"), "rewards": {name: masked(section)}}


async def rebound(app: str, bounds: Autoscaling, load: Load = load_reward, *, wait_s: float) -> None:
    """Deploy a running application again, as it is but with these autoscaling bounds. Serve replaces every replica.

    The bounds are part of what `serve.run` deploys, and that gives a deployment a new version: there is no way to
    change them alone. Requests in work on a replaced replica are finished, or retried by who sent them.
    """
    section, config, http = await _ask(app, "bound", wait_s)
    rescaled = config.model_copy(update={"autoscaling": bounds})
    serve.run_many(
        [_target(app, section, rescaled, load, http)],
        wait_for_ingress_deployment_creation=False,
        wait_for_applications_running=False,
    )
    await _wait_until_running([app], wait_s)


def _target(
    app: str, section: Mapping[str, Any], config: RewardConfig, load: Load, http: HttpConfig | None
) -> RunTarget:
    name = reward_of(app)
    assert name is not None
    server = server_name(app) if getattr(config, "server", None) is not None else None
    return RunTarget(
        target=application(name, section, config, load, describe(name, config), http, server),
        name=app,
        route_prefix=route(app) if http is not None else None,
        external_scaler_enabled=config.autoscaling is None,  # the scale endpoint excludes Serve's own autoscaling
    )


async def _ask(app: str, method: str, wait_s: float) -> Any:
    """Call a method without arguments of a deployed reward.

    A handle may hold for a moment that the application is unavailable: one of this name was deleted before, or the
    news that this one runs is on its way.
    """
    try:
        async with asyncio.timeout(wait_s):
            while True:
                try:
                    return await getattr(serve.get_app_handle(app), method).remote()
                except DeploymentUnavailableError:
                    await _wait_until_running([app], wait_s)
                    await asyncio.sleep(POLL_S)
    except (TimeoutError, RayError, RayServeException) as error:
        raise RuntimeError(
            f"Serve application {app} does not say what it is within {wait_s:g} s: {type(error).__name__}"
        ) from None


async def _is_deployed(app: str, me: User, wait_s: float) -> bool:
    """Wait for another job that is about to deploy it; False where it died first and this one is the next to do so."""
    end = time.monotonic() + wait_s
    while app not in serve.status().applications and time.monotonic() < end:
        claim, live = claims.read_claims().get(app), claims.live_jobs()
        if claim is None:
            raise TryAgainError(f"Serve application {app} does not start: the job that was to deploy it has given up")
        if next((user for user in claim.users if user.job in live), me) == me:
            return False
        await asyncio.sleep(POLL_S)
    return True


async def _attach(app: str, wanted: Mapping[str, Any], config: ExperimentConfig) -> None:
    await _wait_until_running([app], config.cluster.wait_s)  # another job may just have begun to deploy it
    check_shared(app, dict(await _ask(app, "describe", config.cluster.wait_s)), wanted, config)


def check_shared(app: str, found: Mapping[str, Any], wanted: Mapping[str, Any], config: ExperimentConfig) -> None:
    """ValueError where a deployed reward is not the one that is wanted, both as `describe` gives them."""
    if keys := [key for key in differences(found, wanted) if mark_of(config, key) is not Mark.PLACEMENT]:
        raise ValueError(
            f"Serve application {app} was deployed with another configuration: "
            f"{changes(found, wanted, keys, most=SHOWN)}"
        )
    name = str(wanted["reward"])
    deadline_s, (field, longest_s) = found["rewards"][name].get("deadline_s", 0.0), config.deadline_of(name)
    if deadline_s >= longest_s:
        raise ValueError(
            f"Serve application {app} was deployed with deadline_s = {deadline_s:g}: what is scored by then "
            f"is lost unless it is below scorers.{field} = {longest_s:g}; raise that"
        )


async def _wait_until_running(names: Sequence[str], wait_s: float) -> None:
    started = reported = time.monotonic()
    while True:
        status = serve.status().applications
        applications = {name: status.get(name) for name in names}
        for name, one in applications.items():
            if one is not None and one.status in ("DEPLOY_FAILED", "UNHEALTHY"):
                raise RuntimeError(f"Serve application {name} does not start: {_cause(one)}")
        waiting = [name for name, one in applications.items() if one is None or one.status != "RUNNING"]
        if not waiting:
            return
        now = time.monotonic()
        if now - started > wait_s:
            raise TryAgainError(f"{', '.join(waiting)}: not running after {wait_s:g} s (cluster.wait_s); {_free()}")
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
