"""The loop with cores that cost nothing: order, staleness, what is pinned, failure and resume."""

import asyncio
import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nft_ray.config import ExperimentConfig
from nft_ray.cores.publish import verify
from nft_ray.prompts.draw import PromptSet
from nft_ray.rewards.combine import assemble
from nft_ray.roles import Roles, Seen
from nft_ray.runs.folder import RunFolder
from nft_ray.trainer import Trainer
from nft_ray.types import (
    Adapters,
    AdapterWeights,
    Batch,
    EvalResult,
    LearnerState,
    Prompt,
    Rewards,
    Rollout,
    RolloutRequest,
    UpdateResult,
)
from tests.fakes import FakeLearnerCore, FakeReward, FakeSamplerCore, fake_config

LINES = tuple(Prompt(id=i, text=f"prompt {i}", metadata={"tag": "a"}) for i in range(20))


class World:
    """All three roles around fake cores, and a diary of what was asked in which order."""

    size = 1

    def __init__(self, config: ExperimentConfig, fail_at: str = "", survive: int = 0) -> None:
        """`fail_at` is a note at which it fails, but not the first `survive` times."""
        self.config, self.fail_at, self.survive = config, fail_at, survive
        self.sampler, self.learner = FakeSamplerCore(config), FakeLearnerCore(config)
        self.diary: list[str] = []
        self.requests: list[RolloutRequest] = []

    def note(self, what: str) -> None:
        self.diary.append(what)
        if what == self.fail_at and self.diary.count(what) > self.survive:
            raise RuntimeError(f"{what} failed")

    async def load(self, adapters: Adapters) -> None:
        self.note(f"load {adapters.version}")
        verify(adapters, self.sampler.load(adapters, adapters.weights), "float32")

    async def rollout(self, request: RolloutRequest, seen: Seen | None = None) -> Rollout:
        await asyncio.sleep(0)
        self.requests.append(request)
        self.note(f"{request.split} {request.epoch} with {request.adapter} {request.policy_version}")
        info, images, samples = self.sampler.rollout(request)
        return Rollout(info=info, images=images, samples=samples)

    async def images(self, rollout: Rollout) -> np.ndarray:
        return rollout.images

    async def score(self, request: RolloutRequest, images: Any) -> Rewards:
        prompts = [item.prompt for item in request.items for _ in range(item.num_images)]
        scores = FakeReward().score(images, [p.text for p in prompts], [p.metadata for p in prompts])
        return assemble({"jpeg_compressibility": scores}, request.num_images, {"jpeg_compressibility": 1.0})

    def monitored(self, epoch: int) -> dict[int, dict[str, float]]:
        return {epoch - 1: {"reward/ocr": float(epoch - 1)}} if epoch else {}  # an epoch late

    async def drained(self) -> dict[int, dict[str, float]]:
        return {self.config.run.num_epochs - 1: {"reward/ocr": -1.0}}

    async def restore(self, state: LearnerState) -> None:
        self.note("restore")
        self.learner.restore(state)

    async def state(self) -> LearnerState:
        return self.learner.state()

    async def probe(self) -> Adapters:
        return self.announce(*self.learner.probe())

    async def adapters(self) -> tuple[Adapters, ...]:
        return tuple(self.announce(*pair) for pair in self.learner.adapters())

    async def update(self, batch: Batch) -> UpdateResult:
        self.note(f"update {batch.epoch}")
        await asyncio.sleep(0.01)  # long enough for an overlapping rollout to begin
        (groups,) = batch.shards
        result, weights = self.learner.update(
            batch.epoch, groups, [group.samples for group in groups], batch.samples_per_step
        )
        return dataclasses.replace(result, adapters=self.announce(result.adapters, weights))

    @staticmethod
    def announce(adapters: Adapters, weights: AdapterWeights) -> Adapters:
        return dataclasses.replace(adapters, weights=weights)


class SickWorld(World):
    """Its gradient is not finite in epochs `sick`, each so many times; its rewards are alike in epochs `flat`."""

    def __init__(
        self, config: ExperimentConfig, sick: dict[int, int] | None = None, flat: set[int] | None = None
    ) -> None:
        super().__init__(config)
        self.sick, self.flat = sick or {}, flat or set()

    async def update(self, batch: Batch) -> UpdateResult:
        result = await super().update(batch)
        if not self.sick.get(batch.epoch):
            return result
        self.sick[batch.epoch] -= 1
        return dataclasses.replace(result, skipped_steps=1, culprits=(batch.shards[0][0].group_id,))

    async def score(self, request: RolloutRequest, images: Any) -> Rewards:
        if request.epoch in self.flat:
            images = np.zeros_like(images)
        return await super().score(request, images)


