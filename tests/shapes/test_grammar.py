"""The prompt files: what they hold and that nothing held out leaks into training."""

from collections import Counter

import pytest

from nft_ray.rewards.geneval import evaluate
from nft_ray.shapes import grammar
from nft_ray.shapes.grammar import HELD_OUT_TAGS, TAGS, combination
from nft_ray.shapes.world import COLORS, SHAPES


def test_the_files_are_what_the_code_generates() -> None:
    assert grammar.TRAIN_PATH.read_text() == grammar.to_jsonl(grammar.train_lines())
    assert grammar.TEST_PATH.read_text() == grammar.to_jsonl(grammar.test_lines())


def test_every_tag_has_its_lines() -> None:
    assert Counter(line["tag"] for line in grammar.test_lines()) == dict.fromkeys(TAGS, 80)
    assert Counter(line["tag"] for line in grammar.train_lines()) == grammar.NUM_TRAIN_LINES
    assert Counter(line["tag"] for line in grammar.pretraining_lines()) == dict.fromkeys(TAGS, 480)


@pytest.mark.parametrize("tag", HELD_OUT_TAGS)
def test_no_held_out_combination_is_trained_on(tag: str) -> None:
    train = {combination(line) for line in grammar.train_lines() if line["tag"] == tag}
    test = {combination(line) for line in grammar.test_lines() if line["tag"] == tag}
    assert not train & test
    everything = {combination(line) for line in grammar.all_prompts(tag)}
    assert 0.15 <= len(grammar.held_out(tag)) / len(everything) <= 0.25
    assert train == everything - grammar.held_out(tag)
    assert test <= grammar.held_out(tag)


@pytest.mark.parametrize("tag", TAGS)
def test_train_prompts_of_a_tag_are_equally_frequent(tag: str) -> None:
    counts = Counter(line["prompt"] for line in grammar.train_lines() if line["tag"] == tag)
    assert max(counts.values()) - min(counts.values()) <= 1


def test_the_order_of_words_does_not_make_another_combination() -> None:
    prompts = {line["prompt"]: line for tag in TAGS for line in grammar.all_prompts(tag)}
    for a, b in (
        ("a circle and a cross", "a cross and a circle"),
        ("a circle left of a square", "a square right of a circle"),
        ("a circle above a square", "a square below a circle"),
        ("a red circle and a blue square", "a blue square and a red circle"),
    ):
        assert combination(prompts[f"a photo of {a}"]) == combination(prompts[f"a photo of {b}"])
    assert combination(prompts["a photo of a circle left of a square"]) != combination(
        prompts["a photo of a square left of a circle"]
    )
    assert combination(prompts["a photo of a red circle and a blue square"]) != combination(
        prompts["a photo of a blue circle and a red square"]
    )


@pytest.mark.parametrize("tag", HELD_OUT_TAGS)
def test_every_word_stays_learnable(tag: str) -> None:
    def words(lines: list[grammar.Metadata]) -> set[str]:
        return {word for line in lines for word in line["prompt"].split()}

    train, test = grammar.split(tag)
    assert words(test) <= words(train)


def test_prompts_read_like_genevals() -> None:
    prompts = {line["prompt"] for line in grammar.train_lines() + grammar.test_lines()}
    assert {
        "a photo of a circle",
        "a photo of an orange cross",
        "a photo of three crosses",
        "a photo of four diamonds",
        "a photo of a circle and a square",
    } <= prompts


def test_metadata_is_genevals() -> None:
    for line in grammar.train_lines() + grammar.test_lines():
        assert set(line) == {"tag", "include", "prompt"}
        assert not evaluate({}, line, lambda name, boxes: []).strict
        for clause in line["include"]:
            assert clause["class"] in SHAPES
            assert clause.get("color", "red") in COLORS
