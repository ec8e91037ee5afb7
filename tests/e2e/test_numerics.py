"""Numbers that are none, and rewards that say nothing: the whole loop, with the fault planted in a real core."""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from nft_ray.cores import learner
from nft_ray.cores.learner import LearnerCore
from nft_ray.cores.sampler import SamplerCore
from nft_ray.rewards.base import Scores
from nft_ray.runs.folder import RunFolder
from nft_ray.runs.metrics import read_metrics
from nft_ray.types import RolloutRequest
from tests.command_line import NO_MLFLOW, nft_ray_here, sets
from tests.examples import QUICKSTART, SMALL, few_lines

pytestmark = pytest.mark.slow


def train(folder: Path, name: str, *settings: str) -> Any:
    """A run of two epochs, evaluated on a few lines, in this process."""
    few = [*SMALL, few_lines(folder, every=60), f"run.name={name}", "evaluation.num_steps=1", NO_MLFLOW]
    return nft_ray_here("train", str(QUICKSTART), "--local", *sets(*few, *settings), runs=folder)


def lora(folder: Path, name: str) -> dict[str, np.ndarray]:
    return dict(load_file(folder / name / "lora" / "pytorch_lora_weights.safetensors"))


def warnings(caplog: pytest.LogCaptureFixture, part: str) -> list[str]:
    return [record.getMessage() for record in caplog.records if part in record.getMessage()]


def plant(monkeypatch: pytest.MonkeyPatch, value: float, split: str) -> None:
    """One number of the first image of every request of a split."""
    draw, rollout, asked = SamplerCore._draw, SamplerCore.rollout, [""]

    def noting(self: SamplerCore, request: RolloutRequest) -> Any:
        asked[0] = request.split
        return rollout(self, request)

    def broken(self: SamplerCore, *arguments: Any) -> torch.Tensor:
        x0 = draw(self, *arguments)
        if asked[0] == split:
            x0[0, 0, 0, 0] = value
        return x0

    monkeypatch.setattr(SamplerCore, "rollout", noting)
    monkeypatch.setattr(SamplerCore, "_draw", broken)


def test_an_image_that_is_not_finite_costs_that_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plant(monkeypatch, float("nan"), "train")
    done = train(tmp_path, "nan", "run.num_epochs=2")
    assert done.returncode == 0, done.stderr
    lines = [line for line in read_metrics(tmp_path / "nan") if line["epoch"]]
    assert [line["rollout/non_finite"] for line in lines] == [3, 3]  # one of each of 3 groups
    assert [line["reward/missing"] for line in lines] == [0, 0]
    assert all(np.isfinite(value).all() for value in lora(tmp_path, "nan").values())
    told = warnings(caplog, "are not finite numbers")
    assert len(told) == 2
    assert told[0].startswith("epoch 1: 3 of 12 images are not finite numbers: 'a photo of")


def test_an_evaluation_with_images_that_are_not_finite_goes_on_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plant(monkeypatch, float("inf"), "eval")
    done = train(tmp_path, "eval", "run.num_epochs=1", "evaluation.every=1")
    assert done.returncode == 0, done.stderr
    told = warnings(caplog, "are not finite numbers")
    assert len(told) == 2  # of the base and of the first epoch
    assert told[0].startswith("evaluation: ")


