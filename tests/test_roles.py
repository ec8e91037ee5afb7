"""The contract of the roles, over those of one process and those on Ray; and what Ray's do when workers die.

The Ray of 2 logical CPUs holds 2 samplers, 2 learners, a reward of 3 replicas and Serve, for all tests of this module.
Cores and reward are the fakes: what every answer should be is known in closed form.
"""

import asyncio
import dataclasses
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest

import nft_ray.local
from nft_ray.roles import Roles
from nft_ray.types import Adapters, AdapterWeights, Batch, LearnerState, Rewards, Rollout, RolloutRequest, TrainGroup
from tests.conftest import LocalRay
from tests.fakes import (
    MONITOR,
    FakeLearnerCore,
    FakeSamplerCore,
    MortalLearnerCore,
    MortalRewards,
    MortalSamplerCore,
    failing_load_reward,
    fake_checksum,
    fake_config,
    fake_load_reward,
    fake_request,
)

T = TypeVar("T")
REWARD = "jpeg_compressibility"
CONFIG = fake_config(
    rewards={
        REWARD: {"num_replicas": 3, "num_cpus": 0.2, "batch_size": 2},
        MONITOR: {"eval_only": True, "num_cpus": 0.1},
    }
)


@dataclass(frozen=True)
class Run:
    """Roles with the event loop that they live on; `folder` is where the misbehaving fakes look for their markers."""

    kind: str
    roles: Roles
    loop: asyncio.Runner
    folder: Path

    def __call__(self, work: Coroutine[Any, Any, T]) -> T:
        return self.loop.run(asyncio.wait_for(work, 90))


@pytest.fixture(scope="module")
def local_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    with pytest.MonkeyPatch.context() as patch, asyncio.Runner() as loop:
        patch.setattr(nft_ray.local, "SamplerCore", FakeSamplerCore)
        patch.setattr(nft_ray.local, "LearnerCore", FakeLearnerCore)
        patch.setattr(nft_ray.local, "load_reward", fake_load_reward)
        yield Run("local", nft_ray.local.local_roles(CONFIG), loop, tmp_path_factory.mktemp("local"))


