"""What a pool of samplers lives through on a cluster of several raylets: a process of its own, run by test_seats.py.

    head, 1 CPU ──► + node, 2 CPUs ──► the node is killed, with images on it, and away ──► + node, 3 CPUs

Every sampler takes a whole CPU; cores are fakes, so what each rollout should give is known. A line per finding.
"""

import asyncio
import dataclasses
import logging
import sys
import time
from collections.abc import Callable

import ray
from ray.cluster_utils import Cluster

from actors.samplers import SamplerPool
from nft_ray.roles import ObjectsLostError
from nft_ray.types import Rollout
from tests.fakes import FakeLearnerCore, FakeSamplerCore, fake_config, fake_request

logger = logging.getLogger("actors.scenario")
WAIT_S, SHORT_WAIT_S, ATTEMPTS = 60.0, 3.0, 2
CONFIG = fake_config(
    run={"name": "nodes"},
    cluster={"wait_s": WAIT_S},
    model={"height": 128, "width": 128},  # small results are kept by the driver, and never lost
    sampler={
        "num_workers": 3,
        "min_workers": 1,
        "max_workers": 4,
        "num_cpus": 1,
        "max_attempts": ATTEMPTS,
        "timeout_s": 30,
    },
)


async def until(what: str, found: Callable[[], bool], timeout_s: float = 60.0) -> None:
    started = time.monotonic()
    while not found():
        assert time.monotonic() < started + timeout_s, f"not within {timeout_s:g} s: {what}"
        await asyncio.sleep(0.05)
    logger.info("%s (%.1f s)", what, time.monotonic() - started)


async def images_are_right(pool: SamplerPool, drawn: list[Rollout]) -> int:
    """How many rollouts' images are lost; the others are what any worker would have drawn."""
    lost = 0
    for prompt, rollout in enumerate(drawn):
        try:
            images = await pool.images(rollout)
        except ObjectsLostError:
            lost += 1
        else:
            assert images[:, 0, 0, 0].tolist() == [(10 * prompt + image) % 251 for image in range(3)]
    return lost


async def draw(pool: SamplerPool, count: int = 12, version: int = 0) -> list[Rollout]:
    return await asyncio.gather(*(pool.rollout(fake_request(0, prompt, version=version)) for prompt in range(count)))


async def live(cluster: Cluster) -> None:
    ((adapters, weights),) = FakeLearnerCore(CONFIG).adapters()
    pool = SamplerPool(CONFIG, FakeSamplerCore)
    try:
        await pool.start()
        assert pool.size == 1, pool.size
        await pool.load(dataclasses.replace(adapters, weights=weights))
        assert await images_are_right(pool, await draw(pool)) == 0
        logger.info("the run starts with the least")

        node = cluster.add_node(num_cpus=2)
        await until("the others join when there is room", lambda: pool.size == 3)
        drawn = await draw(pool)
        assert len({rollout.info.worker for rollout in drawn}) == 3

        pool._pool._seats._place_s = SHORT_WAIT_S  # away for longer than all attempts last
        cluster.remove_node(node, allow_graceful=False)
        gone = time.monotonic()
        assert await images_are_right(pool, await draw(pool)) == 0
        logger.info("one of three serves on (%.1f s)", time.monotonic() - gone)
        lost = await images_are_right(pool, drawn)
        assert 0 < lost < len(drawn), lost
        logger.info("images that are lost with a node are known to be")
        while time.monotonic() < gone + (ATTEMPTS + 1) * SHORT_WAIT_S:
            assert await images_are_right(pool, await draw(pool, 2)) == 0
            await asyncio.sleep(0.5)
        assert pool.size == 1, pool.size

        pool._pool._seats._place_s = WAIT_S
        cluster.add_node(num_cpus=3)
        await until("the seats are taken again", lambda: pool.size == 3)
        assert await images_are_right(pool, await draw(pool)) == 0
        version = 0
        async with asyncio.timeout(60):
            while pool.size < 4:  # Ray tells of what is free a moment later
                version += 1
                await pool.load(dataclasses.replace(adapters, weights=weights, version=version))
                await draw(pool, 2, version)
                await asyncio.sleep(0.5)
        logger.info("a later epoch uses the new node")
        drawn = await draw(pool, 16, version)
        assert await images_are_right(pool, drawn) == 0
        assert len({rollout.info.worker for rollout in drawn}) == 4
    finally:
        pool.close()


def main() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    logging.getLogger("actors").setLevel(logging.INFO)
    head = {"num_cpus": 1, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
        asyncio.run(live(cluster))
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    main()
