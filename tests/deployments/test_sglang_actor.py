"""The supervisor of an sglang server as a Ray actor, and a reward that brings its server along.

What is killed here is really killed: the server, the actor.
"""

import asyncio
import os
import signal
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import requests
from pydantic import SecretStr

from tests.conftest import LocalRay
from tests.deployments.sglang_folder import StandIn, is_alive, until


def bearer(key: SecretStr) -> dict[str, str]:
    return {"Authorization": f"Bearer {key.get_secret_value()}"}


def scored(application: str, value: int = 0) -> list[float]:
    """Of an image that nobody has asked for yet."""
    import numpy as np
    from ray import serve

    images = np.full((1, 8, 8, 3), value, np.uint8)
    scores = serve.get_app_handle(application).score.remote(images, ["a cat"], [{}]).result(timeout_s=60)
    values: list[float] = scores.values.tolist()
    return values


@pytest.fixture
def actor(local_ray: LocalRay, stand_in: StandIn) -> Iterator[Any]:
    import ray

    from deployments.sglang_actor import serve_sglang

    stand_in.set(load_s=0.2)
    handle = asyncio.run(serve_sglang(stand_in.config(num_gpus=0)))
    yield handle
    ray.kill(handle)
    until(lambda: not stand_in.alive())


@pytest.mark.ray
def test_the_actor_supervises(stand_in: StandIn, actor: Any) -> None:
    import ray

    assert ray.get(ray.get_actor("sglang-Model-7B", namespace="nft_ray").status.remote()).state == "running"
    url, key = ray.get(actor.access.remote())
    assert url.startswith(f"http://{ray.util.get_node_ip_address()}:")  # other nodes reach it, who have the key
    assert requests.get(f"{url}/models", timeout=5).status_code == 401
    models = partial(requests.get, f"{url}/models", headers=bearer(key), timeout=5)
    assert models().status_code == 200
    os.kill(stand_in.starts[0]["pid"], signal.SIGKILL)
    until(lambda: len(stand_in.starts) == 2 and ray.get(actor.status.remote()).state == "running")
    assert models().status_code == 200
    ray.get(actor.stop.remote())
    assert stand_in.alive() == []


@pytest.mark.ray
def test_an_actor_that_is_killed_is_made_again_with_its_server_until_it_is_let_go(
    local_ray: LocalRay, stand_in: StandIn
) -> None:
    """No orphan is left however it ends."""
    import ray

    from deployments.sglang_actor import serve_sglang

    actor = asyncio.run(serve_sglang(stand_in.config(num_gpus=0, name="sglang-mortal")))
    first = stand_in.alive()
    assert len(first) == 2
    os.kill(ray.get(actor.__ray_call__.remote(lambda _: os.getpid())), signal.SIGKILL)
    until(lambda: not any(map(is_alive, first)))
    until(lambda: len(stand_in.alive()) == 2 and ray.get(actor.status.remote()).state == "running")
    url, key = ray.get(actor.access.remote())
    assert requests.get(f"{url}/models", headers=bearer(key), timeout=5).status_code == 200
    ray.kill(actor)
    until(lambda: not stand_in.alive())


@pytest.mark.ray
def test_a_server_that_does_not_start_leaves_no_actor(local_ray: LocalRay, stand_in: StandIn) -> None:
    import ray

    from deployments.sglang_actor import serve_sglang

    stand_in.set(exit_at_once=1)
    with pytest.raises(RuntimeError, match="CUDA out of memory"):
        asyncio.run(serve_sglang(stand_in.config(num_gpus=0)))
    with pytest.raises(ValueError, match="Failed to look up actor"):
        ray.get_actor("sglang-Model-7B", namespace="nft_ray")
    assert stand_in.alive() == []


@pytest.mark.ray
def test_gpus_that_the_cluster_lacks(local_ray: LocalRay, stand_in: StandIn) -> None:
    from deployments.sglang_actor import serve_sglang

    config = stand_in.config(data_parallel_size=4, start_timeout_s=1.0)
    with pytest.raises(RuntimeError, match="waiting for 4 GPUs and 1 CPUs, the cluster has 2 and 2 free; given up"):
        asyncio.run(serve_sglang(config))
    assert stand_in.starts == []


@pytest.mark.slow
@pytest.mark.ray
def test_a_reward_with_a_server_is_scored_by_it_and_takes_it_along(local_ray: LocalRay, stand_in: StandIn) -> None:
    """The server is started with the reward, gives its URL to the replicas, and is gone when the reward is deleted.

    Its actor is killed: the replicas find the new one, at another address.
    """
    import ray

    from deployments.build import deploy
    from deployments.plane import delete, server_name
    from tests.fakes import fake_config

    server = stand_in.config(num_gpus=0, num_cpus=0.1).model_dump(mode="json")
    section = {"server": server, "num_cpus": 0.1, "timeout_s": 2, "deadline_s": 3, "backoff_s": 0.1}
    names = asyncio.run(deploy(fake_config(rewards={"unified_reward": section})))
    try:
        assert scored(names["unified_reward"]) == pytest.approx([0.8])  # "Final Score: 4"
        first = stand_in.alive()
        assert len(first) == 2
        actor = ray.get_actor(server_name(names["unified_reward"]), namespace="nft_ray")
        url = ray.get(actor.url.remote())
        os.kill(ray.get(actor.__ray_call__.remote(lambda _: os.getpid())), signal.SIGKILL)
        until(lambda: not any(map(is_alive, first)) and len(stand_in.alive()) == 2)
        until(lambda: ray.get(actor.status.remote()).state == "running" and ray.get(actor.url.remote()) != url)
        until(lambda: scored(names["unified_reward"], value=7) == pytest.approx([0.8]), timeout_s=40)
    finally:
        delete(list(names.values()))
    until(lambda: not stand_in.alive())


@pytest.mark.slow
@pytest.mark.ray
def test_a_server_that_a_killed_job_left_behind_is_replaced(local_ray: LocalRay, stand_in: StandIn) -> None:
    """A job that is killed between the server and the reward leaves a detached actor, which holds GPUs for nobody."""
    from deployments.build import deploy
    from deployments.plane import delete, server_name
    from deployments.sglang_actor import serve_sglang
    from tests.fakes import fake_config

    server = stand_in.config(num_gpus=0, num_cpus=0.1)
    asyncio.run(serve_sglang(server.model_copy(update={"name": server_name("fake/unified_reward")})))
    left = stand_in.starts[0]["pid"]
    section = {"server": server.model_dump(mode="json"), "num_cpus": 0.1, "timeout_s": 20, "deadline_s": 30}
    names = asyncio.run(deploy(fake_config(rewards={"unified_reward": section})))
    try:
        assert len(stand_in.starts) == 2
        until(lambda: not is_alive(left))
    finally:
        delete(list(names.values()))
    until(lambda: not stand_in.alive())


@pytest.mark.ray
def test_a_reward_whose_server_does_not_start_leaves_nothing(local_ray: LocalRay, stand_in: StandIn) -> None:
    from ray import serve

    from deployments.build import deploy
    from tests.fakes import fake_config

    stand_in.set(exit_at_once=1)
    server = stand_in.config(num_gpus=0, num_cpus=0.1).model_dump(mode="json")
    with pytest.raises(RuntimeError, match="CUDA out of memory"):
        asyncio.run(
            deploy(
                fake_config(
                    rewards={"unified_reward": {"server": server, "num_cpus": 0.1, "timeout_s": 20, "deadline_s": 30}}
                )
            )
        )
    assert not serve.status().applications
    assert stand_in.alive() == []
