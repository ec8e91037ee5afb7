"""GenEval's rule against the published verdicts, and the reward around it with a detector of our own."""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from nft_ray.rewards._detections import Asked, Box
from nft_ray.rewards.base import check_lines, load_reward, reward_config, reward_files
from nft_ray.rewards.geneval import GenEval, GenEvalResult, evaluate, relations, select
from nft_ray.shapes.grammar import TAGS
from nft_ray.shapes.grammar import test_lines as held_out_lines
from nft_ray.shapes.world import render, sample_scene

Found = dict[str, list[tuple[Box, float]]]


def judge_golden(case: dict[str, Any]) -> tuple[GenEvalResult, Found]:
    found = {name: [(tuple(box[:4]), box[4]) for box in boxes] for name, boxes in case["detections"].items()}
    colors = {
        (name, tuple(box[:4])): color
        for name, boxes in case["detections"].items()
        for box, color in zip(boxes, case["box_colors"][name], strict=True)
    }
    selected = select(found, case["metadata"]["tag"])
    return evaluate(selected, case["metadata"], lambda name, boxes: [colors[name, box] for box in boxes]), selected


def test_goldens_and_the_two_differences_on_purpose(goldens: Path) -> None:
    cases = json.loads((goldens / "geneval.json").read_text())
    assert len(cases) == 400
    same = wrong_position = clipped = 0
    for case in cases:
        result, selected = judge_golden(case)
        assert result.strict == bool(case["strict"])
        assert result.correct == bool(case["correct"])
        assert result.correct or not result.strict
        assert bool(result.reason) != result.strict
        assert 0 <= result.score <= 1

        include = case["metadata"]["include"]
        counts = [(clause["count"], len(selected.get(clause["class"], []))) for clause in include]
        num_terms = sum(1 + ("color" in clause or "position" in clause) for clause in include)
        below_zero = [1 - abs(wanted - found) / wanted for wanted, found in counts if found > 2 * wanted]
        if case["metadata"]["tag"] == "position" and not case["strict"] and all(w == f for w, f in counts):
            wrong_position += 1  # every count is right: the published sum holds a 1.0 too many, appended after the 0.0
            expected = (case["score"] * (num_terms + 1) - 1) / num_terms
        elif below_zero:
            clipped += 1
            expected = case["score"] - sum(below_zero) / num_terms
        else:
            same += 1
            expected = case["score"]
        assert result.score == pytest.approx(expected, abs=1e-9), case
    assert (same, wrong_position, clipped) == (377, 21, 2)


CUP, DOG = ((0.0, 0.0, 10.0, 10.0), 0.9), ((40.0, 0.0, 50.0, 10.0), 0.8)
FAR = ((40.0, 40.0, 50.0, 50.0), 0.7)


def no_colors(name: str, boxes: list[Box]) -> list[str]:
    raise AssertionError("no colour was asked for")


def test_sixteen_found_where_one_is_wanted_earns_nothing_but_not_less() -> None:
    line = {"include": [{"class": "cup", "count": 1}, {"class": "dog", "count": 1}]}
    result = evaluate({"cup": [CUP] * 16, "dog": [DOG]}, line, no_colors)
    assert (result.score, result.correct, result.strict) == (0.5, True, False)
    assert result.reason == "expected 1 cup, found 16"


@pytest.mark.parametrize(
    ("relation", "score", "strict"),
    [("right of", 1.0, True), ("left of", 2 / 3, False), ("above", 2 / 3, False), ("below", 2 / 3, False)],
)
def test_a_wrong_position_earns_nothing(relation: str, score: float, strict: bool) -> None:
    line = {"include": [{"class": "cup", "count": 1}, {"class": "dog", "count": 1, "position": [relation, 0]}]}
    result = evaluate({"cup": [CUP], "dog": [DOG]}, line, no_colors)
    assert result.score == pytest.approx(score)
    assert result.strict == result.correct == strict


def test_every_pair_must_stand_as_asked_for() -> None:
    line = {"include": [{"class": "cup", "count": 1}, {"class": "dog", "count": 2, "position": ["right of", 0]}]}
    near = ((-40.0, 0.0, -30.0, 10.0), 0.6)
    assert evaluate({"cup": [CUP], "dog": [DOG, DOG]}, line, no_colors).strict
    wrong = evaluate({"cup": [CUP], "dog": [DOG, near]}, line, no_colors)
    assert (wrong.score, wrong.correct) == (pytest.approx(2 / 3), False)


