"""Whose an application is, with real drivers that are killed: used again, kept, collected, shared."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest

from nft_ray.config import ExperimentConfig
from tests.command_line import REPO
from tests.conftest import LocalRay
from tests.deployments.sglang_folder import until
from tests.fakes import NamedRewards, fake_config

pytestmark = [pytest.mark.ray, pytest.mark.slow]
REWARD = "jpeg_compressibility"
DRIVER = """
import asyncio, sys, time
import ray
from deployments.build import deploy
from tests.deployments.test_ownership import config
from tests.fakes import NamedRewards
ray.init(address="auto", log_to_driver=False, logging_level="ERROR")
run, owner, attach = sys.argv[1:]
print(asyncio.run(deploy(config(run, attach=bool(attach)), NamedRewards(), owner=owner)), flush=True)
time.sleep(600)
"""
Start = Callable[..., subprocess.Popen[str]]


def config(run: str, *, attach: bool = False, **section: Any) -> ExperimentConfig:
    return fake_config(run={"name": run}, rewards={REWARD: {"num_cpus": 0.1, **section}}, scorers={"attach": attach})


@pytest.fixture
def start(local_ray: LocalRay) -> Iterator[Start]:
    """Another job, with its rewards deployed: it lives until it is killed."""
    with ExitStack() as stack:

        def driver(run: str, owner: str, *, attach: bool = False, code: str = DRIVER) -> subprocess.Popen[str]:
            process = subprocess.Popen(
                [sys.executable, "-c", code, run, owner, *(["attach" if attach else ""] if code == DRIVER else [])],
                cwd=REPO,
                env=os.environ | local_ray.environment | {"PYTHONPATH": str(REPO)},
                stdout=subprocess.PIPE,
                text=True,
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
            assert process.stdout is not None
            assert process.stdout.readline()
            return process

        yield driver


@pytest.fixture(autouse=True)
def nothing_deployed(local_ray: LocalRay) -> Iterator[None]:
    from deployments.claims import read_claims
    from deployments.plane import delete

    yield
    delete([*read_claims(), *applications()])


def applications() -> list[str]:
    from ray import serve

    return sorted(serve.status().applications)


def deployed(job: ExperimentConfig, owner: str) -> str:
    from deployments.build import deploy

    return asyncio.run(deploy(job, NamedRewards(), owner=owner))[REWARD]


def replica_of(application: str) -> float:
    """Which process scores there."""
    from ray import serve

    images = np.zeros((1, 8, 8, 3), np.uint8)
    scores = serve.get_app_handle(application).score.remote(images, ["p"], [{}]).result(timeout_s=60)
    return float(scores.details["process"][0])


def kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()


def test_a_killed_run_finds_its_own_again_and_another_of_its_name_works_beside_it(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    from deployments.build import release

    caplog.set_level("INFO")
    first = start("run", "/runs/mine")
    assert applications() == [f"run/{REWARD}"]
    before = replica_of(f"run/{REWARD}")
    other = deployed(config("run"), "/elsewhere/run")
    assert other == f"run-2/{REWARD}"
    assert replica_of(other) != before
    release([other], owner="/elsewhere/run")
    assert applications() == [f"run/{REWARD}"]  # the first one's is left alone

    kill(first)
    assert deployed(config("run"), "/runs/mine") == f"run/{REWARD}"
    assert replica_of(f"run/{REWARD}") == before  # as it was: nothing was loaded again
    assert f"using run/{REWARD} again, which an earlier start of this run has left" in caplog.messages
    assert deployed(config("run", batch_size=3), "/runs/mine") == f"run/{REWARD}"
    assert replica_of(f"run/{REWARD}") != before  # another configuration
    release([f"run/{REWARD}"], owner="/runs/mine")
    assert applications() == []


def test_what_a_dead_job_left_is_collected_by_the_next_and_what_is_shared_outlives_its_maker(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    from deployments.build import release
    from deployments.claims import read_claims

    caplog.set_level("INFO")
    shared = f"shared/{REWARD}"
    dead, maker = start("dead", "/runs/dead"), start("maker", "/runs/maker", attach=True)
    assert deployed(config("user", attach=True), "/runs/user") == shared
    before = replica_of(shared)
    kill(dead)
    kill(maker)
    mine = deployed(config("next"), "/runs/next")
    assert applications() == sorted([mine, shared])
    assert f"deleted dead/{REWARD}: the job that used it (/runs/dead) has ended" in caplog.messages
    assert replica_of(shared) == before
    release([shared], owner="/runs/user")  # the last user of it
    release([mine], owner="/runs/next")
    assert applications() == []
    assert read_claims() == {}


CLAIMANT = """
import asyncio, sys, time
import ray
from deployments import claims
from deployments.lock import alone
ray.init(address="auto", log_to_driver=False, logging_level="ERROR")
application, owner = sys.argv[1:]
def claim():
    me = claims.User(ray.get_runtime_context().get_job_id(), owner)
    claims.write(claims.Claim(application=application, made_from="", users=(me,)))
    print("claimed", flush=True)
    time.sleep(600)
async def main():
    async with alone(60):
        claim()
claim() if application.startswith("shared/") else asyncio.run(main())
"""
"""A job that never comes to deploy what it has claimed; of its own, it even holds the lock."""


def test_a_job_killed_before_it_has_deployed_holds_up_nobody(start: Start) -> None:
    """Neither the one that has found its claim, nor the one that waits for what is to be shared."""
    from deployments.build import release
    from deployments.claims import read_claims

    own, shared = f"run/{REWARD}", f"shared/{REWARD}"
    kill(start(own, "/runs/mine", code=CLAIMANT))
    assert deployed(config("run"), "/runs/mine") == own
    maker = start(shared, "/runs/maker", code=CLAIMANT)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(deployed, config("user", attach=True), "/runs/user")
        until(lambda: len(read_claims()[shared].users) == 2)
        assert shared not in applications()
        kill(maker)
        assert waiting.result(60) == shared
    assert replica_of(shared)
    release([own], owner="/runs/mine")
    release([shared], owner="/runs/user")
    assert applications() == []
