"""The prompts of the world of shapes, in GenEval's metadata format, split into train and held-out lines.

The unit is a LINE of a file: its index gives the seed, so the same prompt on two lines is two tests, as in GenEval.
In `HELD_OUT_TAGS` every test line asks for a combination that no train line has, in any order of its words: a pair of
shapes, a number of a shape, a pair of shapes with their relation, a pair of coloured shapes. single_object and colors
have too few prompts to hold any out: train and test share them.

    python -m nft_ray.shapes.grammar        writes prompts/train.jsonl and prompts/test.jsonl
"""

import itertools
import json
import logging
from pathlib import Path
from random import Random
from typing import Any

from nft_ray.shapes.world import COLORS, SHAPES

Metadata = dict[str, Any]
Combination = tuple[Any, ...]

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
HELD_OUT_TAGS = ("two_object", "counting", "position", "color_attr")
RELATIONS = ("left of", "right of", "above", "below")
NUMBERS = {2: "two", 3: "three", 4: "four"}
PROMPT_DIR = Path(__file__).parent / "prompts"
TRAIN_PATH = PROMPT_DIR / "train.jsonl"
TEST_PATH = PROMPT_DIR / "test.jsonl"

NUM_PRETRAINING_LINES_PER_TAG = 480
NUM_TRAIN_LINES = {
    "position": 1120,
    "counting": 800,
    "color_attr": 480,
    "two_object": 160,
    "colors": 160,
    "single_object": 160,
}
"""7:5:3:1:1:1, by difficulty, as reinforcement learning on GenEval is published (Flow-GRPO, arXiv 2505.05470, which has
no single objects at all): a prompt that is nearly always right teaches nothing."""
NUM_TEST_LINES_PER_TAG = 80
_SEED = 20250916
_HELD_OUT_PAIRS = (("circle", "cross"), ("square", "triangle"))
_HELD_OUT_COUNTS = (("square", 2), ("circle", 3), ("cross", 4))
_NUM_HELD_OUT = {"position": 8, "color_attr": 60}  # of 40 and 300


def plural(shape: str) -> str:
    """The plural of a shape's name."""
    return shape + ("es" if shape.endswith("s") else "s")


def combination(metadata: Metadata) -> Combination:
    """What a line asks for, whatever the order of its words: equal for "a left of b" and "b right of a"."""
    clauses = metadata["include"]
    tag = metadata["tag"]
    if tag == "position":
        target, placed = clauses
        relation = placed["position"][0]
        axis = "row" if relation in ("left of", "right of") else "column"
        first, second = (placed, target) if relation in ("left of", "above") else (target, placed)
        return (tag, axis, first["class"], second["class"])
    return (tag, *sorted((clause["class"], clause["count"], clause.get("color", "")) for clause in clauses))


def all_prompts(tag: str) -> list[Metadata]:
    """Every prompt of a tag, in a fixed order."""
    pairs = list(itertools.permutations(SHAPES, 2))
    if tag == "single_object":
        return [_line(tag, f"a {shape}", [{"class": shape, "count": 1}]) for shape in SHAPES]
    if tag == "two_object":
        return [_line(tag, f"a {a} and a {b}", [{"class": a, "count": 1}, {"class": b, "count": 1}]) for a, b in pairs]
    if tag == "counting":
        return [
            _line(tag, f"{word} {plural(shape)}", [{"class": shape, "count": count}])
            for shape in SHAPES
            for count, word in NUMBERS.items()
        ]
    if tag == "colors":
        return [
            _line(tag, f"{_article(color)} {color} {shape}", [{"class": shape, "count": 1, "color": color}])
            for color in COLORS
            for shape in SHAPES
        ]
    if tag == "position":
        return [
            _line(
                tag,
                f"a {a} {relation} a {b}",
                [{"class": b, "count": 1}, {"class": a, "count": 1, "position": [relation, 0]}],
            )
            for a, b in pairs
            for relation in RELATIONS
        ]
    if tag == "color_attr":
        return [
            _line(
                tag,
                f"{_article(color_a)} {color_a} {a} and {_article(color_b)} {color_b} {b}",
                [{"class": a, "count": 1, "color": color_a}, {"class": b, "count": 1, "color": color_b}],
            )
            for a, b in pairs
            for color_a, color_b in itertools.permutations(COLORS, 2)
        ]
    raise ValueError(f"unknown tag {tag!r}, known: {', '.join(TAGS)}")