class Diary:
    """A tracker that keeps what it is told."""

    def __init__(self) -> None:
        self.epochs: list[int] = []
        self.evaluations: dict[int, EvalResult] = {}
        self.metrics: list[dict[str, float]] = []
        self.late: list[tuple[int, dict[str, float]]] = []
        self.rewound: list[int] = []

    def log_epoch(self, epoch: int, metrics: dict[str, float], steps: tuple[dict[str, float], ...]) -> None:
        self.epochs.append(epoch)
        self.metrics.append(metrics)

    def log_evaluation(self, epoch: int, result: EvalResult) -> None:
        self.evaluations[epoch] = result

    def log_late(self, epoch: int, metrics: dict[str, float]) -> None:
        self.late.append((epoch, metrics))

    def rewind(self, epoch: int) -> None:
        self.rewound.append(epoch)
        kept = [(at, metrics) for at, metrics in zip(self.epochs, self.metrics, strict=True) if at <= epoch]
        self.epochs, self.metrics = [at for at, _ in kept], [metrics for _, metrics in kept]

    def log_progress(self, what: str, done: int, total: int) -> None:
        assert 0 < done <= total


def config_for(staleness: int = 0, epochs: int = 4, **run: Any) -> ExperimentConfig:
    return fake_config(
        run={"num_epochs": epochs, "max_staleness": staleness, "checkpoint_every": 2, **run},
        learner={"num_workers": 1},
        evaluation={"every": 2, "batch_size": 8},
    )


def train(
    config: ExperimentConfig,
    folder: Path,
    fail_at: str = "",
    *,
    survive: int = 0,
    first_epoch: int = 0,
    results: Path | None = None,
    world: World | None = None,
) -> tuple[World, Diary]:
    world, tracker = world or World(config, fail_at, survive), Diary()
    roles: Any = Roles(samplers=world, scorers=world, learners=world)
    prompts, place = PromptSet(lines=LINES), RunFolder(folder, results=results)
    asyncio.run(Trainer(config, roles, place, tracker, prompts, prompts, first_epoch=first_epoch).run())
    return world, tracker


def policy(world: World) -> np.ndarray:
    return world.learner.state().policy["lora"]


@pytest.mark.parametrize("staleness", [0, 1])
def test_rollouts_are_pinned_to_the_version_that_staleness_allows(staleness: int, tmp_path: Path) -> None:
    world, _ = train(config_for(staleness), tmp_path)
    asked = {(r.epoch, r.policy_version) for r in world.requests if r.split == "train"}
    assert asked == {(epoch, max(0, epoch - staleness)) for epoch in range(4)}
    per_epoch = [sum(r.epoch == epoch and r.split == "train" for r in world.requests) for epoch in range(4)]
    assert per_epoch == [config_for().prompts.groups_per_epoch] * 4


def test_without_staleness_nothing_overlaps(tmp_path: Path) -> None:
    world, _ = train(config_for(0), tmp_path)
    for epoch in range(1, 4):
        first_rollout = world.diary.index(f"train {epoch} with old {epoch}")
        assert world.diary.index(f"update {epoch - 1}") < world.diary.index(f"load {epoch}") < first_rollout


def test_with_staleness_the_next_rollouts_begin_before_the_update_is_published(tmp_path: Path) -> None:
    world, _ = train(config_for(1), tmp_path)
    for epoch in range(1, 4):
        first_rollout = world.diary.index(f"train {epoch} with old {epoch - 1}")
        assert first_rollout < world.diary.index(f"load {epoch}")


def test_a_random_adapter_is_proved_before_anything_is_sampled(tmp_path: Path) -> None:
    world, _ = train(config_for(), tmp_path)
    assert world.diary[:2] == ["load -1", "load 0"]


def test_the_base_is_evaluated_first_and_the_ema_policy_every_n_epochs(tmp_path: Path) -> None:
    world, tracker = train(config_for(epochs=5), tmp_path)
    assert sorted(tracker.evaluations) == [0, 2, 4, 5]
    assert tracker.epochs == [1, 2, 3, 4, 5]
    evaluations = [r for r in world.requests if r.split == "eval"]
    assert {r.adapter for r in evaluations if r.epoch == 0} == {"reference"}
    assert {(r.adapter, r.policy_version) for r in evaluations if r.epoch == 4} == {("ema", 4)}
    for epoch in tracker.evaluations:
        lines = [item.prompt.id for r in evaluations if r.epoch == epoch for item in r.items]
        assert lines == list(range(20))  # each line once, in the batches that the config fixes
        assert sorted(tracker.evaluations[epoch].images) == list(range(8))