def test_no_target_is_said() -> None:
    line = {"include": [{"class": "cup", "count": 1}, {"class": "dog", "count": 1, "position": ["right of", 0]}]}
    result = evaluate({"dog": [DOG]}, line, no_colors)
    assert result.score == pytest.approx(1 / 3)
    assert result.reason == "expected 1 cup, found 0; no target for dog to be right of"


def test_colors_are_asked_once_for_the_surest_and_give_partial_credit() -> None:
    asked: list[tuple[str, int]] = []

    def colors_of(name: str, boxes: list[Box]) -> list[str]:
        asked.append((name, len(boxes)))
        return ["red", "blue", "red"][: len(boxes)]

    line = {"include": [{"class": "cup", "count": 2, "color": "red"}]}
    partial = evaluate({"cup": [CUP, DOG]}, line, colors_of)
    assert (partial.score, partial.correct, partial.strict) == (0.75, False, False)
    assert partial.reason == "expected 2 red cup, found red, blue"
    assert asked == [("cup", 2)]

    assert evaluate({"cup": [CUP]}, line, no_colors).score == 0.25
    surplus = evaluate({"cup": [CUP, DOG, FAR]}, {"include": [{"class": "cup", "count": 1, "color": "red"}]}, colors_of)
    assert (surplus.score, surplus.correct, surplus.strict) == (0.0, True, False)
    assert asked[1:] == [("cup", 1)]


def test_an_excluded_object_spoils_the_verdict_not_the_score() -> None:
    line = {"include": [{"class": "cup", "count": 1}], "exclude": [{"class": "dog", "count": 1}]}
    result = evaluate({"cup": [CUP], "dog": [DOG]}, line, no_colors)
    assert (result.score, result.correct, result.strict) == (1.0, False, False)
    assert result.reason == "expected fewer than 1 dog, found 1"


@pytest.mark.parametrize(
    ("a", "expected"),
    [
        ((-30, 0, -20, 10), {"left of"}),
        ((30, 0, 40, 10), {"right of"}),
        ((0, -30, 10, -20), {"above"}),
        ((0, 30, 10, 40), {"below"}),
        ((30, 30, 40, 40), {"right of", "below"}),
        ((30, 10, 40, 20), {"right of"}),
        ((2, 0, 12, 10), set()),  # within a tenth of the summed sizes
        ((0, 0, 10, 10), set()),
    ],
)
def test_relations(a: Box, expected: set[str]) -> None:
    assert relations(a, (0, 0, 10, 10)) == expected


def test_select_thresholds_order_and_limit() -> None:
    boxes = [(float(i), 0.0, 1.0, 1.0) for i in range(20)]
    found = {"cup": [(boxes[0], 0.3), (boxes[1], 0.31), (boxes[2], 0.95), (boxes[3], 0.9)], "dog": [(boxes[4], 0.1)]}
    assert select(found, "colors") == {"cup": [(boxes[2], 0.95), (boxes[3], 0.9), (boxes[1], 0.31)]}
    assert select(found, "counting") == {"cup": [(boxes[2], 0.95)]}
    ties = select({"cup": [(box, 0.5) for box in boxes]}, "colors")["cup"]
    assert [box for box, _ in ties] == boxes[:3:-1]  # the 16 last, the last first


BAD_METADATA = [
    ({}, "metadata.include: missing"),
    ({"include": []}, r"metadata.include = \[\]: List should have at least 1 item"),
    ({"include": [{"class": "cup", "count": 0}]}, "metadata.include.0.count = 0: Input should be greater than 0"),
    ({"include": [{"class": "cup", "count": 1, "colour": "red"}]}, "metadata.include.0.colour: unknown key"),
    ({"include": [{"class": "cup", "count": 1, "position": ["near", 0]}]}, "metadata.include.0.position.0 = 'near'"),
    ({"include": [{"class": "cup", "count": 1, "position": ["above", 0]}]}, "must be an earlier clause, not 0"),
]


@pytest.mark.parametrize(("line", "message"), BAD_METADATA)
def test_metadata_that_is_not_genevals_takes_one_line(line: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"not GenEval metadata: .*{message}") as error:
        evaluate({}, line, no_colors)
    assert "\n" not in str(error.value)


