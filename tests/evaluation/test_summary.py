"""Figures of scored lines: each line once, missing ones left out and counted, means to the bit."""

import json

import numpy as np
import pytest

from nft_ray.evaluation.results import LineResult, line_results
from nft_ray.evaluation.summary import headline, summarise, summarise_results
from nft_ray.rewards.base import Scores
from nft_ray.rewards.combine import assemble
from nft_ray.types import Prompt, RolloutItem, RolloutRequest
from tests.fakes import fake_config

NAN = float("nan")
IMAGE = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)


def request(*lines: tuple[int, str]) -> RolloutRequest:
    items = tuple(
        RolloutItem(group_id=i, prompt=Prompt(id=i, text="x", metadata={"tag": tag}), seeds=(i,)) for i, tag in lines
    )
    return RolloutRequest(epoch=0, items=items, adapter="ema", policy_version=0, split="eval")


def scored(values: list[float], strict: list[float], *lines: tuple[int, str]) -> list[LineResult]:
    scores = Scores(values=np.array(values, np.float32), details={"strict": np.array(strict, np.float32)})
    return line_results(request(*lines), assemble({"geneval": scores}, len(lines), {"geneval": 1.0}))


def test_means_over_all_lines_and_per_tag_without_the_missing() -> None:
    lines = scored([1.0, 0.5], [1.0, 0.0], (0, "colors"), (1, "counting")) + scored([NAN], [NAN], (2, "counting"))
    result = summarise(lines, {}, seconds=1.0)
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


def test_a_picture_is_right_where_its_line_is_exactly_what_was_asked_for() -> None:
    lines = scored([1.0, 0.5, NAN], [1.0, 0.0, NAN], (0, "colors"), (1, "counting"), (2, "counting"))
    assert summarise(lines, dict.fromkeys((0, 1, 2), IMAGE), seconds=0).right == {0: True, 1: False, 2: False}
    assert summarise(lines, {1: IMAGE}, seconds=0).right == {1: False}
    plain = LineResult(line=0, prompt="x", tag="", seed=0, scores={"ocr": 1.0}, details={"ocr/exact": 1.0})
    assert summarise([plain], {0: IMAGE}, seconds=0).right == {}


def test_a_reward_that_was_never_had_is_counted_and_has_no_mean() -> None:
    lines = scored([NAN, NAN], [NAN, NAN], (0, "a"), (1, "b"))
    result = summarise(lines, {}, seconds=0)
    assert result.metrics == {}
    assert result.counts["geneval"] == 0
    found = json.loads(json.dumps(summarise_results(lines)))
    assert found["geneval"] == {"mean": None, "low": None, "high": None, "count": 0, "missing": 2}


def test_both_summaries_have_the_same_means_to_the_bit() -> None:
    values = np.random.default_rng(0).random(480).astype(np.float32)
    lines = [
        LineResult(line=i, prompt="x", tag="", seed=i, scores={"ocr": json.loads(json.dumps(float(value)))}, details={})
        for i, value in enumerate(values)
    ]
    mean = float(values.astype(np.float64).mean())
    assert summarise_results(lines)["ocr"]["mean"] == summarise(lines, {}, seconds=0).metrics["ocr"] == mean
    assert (summarise_results(lines)["ocr"]["count"], summarise_results(lines)["ocr"]["missing"]) == (480, 0)


@pytest.mark.parametrize(
    ("rewards", "wanted"),
    [
        ({"geneval": {"detector": "shapes"}, "jpeg_compressibility": {}}, "geneval/strict"),
        ({"jpeg_compressibility": {"eval_only": True}, "jpeg_incompressibility": {}}, "jpeg_incompressibility"),
    ],
)
def test_one_metric_stands_for_all(rewards: dict[str, object], wanted: str) -> None:
    assert headline(fake_config(rewards=rewards)) == wanted