def held_out(tag: str) -> frozenset[Combination]:
    """The combinations of a tag that only test lines ask for; empty outside of `HELD_OUT_TAGS`."""
    prompts = all_prompts(tag)
    if tag == "two_object":
        return frozenset(
            combination(line)
            for line in prompts
            if tuple(clause["class"] for clause in line["include"]) in _HELD_OUT_PAIRS
        )
    if tag == "counting":
        return frozenset(
            combination(line)
            for line in prompts
            if (line["include"][0]["class"], line["include"][0]["count"]) in _HELD_OUT_COUNTS
        )
    if tag in _NUM_HELD_OUT:
        known = sorted({combination(line) for line in prompts})
        return frozenset(Random(f"{_SEED}/held out/{tag}").sample(known, _NUM_HELD_OUT[tag]))
    return frozenset()


def split(tag: str) -> tuple[list[Metadata], list[Metadata]]:
    """The distinct prompts of a tag: (train, test)."""
    prompts, kept = all_prompts(tag), held_out(tag)
    if not kept:
        return prompts, prompts
    return (
        [line for line in prompts if combination(line) not in kept],
        [line for line in prompts if combination(line) in kept],
    )


def pretraining_lines() -> list[Metadata]:
    """What nano-sd3 is pretrained on: as many per tag, in turn; the prompts of a tag equally often, give or take 1."""
    return _interleave({tag: _fill(split(tag)[0], NUM_PRETRAINING_LINES_PER_TAG, f"train/{tag}") for tag in TAGS})


def train_lines() -> list[Metadata]:
    """The lines of train.jsonl, shuffled: the same prompts, the hard tags more often."""
    lines = [line for tag in TAGS for line in _fill(split(tag)[0], NUM_TRAIN_LINES[tag], f"train/{tag}")]
    return Random(f"{_SEED}/train").sample(lines, len(lines))


def test_lines() -> list[Metadata]:
    """The lines of test.jsonl: as many per tag, in turn."""
    return _interleave({tag: _fill(split(tag)[1], NUM_TEST_LINES_PER_TAG, f"test/{tag}") for tag in TAGS})


def words() -> list[str]:
    """Every word of every prompt, sorted: what a tokenizer has to know."""
    return sorted({word for tag in TAGS for line in all_prompts(tag) for word in line["prompt"].split()})


def to_jsonl(lines: list[Metadata]) -> str:
    """The text of a prompt file."""
    return "".join(json.dumps(line) + "\n" for line in lines)


def main() -> None:
    """Write both files."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    PROMPT_DIR.mkdir(exist_ok=True)
    for path, lines in ((TRAIN_PATH, train_lines()), (TEST_PATH, test_lines())):
        path.write_text(to_jsonl(lines))
        logging.info("%s: %d lines, %d distinct", path, len(lines), len({line["prompt"] for line in lines}))


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _line(tag: str, what: str, include: list[dict[str, Any]]) -> Metadata:
    return {"tag": tag, "include": include, "prompt": f"a photo of {what}"}


def _fill(prompts: list[Metadata], num_lines: int, purpose: str) -> list[Metadata]:
    """`num_lines` lines: whole shuffled rounds of the prompts, and a part of one more."""
    rng = Random(f"{_SEED}/{purpose}")
    rounds = itertools.chain.from_iterable(rng.sample(prompts, len(prompts)) for _ in itertools.count())
    return list(itertools.islice(rounds, num_lines))


def _interleave(by_tag: dict[str, list[Metadata]]) -> list[Metadata]:
    return [line for lines in zip(*by_tag.values(), strict=True) for line in lines]


if __name__ == "__main__":
    main()
