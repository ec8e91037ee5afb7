"""Every line once, a bound on what is in flight, and what is done again after a kill."""

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nft_ray.config import ExperimentConfig
from nft_ray.evaluation.evaluator import evaluate, open_requests, pipeline_depth, spaced
from nft_ray.evaluation.results import EvaluationFolder
from nft_ray.prompts.draw import PromptSet, evaluation_requests
from nft_ray.rewards.base import Scores
from nft_ray.rewards.combine import assemble
from nft_ray.roles import EvaluationRoles, Seen
from nft_ray.types import Adapters, Prompt, Rewards, Rollout, RolloutInfo, RolloutRequest
from tests.fakes import fake_config

CONFIG = fake_config(
    evaluation={"batch_size": 4},
    sampler={"max_in_flight": 2},
    rewards={"jpeg_compressibility": {}, "jpeg_incompressibility": {}},
    scorers={"max_in_flight": 3, "max_missing_fraction": 0.25},
)
NARROW = fake_config(
    evaluation={"batch_size": 4},
    sampler={"num_workers": 1, "max_in_flight": 1},
    rewards={"jpeg_compressibility": {}, "jpeg_incompressibility": {}},
    scorers={"max_in_flight": 1, "max_missing_fraction": 0.25},
)
PROMPTS = PromptSet(lines=tuple(Prompt(id=i, text=f"prompt {i}") for i in range(50)))


class Plane:
    """Samplers and scorers in one: images hold their line, the score is the line.

    `broken` lines miss the first reward, which `gives` what is no number, and the second one `also`.
    """

    size = 2

    def __init__(
        self, broken: tuple[int, ...] = (), die_after: int = 10**6, also: bool = True, gives: float = np.nan
    ) -> None:
        self.gives = gives
        self.broken, self.die_after, self.also = broken, die_after, also
        self.drawn: list[int] = []
        self.now = self.most = 0

    async def load(self, adapters: Adapters) -> None: ...

    async def rollout(self, request: RolloutRequest, seen: Seen | None = None) -> Rollout:
        self.now += 1
        self.most = max(self.most, self.now)
        lines = [item.prompt.id for item in request.items]
        self.drawn += lines
        await asyncio.sleep(0.001 * (lines[0] % 7))  # batches finish in another order than they start
        info = RolloutInfo(epoch=0, policy_version=0, worker="w", seconds=0.0, num_bytes=0)
        images = np.zeros((len(lines), 2, 2, 3), np.uint8)
        images[:] = np.array(lines, np.uint8).reshape(-1, 1, 1, 1)
        return Rollout(info=info, images=images, samples=None)

    async def images(self, rollout: Rollout) -> np.ndarray:
        return np.asarray(rollout.images)

    async def score(self, request: RolloutRequest, images: Any) -> Rewards:
        lines = [item.prompt.id for item in request.items]
        await asyncio.sleep(0.001)
        self.now -= 1
        self.die_after -= 1
        if self.die_after < 0:
            raise ConnectionError("the cluster is gone") from TimeoutError("no answer")
        values = np.array([self.gives if line in self.broken else line for line in lines], np.float32)
        second = -values if self.also else -np.array(lines, np.float32)
        scores = {"jpeg_compressibility": Scores(values=values), "jpeg_incompressibility": Scores(values=second)}
        return assemble(scores, len(lines), {"jpeg_compressibility": 1.0})

    def monitored(self, epoch: int) -> dict[int, dict[str, float]]:
        return {}

    async def drained(self) -> dict[int, dict[str, float]]:
        return {}


def run(
    folder: EvaluationFolder, plane: Plane, pictures: tuple[int, ...] = (), config: ExperimentConfig = CONFIG
) -> list[int]:
    """What the command does; gives the lines that were left to do."""
    folder.path.mkdir(exist_ok=True)
    requests = evaluation_requests(PROMPTS, config, epoch=0, policy_version=0, adapter="reference")
    left, kept = open_requests(requests, folder, pictures)
    assert len(kept) == 50 - sum(request.num_images for request in left)
    roles, told = EvaluationRoles(samplers=plane, scorers=plane), [len(kept)]

    def progress(done: int, of: int) -> None:
        assert told[-1] < done <= of == 50
        told.append(done)

    found = asyncio.run(evaluate(config, roles, folder, requests, pictures=pictures, progress=progress))
    assert [result.line for result in found] == list(range(50)) == [result.line for result in folder.results()]
    return [item.prompt.id for request in left for item in request.items]


def test_every_line_once_with_a_bound_in_flight(tmp_path: Path) -> None:
    plane = Plane()
    run(EvaluationFolder(tmp_path), plane)
    assert sorted(plane.drawn) == list(range(50))
    results = EvaluationFolder(tmp_path).results()
    assert [(r.line, r.scores["jpeg_compressibility"]) for r in results] == [(i, float(i)) for i in range(50)]
    assert plane.most == pipeline_depth(CONFIG) == 2 * 2 + 3


