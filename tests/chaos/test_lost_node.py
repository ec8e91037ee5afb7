"""A node goes, with a sampler, what it drew and a rank of the learners: nothing is lost, nothing is wrong."""

import asyncio
import logging
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nft_ray.config import ExperimentConfig
from nft_ray.prompts.draw import PromptSet
from nft_ray.rewards.combine import assemble
from nft_ray.roles import Roles, Samplers
from nft_ray.runs.folder import RunFolder
from nft_ray.trainer import Trainer
from nft_ray.types import Rewards, RolloutRequest
from tests.fakes import FakeLearnerCore, FakeReward, FakeSamplerCore, fake_config
from tests.test_trainer import LINES, Diary, policy, train

pytestmark = [pytest.mark.ray, pytest.mark.chaos, pytest.mark.full]
STORE = 150 * 2**20
QUICK = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 5}
"""A node that was killed is known to be gone after three seconds, not after fifteen."""


@contextmanager
def two_nodes() -> Iterator[tuple[Any, Any]]:
    """A cluster of two raylets, and the one of them where the driver is not."""
    import ray
    from ray.cluster_utils import Cluster

    folder = tempfile.mkdtemp(prefix="nr-", dir="/tmp")  # short: Ray's socket paths have a limit
    cluster = Cluster()
    try:
        cluster.add_node(
            num_cpus=1, temp_dir=folder, include_dashboard=False, object_store_memory=STORE, _system_config=QUICK
        )
        other = cluster.add_node(num_cpus=1, object_store_memory=STORE)
        ray.init(address=cluster.address, log_to_driver=False, namespace="lost")
        yield cluster, other
    finally:
        ray.shutdown()
        cluster.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


class NodeKillingScorers:
    """Scores that cost nothing; with the last one of an epoch, when all its samples are drawn, the node is killed."""

    def __init__(self, samplers: Samplers, cluster: Any, node: Any, epoch: int, num_groups: int) -> None:
        self.samplers, self.cluster, self.node = samplers, cluster, node
        self.epoch, self.left = epoch, num_groups
        self.scored: list[RolloutRequest] = []

    async def score(self, request: RolloutRequest, images: Any) -> Rewards:
        self.scored.append(request)
        images = await images
        prompts = [item.prompt for item in request.items for _ in range(item.num_images)]
        scores = FakeReward().score(images, [p.text for p in prompts], [p.metadata for p in prompts])
        if request.split == "train" and request.epoch == self.epoch:
            self.left -= 1
            if self.left == 0:
                await asyncio.to_thread(self.cluster.remove_node, self.node, allow_graceful=False)
        return assemble({"jpeg_compressibility": scores}, request.num_images, {"jpeg_compressibility": 1.0})

    def monitored(self, epoch: int) -> dict[int, dict[str, float]]:
        return {}

    async def drained(self) -> dict[int, dict[str, float]]:
        return {}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run that lost a node ends with."""

    policy: np.ndarray
    epochs: list[int]
    missing: list[float]
    num_drawn: int  # groups of the epoch in which it happened
    num_learners: int
    lines: list[str]


def config() -> ExperimentConfig:
    return fake_config(
        run={"num_epochs": 3, "name": "lost"},
        cluster={"wait_s": 60},
        model={"height": 512, "width": 512},  # what is below 100 KB stays with its owner and is never lost
        sampler={"num_cpus": 0.25, "num_workers": 2},
        learner={"num_cpus": 0.7, "num_workers": 2, "min_workers": 1},
        evaluation={"every": 100, "batch_size": 20},
    )


def lose_a_node(folder: Path) -> Outcome:
    """In a process of its own: this one may be joined to the Ray that tests share."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    os.environ["PYTHONPATH"] = str(Path(__file__).parents[2])  # workers import the fakes
    os.environ.pop("RAY_ADDRESS", None)
    with two_nodes() as (cluster, node):
        return asyncio.run(run_on(cluster, node, folder, lines))


async def run_on(cluster: Any, node: Any, folder: Path, lines: list[str]) -> Outcome:
    from ray.util import remove_placement_group

    from actors.bundles import reserve
    from actors.learners import LearnerGroup
    from actors.samplers import SamplerPool

    bundles = reserve(config())
    learners, samplers = LearnerGroup(config(), bundles, FakeLearnerCore), SamplerPool(config(), FakeSamplerCore)
    try:
        await learners.start()
        await samplers.start()
        scorers = NodeKillingScorers(samplers, cluster, node, epoch=1, num_groups=config().prompts.groups_per_epoch)
        tracker, prompts = Diary(), PromptSet(lines=LINES)
        roles: Any = Roles(samplers=samplers, scorers=scorers, learners=learners)
        await Trainer(config(), roles, RunFolder(folder), tracker, prompts, prompts).run()
        state = await learners.state()
        return Outcome(
            policy=np.array(state.policy["lora"]),
            epochs=tracker.epochs,
            missing=[metrics["reward/missing"] for metrics in tracker.metrics],
            num_drawn=sum(request.split == "train" and request.epoch == 1 for request in scorers.scored),
            num_learners=learners.size,
            lines=lines,
        )
    finally:
        samplers.close()
        learners.close()
        remove_placement_group(bundles)


def test_a_node_that_goes_with_samples_and_a_learner_changes_nothing(tmp_path: Path) -> None:
    straight, _ = train(config(), tmp_path / "straight")
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as elsewhere:
        found = elsewhere.submit(lose_a_node, tmp_path / "run").result(timeout=150)
    assert found.epochs == [1, 2, 3]
    assert found.missing == [0, 0, 0]
    assert 4 < found.num_drawn <= 8
    assert found.num_learners == 1
    np.testing.assert_array_equal(found.policy, policy(straight))
    assert any("groups are lost with a node; made again" in line for line in found.lines), found.lines
    assert any(line.startswith("1 of 2 learners found room") for line in found.lines), found.lines