class Saying:
    """A reward whose scores are a function of their number."""

    def __init__(self, say: Any) -> None:
        self.say = say

    def score(self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Scores:
        return Scores(values=np.asarray(self.say(len(images)), np.float64))


def saying(monkeypatch: pytest.MonkeyPatch, say: Any) -> None:
    monkeypatch.setattr("nft_ray.local.load_reward", lambda name, section: Saying(say))


def test_an_infinite_score_is_a_missing_one_named_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    saying(monkeypatch, lambda count: [np.inf, *range(count - 1)])
    done = train(tmp_path, "inf", "scorers.max_missing_fraction=0.5", "evaluation.batch_size=8")
    assert done.returncode == 0, done.stderr
    lines = [line for line in read_metrics(tmp_path / "inf") if line["epoch"]]
    assert [line["reward/missing/geneval"] for line in lines] == [0.25, 0.25]
    assert warnings(caplog, "geneval gave no number") == [
        "epoch 1: reward geneval gave no number, or an infinite one, or one that (with its weight) is "
        "beyond float32, for 3 of 12 images; they are left out of the update, and further ones only "
        "counted (reward/missing/geneval)"
    ]


def test_too_few_scores_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saying(monkeypatch, lambda count: range(count - 1))
    done = train(tmp_path, "few")
    assert done.returncode == 1
    line = "nft-ray: reward geneval: returned values as float64 (7,) for 8 images; return float32 (8,)"
    assert done.stderr.splitlines()[-1] == line


def test_rewards_that_are_all_equal_move_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    saying(monkeypatch, lambda count: [0.1] * count)
    done = train(tmp_path, "flat")
    assert done.returncode == 0, done.stderr
    assert all(not value.any() for name, value in lora(tmp_path, "flat").items() if "lora_B" in name)
    assert [line["reward/groups_without_signal"] for line in read_metrics(tmp_path / "flat") if line["epoch"]] == [1, 1]
    assert len(warnings(caplog, "reward geneval gives 0.1 to every image: nothing is learned from it")) == 1
    checkpoint = RunFolder(tmp_path / "flat").latest()
    assert checkpoint is not None
    assert (checkpoint.state.version, checkpoint.state.optimizer_step, checkpoint.state.optimizer) == (2, 0, {})


def test_a_policy_that_blows_up_leaves_the_checkpoint_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    update = LearnerCore.update

    def reckless(self: LearnerCore, epoch: int, *arguments: Any) -> Any:
        for group in self.optimizer.param_groups:
            group["lr"] = 1e12 if epoch == 1 else 1e-4
        return update(self, epoch, *arguments)

    monkeypatch.setattr(LearnerCore, "update", reckless)
    done = train(tmp_path, "blown", "run.num_epochs=3", "run.checkpoint_every=1", "evaluation.every=3")
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("nft-ray: the policy has blown up: its velocity is not finite after epoch 2 (optimizer step")
    checkpoint = RunFolder(tmp_path / "blown").latest()
    assert checkpoint is not None
    assert checkpoint.epoch == 1
    assert all(np.isfinite(value).all() for value in checkpoint.state.policy.values())
    kept = json.loads((checkpoint.path / "state.json").read_text())
    assert kept["epoch"] == 1
    assert logging.getLogger("nft_ray").level == logging.INFO


def broken_group(monkeypatch: pytest.MonkeyPatch, epochs: set[int]) -> None:
    """In these epochs the policy's velocity of the first group's samples is NaN, whatever was sampled."""
    update, gather, now = LearnerCore.update, learner.gather, [0]

    def noting(self: LearnerCore, epoch: int, *arguments: Any) -> Any:
        now[0] = epoch
        return update(self, epoch, *arguments)

    def broken(rows: np.ndarray, *arguments: Any, **options: Any) -> Any:
        batch = gather(rows, *arguments, **options)
        if now[0] in epochs:
            batch.pairs.x_t[torch.from_numpy(rows[:, 0] == 0)] = torch.nan
        return batch

    monkeypatch.setattr(LearnerCore, "update", noting)
    monkeypatch.setattr(learner, "gather", broken)


def test_a_gradient_that_is_not_finite_costs_its_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broken_group(monkeypatch, {0})
    done = train(tmp_path, "gradient")
    assert done.returncode == 0, done.stderr
    lines = [line for line in read_metrics(tmp_path / "gradient") if line["epoch"]]
    assert [line["nft/skipped_steps"] for line in lines] == [2, 0]
    assert [line.get("nft/grad_norm") is None for line in lines] == [True, False]
    (told,) = warnings(caplog, "left out, for a gradient was not finite")
    assert told.startswith("epoch 1: left out, for a gradient was not finite: 2 steps, by 'a photo of")
    assert all(np.isfinite(value).all() for value in lora(tmp_path, "gradient").values())


def test_a_gradient_that_stays_not_finite_takes_the_run_back_then_stops_it_and_names_the_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broken_group(monkeypatch, {2, 3, 4, 5})
    settings = ("run.num_epochs=6", "run.max_skipped_epochs=2", "run.checkpoint_every=1", "evaluation.every=6")
    done = train(tmp_path, "stays", *settings)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("nft-ray: epochs 3 to 4: a gradient, x0 or velocity was not finite in each (2 steps, by 'a ")
    assert len(warnings(caplog, "the run goes back to epoch 2, once")) == 1
    assert [line["epoch"] for line in read_metrics(tmp_path / "stays")] == [0, 1, 2, 3, 4]
