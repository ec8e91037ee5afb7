"""Rewards on Ray when something befalls them: replicas, their devices, the images, and a reward that only monitors.

What holds of every implementation is in tests/test_roles.py.
"""

import asyncio
import dataclasses
import time
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest

from nft_ray.rewards.outage import Outage
from nft_ray.roles import ObjectsLostError
from nft_ray.types import Rewards, RolloutRequest
from tests.conftest import LocalRay
from tests.deployments.sglang_folder import is_alive, until
from tests.fakes import MONITOR, MortalRewards, fake_config, fake_request

pytestmark = pytest.mark.ray
T = TypeVar("T")
REWARD = "jpeg_compressibility"
CONFIG = fake_config(
    run={"name": "scorers"},
    rewards={
        REWARD: {"num_replicas": 3, "num_cpus": 0.2, "batch_size": 2},
        MONITOR: {"eval_only": True, "num_cpus": 0.1},
    },
)


@dataclass(frozen=True)
class Plane:
    """The scorers with the event loop that they live on; `folder` is where the rewards look for their markers."""

    scorers: Any
    loop: asyncio.Runner
    folder: Path

    def __call__(self, work: Coroutine[Any, Any, T]) -> T:
        return self.loop.run(asyncio.wait_for(work, 90))

    def score(self, *requests: RolloutRequest) -> list[Rewards]:
        """The images of a request hold its seeds, as those of a FakeSamplerCore."""

        async def all_of_them() -> list[Rewards]:
            return await asyncio.gather(*(self.scorers.score(one, images_of(one)) for one in requests))

        return self(all_of_them())

    def num_asked(self) -> int:
        """Calls of the monitor that a replica has taken up."""
        asked = self.folder / "asked-monitor"
        return len(asked.read_text().splitlines()) if asked.exists() else 0


@pytest.fixture(scope="module")
def plane(local_ray: LocalRay, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plane]:
    from actors.scorers import ServeScorers
    from deployments.build import deploy
    from deployments.plane import delete

    folder = tmp_path_factory.mktemp("scorers")
    names = asyncio.run(deploy(CONFIG, MortalRewards(folder)))
    with asyncio.Runner() as loop:
        scorers = ServeScorers(CONFIG, names)
        try:
            yield Plane(scorers, loop, folder)
        finally:
            loop.run(scorers.close())
            delete(list(names.values()))


@pytest.fixture(autouse=True)
def nothing_under_way(plane: Plane) -> Iterator[None]:
    yield
    plane(plane.scorers.drained())


def right(request: RolloutRequest) -> np.ndarray:
    return np.array([seed % 251 for item in request.items for seed in item.seeds], dtype=np.uint8)


def images_of(request: RolloutRequest) -> Any:
    import ray

    images = np.empty((request.num_images, 32, 32, 3), np.uint8)
    images[:] = right(request).reshape(-1, 1, 1, 1)
    return ray.put(images)


def test_a_replica_killed_with_work_in_flight_loses_no_score(plane: Plane) -> None:
    (plane.folder / "die-reward").touch()
    requests = [fake_request(0, prompt) for prompt in range(100, 112)]
    for request, rewards in zip(requests, plane.score(*requests), strict=True):
        np.testing.assert_array_equal(rewards.raw[REWARD], right(request))
    assert not (plane.folder / "die-reward").exists()


def test_a_replica_whose_device_fails_is_replaced_and_its_call_made_again(plane: Plane) -> None:
    (plane.folder / "device-reward").touch()
    requests = [fake_request(0, prompt) for prompt in range(800, 806)]
    for request, rewards in zip(requests, plane.score(*requests), strict=True):
        np.testing.assert_array_equal(rewards.raw[REWARD], right(request))
    broken = int((plane.folder / "device-reward.pid").read_text())
    until(lambda: not is_alive(broken))


@pytest.mark.parametrize(("marker", "cause"), [("hang-reward", "DeadlineError"), ("broken-reward", "ConnectionError")])
def test_a_reward_that_cannot_be_had_is_missing(
    plane: Plane, monkeypatch: pytest.MonkeyPatch, marker: str, cause: str
) -> None:
    from actors import scorers as module

    scorers = plane.scorers
    monkeypatch.setattr(module, "BACKOFF_S", 0.01)
    monkeypatch.setattr(scorers, "_config", scorers._config.model_copy(update={"timeout_s": 0.5, "max_attempts": 2}))
    (plane.folder / marker).touch()
    request = fake_request(0, 200 if marker == "hang-reward" else 300)
    try:
        (rewards,) = plane.score(request)
    finally:
        (plane.folder / marker).unlink()
    assert np.isnan(rewards.raw[REWARD]).all()
    assert np.isnan(rewards.total).all()
    assert rewards.missing[REWARD].all()
    assert scorers.num_missing[REWARD, cause] == 1
    monkeypatch.undo()
    (rewards,) = plane.score(request)
    assert not rewards.missing[REWARD].any()


