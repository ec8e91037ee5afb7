"""Evaluation figures: each line once, missing ones left out and counted."""

import json
from pathlib import Path

import numpy as np

from nft_ray.evaluation.summary import load_evaluation, save_evaluation, summarise
from nft_ray.rewards.base import Scores
from nft_ray.rewards.combine import assemble
from nft_ray.types import Prompt, RolloutItem, RolloutRequest


def request(*lines: tuple[int, str]) -> RolloutRequest:
    items = tuple(
        RolloutItem(group_id=i, prompt=Prompt(id=i, text="x", metadata={"tag": tag}), seeds=(i,)) for i, tag in lines
    )
    return RolloutRequest(epoch=0, items=items, adapter="ema", policy_version=0, split="eval")


def scores(values: list[float], strict: list[float]) -> Scores:
    return Scores(values=np.array(values, np.float32), details={"strict": np.array(strict, np.float32)})


def test_means_over_all_lines_and_per_tag_without_the_missing() -> None:
    requests = [request((0, "colors"), (1, "counting")), request((2, "counting"))]
    nan = float("nan")
    rewards = [
        assemble({"geneval": scores([1.0, 0.5], [1.0, 0.0])}, 2, {"geneval": 1.0}),
        assemble({"geneval": scores([nan], [nan])}, 1, {"geneval": 1.0}),
    ]
    result = summarise(requests, rewards, {}, seconds=1.0)
    assert result.metrics == {
        "geneval": 0.75,
        "geneval/colors": 1.0,
        "geneval/counting": 0.5,
        "geneval/strict": 0.5,
        "geneval/strict/colors": 1.0,
        "geneval/strict/counting": 0.0,
    }
    assert result.counts["geneval"] == 2
    assert result.counts["geneval/strict/counting"] == 1


def test_a_saved_evaluation_comes_back(tmp_path: Path) -> None:
    image = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    rewards = [assemble({"geneval": scores([1.0], [1.0])}, 1, {"geneval": 1.0})]
    result = summarise([request((5, "colors"))], rewards, {5: image}, seconds=2.0)
    save_evaluation(tmp_path, 10, result)
    back = load_evaluation(tmp_path, 10)
    assert back.metrics == result.metrics
    assert back.counts == result.counts
    assert back.right == result.right == {5: True}
    np.testing.assert_array_equal(back.images[5], image)
    target = tmp_path / "evaluations" / "epoch-000010.json"
    figures = json.loads(target.read_text())
    target.write_text(json.dumps({key: value for key, value in figures.items() if key != "right"}))
    assert load_evaluation(tmp_path, 10).right == {}, "runs of an earlier version have no verdicts"