@pytest.fixture(scope="module")
def ray_run(local_ray: LocalRay, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    from actors.roles import ray_roles
    from deployments.build import deploy
    from deployments.plane import delete

    folder = tmp_path_factory.mktemp("ray")
    names = asyncio.run(deploy(CONFIG, MortalRewards(folder)))
    with asyncio.Runner() as loop:
        context = ray_roles(CONFIG, partial(MortalSamplerCore, folder), partial(MortalLearnerCore, folder, 1))
        roles = loop.run(context.__aenter__())
        try:
            yield Run("ray", roles, loop, folder)
        finally:
            loop.run(context.__aexit__(None, None, None))
            delete(list(names.values()))


@pytest.fixture(params=["local", pytest.param("ray", marks=pytest.mark.ray)])
def run(request: pytest.FixtureRequest) -> Run:
    """Every implementation, at version 0, its adapters published."""
    run: Run = request.getfixturevalue(f"{request.param}_run")
    run(publish(run.roles))
    return run


@pytest.fixture
def ray(ray_run: Run) -> Run:
    ray_run(publish(ray_run.roles))
    return ray_run


def weights(value: float) -> AdapterWeights:
    lora = {"lora": np.full(4, value, dtype=np.float32)}
    return AdapterWeights(old=lora, ema=lora)


def learner_state(version: int = 0, value: float = 0.0) -> LearnerState:
    lora = weights(value)
    return LearnerState(
        version=version, optimizer_step=version, policy=lora.old, ema=lora.ema, versions={version: lora}, optimizer={}
    )


async def publish(roles: Roles, state: LearnerState | None = None) -> tuple[Adapters, ...]:
    """What the trainer does at the start: restore, prove that a load is felt, publish."""
    await roles.learners.restore(state or learner_state())
    await roles.samplers.load(await roles.learners.probe())
    published = await roles.learners.adapters()
    for adapters in published:
        await roles.samplers.load(adapters)
    return published


async def rollouts(roles: Roles, requests: list[RolloutRequest]) -> list[Rollout]:
    return await asyncio.gather(*(roles.samplers.rollout(request) for request in requests))


async def scores(roles: Roles, requests: list[RolloutRequest]) -> list[Rewards]:
    drawn = await rollouts(roles, requests)
    asked = zip(requests, drawn, strict=True)
    return await asyncio.gather(*(roles.scorers.score(request, rollout.images) for request, rollout in asked))


def make_batch(drawn: list[Rollout], num_shards: int, epoch: int = 0) -> Batch:
    groups = [
        TrainGroup(
            group_id=i,
            samples=rollout.samples,
            weight=np.full(3, 0.25 * (i + 1), dtype=np.float32),
            step=np.array([0, 1, -1], dtype=np.int32),
        )
        for i, rollout in enumerate(drawn)
    ]
    shards = tuple(tuple(groups[k::num_shards]) for k in range(num_shards))
    return Batch(epoch=epoch, shards=shards, samples_per_step=(len(drawn), len(drawn)), metrics={})


def right_images(request: RolloutRequest) -> np.ndarray:
    return np.array([seed % 251 for item in request.items for seed in item.seeds], dtype=np.uint8)


async def check_rollouts(roles: Roles, requests: list[RolloutRequest]) -> list[Rollout]:
    drawn = await rollouts(roles, requests)
    for request, rollout in zip(requests, drawn, strict=True):
        images = await roles.samplers.images(rollout)
        np.testing.assert_array_equal(images[:, 0, 0, 0], right_images(request))
        assert images.dtype == np.uint8
        assert rollout.info.policy_version == request.policy_version
    return drawn


# The contract: the same of every implementation


def test_a_rollout_is_what_was_asked_for(run: Run) -> None:
    requests = [fake_request(0, prompt) for prompt in range(7)]
    drawn = run(check_rollouts(run.roles, requests))
    assert [rollout.info.epoch for rollout in drawn] == [0] * 7


def test_an_evaluation_has_many_prompts_and_no_samples(run: Run) -> None:
    items = tuple(item for prompt in range(3) for item in fake_request(0, prompt, num_images=1).items)
    request = dataclasses.replace(fake_request(), items=items, split="eval", adapter="ema")
    (rollout,) = run(check_rollouts(run.roles, [request]))
    (rewards,) = run(scores(run.roles, [request]))
    assert rollout.info.num_bytes == 3 * 32 * 32 * 3
    np.testing.assert_array_equal(rewards.raw[REWARD], right_images(request))


def test_rollouts_use_the_version_that_they_name(run: Run) -> None:
    run(publish(run.roles, learner_state(version=5, value=2.0)))
    run(check_rollouts(run.roles, [fake_request(6, version=5)]))
    with pytest.raises(RuntimeError, match=r"^version 4 is not loaded; has \[5\]$"):
        run(run.roles.samplers.rollout(fake_request(5, version=4)))


def test_weights_of_the_driver_are_loaded_without_a_learner_to_compare_with(run: Run) -> None:
    (announced,) = run(run.roles.learners.adapters())
    lora = weights(3.0)
    digest = fake_checksum(lora.old)
    ours = dataclasses.replace(
        announced, version=8, weights=lora, checksums={"old": digest, "ema": digest}, probe=None, probe_base=None
    )
    run(run.roles.samplers.load(ours))
    run(check_rollouts(run.roles, [fake_request(9, version=8)]))
    same = weights(0.0)
    digest = fake_checksum(same.old)
    with pytest.raises(RuntimeError, match="the velocity is the base model's"):
        run(run.roles.samplers.load(dataclasses.replace(ours, weights=same, checksums={"old": digest, "ema": digest})))


def test_a_load_that_is_not_felt_stops_the_run(run: Run) -> None:
    (adapters,) = run(run.roles.learners.adapters())
    lie = dataclasses.replace(adapters, probe=adapters.probe + 1)
    with pytest.raises(RuntimeError, match=r"(sampler-\d|local).*velocity.*learner.*sampler"):
        run(run.roles.samplers.load(lie))
    wrong = dataclasses.replace(adapters, checksums={"old": "a", "ema": "b"})
    with pytest.raises(RuntimeError, match="checksums"):
        run(run.roles.samplers.load(wrong))


def test_scores_come_with_details_and_a_total(run: Run) -> None:
    requests = [fake_request(0, prompt) for prompt in range(9)]
    for request, rewards in zip(requests, run(scores(run.roles, requests)), strict=True):
        right = right_images(request).astype(np.float32)
        np.testing.assert_array_equal(rewards.raw[REWARD], right)
        np.testing.assert_array_equal(rewards.details[f"{REWARD}/negative"], -right)
        np.testing.assert_array_equal(rewards.total, right)
        assert rewards.total.dtype == rewards.raw[REWARD].dtype == np.float32
        assert not rewards.missing[REWARD].any()


def test_training_does_without_what_only_monitors_and_says_it_by_epoch(run: Run) -> None:
    run(run.roles.scorers.drained())  # of the tests before
    requests = [fake_request(1, prompt) for prompt in range(3)] + [fake_request(2, 0)]
    for rewards in run(scores(run.roles, requests)):
        assert list(rewards.raw) == [REWARD]
    said = run(run.roles.scorers.drained())
    right = np.concatenate([right_images(request) for request in requests[:3]]).mean()
    assert list(said) == [1, 2]
    assert said[1] == pytest.approx(
        {f"reward/{MONITOR}": right, f"reward/{MONITOR}/negative": -right, f"reward/missing/{MONITOR}": 0.0}
    )
    assert run.roles.scorers.monitored(9) == {}


def test_an_evaluation_waits_for_what_only_monitors(run: Run) -> None:
    request = dataclasses.replace(fake_request(1, 5), split="eval")
    (rewards,) = run(scores(run.roles, [request]))
    np.testing.assert_array_equal(rewards.raw[MONITOR], right_images(request))
    assert run.roles.scorers.monitored(9) == {}


def test_an_update_gives_adapters_that_samplers_can_load(run: Run) -> None:
    async def epochs() -> list[LearnerState]:
        states = []
        for epoch in range(2):
            drawn = await rollouts(run.roles, [fake_request(epoch, prompt, version=epoch) for prompt in range(3)])
            update = await run.roles.learners.update(make_batch(drawn, run.roles.learners.size, epoch))
            assert (update.version, update.num_optimizer_steps, len(update.steps)) == (epoch + 1, 2, 2)
            await run.roles.samplers.load(update.adapters)
            states.append(await run.roles.learners.state())
        await check_rollouts(run.roles, [fake_request(2, version=2)])
        return states

    states = run(epochs())
    assert [state.version for state in states] == [1, 2]
    step = np.float32((0.25 + 0.5 + 0.75) * 2 / 6)  # the kept samples' weight, summed over ranks, per sample
    np.testing.assert_array_equal(states[1].policy["lora"], np.full(4, 2 * step))


def test_a_state_restores(run: Run) -> None:
    (adapters,) = run(publish(run.roles, learner_state(version=3, value=1.5)))
    state = run(run.roles.learners.state())
    assert adapters.version == state.version == 3
    assert list(state.versions) == [3]
    np.testing.assert_array_equal(state.policy["lora"], weights(1.5).old["lora"])


# Ray: who is lost loses nothing


@pytest.mark.ray
def test_actors_have_telling_names(ray: Run) -> None:
    from ray.util import list_named_actors

    names = set(list_named_actors())
    assert {"fake/sampler-0", "fake/sampler-1", "fake/learner-0", "fake/learner-1"} <= names


@pytest.mark.ray
def test_a_sampler_killed_in_a_rollout_loses_nothing(ray: Run) -> None:
    (ray.folder / "die-sampler").touch()
    requests = [fake_request(0, prompt) for prompt in range(12)]
    ray(check_rollouts(ray.roles, requests))
    assert not (ray.folder / "die-sampler").exists()
    assert "." in ray(replaced(ray))


@pytest.mark.ray
def test_a_hanging_sampler_is_replaced(ray: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_of(ray), "_timeout_s", 1.0)
    (ray.folder / "hang-sampler").touch()
    ray(check_rollouts(ray.roles, [fake_request(0, prompt) for prompt in range(6)]))
    assert "." in ray(replaced(ray))


# Ray: what cannot work is said in one line


@pytest.mark.ray
def test_a_reward_that_does_not_load_takes_its_application_down(ray: Run) -> None:
    from ray import serve

    from deployments.build import deploy

    other = "clipscore"
    with pytest.raises(
        RuntimeError, match=rf"^Serve application fake/{other} does not start: .*no weights at /nowhere"
    ):
        asyncio.run(deploy(fake_config(rewards={other: {"num_cpus": 0.05}}), failing_load_reward))
    assert sorted(serve.status().applications) == [f"fake/{REWARD}", f"fake/{MONITOR}"]


@pytest.mark.ray
def test_too_large_a_run_fails_at_once(ray: Run) -> None:
    from actors.roles import ray_roles

    with pytest.raises(ValueError, match=r"needs 4\.25 CPUs .*has 2"):
        ray(enter(ray_roles(fake_config(sampler={"num_cpus": 1.5}))))


@pytest.mark.ray
def test_a_core_that_does_not_load_leaves_no_actor(ray: Run) -> None:
    from ray.util import list_named_actors

    from actors.roles import ray_roles

    config = fake_config(
        run={"name": "broken"},
        sampler={"num_cpus": 0.05, "num_workers": 1},
        learner={"num_cpus": 0.05, "num_workers": 1},
    )
    with pytest.raises(ValueError, match=r"^no model at /nowhere$"):
        ray(enter(ray_roles(config, no_model, FakeLearnerCore, applications={REWARD: f"fake/{REWARD}"})))
    assert not [name for name in list_named_actors() if name.startswith("broken/")]


@pytest.mark.ray
def test_a_dead_learner_costs_a_restart_of_the_group(ray: Run) -> None:
    """In tests/actors/test_learners.py are all the ways in which a rank can fail."""
    drawn = ray(rollouts(ray.roles, [fake_request(0, prompt) for prompt in range(2)]))
    (ray.folder / "die-learner").touch()
    update = ray(ray.roles.learners.update(make_batch(drawn, 2)))
    assert not (ray.folder / "die-learner").exists()
    ray(ray.roles.samplers.load(update.adapters))
    assert ray(ray.roles.learners.state()).version == 1


def no_model(config: Any, worker: str) -> Any:
    raise ValueError("no model at /nowhere")


async def enter(context: Any) -> None:
    async with context:
        raise AssertionError("it started")


def pool_of(ray: Run) -> Any:
    samplers: Any = ray.roles.samplers
    return samplers._pool


async def replaced(ray: Run) -> str:
    """Wait for the replacement; the names of those who serve, each of whom has all that a rollout needs."""
    num_workers = CONFIG.sampler.num_workers
    async with asyncio.timeout(30):
        while ray.roles.samplers.size < num_workers:
            await asyncio.sleep(0.05)
    drawn = await check_rollouts(ray.roles, [fake_request(0, prompt) for prompt in range(8)])
    names = {rollout.info.worker for rollout in drawn}
    assert len(names) == num_workers
    return " ".join(sorted(names))