def test_told_to_end_at_a_checkpoint_without_figures_it_evaluates_that_one_once(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="failed"):
        train(config_for(epochs=4, checkpoint_every=3), tmp_path, fail_at="update 3")
    changed = config_for(epochs=3, checkpoint_every=3)
    world, tracker = train(changed, tmp_path)
    assert (tracker.epochs, sorted(tracker.evaluations)) == ([], [3])
    assert {(r.split, r.adapter, r.policy_version) for r in world.requests} == {("eval", "ema", 3)}
    assert train(changed, tmp_path)[0].requests == []


def lines_drawn(world: World, epoch: int) -> list[int]:
    return [item.prompt.id for r in world.requests if r.split == "eval" and r.epoch == epoch for item in r.items]


def lines_kept(results: Path, epoch: int) -> list[int]:
    file = results / "evaluations" / f"epoch-{epoch:06d}" / "results.jsonl"
    return [json.loads(line)["line"] for line in file.read_text().splitlines()]


def test_an_evaluation_that_was_killed_goes_on_where_it_was(tmp_path: Path) -> None:
    straight, wanted = train(config_for(), tmp_path / "straight")
    with pytest.raises(RuntimeError, match="failed"):
        train(config_for(), tmp_path / "broken", "eval 2 with ema 2", survive=2)
    kept = lines_kept(tmp_path / "broken", 2)
    resumed, tracker = train(config_for(), tmp_path / "broken")
    assert lines_drawn(straight, 2) == list(range(20))
    assert lines_drawn(resumed, 0) == [], "the base was finished"
    assert tracker.epochs == [3, 4], "the epoch was saved before it was evaluated"
    assert set(kept) >= set(range(8, 16))
    assert lines_drawn(resumed, 2) == [line for line in range(20) if line not in kept]
    for epoch in (2, 4):
        found, before = tracker.evaluations[epoch], wanted.evaluations[epoch]
        assert (found.metrics, found.counts, found.right) == (before.metrics, before.counts, before.right)
        assert sorted(found.images) == list(range(8))


def test_an_evaluation_of_another_policy_is_not_gone_on_with(tmp_path: Path) -> None:
    """Resumed with fewer learners, say, the last bits of the policy are others than before the kill."""
    with pytest.raises(RuntimeError, match="failed"):
        train(config_for(), tmp_path, "eval 2 with ema 2", survive=2)
    assert set(lines_kept(tmp_path, 2)) >= set(range(8, 16))
    file = tmp_path / "evaluations" / "epoch-000002" / "evaluation.json"
    text = file.read_text()
    assert text.count('"checksum": "lora:') == 1, "the EMA's"
    file.write_text(text.replace('"checksum": "lora:', '"checksum": "lora:00'))
    resumed, _ = train(config_for(), tmp_path)
    assert lines_drawn(resumed, 2) == list(range(20))


@pytest.mark.parametrize("staleness", [0, 1])
@pytest.mark.parametrize(("fail_at", "left"), [("update 2", [3, 4, 5]), ("update 3", [4, 5]), ("load 3", [3, 4, 5])])
def test_a_run_that_stops_goes_on_at_its_last_finished_epoch(
    staleness: int, fail_at: str, left: list[int], tmp_path: Path
) -> None:
    """Between checkpoints, too: an epoch is finished once it is published and logged."""
    straight, _ = train(config_for(staleness, epochs=5), tmp_path / "straight")
    with pytest.raises(RuntimeError, match="failed"):
        train(config_for(staleness, epochs=5), tmp_path / "broken", fail_at)
    resumed, tracker = train(config_for(staleness, epochs=5), tmp_path / "broken")
    assert resumed.diary[0] == "restore"
    assert tracker.epochs == left
    assert resumed.learner.version == straight.learner.version == 5
    np.testing.assert_array_equal(resumed.learner.state().policy["lora"], straight.learner.state().policy["lora"])


def test_a_finished_run_has_nothing_left_to_do(tmp_path: Path) -> None:
    train(config_for(), tmp_path)
    world, tracker = train(config_for(), tmp_path)
    assert tracker.epochs == []
    assert not [r for r in world.requests if r.split == "train"]


def test_a_failing_rollout_is_raised_as_itself_and_leaves_no_task_behind(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="train 1 with old 0 failed"):
        train(config_for(1), tmp_path, fail_at="train 1 with old 0")


@pytest.mark.parametrize("staleness", [0, 1])
def test_a_stage_goes_on_with_the_policy_and_begins_with_the_base_on_its_own_lines(
    staleness: int, tmp_path: Path
) -> None:
    train(config_for(staleness, epochs=3), tmp_path)
    place = tmp_path / "stages" / "second"
    world, tracker = train(config_for(staleness, epochs=5), tmp_path, first_epoch=3, results=place)
    assert tracker.epochs == [4, 5]
    assert sorted(tracker.evaluations) == [0, 4, 5]
    files = sorted(path.name for path in (place / "evaluations").glob("*.json"))
    assert files == ["epoch-000000.json", "epoch-000004.json", "epoch-000005.json"]
    drawn = {(r.epoch, r.policy_version) for r in world.requests if r.split == "train"}
    assert drawn == {(epoch, epoch - staleness) for epoch in (3, 4)}
    assert world.learner.version == 5


