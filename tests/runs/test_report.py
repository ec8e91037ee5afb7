"""Pictures, curve, table and summary of a finished run."""

import json
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFont

from nft_ray.runs import report
from nft_ray.shapes.grammar import TAGS, all_prompts
from nft_ray.shapes.world import render, sample_scene
from nft_ray.types import EvalResult
from tests.examples import example_config

RED = np.broadcast_to(np.uint8([255, 0, 0]), (32, 32, 3)).copy()
BLUE = np.broadcast_to(np.uint8([0, 0, 255]), (32, 32, 3)).copy()


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def places_of(part: np.ndarray, image: np.ndarray) -> list[tuple[int, int]]:
    height, width = part.shape[:2]
    rows, columns = image.shape[0] - height + 1, image.shape[1] - width + 1
    match = np.ones((rows, columns), dtype=bool)
    for y in range(0, height, 20):  # a few pixels say where it may be, all of them where it is
        for x in range(0, width, 20):
            match &= (image[y : y + rows, x : x + columns] == part[y, x]).all(axis=2)
    return [(y, x) for y, x in np.argwhere(match) if np.array_equal(image[y : y + height, x : x + width], part)]


def rows_with(image: np.ndarray, color: tuple[int, int, int]) -> np.ndarray:
    return np.flatnonzero((image == color).all(axis=2).any(axis=1))


def test_base_stands_above_trained_enlarged_five_times(tmp_path: Path) -> None:
    report.before_after({3: RED}, {3: BLUE}, {3: "a photo of a circle"}, tmp_path / "a.png")
    image = pixels(tmp_path / "a.png")
    red, blue = rows_with(image, (255, 0, 0)), rows_with(image, (0, 0, 255))
    assert red.max() < blue.min()
    # 160 rows each, less the hairline frame
    assert len(red) == len(blue) == 158


def test_only_lines_in_both_are_shown(tmp_path: Path) -> None:
    prompts = {line: f"prompt {line}" for line in range(3)}
    report.before_after({0: RED, 1: RED}, {1: BLUE, 2: BLUE}, prompts, tmp_path / "one.png")
    report.before_after({0: RED, 1: RED}, {0: BLUE, 1: BLUE}, prompts, tmp_path / "two.png")
    assert Image.open(tmp_path / "two.png").width - Image.open(tmp_path / "one.png").width == 160 + report.GAP
    with pytest.raises(ValueError, match="no line in common"):
        report.before_after({0: RED}, {1: BLUE}, prompts, tmp_path / "none.png")


def test_many_prompts_break_into_even_rows(tmp_path: Path) -> None:
    images = {line: RED for line in range(10)}
    report.before_after(images, images, {line: "x" for line in images}, tmp_path / "a.png")
    image = pixels(tmp_path / "a.png")
    assert image.shape[1] <= report.WIDTH_PX + report.MARGIN
    assert len(rows_with(image, (255, 0, 0))) == 2 * 2 * 158
    assert report.balanced(10, 8) == 5


def test_large_images_keep_their_pixels(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (256, 320, 3), dtype=np.uint8)
    assert np.array_equal(np.asarray(report.enlarged(noise)), noise)
    assert report.enlarged(RED).size == (160, 160)
    report.before_after({0: noise}, {0: noise}, {0: "noise"}, tmp_path / "a.png")
    image = pixels(tmp_path / "a.png")
    assert len(places_of(noise[1:-1, 1:-1], image)) == 2


def test_verdicts_are_drawn_and_differ(tmp_path: Path) -> None:
    for name, pair in {"none": None, "worse": {0: (True, False)}, "better": {0: (False, True)}}.items():
        report.before_after({0: RED}, {0: RED}, {0: "x"}, tmp_path / f"{name}.png", verdicts=pair)
    assert len(rows_with(pixels(tmp_path / "none.png"), report.PASSED)) == 0
    better, worse = pixels(tmp_path / "better.png"), pixels(tmp_path / "worse.png")
    assert rows_with(better, report.FAILED).max() < rows_with(better, report.PASSED).min()
    assert rows_with(worse, report.PASSED).max() < rows_with(worse, report.FAILED).min()


def test_captions_are_wrapped_at_spaces_and_fit() -> None:
    font = ImageFont.load_default(16)
    text = "a photo of a purple triangle and a yellow cross"
    lines = report.wrapped(text, font, 160)
    assert " ".join(lines) == text
    assert len(lines) == 3
    assert max(font.getlength(line) for line in lines) <= 160


def test_a_longer_caption_moves_the_images_down(tmp_path: Path) -> None:
    for name, text in {"short": "x", "long": "a photo of a purple triangle and a yellow cross"}.items():
        report.before_after({0: RED}, {0: RED}, {0: text}, tmp_path / f"{name}.png")
    heights = [rows_with(pixels(tmp_path / f"{name}.png"), (255, 0, 0)).min() for name in ("short", "long")]
    assert heights[1] - heights[0] == 40


