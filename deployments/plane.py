"""The reward plane as it runs: what Serve holds, and how many replicas of it are wanted. Through the dashboard's REST.

    GET  {dashboard}/api/serve/applications/                                     what runs
    POST {dashboard}/api/v1/applications/RUN%2FNAME/deployments/NAME/scale       {"target_num_replicas": 3}

Never a second `serve.run`: that would replace every replica. Scaling keeps those that serve, starts or stops the
difference, and returns at once; whoever waits asks `reward_states`.

Failure policy: every call has a deadline; what the cluster refuses is one ValueError (the user's: unknown reward,
autoscaled) or RuntimeError (Ray's: no dashboard, no answer) that says why. `delete` removes applications by name and
never shuts Serve down, for others may use it.
"""

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import ray
import requests
from ray import serve
from ray.dashboard.modules.dashboard_sdk import SubmissionClient

from deployments.claims import NAMESPACE, forget
from nft_ray.rewards.applications import find_application, reward_of

TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardState:
    """One application, RUN/REWARD or shared/REWARD, as Serve sees it.

    `target`: replicas wanted; `running`: replicas that serve; `status`: RUNNING, ...
    """

    name: str
    reward: str
    target: int
    running: int
    status: str
    autoscaled: bool
    num_cpus: float
    num_gpus: float
    route: str | None
    message: str


class Dashboard(SubmissionClient):
    """Ray's own client of the dashboard, which knows its token: two calls of it."""

    def __init__(self, url: str) -> None:
        super().__init__(address=url if "://" in url else f"http://{url}", create_cluster_if_needed=False)

    def get(self, path: str) -> dict[str, Any]:
        return self._call("GET", path)

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        return self._call("POST", path, json_data=body)

    def _call(self, method: str, path: str, **arguments: Any) -> dict[str, Any]:
        try:
            response = self._do_request(method, path, timeout=TIMEOUT_S, **arguments)
        except requests.RequestException as error:
            raise RuntimeError(f"the Ray dashboard at {self._address} does not answer: {error}") from None
        try:
            body = response.json()
        except requests.JSONDecodeError:
            body = {"error": response.text[:300]}
        if response.status_code >= 400:
            raise RuntimeError(f"{method} {path}: {response.status_code} {body.get('error', body)}")
        return dict(body)


def serve_details(dashboard: Dashboard) -> dict[str, Any]:
    """Everything that Serve says of itself: applications, HTTP options, proxies."""
    return dashboard.get("/api/serve/applications/")


def reward_states(dashboard: Dashboard) -> list[RewardState]:
    """The rewards that are deployed on this cluster, sorted by name."""
    applications = serve_details(dashboard).get("applications", {})
    return [
        _state(name, reward, application)
        for name, application in sorted(applications.items())
        if (reward := reward_of(name)) in application.get("deployments", {reward: None}) and reward is not None
    ]


def find(dashboard: Dashboard, name: str) -> RewardState:
    """The state of one, by RUN/REWARD, or by REWARD where that says which; ValueError with the nearest otherwise."""
    states = {state.name: state for state in reward_states(dashboard)}
    return states[find_application(name, states)]


def scale(dashboard: Dashboard, name: str, num_replicas: int) -> None:
    """Ask for so many replicas of a reward whose number is fixed; returns when Serve has accepted it."""
    if num_replicas < 1:
        raise ValueError(f"--replicas {num_replicas}: a reward needs at least 1")
    state = find(dashboard, name)
    if state.autoscaled:
        raise ValueError(f"reward {state.name} scales itself: change its bounds with --min and --max")
    dashboard.post(
        f"/api/v1/applications/{quote(state.name, safe='')}/deployments/{state.reward}/scale",
        {"target_num_replicas": num_replicas},
    )


def delete(names: Sequence[str]) -> None:
    """Delete these applications, their servers and claims; wait until they are gone. None of a name is no error."""
    for name in names:
        serve.delete(name, _blocking=False)
    for name in names:
        serve.delete(name)
        drop_server(name)
        forget(name)


def drop_server(application: str) -> None:
    """End the server that was started for an application, its processes included; most have none.

    Returns when its name is free again.
    """
    with contextlib.suppress(ValueError):  # no such actor (any more)
        deadline = time.monotonic() + TIMEOUT_S
        while time.monotonic() < deadline:
            ray.kill(ray.get_actor(server_name(application), namespace=NAMESPACE))
            time.sleep(0.1)


def server_name(application: str) -> str:
    """Of the actor that holds the server that was started for an application."""
    return f"{application}-server"


def _state(name: str, reward: str, application: dict[str, Any]) -> RewardState:
    deployment = application.get("deployments", {}).get(reward, {})
    config = deployment.get("deployment_config", {})
    options = config.get("ray_actor_options") or {}
    replicas = deployment.get("replicas", [])
    return RewardState(
        name=name,
        reward=reward,
        target=int(deployment.get("target_num_replicas") or 0),
        running=sum(replica["state"] == "RUNNING" for replica in replicas),
        status=str(application.get("status", "UNKNOWN")),
        autoscaled=config.get("autoscaling_config") is not None,
        num_cpus=float(options.get("num_cpus") or 0),
        num_gpus=float(options.get("num_gpus") or 0),
        route=application.get("route_prefix"),
        message=" ".join((deployment.get("message") or application.get("message") or "").split()),
    )
