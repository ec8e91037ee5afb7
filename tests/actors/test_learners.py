"""The learner group: what it checks on the driver, and how it goes on when a rank fails, with real processes."""

import asyncio
import dataclasses
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ray.exceptions import ObjectLostError

from actors import learners as module
from actors import ranks
from actors.learners import LearnerGroup
from nft_ray.algorithms.batch import shard
from nft_ray.config import ExperimentConfig
from nft_ray.cores.learner import LearnerCore
from nft_ray.cores.publish import checksum
from nft_ray.roles import StateLostError
from nft_ray.types import Batch, CleanSamples, LearnerState, TrainGroup
from tests.conftest import LocalRay
from tests.examples import example_config
from tests.fakes import (
    FakeLearnerCore,
    FakeSamplerCore,
    MortalLearnerCore,
    consume,
    die,
    fake_config,
    fake_request,
)
from tests.learning import example_groups

STEP = np.float32(6 * 0.25 / 6)
"""What a fake update adds: the weight of all samples, per sample."""


def samples_of(epoch: int, prompt: int) -> CleanSamples:
    config = fake_config()
    sampler = FakeSamplerCore(config)
    sampler.load(*FakeLearnerCore(config).adapters()[0])
    samples = sampler.rollout(fake_request(epoch, prompt))[2]
    assert samples is not None
    return samples


def batch_of(epoch: int, num_shards: int = 2, put: Callable[[Any], Any] = lambda value: value) -> Batch:
    weight, step = np.full(3, 0.25, np.float32), np.zeros(3, np.int32)
    groups = [TrainGroup(group_id=i, samples=put(samples_of(epoch, i)), weight=weight, step=step) for i in range(2)]
    shards = tuple(tuple(groups[k::num_shards]) for k in range(num_shards))
    return Batch(epoch=epoch, shards=shards, samples_per_step=(6,), metrics={})


# On the driver


def test_learners_that_drift_apart_end_the_group() -> None:
    config = fake_config(learner={"num_workers": 1})
    learner = FakeLearnerCore(config)
    (groups,) = batch_of(0, 1).shards
    samples = [group.samples for group in groups]
    result, _ = learner.update(0, [dataclasses.replace(group, samples=None) for group in groups], samples, (6,))
    drifted = dataclasses.replace(result, adapters=dataclasses.replace(result.adapters, checksums={"old": "other"}))
    learners = LearnerGroup(config, None)  # type: ignore[arg-type]  # nobody is placed
    learners._agree([result.adapters, result.adapters])
    with pytest.raises(RuntimeError, match=r"^learner 1 differs from learner 0 at version 1: .*other"):
        learners._agree([result.adapters, drifted.adapters])
    with pytest.raises(RuntimeError, match=r"^learner 1 differs"):
        asyncio.run(learners.probe())


def test_a_batch_is_split_anew_for_fewer_ranks() -> None:
    batch = batch_of(0, 2)
    assert module._shards(batch, 2) is batch.shards
    (one,) = module._shards(batch, 1)
    assert [group.group_id for group in one] == [0, 1]
    assert [len(part) for part in module._shards(batch, 3)] == [1, 1, 0]


class ScriptedRanks:
    """Groups that fail as `script` says, one entry per question; no process."""

    script: list[str]
    born: list["ScriptedRanks"]

    def __init__(self, config: ExperimentConfig, bundles: Any, make: Any, life: int) -> None:
        self.actors: list[Any] = []
        self.least, self.killed, self.asked = 0, False, list[str]()
        ScriptedRanks.born.append(self)

    async def come_up(self, least: int) -> None:
        self.least, self.actors = least, [object()]

    async def all(self, what: str, send: Any) -> list[Any]:
        assert not self.killed
        self.asked.append(what)
        if ScriptedRanks.script and (failure := ScriptedRanks.script.pop(0)):
            raise ranks.GroupError(failure)
        return [None]

    def kill(self) -> None:
        self.killed = True


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> type[ScriptedRanks]:
    monkeypatch.setattr(module, "Ranks", ScriptedRanks)
    ScriptedRanks.script, ScriptedRanks.born = [], []
    return ScriptedRanks