def test_contact_sheet_holds_every_line_in_order() -> None:
    sheet = np.asarray(report.contact_sheet({7: BLUE, 2: RED}))
    assert sheet.shape == (160, 2 * 160 + report.GAP, 3)
    assert tuple(sheet[80, 80]) == (255, 0, 0)
    assert tuple(sheet[80, 160 + report.GAP + 80]) == (0, 0, 255)


def test_a_captioned_sheet_holds_prompt_score_and_verdict(tmp_path: Path) -> None:
    large = np.broadcast_to(np.uint8([0, 0, 255]), (600, 300, 3)).copy()
    captions = {2: ["a photo of a circle", "ocr 0.5"], 7: ["x", "ocr 1.0"]}
    report.captioned_sheet({7: large, 2: RED}, captions, tmp_path / "plain.png")
    report.captioned_sheet({7: large, 2: RED}, captions, tmp_path / "judged.png", right={7: True, 2: False})
    plain, judged = pixels(tmp_path / "plain.png"), pixels(tmp_path / "judged.png")
    red = np.argwhere((plain == (255, 0, 0)).all(axis=2))
    blue = np.argwhere((plain == (0, 0, 255)).all(axis=2))
    assert red[:, 1].max() < blue[:, 1].min(), "by line"
    assert np.ptp(red, axis=0).tolist() == [157, 157]  # 160, less the hairline frame
    assert np.ptp(blue, axis=0).tolist() == [253, 125]  # made smaller to 256 x 128
    assert red[:, 0].min() - report.MARGIN > 40, "three lines of caption stand above"
    assert len(rows_with(plain, report.PASSED)) == len(rows_with(plain, report.FAILED)) == 0
    assert len(rows_with(judged, report.PASSED)) > 200
    assert len(rows_with(judged, report.FAILED)) > 100


def test_the_table_of_an_evaluation_says_how_sure_it_is() -> None:
    row = {"mean": 0.5, "low": 0.4, "high": 0.6, "count": 90, "missing": 0}
    summary = {name: row for name in ("geneval", "geneval/strict", "geneval/strict/colors", "geneval/colors")}
    lines = report.evaluation_table(summary).splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["geneval", "geneval/strict", "geneval/strict/colors"]
    assert lines[2].split()[1:] == ["90", "0.500", "0.400", "to", "0.600"]
    assert "missing" not in lines[0]
    gone = {"mean": None, "low": None, "high": None, "count": 0, "missing": 90}
    lines = report.evaluation_table(summary | {"ocr": gone}).splitlines()
    assert lines[0].split()[-1] == "missing"
    assert lines[4].split() == ["ocr", "0", "-", "-", "to", "-", "90"]
    tags = {f"geneval/correct/{tag}": row | {"mean": mean} for tag, mean in (("colors", 0.5), ("counting", 0.25))}
    assert report.evaluation_table(summary | tags).splitlines()[-1].endswith("the mean of 2 tags' `correct`: 0.3750")


LINES: list[dict[str, Any]] = [
    {"epoch": 0, "eval/geneval": 0.6, "eval/geneval/strict": 0.5, "eval/geneval/strict/colors": 0.5},
    {"epoch": 1, "reward/geneval": 0.6, "reward/total": 0.6},
    {"epoch": 2, "reward/geneval": None, "reward/total": None},
    {"epoch": 3, "reward/geneval": 0.8, "reward/total": 0.8, "eval/geneval": 0.9, "eval/geneval/strict": 0.85},
]


def test_curve_shows_the_reward_and_its_held_out_counterparts(tmp_path: Path) -> None:
    assert report.curve_names(LINES) == ("reward/geneval", ["eval/geneval", "eval/geneval/strict"])
    report.reward_curve(LINES, tmp_path / "curve.png")
    report.reward_curve(LINES[:3], tmp_path / "shorter.png")
    image = pixels(tmp_path / "curve.png")
    assert image.shape == (630, 1200, 3)
    assert not np.array_equal(image, pixels(tmp_path / "shorter.png"))
    for color in ((26, 115, 232), (217, 48, 37)):
        assert (image == color).all(axis=2).sum() > 300


def test_curves_of_the_same_values_are_one_line_with_both_names(tmp_path: Path) -> None:
    same = [{**line, "eval/geneval/strict": line.get("eval/geneval")} for line in LINES]
    both = ["eval/geneval", "eval/geneval/strict"]
    assert report.distinct_curves(same, both) == [(both, [0, 3], [0.6, 0.9])]
    assert report.distinct_curves(LINES, both) == [(both[:1], [0, 3], [0.6, 0.9]), (both[1:], [0, 3], [0.5, 0.85])]
    assert report.distinct_curves(LINES, ["eval/none"]) == []


def test_every_curve_has_a_style_of_its_own(tmp_path: Path) -> None:
    names = [f"eval/reward{i}" for i in range(8)]
    many = [{"epoch": epoch} | {name: i + epoch / 20 for i, name in enumerate(names)} for epoch in (0, 10)]
    assert report.curve_names(many) == ("reward/total", names)
    assert len({report.curve_style(i) for i in range(len(names))}) == len(names)
    report.reward_curve(many, tmp_path / "many.png")
    report.reward_curve([{k: v for k, v in line.items() if k != names[7]} for line in many], tmp_path / "fewer.png")
    assert not np.array_equal(pixels(tmp_path / "many.png"), pixels(tmp_path / "fewer.png"))