@pytest.mark.parametrize("after", [0, 1, 6, 12])
def test_what_was_interrupted_ends_in_the_same_bytes(after: int, tmp_path: Path) -> None:
    whole, cut = EvaluationFolder(tmp_path / "whole"), EvaluationFolder(tmp_path / "cut")
    run(whole, Plane())
    with pytest.raises(ConnectionError) as gone:
        run(cut, Plane(die_after=after))
    assert isinstance(gone.value.__cause__, TimeoutError)  # says whether it helps to try again
    (cut.path / "results.jsonl").open("a").write('{"line": 49, "pro')
    left = run(cut, Plane())
    assert len(left) == 50 - 4 * after
    assert (cut.path / "results.jsonl").read_bytes() == (whole.path / "results.jsonl").read_bytes()


def test_missing_rewards_are_asked_for_again_with_their_whole_batch(tmp_path: Path) -> None:
    folder = EvaluationFolder(tmp_path)
    run(folder, Plane(broken=(5, 6, 49)))
    assert [r.line for r in folder.results() if r.missing] == [5, 6, 49]
    assert run(folder, Plane()) == [4, 5, 6, 7, 48, 49]
    assert not any(r.missing for r in folder.results())
    assert run(folder, Plane()) == []


def test_too_many_missing_stop_it_and_keep_what_is_there(tmp_path: Path) -> None:
    folder = EvaluationFolder(tmp_path)
    with pytest.raises(RuntimeError, match=r"of 50 lines miss a reward \(jpeg_compressibility, jpeg_inc.*allows 25%"):
        run(folder, Plane(broken=tuple(range(10, 50))), config=NARROW)
    kept = folder.results()
    assert 12 < sum(bool(r.missing) for r in kept) <= 12 + 4 * pipeline_depth(NARROW)  # those that were about to end
    assert len(kept) < 50


@pytest.mark.parametrize("gives", [np.inf, -np.inf])
def test_where_it_would_be_infinite_again_the_same_command_is_no_advice(tmp_path: Path, gives: float) -> None:
    broken = tuple(range(10, 50))
    with pytest.raises(RuntimeError, match=r"; jpeg_compressibility gave infinite scores, .* and would again") as told:
        run(EvaluationFolder(tmp_path / "inf"), Plane(broken=broken, also=False, gives=gives), config=NARROW)
    assert "same command" not in str(told.value)
    with pytest.raises(RuntimeError, match="what was scored is kept: run the same command again") as told:
        run(EvaluationFolder(tmp_path / "nan"), Plane(broken=broken, also=False), config=NARROW)
    assert "infinite" not in str(told.value)


def test_a_reward_that_is_only_measured_stops_nothing(tmp_path: Path) -> None:
    rewards = {"jpeg_compressibility": {"eval_only": True}, "jpeg_incompressibility": {}}
    config = NARROW.model_copy(update={"rewards": rewards})
    run(EvaluationFolder(tmp_path / "measured"), Plane(broken=tuple(range(50)), also=False), config=config)
    with pytest.raises(RuntimeError, match="of 50 lines miss a reward"):
        run(EvaluationFolder(tmp_path / "trained"), Plane(broken=tuple(range(50)), also=False), config=NARROW)


def test_where_no_line_has_a_score_it_is_over_whatever_is_allowed(tmp_path: Path) -> None:
    scorers = NARROW.scorers.model_copy(update={"max_missing_fraction": 1.0})
    config = NARROW.model_copy(update={"scorers": scorers})
    run(EvaluationFolder(tmp_path / "one"), Plane(broken=tuple(range(49))), config=config)
    with pytest.raises(RuntimeError, match="50 of 50 lines miss a reward"):
        run(EvaluationFolder(tmp_path / "none"), Plane(broken=tuple(range(50))), config=config)


def test_pictures_are_kept_and_drawn_again_where_they_are_wanted_later(tmp_path: Path) -> None:
    folder = EvaluationFolder(tmp_path)
    run(folder, Plane(), pictures=(1, 30))
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == ["000001.png", "000030.png"]
    assert run(folder, Plane(), pictures=(1, 30)) == []
    assert run(folder, Plane(), pictures=(1, 9, 30)) == [8, 9, 10, 11]
    assert folder.image(9)[0, 0, 0] == 9


def test_what_was_damaged_is_evaluated_again(tmp_path: Path) -> None:
    """A disk that was full, a machine that lost its power: neither stands in the way of every later start."""
    whole, hurt = EvaluationFolder(tmp_path / "whole"), EvaluationFolder(tmp_path / "hurt")
    for folder in (whole, hurt):
        run(folder, Plane(), pictures=(1, 30))
    file = hurt.path / "results.jsonl"
    lines = file.read_text().split("\n")
    file.write_text("\n".join([*lines[:9], '{"line": 9, "pro\x00', *lines[10:]]))
    hurt.image_path(30).write_bytes(b"")
    assert run(hurt, Plane(), pictures=(1, 30)) == [8, 9, 10, 11, 28, 29, 30, 31]
    assert file.read_bytes() == (whole.path / "results.jsonl").read_bytes()
    np.testing.assert_array_equal(hurt.image(30), whole.image(30))


def test_pictures_are_spread_over_the_set() -> None:
    assert spaced(5) == [0, 1, 2, 3, 4]
    found = spaced(553)
    assert (len(found), found[0], found[-1]) == (24, 0, 552)
    assert max(np.diff(found)) - min(np.diff(found)) <= 1
