"""The reward plane on a real local Ray with Serve and its dashboard: HTTP, scaling, sharing. The rewards are fakes."""

import asyncio
import base64
import io
import socket
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from PIL import Image

from nft_ray.config import ExperimentConfig
from tests.conftest import LocalRay, free_port
from tests.fakes import NamedRewards, fake_config, fake_load_reward

pytestmark = pytest.mark.ray

REWARD, OTHER = "jpeg_compressibility", "jpeg_incompressibility"
SHARED = f"shared/{REWARD}"
TOKEN = "a-secret"
SMALL = {"num_cpus": 0.1, "batch_size": 2}


def config(port: int, name: str = REWARD, section: dict[str, Any] | None = None, **scorers: Any) -> ExperimentConfig:
    http = {"port": port, "token": TOKEN}
    return fake_config(rewards={name: SMALL | (section or {})}, scorers={"http": http, **scorers})


@pytest.fixture(scope="module")
def port(local_ray: LocalRay) -> int:
    return local_ray.http_port


@pytest.fixture(scope="module")
def plane(local_ray: LocalRay, port: int) -> Iterator[str]:
    """One fake reward with one replica, over HTTP with a token; gives the dashboard's host:port."""
    from deployments.build import deploy
    from deployments.plane import delete

    names = asyncio.run(
        deploy(config(port, attach=True), NamedRewards(slow=0.05), dashboard_url=local_ray.dashboard, stays=True)
    )
    assert names == {REWARD: SHARED}
    yield local_ray.dashboard
    delete(list(names.values()))


def png(value: int, size: int = 8) -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), (value, value, value)).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def post(port: int, body: Any, *, token: str | None = TOKEN, path: str = REWARD) -> requests.Response:
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    return requests.post(f"http://127.0.0.1:{port}/{path}", json=body, headers=headers, timeout=60)


def score(value: int) -> tuple[float, float]:
    """(score, process) of an image that nobody has asked for yet, by a handle."""
    from ray import serve

    images = np.full((1, 8, 8, 3), value, np.uint8)
    scores = serve.get_app_handle(SHARED).score.remote(images, [f"{time.time_ns()}"], [{}]).result(timeout_s=60)
    return float(scores.values[0]), float(scores.details["process"][0])


# HTTP


def test_http_scores_images_of_any_size_in_order(plane: str, port: int) -> None:
    answer = post(port, {"images": [png(1), png(2, size=5), png(3)], "prompts": ["p"] * 3})
    assert answer.status_code == 200
    assert answer.json()["reward"] == REWARD
    assert answer.json()["scores"] == [1.0, 2.0, 3.0]
    assert answer.json()["details"]["negative"] == [-1.0, -2.0, -3.0]


@pytest.mark.parametrize(
    ("body", "token", "status", "reason"),
    [
        ({"images": [png(1)], "prompts": ["p"]}, None, 401, "no or a wrong token"),
        ({"images": [png(1)], "prompts": ["p"]}, "guess", 401, "no or a wrong token"),
        ({"images": ["?"], "prompts": ["p"]}, TOKEN, 400, "images.0 is not base64"),
        ({"images": [png(1)], "prompts": ["bad"]}, TOKEN, 400, "the prompt is bad"),
    ],
)
def test_http_says_what_is_wrong(plane: str, port: int, body: Any, token: str | None, status: int, reason: str) -> None:
    answer = post(port, body, token=token)
    assert answer.status_code == status
    assert reason in answer.json()["error"]


def test_http_serves_nothing_but_rewards(plane: str, port: int) -> None:
    assert post(port, {}, path="nothing").status_code == 404
    assert requests.get(f"http://127.0.0.1:{port}/{REWARD}", timeout=60).status_code == 405


# Scaling