def test_curve_of_other_rewards() -> None:
    one = [{"epoch": 0, "eval/jpeg": 1.0}, {"epoch": 1, "reward/jpeg": 1.0, "reward/total": 2.0}]
    assert report.curve_names(one) == ("reward/jpeg", ["eval/jpeg"])
    two = [*one, {"epoch": 2, "eval/clip": 0.3, "reward/clip": 0.3}]
    assert report.curve_names(two) == ("reward/total", ["eval/clip", "eval/jpeg"])
    judged_only = [{"epoch": 0, "eval/geneval": 0.5, "eval/jpeg": 1.0}, {"epoch": 1, "reward/total": 2.0}]
    assert report.curve_names(judged_only) == ("reward/total", ["eval/geneval", "eval/jpeg"])


BASE = {
    "geneval": 0.61,
    "geneval/colors": 0.7,
    "geneval/two_object": 0.5,
    "geneval/strict": 0.5,
    "geneval/strict/colors": 0.75,
    "geneval/strict/two_object": 0.25,
    "jpeg": -1.5,
    "jpeg/colors": -1.25,
}


def test_table_has_overall_rows_then_the_strict_tags() -> None:
    trained = {name: value + 0.125 for name, value in BASE.items() if name != "jpeg"}
    counts = {name: 480 if name in ("geneval", "geneval/strict") else 80 for name in trained}
    lines = report.table(BASE, trained, counts, shared_tags={"colors"}).splitlines()
    rows = {line[: line.index("  ")]: line.split()[-4:] for line in lines[2:-1]}
    assert list(rows) == [
        "geneval", "geneval/strict", "jpeg",
        "geneval/strict/colors *", "geneval/strict/two_object", "jpeg/colors *",
    ]  # fmt: skip
    assert rows["geneval/strict"] == ["480", "0.500", "0.625", "+0.125"]
    assert rows["geneval/strict/two_object"] == ["80", "0.250", "0.375", "+0.125"]
    assert rows["jpeg"] == ["-", "-1.500", "-", "-"]
    assert lines[-1].startswith("* prompts of this tag also occur in training")
    assert len({len(line) for line in lines[:-1]}) == 1


def test_table_without_shared_tags_has_no_footnote() -> None:
    assert "*" not in report.table(BASE, BASE, {})
    assert "*" not in report.table(BASE, BASE, {}, shared_tags={"counting"})


def test_summary_has_the_promised_keys_and_is_json() -> None:
    base = EvalResult(metrics={"geneval/strict": 0.5}, counts={"geneval/strict": 7}, images={0: RED}, seconds=1.0)
    trained = EvalResult(metrics={"geneval/strict": 0.8}, counts={"geneval/strict": 8}, images={0: BLUE}, seconds=1.0)
    config = example_config("run.seed=5")
    found = json.loads(json.dumps(report.summary(config, {"": (base, trained)}, seconds=12.5, epochs=40)))
    versions = found.pop("versions")
    assert found == {
        "name": "quickstart",
        "base": {"geneval/strict": 0.5},
        "trained": {"geneval/strict": 0.8},
        "counts": {"geneval/strict": 8},
        "seconds": 12.5,
        "epochs": 40,
        "seed": 5,
    }
    assert {"torch", "diffusers", "peft", "transformers", "mlflow", "nft_ray", "python"} <= set(versions)


def test_a_summary_of_stages_has_a_part_for_each_and_the_last_ones_figures() -> None:
    parts = [EvalResult(metrics={"ocr": i / 4}, counts={"ocr": i}, images={}, seconds=1.0) for i in range(4)]
    stages = {"one": (parts[0], parts[1]), "two": (parts[2], parts[3])}
    found = report.summary(example_config(), stages, seconds=1, epochs=2)
    assert (found["base"], found["trained"], found["counts"]) == ({"ocr": 0.5}, {"ocr": 0.75}, {"ocr": 3})
    assert found["stages"]["one"] == {"base": {"ocr": 0.0}, "trained": {"ocr": 0.25}, "counts": {"ocr": 1}}
    assert list(found["stages"]) == ["one", "two"]


def test_pictures_of_the_world_come_out_whole(tmp_path: Path) -> None:
    metadata = {line: all_prompts(tag)[2] for line, tag in enumerate(TAGS)}
    base = {line: render(sample_scene(one, Random(0))) for line, one in metadata.items()}
    trained = {line: render(sample_scene(one, Random(1))) for line, one in metadata.items()}
    report.before_after(base, trained, {line: one["prompt"] for line, one in metadata.items()}, tmp_path / "a.png")
    image = pixels(tmp_path / "a.png")
    for line, picture in trained.items():
        big = np.kron(picture, np.ones((5, 5, 1), dtype=np.uint8))[1:-1, 1:-1]  # without the hairline frame
        assert len(places_of(big, image)) == 1, f"line {line}"
