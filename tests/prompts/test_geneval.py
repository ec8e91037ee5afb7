"""GenEval's template rules: every tag's prompts are different, are worded as GenEval words them, and can be scored."""

from collections import Counter
from random import Random

import pytest

from nft_ray.prompts.geneval import TAGS, line, lines, num_prompts, prompt_of
from nft_ray.rewards.geneval import Config, check_line, evaluate

KNOWN = [
    ({"tag": "single_object", "include": [{"class": "umbrella", "count": 1}]}, "a photo of an umbrella"),
    (
        {"tag": "two_object", "include": [{"class": "bench", "count": 1}, {"class": "oven", "count": 1}]},
        "a photo of a bench and an oven",
    ),
    ({"tag": "counting", "include": [{"class": "bus", "count": 4}]}, "a photo of four buses"),
    ({"tag": "counting", "include": [{"class": "knife", "count": 2}]}, "a photo of two knifes"),
    ({"tag": "colors", "include": [{"class": "cat", "count": 1, "color": "orange"}]}, "a photo of an orange cat"),
    (
        {
            "tag": "position",
            "include": [{"class": "cow", "count": 1}, {"class": "apple", "count": 1, "position": ["right of", 0]}],
        },
        "a photo of an apple right of a cow",
    ),
    (
        {
            "tag": "color_attr",
            "include": [
                {"class": "scissors", "count": 1, "color": "black"},
                {"class": "car", "count": 1, "color": "orange"},
            ],
        },
        "a photo of a black scissors and an orange car",
    ),
]


@pytest.mark.parametrize(("metadata", "prompt"), KNOWN, ids=lambda value: value if isinstance(value, str) else "")
def test_the_words_are_genevals(metadata: dict[str, object], prompt: str) -> None:
    assert prompt_of(metadata) == prompt


@pytest.mark.parametrize("tag", TAGS)
def test_every_index_is_another_prompt_that_can_be_scored(tag: str) -> None:
    total = num_prompts(tag)
    indices = range(total) if total < 1000 else Random(0).sample(range(total), 1000)
    made = [line(tag, index) for index in (0, total - 1, *indices)]
    assert len({one["prompt"] for one in made}) == len(set(indices) | {0, total - 1})
    for one in made:
        check_line(one["prompt"], one, Config(detector="mask2former"))
        assert one["tag"] == tag
        assert "colored" not in one["prompt"]
        assert not any(clause["class"] == "person" and "color" in clause for clause in one["include"])
        assert evaluate({}, one, lambda _, boxes: [""] * len(boxes)).score == 0


def test_what_is_asked_for_is_right_and_one_more_is_wrong() -> None:
    counted = next(one for one in lines(0, 3) if one["tag"] == "counting")
    (clause,) = counted["include"]
    boxes = [((float(i), 0.0, i + 1.0, 1.0), 0.99) for i in range(clause["count"] + 1)]
    exact = evaluate({clause["class"]: boxes[:-1]}, counted, lambda _, found: [""] * len(found))
    assert exact.strict
    more = evaluate({clause["class"]: boxes}, counted, lambda _, found: [""] * len(found))
    assert (more.correct, more.strict) == (False, False)


def test_lines_are_a_function_of_the_seed_and_the_tags_take_turns() -> None:
    made = lines(3, 20)
    assert made == lines(3, 20)
    assert made != lines(4, 20)
    assert [one["tag"] for one in made[:12]] == [*TAGS, *TAGS]
    assert set(Counter(one["tag"] for one in made).values()) == {20}


def test_a_tag_is_never_asked_twice_for_the_same() -> None:
    made = lines(0, 300)
    counts = Counter(one["tag"] for one in made)
    assert counts == {tag: min(300, num_prompts(tag)) for tag in TAGS}
    assert counts["single_object"] == 80
    assert len({one["prompt"] for one in made}) == len(made)