def test_scaling_keeps_the_replica_that_serves_and_fails_no_request(plane: str) -> None:
    from deployments.plane import Dashboard, find, scale

    dashboard = Dashboard(plane)
    assert (find(dashboard, REWARD).running, find(dashboard, REWARD).target) == (1, 1)
    first = score(7)[1]
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(score, value) for value in range(100)]
        scale(dashboard, REWARD, 3)
        deadline = time.monotonic() + 60
        while find(dashboard, SHARED).running < 3:
            assert time.monotonic() < deadline
            asked += [pool.submit(score, value) for value in range(5)]
            time.sleep(0.2)
        asked += [pool.submit(score, value) for value in range(100)]
        answers = [one.result() for one in asked]
    assert [value for value, _ in answers[:100]] == list(range(100))
    processes = {process for _, process in answers}
    assert first in processes
    assert len(processes) == 3
    scale(dashboard, REWARD, 1)
    while find(dashboard, REWARD).running > 1:
        assert time.monotonic() < deadline + 60
        time.sleep(0.2)
    assert score(9)[0] == 9


def test_what_cannot_be_scaled_is_said(plane: str) -> None:
    from deployments.plane import Dashboard, scale

    with pytest.raises(
        ValueError, match=r"^reward 'jpeg_compress' is not deployed .*did you mean shared/jpeg_compressibil"
    ):
        scale(Dashboard(plane), "jpeg_compress", 2)
    with pytest.raises(ValueError, match="needs at least 1"):
        scale(Dashboard(plane), REWARD, 0)


def test_a_dashboard_that_is_not_there_is_one_line() -> None:
    from deployments.plane import Dashboard, reward_states

    with pytest.raises(RuntimeError, match=r"^the Ray dashboard at http://127\.0\.0\.1:\d+ does not answer"):
        reward_states(Dashboard(f"127.0.0.1:{free_port()}"))


# Autoscaling


@pytest.mark.slow
def test_autoscaling_adds_replicas_under_load_and_takes_new_bounds(
    plane: str, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray import serve

    from deployments.build import deploy, rebound
    from deployments.plane import Dashboard, delete, find, scale
    from nft_ray.rewards.base import Autoscaling

    dumped = Autoscaling.model_dump
    quick = {"upscale_delay_s": 0.5, "metrics_interval_s": 0.5, "look_back_period_s": 1.0}  # Serve waits for 30 s
    monkeypatch.setattr(Autoscaling, "model_dump", lambda self: dumped(self) | quick)
    dashboard = Dashboard(plane)
    section = {"autoscaling": {"min_replicas": 1, "max_replicas": 2, "target_ongoing_requests": 1}, "batch_size": 1}
    names = asyncio.run(deploy(config(port, OTHER, section), NamedRewards(slow=0.3), dashboard_url=plane))
    try:
        assert find(dashboard, OTHER).autoscaled
        with pytest.raises(ValueError, match="scales itself: change its bounds with --min and --max"):
            scale(dashboard, OTHER, 2)
        handle, deadline, enough = serve.get_app_handle(names[OTHER]), time.monotonic() + 90, threading.Event()

        # Threads that are the first to ask, together, would each start a router under one and the same name: what one
        # reports then hides what the others have, and Serve sees a single request.
        handle.score.remote(np.zeros((1, 8, 8, 3), np.uint8), ["first"], [{}]).result(timeout_s=60)

        def keep_asking(value: int) -> None:
            images = np.full((1, 8, 8, 3), value, np.uint8)
            while not enough.is_set():
                asked = handle.score.remote(images, [str(time.time_ns())], [{}])
                assert asked.result(timeout_s=60).values[0] == value

        with ThreadPoolExecutor(6) as pool:
            asking = [pool.submit(keep_asking, value) for value in range(6)]
            while find(dashboard, OTHER).running < 2 and time.monotonic() < deadline:
                time.sleep(0.2)
            enough.set()
        assert [one.result() for one in asking] == [None] * 6
        assert find(dashboard, OTHER).running == 2
        asyncio.run(rebound(names[OTHER], Autoscaling(min_replicas=2, max_replicas=3), NamedRewards(), wait_s=60))
        while find(dashboard, OTHER).running < 2:
            assert time.monotonic() < deadline + 60
            time.sleep(0.2)
        answer = post(port, {"images": [png(5)], "prompts": ["p"]}, path=f"fake/{OTHER}")
        assert answer.json()["scores"] == [5.0]
        assert post(port, {}, path=f"fake/{OTHER}", token=None).status_code == 401  # the token is kept
    finally:
        delete(list(names.values()))


# Sharing


def test_attaching_uses_what_is_there(plane: str, port: int) -> None:
    from deployments.build import deploy, release

    job = config(port, section={"weight": 0.5, "num_replicas": 2, "batch_size": 7}, attach=True)
    assert asyncio.run(deploy(job, fake_load_reward, owner="/runs/b", dashboard_url=plane)) == {REWARD: SHARED}
    assert score(3)[0] == 3  # still the one of NamedRewards
    release([SHARED], owner="/runs/b")
    assert score(3)[0] == 3  # it stays


def test_attaching_to_another_configuration_names_the_difference(plane: str, port: int) -> None:
    from deployments.build import check_shared, describe

    mine, theirs = config(port), config(port, section={"num_replicas": 3})
    found, wanted = (describe(REWARD, one.reward_configs[REWARD]) for one in (theirs, mine))
    check_shared(SHARED, found, wanted, mine)
    with pytest.raises(ValueError, match=rf"^Serve application {SHARED} was deployed with another .*nft_ray"):
        check_shared(SHARED, found | {"nft_ray": "0.0"}, wanted, mine)


@pytest.mark.slow
def test_what_is_shared_goes_with_its_last_user(plane: str, port: int) -> None:
    """Two start together: one of them deploys it. It outlives the first that ends, whoever that is."""
    from ray import serve

    from deployments.build import deploy, release

    shared, owners = f"shared/{OTHER}", ("/runs/a", "/runs/b")
    job = config(port, OTHER, attach=True)

    def start(owner: str) -> dict[str, str]:
        return asyncio.run(deploy(job, fake_load_reward, owner=owner, dashboard_url=plane))

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(start, owners)) == [{OTHER: shared}] * 2
    release([shared], owner=owners[0])
    assert serve.status().applications[shared].status == "RUNNING"
    release([shared], owner=owners[1])
    assert list(serve.status().applications) == [SHARED]


