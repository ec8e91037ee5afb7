"""How two resolved experiments are compared, and what is said of it."""

from typing import Any

from nft_ray.config import changes, differences, parse, resolved
from tests.fakes import fake_config

STAGES = [{"name": "one", "num_epochs": 1}, {"name": "two", "num_epochs": 1}]


def staged(*stages: dict[str, Any]) -> dict[str, Any]:
    """An experiment of two epochs in stages, resolved."""
    return resolved(parse({**resolved(fake_config()), "stages": stages}))


def test_differences_are_dotted_keys() -> None:
    old = {"a": 1, "b": {"c": 1, "d": [1, 2]}, "gone": 1}
    assert differences(old, {"a": 1, "b": {"c": 2, "d": [2, 2]}, "new": None}) == ["b.c", "b.d", "gone"]
    assert differences(old, old) == []


def test_sections_in_a_list_are_numbered() -> None:
    one = staged(*STAGES)
    two = staged(STAGES[0], STAGES[1] | {"learner": {"learning_rate": 1.0}})
    assert differences(one, two) == ["stages.1.learner.learning_rate"]
    assert changes(one, two, differences(one, two), most=3) == "stages.1.learner.learning_rate = None there, 1.0 here"
    assert differences(one, staged({"name": "one", "num_epochs": 2})) == ["stages"]


def test_what_a_stage_says_nothing_more_of_is_an_empty_section() -> None:
    data = staged({"name": "one", "num_epochs": 2, "rewards": {"jpeg_compressibility": None}})
    assert data["stages"][0]["rewards"] == {"jpeg_compressibility": {}}


def test_many_changes_are_cut_off() -> None:
    old, new = {"a": 1, "b": 1, "c": "x"}, {"a": 2, "b": 2, "c": "y"}
    assert changes(old, new, ["a", "b", "c"], most=2) == "a = 1 there, 2 here; b = 1 there, 2 here; ..."
    assert changes(old, new, ["c"], most=2) == "c = 'x' there, 'y' here"
