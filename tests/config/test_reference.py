"""docs/configuration.md is what the fields say."""

from pathlib import Path

from nft_ray.algorithms.base import algorithm_names
from nft_ray.config.reference import reference, rows
from nft_ray.config.sections import ModelConfig
from nft_ray.rewards.base import reward_names
from nft_ray.types import Mark

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"


def test_the_page_is_current() -> None:
    current = PAGE.read_text() == reference()
    assert current, "run: python -m nft_ray.config.reference > docs/configuration.md"


def test_a_row_has_default_mark_and_docstring() -> None:
    found = {row.key: row for row in rows(ModelConfig)}
    assert (found["height"].default, found["height"].mark, found["height"].text) == ("32", Mark.RESULT, "Pixels.")
    assert found["dtype"].mark is Mark.ROUNDING
    assert "lora" not in found
    assert found["lora.rank"].default == "32"


def test_every_setting_is_explained() -> None:
    bare = [line for line in reference().splitlines() if line.endswith("|  |")]
    assert [line for line in bare if not line.startswith("| `name` |")] == []  # of an algorithm, which is its title


def test_every_algorithm_and_every_reward_with_a_setting_of_its_own_is_there() -> None:
    page = reference()
    assert all(f"## algorithm, where name is {name}\n" in page for name in algorithm_names())
    assert [name for name in reward_names() if f"## rewards.{name}\n" not in page] == [
        "jpeg_compressibility",
        "jpeg_incompressibility",
    ]