def test_two_jobs_use_one_application(plane: str, port: int) -> None:
    from actors.scorers import ServeScorers
    from tests.fakes import fake_request

    async def both() -> list[Any]:
        jobs = [ServeScorers(config(port, attach=True), {REWARD: SHARED}) for _ in range(2)]
        request = fake_request()
        images = [np.full((3, 8, 8, 3), i, np.uint8) for i in (4, 6)]
        found = await asyncio.gather(*(job.score(request, one) for job, one in zip(jobs, images, strict=True)))
        for job in jobs:
            await job.close()
        return found

    first, second = asyncio.run(both())
    assert first.raw[REWARD].tolist() == [4, 4, 4]
    assert second.raw[REWARD].tolist() == [6, 6, 6]


# What cannot work is said before anything starts


def test_another_http_port_than_the_clusters_is_refused(plane: str, port: int) -> None:
    from deployments.build import deploy

    other = free_port()
    with pytest.raises(
        ValueError, match=rf"^scorers\.http = 127\.0\.0\.1:{other}: Serve runs .* on 127\.0\.0\.1:{port}"
    ):
        asyncio.run(deploy(config(other, OTHER), fake_load_reward, dashboard_url=plane))


def test_a_port_in_use_is_one_line() -> None:
    from deployments.proxy import check_port
    from nft_ray.config import HttpConfig

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        number = taken.getsockname()[1]
        with pytest.raises(ValueError, match=rf"^scorers\.http\.port = {number}: cannot listen .*in use"):
            check_port(HttpConfig(port=number))


@pytest.mark.slow
def test_a_python_without_ray_is_refused_before_serve_waits_for_it(plane: str, port: int, tmp_path: Path) -> None:
    from deployments.build import deploy
    from deployments.interpreter import check_py_executable

    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S -E "$@"\n')
    bare.chmod(0o755)
    job = config(port, OTHER, {"py_executable": str(bare)})
    with pytest.raises(ValueError, match=r"py_executable = .*: cannot import ray and nft_ray \(ModuleNotFoundError"):
        asyncio.run(deploy(job, fake_load_reward, dashboard_url=plane))
    absent = config(port, OTHER, {"py_executable": "/nowhere/python"})
    with pytest.raises(ValueError, match=r"py_executable = '/nowhere/python': cannot be run: .*No such file"):
        asyncio.run(deploy(absent, fake_load_reward, dashboard_url=plane))
    fitting = config(port, OTHER, {"py_executable": sys.executable})
    check_py_executable(OTHER, fitting.reward_configs[OTHER])