def scripted_group(now: list[float], **learner: Any) -> LearnerGroup:
    config = fake_config(learner={"max_restarts": 2, "restart_window_s": 100, "min_workers": 1, **learner})
    return LearnerGroup(config, None, FakeLearnerCore, clock=lambda: now[0])  # type: ignore[arg-type]


def test_what_fails_too_often_within_the_window_ends_the_run(
    scripted: type[ScriptedRanks], caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> None:
        now = [0.0]
        learners = scripted_group(now)
        await learners.start()
        scripted.script = ["learner 1 died: park", ""]
        await learners.park()
        now[0] = 99.0
        scripted.script = ["learner 0 died: wake up", ""]
        await learners.wake()
        now[0] = 101.0  # the first is forgotten
        scripted.script = ["learner 0 died: wake up", ""]
        await learners.wake()
        scripted.script = ["learner 1 died: park", ""]
        with pytest.raises(
            RuntimeError,
            match=r"^learner 1 died: park after 2 restarts within 100 s \(learner.max_restarts\); start the run again "
            r"to go on at its last checkpoint$",
        ):
            await learners.park()
        with pytest.raises(RuntimeError, match=r"^learner 1 died: park after"):
            await learners.wake()

    asyncio.run(run())
    assert [group.least for group in scripted.born] == [2, 1, 1, 1]  # the first one needs all
    assert all(group.killed for group in scripted.born)
    assert told(caplog) == [
        "learner 1 died: park; all learners start again, after epoch 0 (restart 1 of 2)",
        "learner 0 died: wake up; all learners start again, after epoch 0 (restart 2 of 2)",
        "learner 0 died: wake up; all learners start again, after epoch 0 (restart 2 of 2)",
    ]


def test_a_group_that_fails_while_it_starts_again_is_one_more_restart(scripted: type[ScriptedRanks]) -> None:
    """A kept state is given to each new group before it is asked anything else."""

    async def run() -> None:
        learners = scripted_group([0.0])
        await learners.start()
        here: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        here.set_result("a state")
        learners._fresh, learners._state = False, module.Kept(here, "a state", 1.0)
        scripted.script = ["learner 1 died: park", "learner 0 died: restore a state", "", ""]
        await learners.park()
        assert await learners.state() == "a state"  # type: ignore[comparison-overlap]  # without a question
        learners.close()

    asyncio.run(run())
    assert [group.asked for group in scripted.born] == [["park"], ["restore a state"], ["restore a state", "park"]]


def test_without_a_state_the_group_lives_and_says_so(scripted: type[ScriptedRanks]) -> None:
    async def run() -> None:
        learners = scripted_group([0.0])
        await learners.start()
        gone: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        gone.set_exception(ObjectLostError("00" * 28, "", ""))
        learners._fresh, learners._state = False, module.Kept(gone, "a state", 1.0)
        scripted.script = ["learner 0 died: park"]
        with pytest.raises(StateLostError, match="what they had learned is lost: ObjectLostError"):
            await learners.park()
        await learners.park()  # of the new one, which is as `build` left it
        learners.close()

    asyncio.run(run())
    assert [group.asked for group in scripted.born] == [["park"], ["park"]]


# With processes


@asynccontextmanager
async def group_of(config: ExperimentConfig, make: Any) -> AsyncIterator[LearnerGroup]:
    from ray.util import remove_placement_group

    from actors.bundles import reserve

    bundles = reserve(config)
    learners = LearnerGroup(config, bundles, make)
    try:
        await learners.start()
        yield learners
    finally:
        learners.close()
        remove_placement_group(bundles)


async def two_epochs(learners: LearnerGroup, folder: Path, marker: str) -> LearnerState:
    """The second one is disturbed."""
    import ray

    await learners.update(batch_of(0, put=ray.put))
    (folder / marker).touch()
    result = await learners.update(batch_of(1, put=ray.put))
    assert result.version == 2
    weights = await result.adapters.weights
    np.testing.assert_array_equal(weights.old["lora"], np.full(4, 2 * STEP))
    return await learners.state()


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("actors")]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize(
    ("marker", "line"),
    [
        ("die-learner", r"learner 1 died: update of epoch 2 \(ActorDiedError.*\); all learners start again, after "),
        ("xid-learner", r"learner 1 failed: update of epoch 2 \(AcceleratorError: CUDA error: an illegal.*\); all "),
        ("stop-learner", r"learner 1 did not finish within 3 s: update of epoch 2 \(its process does not answer\); a"),
        ("sleep-learner", r"learner 1 did not finish within 3 s: update of epoch 2 \(in tests/fakes.py:\d+, update\)"),
    ],
)
def test_a_rank_that_fails_in_an_update_changes_nothing(
    local_ray: LocalRay, marker: str, line: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = fake_config(
        run={"name": marker}, learner={"timeout_s": 3 if marker in ("stop-learner", "sleep-learner") else 60}
    )

    async def run() -> LearnerState:
        async with group_of(config, partial(MortalLearnerCore, tmp_path, 1)) as learners:
            return await two_epochs(learners, tmp_path, marker)

    state = asyncio.run(run())
    assert not (tmp_path / marker).exists()
    assert state.version == state.optimizer_step == 2
    np.testing.assert_array_equal(state.policy["lora"], np.full(4, 2 * STEP))
    (said,) = told(caplog)
    assert re.match(line, said), said
    assert said.endswith(", after epoch 1 (restart 1 of 3)")


@pytest.mark.ray
@pytest.mark.slow
def test_too_little_memory_twice_is_met_with_a_smaller_micro_batch(
    local_ray: LocalRay, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = fake_config(learner={"num_workers": 1, "micro_batch_size": 8, "shrink_on_oom": True})

    async def run(config: ExperimentConfig) -> LearnerState:
        async with group_of(config, partial(MortalLearnerCore, tmp_path, 0)) as learners:
            return await two_epochs(learners, tmp_path, "oom-learner")

    assert asyncio.run(run(config)).version == 2
    first, second = told(caplog)
    assert "start again, after epoch 1 (restart 1 of 3)" in first
    assert (
        "start again with learner.micro_batch_size = 4 (set it so; the last bits of an update change), after epoch 1 "
        in second
    )
    once = config.model_copy(update={"learner": config.learner.model_copy(update={"max_restarts": 1})})
    with pytest.raises(
        RuntimeError,
        match=r"^learner 0 failed: update of epoch 1 \(OutOfMemoryError: .*\) after 1 restarts within 3600 s "
        r"\(learner.max_restarts\); lower learner.micro_batch_size, which is 8; start the run again to go on at its "
        r"last checkpoint$",
    ):
        asyncio.run(run(once))


@pytest.mark.ray
@pytest.mark.slow
def test_a_bug_ends_the_run_as_itself(local_ray: LocalRay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "GRACE_S", 0.5)
    config = fake_config(run={"name": "bug"})

    async def run() -> None:
        async with group_of(config, partial(MortalLearnerCore, tmp_path, 1)) as learners:
            with pytest.raises(ValueError, match=r"^a bug$"):
                await two_epochs(learners, tmp_path, "bug-learner")
            with pytest.raises(RuntimeError, match=r"^the learners failed: ValueError: a bug$"):
                await learners.probe()

    asyncio.run(run())


@pytest.mark.ray
@pytest.mark.slow
def test_a_state_that_is_lost_is_asked_of_the_trainer(local_ray: LocalRay, tmp_path: Path) -> None:
    """As with full fine-tuning, or with rank 0's node before the driver had it: restored, the group goes on."""
    import ray

    config = fake_config(run={"name": "lost"}, learner={"num_workers": 1})

    async def run() -> LearnerState:
        async with group_of(config, partial(MortalLearnerCore, tmp_path, 0)) as learners:
            learners._keeps = False
            await learners.update(batch_of(0, 1, put=ray.put))
            saved = await learners.state()
            (tmp_path / "die-learner").touch()
            with pytest.raises(StateLostError, match=r"^the learners started again, and what they had learned is lost"):
                await learners.update(batch_of(1, 1, put=ray.put))
            await learners.restore(saved)
            await learners.update(batch_of(1, 1, put=ray.put))
            return await learners.state()

    state = asyncio.run(run())
    np.testing.assert_array_equal(state.policy["lora"], np.full(4, 2 * STEP))


@pytest.mark.ray
@pytest.mark.slow
def test_with_less_room_fewer_go_on(local_ray: LocalRay, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What a rank had is taken by somebody else while it is dead, as with a node that is gone."""
    import ray

    config = fake_config(
        run={"name": "smaller"}, cluster={"wait_s": 12}, learner={"num_cpus": 0.75, "min_workers": 1, "timeout_s": 30}
    )

    async def run() -> LearnerState:
        async with group_of(config, partial(MortalLearnerCore, tmp_path, 1)) as learners:
            come_up = ranks.Ranks._placed

            async def in_a_smaller_cluster(self: ranks.Ranks, least: int) -> list[Any]:
                thief = ray.remote(num_cpus=0.5)(FakeSamplerCore).options(
                    scheduling_strategy=ranks.in_bundle(learners._bundles, 1)
                )
                held = thief.remote(config)
                await held.__ray_ready__.remote()
                try:
                    return await come_up(self, least)
                finally:
                    ray.kill(held)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(ranks.Ranks, "_placed", in_a_smaller_cluster)
                state = await two_epochs(learners, tmp_path, "die-learner")
            assert learners.size == 1
            return state

    state = asyncio.run(run())
    np.testing.assert_array_equal(state.policy["lora"], np.full(4, 2 * STEP))
    assert any(line.startswith("1 of 2 learners found room within 12 s") for line in told(caplog))


class DyingLearner(LearnerCore):
    """Rank 1 is killed between two optimizer steps, while rank 0 waits for it in the reduction of the second."""

    def __init__(self, folder: Path, config: ExperimentConfig, rank: int, world_size: int) -> None:
        super().__init__(config, rank, world_size)
        if rank == 1:
            self.optimizer.register_step_post_hook(lambda *_: die() if consume(folder / "die") else None)


@pytest.mark.ray
@pytest.mark.slow
def test_a_lora_is_the_same_to_the_last_bit_after_a_restart(local_ray: LocalRay, tmp_path: Path) -> None:
    import ray

    config = example_config("run.name=bits", "learner.num_workers=2", "learner.num_cpus=0.25")

    def batch(epoch: int) -> Batch:
        groups, counts = example_groups(epoch)
        placed = [dataclasses.replace(group, samples=ray.put(group.samples)) for group in groups]
        return Batch(epoch=epoch, shards=shard(placed, 2), samples_per_step=counts, metrics={})

    async def run() -> tuple[LearnerState, LearnerState]:
        async with group_of(config, partial(DyingLearner, tmp_path)) as learners:
            await learners.update(batch(0))
            after_one = await learners.state()
            await learners.update(batch(1))
            straight = await learners.state()
            await learners.restore(after_one)
            (tmp_path / "die").touch()
            await learners.update(batch(1))
            return straight, await learners.state()

    straight, disturbed = asyncio.run(run())
    assert not (tmp_path / "die").exists()
    assert (disturbed.version, disturbed.optimizer_step) == (straight.version, straight.optimizer_step) == (2, 4)
    assert checksum(disturbed.policy) == checksum(straight.policy)
    assert checksum(disturbed.ema) == checksum(straight.ema)
    assert checksum(disturbed.optimizer) == checksum(straight.optimizer)
    assert checksum(disturbed.versions[2].old) == checksum(straight.versions[2].old)