def test_a_value_error_of_the_reward_is_the_users(plane: Plane) -> None:
    (plane.folder / "wrong-reward").touch()
    try:
        with pytest.raises(ValueError, match=f"^reward {REWARD}: prompt 0 has no tag$"):
            plane.score(fake_request(0, 400))
    finally:
        (plane.folder / "wrong-reward").unlink()


def test_lost_images_are_no_missing_reward(plane: Plane) -> None:
    """Their owner dies, as with the node of a sampler."""
    import ray
    from ray.exceptions import GetTimeoutError, ObjectLostError

    def is_lost(images: Any) -> bool:
        try:
            ray.get(images, timeout=0.5)
        except ObjectLostError:
            return True
        except GetTimeoutError:
            pass
        return False

    @ray.remote(num_cpus=0)
    class Owner:
        def images(self) -> list[Any]:
            return [ray.put(np.zeros((3, 512, 512, 3), np.uint8))]

    async def lost() -> None:
        request, owner = fake_request(0, 700), Owner.remote()
        (images,) = await owner.images.remote()
        ray.kill(owner)
        until(lambda: is_lost(images))
        await plane.scorers.score(request, images)

    missing = dict(plane.scorers.num_missing)
    with pytest.raises(ObjectsLostError, match=f"^reward {REWARD}: the images are lost: "):
        plane(lost())
    assert plane.scorers.num_missing == missing


# A reward that only monitors


@pytest.mark.parametrize("marker", ["hang-monitor", "broken-monitor"])
def test_nobody_waits_for_a_monitor_that_is_down(
    plane: Plane, monkeypatch: pytest.MonkeyPatch, marker: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Silent, or failing: training has its scores, an evaluation does not ask again, and one line says so."""
    scorers = plane.scorers
    monkeypatch.setattr(scorers, "_config", scorers._config.model_copy(update={"monitor_timeout_s": 2.0}))
    monkeypatch.setitem(scorers._outages, MONITOR, Outage(MONITOR))
    first = 500 if marker == "hang-monitor" else 600
    training = [fake_request(3, first + prompt) for prompt in range(4)]
    evaluation = [dataclasses.replace(fake_request(3, first + 50 + prompt), split="eval") for prompt in range(9)]
    before = plane.num_asked()
    (plane.folder / marker).touch()
    try:
        for rewards in plane.score(*training):
            assert list(rewards.raw) == [REWARD]
            assert not rewards.missing[REWARD].any()
        if marker == "hang-monitor":
            assert scorers.monitored(3) == {}  # its calls are under way
        assert plane(scorers.drained()) == {3: {f"reward/missing/{MONITOR}": 1.0}}
        asked = plane.num_asked() - before
        for rewards in plane.score(*evaluation):
            assert rewards.missing[MONITOR].all()
            assert not rewards.missing[REWARD].any()
        assert plane.num_asked() - before == asked <= len(training)
    finally:
        (plane.folder / marker).unlink()
    assert len([line for line in caplog.messages if line.startswith(f"reward {MONITOR} is down: ")]) == 1
    now = time.monotonic()
    monkeypatch.setattr(scorers._outages[MONITOR], "_clock", lambda: now + 100)
    (rewards,) = plane.score(evaluation[0])
    assert not rewards.missing[MONITOR].any()


def test_a_monitor_whose_input_is_wrong_stops_no_training(plane: Plane) -> None:
    (plane.folder / "wrong-monitor").touch()
    request = fake_request(4, 900)
    try:
        (rewards,) = plane.score(request)
        assert not rewards.missing[REWARD].any()
        assert plane(plane.scorers.drained()) == {4: {f"reward/missing/{MONITOR}": 1.0}}
        with pytest.raises(ValueError, match=f"^reward {MONITOR}: prompt 0 has no tag$"):
            plane.score(dataclasses.replace(request, split="eval"))
    finally:
        (plane.folder / "wrong-monitor").unlink()