@dataclass(frozen=True)
class FakeDetections:
    """A pixel's red is a cup's confidence in percent, its green a dog's; the mean blue is the colour of everything."""

    image: np.ndarray

    @property
    def objects(self) -> Found:
        red, green = (self.image[..., channel].ravel() for channel in (0, 1))
        box = (0.0, 0.0, 1.0, 1.0)
        return {"cup": [(box, v / 100) for v in red if v], "dog": [(box, v / 100) for v in green if v]}


class FakeDetector:
    """Notes how often it is asked, and how much about colours: (class, number of boxes) of each question."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.asked: list[list[tuple[str, int]]] = []

    def detect(self, images: np.ndarray) -> list[FakeDetections]:
        self.batches.append(len(images))
        return [FakeDetections(image) for image in images]

    def colors_of(self, asked: Sequence[Asked[FakeDetections]]) -> list[list[str]]:
        self.asked.append([(one.class_name, len(one.boxes)) for one in asked])
        return [["blue" if one.detections.image[..., 2].any() else "black"] * len(one.boxes) for one in asked]


def image(cups: list[int], blue: int = 0) -> np.ndarray:
    pixels = np.zeros((4, 4, 3), dtype=np.uint8)
    pixels[0, : len(cups), 0] = cups
    pixels[..., 2] = blue
    return pixels


def test_the_reward_applies_the_threshold_of_the_tag() -> None:
    images = np.stack([image([95, 50]), image([95, 50]), image([50], blue=9), image([50]), image([20])])
    one = {"class": "cup", "count": 1}
    lines = [
        {"tag": "counting", "include": [one]},
        {"tag": "single_object", "include": [one]},
        {"tag": "colors", "include": [one | {"color": "blue"}]},
        {"tag": "colors", "include": [one | {"color": "blue"}]},
        {"tag": "single_object", "include": [one]},
    ]
    scores = GenEval(FakeDetector()).score(images, ["p"] * 5, lines)
    assert scores.values.tolist() == [1.0, 0.0, 1.0, 0.5, 0.0]
    assert scores.details["strict"].tolist() == [1.0, 0.0, 1.0, 0.0, 0.0]
    assert scores.details["correct"].tolist() == [1.0, 1.0, 1.0, 0.0, 0.0]
    assert {array.dtype for array in (scores.values, *scores.details.values())} == {np.dtype(np.float32)}


@pytest.mark.parametrize("line", [line for line, _ in BAD_METADATA] + [{"include": [{"class": "cup", "count": 1}]}])
def test_the_reward_says_that_a_prompt_has_no_geneval_metadata(line: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="not GenEval metadata"):
        GenEval(FakeDetector()).score(image([50])[None], ["p"], [line])


def test_a_batch_is_detected_at_once_and_all_its_colours_are_asked_at_once() -> None:
    cup = {"class": "cup", "count": 1, "color": "blue"}
    both = {"tag": "color_attr", "include": [cup, {"class": "dog", "count": 1, "color": "black"}]}
    seen = image([50], blue=9)
    seen[1, 0, 1] = 60  # a dog
    images = np.stack([seen, image([50]), image([50]), image([50, 60], blue=9), image([20], blue=9)])
    plain = {"tag": "single_object", "include": [{"class": "cup", "count": 1}]}
    two = {"tag": "colors", "include": [cup | {"count": 2}]}
    lines = [both, {"tag": "colors", "include": [cup]}, plain, two, {"tag": "colors", "include": [cup]}]
    detector = FakeDetector()
    scores = GenEval(detector).score(images, ["p"] * 5, lines)
    assert detector.batches == [5]
    assert detector.asked == [[("cup", 1), ("dog", 1), ("cup", 1), ("cup", 2)]]
    assert scores.values.tolist() == [0.75, 0.5, 1.0, 1.0, 0.0]
    alone = [GenEval(FakeDetector()).score(images[i : i + 1], ["p"], lines[i : i + 1]).values[0] for i in range(5)]
    assert scores.values.tolist() == alone

    detector.asked.clear()
    GenEval(detector).score(images[2:3], ["p"], [plain])
    assert detector.asked == []
    assert GenEval(detector).score(images[:0], [], []).details["strict"].shape == (0,)
    assert detector.batches == [5, 1]


def test_the_score_may_be_the_strict_one() -> None:
    line = {"tag": "counting", "include": [{"class": "cup", "count": 2}]}
    one = image([95])[None]
    assert GenEval(FakeDetector(), "soft").score(one, ["p"], [line]).values.tolist() == [0.5]
    assert GenEval(FakeDetector(), "strict").score(one, ["p"], [line]).values.tolist() == [0.0]


def test_lines_are_checked_before_anything_starts() -> None:
    good = {"tag": "counting", "include": [{"class": "cup", "count": 2}]}
    config = reward_config("geneval", {"detector": "mask2former"})
    check_lines("geneval", [("two cups", good)], config)
    with pytest.raises(
        ValueError, match=r"rewards\.geneval: prompt 'a sign': not GenEval metadata: metadata\.tag: miss"
    ):
        check_lines("geneval", [("two cups", good), ("a sign", {})], config)
    with pytest.raises(ValueError, match=r"prompt 'no cup': not GenEval metadata: metadata\.include\.0\.count = 0"):
        check_lines("geneval", [("no cup", {"tag": "counting", "include": [{"class": "cup", "count": 0}]})], config)


@pytest.mark.parametrize(
    ("detector", "clause", "message"),
    [
        ("shapes", {"class": "cup"}, r"include\.0\.class = 'cup': detector shapes never .*circle.*mask2former"),
        ("shapes", {"class": "cross", "color": "pink"}, r"include\.0\.color = 'pink': detector shapes never.* red, "),
        ("mask2former", {"class": "circle"}, r"class = 'circle': detector mask2former never .*person, .*, \.\.\.;"),
    ],
)
def test_what_the_detector_never_finds_is_refused(detector: str, clause: dict[str, str], message: str) -> None:
    line = {"tag": "colors", "include": [{"count": 1, **clause}]}
    check_lines("geneval", [("p", line)], None)  # deployed: whoever deployed it knows the detector
    with pytest.raises(ValueError, match=message):
        check_lines("geneval", [("p", line)], reward_config("geneval", {"detector": detector}))


def test_shapes_needs_no_files_mask2former_four() -> None:
    shapes, real = (reward_config("geneval", {"detector": detector}) for detector in ("shapes", "mask2former"))
    assert reward_files("geneval", shapes) == ()
    assert [file.path for file in reward_files("geneval", real)] == [
        "facebook/mask2former-swin-small-coco-instance/config.json",
        "facebook/mask2former-swin-small-coco-instance/preprocessor_config.json",
        "facebook/mask2former-swin-small-coco-instance/model.safetensors",
        "timm/vit_large_patch14_clip_224.openai/open_clip_model.safetensors",
    ]
    assert real.memory_gib > 10 * shapes.memory_gib
    assert reward_config("geneval", {"detector": "mask2former", "memory_gib": 9.0}).memory_gib == 9.0


def test_the_detector_has_no_default_and_absent_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"rewards\.geneval\.detector: missing"):
        reward_config("geneval", {})
    with pytest.raises(ValueError, match=r"config\.json is missing \(and 3 more\): run `nft-ray rewards fetch gen"):
        load_reward("geneval", {"detector": "mask2former", "weights": str(tmp_path)})


def test_shapes_needs_no_torch() -> None:
    script = (
        "import sys; from nft_ray.rewards.base import load_reward; load_reward('geneval', {'detector': 'shapes'});"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_the_shapes_detector_sees_what_the_world_draws() -> None:
    lines = [line for tag in TAGS for line in [one for one in held_out_lines() if one["tag"] == tag][:8]]
    assert len(lines) == 8 * len(TAGS)
    drawn = np.stack([render(sample_scene(line, Random(i))) for i, line in enumerate(lines)])
    reward = load_reward("geneval", {"detector": "shapes"})
    prompts = [line["prompt"] for line in lines]

    seen = reward.score(drawn, prompts, lines)
    assert seen.details["strict"].mean() >= 0.95
    assert (seen.values[seen.details["strict"] == 1] == 1).all()

    other = reward.score(np.roll(drawn, 8, axis=0), prompts, lines)  # every prompt with the image of another tag
    assert other.details["strict"].mean() < 0.2
    assert reward.score(np.full_like(drawn, 244), prompts, lines).values.max() == 0
