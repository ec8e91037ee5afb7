"""The supervisor of an sglang server as a Ray actor, and a reward that brings its server along.

What is killed here is really killed: the server, the actor.
"""

import asyncio
import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
import requests

from tests.conftest import LocalRay
from tests.deployments.sglang_folder import StandIn, is_alive, until


@pytest.fixture
def actor(local_ray: LocalRay, stand_in: StandIn) -> Iterator[Any]:
    import ray

    from deployments.sglang_server import serve_sglang

    stand_in.set(load_s=0.2)
    handle = asyncio.run(serve_sglang(stand_in.config(num_gpus=0)))
    yield handle
    ray.kill(handle)
    until(lambda: not stand_in.alive())


@pytest.mark.ray
def test_the_actor_supervises(stand_in: StandIn, actor: Any) -> None:
    import ray

    assert ray.get(ray.get_actor("sglang-Model-7B", namespace="nft_ray").status.remote()).state == "running"
    url = ray.get(actor.url.remote())
    assert requests.get(f"{url}/models", timeout=5).status_code == 200
    os.kill(stand_in.starts[0]["pid"], signal.SIGKILL)
    until(lambda: len(stand_in.starts) == 2 and ray.get(actor.status.remote()).state == "running")
    assert requests.get(f"{url}/models", timeout=5).status_code == 200
    ray.get(actor.stop.remote())
    assert stand_in.alive() == []


@pytest.mark.ray
@pytest.mark.parametrize("how", ["ray.kill", "SIGKILL"])
def test_no_orphan_is_left_however_the_actor_ends(local_ray: LocalRay, stand_in: StandIn, how: str) -> None:
    import ray

    from deployments.sglang_server import serve_sglang

    actor = asyncio.run(serve_sglang(stand_in.config(num_gpus=0, name=f"sglang-{how}")))
    assert len(stand_in.alive()) == 2
    if how == "ray.kill":
        ray.kill(actor)
    else:
        os.kill(ray.get(actor.__ray_call__.remote(lambda _: os.getpid())), signal.SIGKILL)
    until(lambda: not stand_in.alive())


@pytest.mark.ray
def test_a_server_that_does_not_start_leaves_no_actor(local_ray: LocalRay, stand_in: StandIn) -> None:
    import ray

    from deployments.sglang_server import serve_sglang

    stand_in.set(exit_at_once=1)
    with pytest.raises(RuntimeError, match="CUDA out of memory"):
        asyncio.run(serve_sglang(stand_in.config(num_gpus=0)))
    with pytest.raises(ValueError, match="Failed to look up actor"):
        ray.get_actor("sglang-Model-7B", namespace="nft_ray")
    assert stand_in.alive() == []


@pytest.mark.ray
def test_gpus_that_the_cluster_lacks(local_ray: LocalRay, stand_in: StandIn) -> None:
    from deployments.sglang_server import serve_sglang

    config = stand_in.config(data_parallel_size=4, start_timeout_s=1.0)
    with pytest.raises(RuntimeError, match="waiting for 4 GPUs and 1 CPUs, the cluster has 2 and 2 free; given up"):
        asyncio.run(serve_sglang(config))
    assert stand_in.starts == []


@pytest.mark.slow
@pytest.mark.ray
def test_a_reward_with_a_server_is_scored_by_it_and_takes_it_along(local_ray: LocalRay, stand_in: StandIn) -> None:
    """The server is started with the reward, gives its URL to the replicas, and is gone when the reward is deleted."""
    import numpy as np
    from ray import serve

    from deployments.build import deploy
    from deployments.plane import delete
    from tests.fakes import fake_config

    server = stand_in.config(num_gpus=0, num_cpus=0.1).model_dump(mode="json")
    config = fake_config(
        rewards={"unified_reward": {"server": server, "num_cpus": 0.1, "timeout_s": 20, "deadline_s": 30}}
    )
    names = asyncio.run(deploy(config))
    try:
        images = np.zeros((2, 8, 8, 3), np.uint8)
        response = serve.get_app_handle(names[0]).score.remote(images, ["a cat", "a dog"], [{}, {}])
        assert response.result(timeout_s=60).values.tolist() == pytest.approx([0.8, 0.8])  # "Final Score: 4"
        assert len(stand_in.alive()) == 2
    finally:
        delete(names)
    until(lambda: not stand_in.alive())


@pytest.mark.slow
@pytest.mark.ray
def test_a_server_that_a_killed_job_left_behind_is_replaced(local_ray: LocalRay, stand_in: StandIn) -> None:
    """A job that is killed between the server and the reward leaves a detached actor, which holds GPUs for nobody."""
    from deployments.build import deploy
    from deployments.plane import delete, server_name
    from deployments.sglang_server import serve_sglang
    from tests.fakes import fake_config

    server = stand_in.config(num_gpus=0, num_cpus=0.1)
    asyncio.run(serve_sglang(server.model_copy(update={"name": server_name("reward-unified_reward")})))
    left = stand_in.starts[0]["pid"]
    section = {"server": server.model_dump(mode="json"), "num_cpus": 0.1, "timeout_s": 20, "deadline_s": 30}
    names = asyncio.run(deploy(fake_config(rewards={"unified_reward": section})))
    try:
        assert len(stand_in.starts) == 2
        until(lambda: not is_alive(left))
    finally:
        delete(names)
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