@pytest.mark.parametrize("staleness", [0, 1])
@pytest.mark.parametrize("fail_at", ["update 3", "update 4", "update 5"])
def test_a_stage_that_stops_goes_on_as_if_it_had_not(staleness: int, fail_at: str, tmp_path: Path) -> None:
    second = config_for(staleness, epochs=6, checkpoint_every=1)
    worlds = {}
    for name in ("straight", "broken"):
        train(config_for(staleness, epochs=3), tmp_path / name)
        if name == "broken":
            with pytest.raises(RuntimeError, match="failed"):
                train(second, tmp_path / name, fail_at, first_epoch=3)
        worlds[name], _ = train(second, tmp_path / name, first_epoch=3)
    np.testing.assert_array_equal(policy(worlds["broken"]), policy(worlds["straight"]))


def test_a_skipped_step_now_and_then_is_only_counted(tmp_path: Path) -> None:
    config = config_for(epochs=8)
    world, tracker = train(config, tmp_path, world=SickWorld(config, sick={1: 1, 2: 1, 4: 1, 6: 1}))
    assert tracker.epochs == list(range(1, 9))
    assert "restore" not in world.diary


@pytest.mark.parametrize("staleness", [0, 1])
def test_what_is_not_finite_for_too_long_takes_the_run_back_to_the_last_good_epoch(
    staleness: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_for(staleness, epochs=8)
    straight, _ = train(config, tmp_path / "straight")
    world, tracker = train(config, tmp_path / "sick", world=SickWorld(config, sick={3: 1, 4: 1, 5: 1}))
    updates = [int(note.split()[1]) for note in world.diary if note.startswith("update")]
    assert updates == [0, 1, 2, 3, 4, 5, 3, 4, 5, 6, 7]
    assert tracker.epochs == list(range(1, 9))
    np.testing.assert_array_equal(policy(world), policy(straight))
    (said,) = [record.getMessage() for record in caplog.records if "goes back" in record.getMessage()]
    assert "epochs 4 to 6" in said
    assert "'prompt " in said
    assert "goes back to epoch 3, once" in said


def test_what_stays_not_finite_stops_the_run_and_names_a_prompt(tmp_path: Path) -> None:
    config = config_for(epochs=8)
    with pytest.raises(RuntimeError, match=r"epochs 4 to 6: .*1 steps, by 'prompt "):
        train(config, tmp_path, world=SickWorld(config, sick={3: 9, 4: 9, 5: 9}))


def test_a_run_without_signal_stops_and_one_that_finds_it_again_does_not(tmp_path: Path) -> None:
    config = config_for(epochs=9, max_epochs_without_signal=3)
    _, tracker = train(config, tmp_path / "again", world=SickWorld(config, flat={2, 3, 5, 6}))
    assert tracker.epochs == list(range(1, 10))
    with pytest.raises(RuntimeError, match="epochs 6 to 8: in no group"):
        train(config, tmp_path / "never", world=SickWorld(config, flat={5, 6, 7, 8}))
    endless = config_for(epochs=9, max_epochs_without_signal=None)
    _, tracker = train(endless, tmp_path / "endless", world=SickWorld(endless, flat={5, 6, 7, 8}))
    assert tracker.epochs == list(range(1, 10))


def test_an_evaluation_that_fails_after_the_last_update_costs_no_epoch(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="failed"):
        train(config_for(checkpoint_every=10), tmp_path, fail_at="eval 4 with ema 4")
    _, tracker = train(config_for(checkpoint_every=10), tmp_path)
    assert (tracker.epochs, sorted(tracker.evaluations)) == ([], [4])


def test_figures_of_the_base_that_are_lost_are_made_again(tmp_path: Path) -> None:
    train(config_for(), tmp_path)
    for file in ("epoch-000000.json", "epoch-000004.json"):
        (tmp_path / "evaluations" / file).unlink()
    _, tracker = train(config_for(), tmp_path)
    assert sorted(tracker.evaluations) == [0, 4]


def test_the_trainer_and_the_local_roles_load_without_ray() -> None:
    """What nft_ray imports is in pyproject.toml's contracts; this is about what those packages import in their turn."""
    script = "import sys, nft_ray.trainer, nft_ray.local, nft_ray.runs.tracking; assert 'ray' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[1], check=True)
