"""GenEval's prompts by its template rules: a number stands for a prompt, so a tag's prompts can be counted and drawn.

    (tag, index) --include--> metadata --prompt_of--> "a photo of a dog left of a cup"

A tag has `num_prompts(tag)` of them, all different; `lines` draws from each without replacement. The wording keeps
GenEval's plain rules ("two knifes", "a black scissors"), which models are measured with; like there, a person has no
colour. Source of the rules: Ghosh et al. 2023 (arXiv 2310.11513).
"""

from collections.abc import Mapping, Sequence
from itertools import chain, zip_longest
from random import Random
from typing import Any

from nft_ray.rewards._vocabulary import COLORS, OBJECT_NAMES

Line = dict[str, Any]
"""{"tag", "include": [{"class", "count", "color"?, "position"?}], "exclude"?, "prompt"}: GenEval's metadata."""

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
RELATIONS = ("left of", "right of", "above", "below")
NUMBERS = {2: "two", 3: "three", 4: "four"}
_COLORED = tuple(name for name in OBJECT_NAMES if name != "person")
_PAIRS = len(OBJECT_NAMES) * (len(OBJECT_NAMES) - 1)
_COLORED_PAIRS = len(_COLORED) * (len(_COLORED) - 1)
_COLOR_PAIRS = len(COLORS) * (len(COLORS) - 1)
_NUM_PROMPTS = {
    "single_object": len(OBJECT_NAMES),
    "two_object": _PAIRS,
    "counting": len(OBJECT_NAMES) * len(NUMBERS),
    "colors": len(_COLORED) * len(COLORS),
    "position": _PAIRS * len(RELATIONS),
    "color_attr": _COLORED_PAIRS * _COLOR_PAIRS,
}


def num_prompts(tag: str) -> int:
    """How many different prompts a tag has."""
    return _NUM_PROMPTS[tag]


def line(tag: str, index: int) -> Line:
    """Prompt `index` of a tag, 0 <= index < num_prompts(tag), with its metadata."""
    if tag == "single_object":
        clauses: list[dict[str, Any]] = [_clause(OBJECT_NAMES[index])]
    elif tag == "two_object":
        clauses = [_clause(name) for name in _pair(OBJECT_NAMES, index)]
    elif tag == "counting":
        which, number = divmod(index, len(NUMBERS))
        clauses = [{"class": OBJECT_NAMES[which], "count": tuple(NUMBERS)[number]}]
    elif tag == "colors":
        which, color = divmod(index, len(COLORS))
        clauses = [_clause(_COLORED[which], color=COLORS[color])]
    elif tag == "position":
        pair, relation = divmod(index, len(RELATIONS))
        placed, target = _pair(OBJECT_NAMES, pair)
        clauses = [_clause(target), _clause(placed, position=[RELATIONS[relation], 0])]
    else:
        pair, color_pair = divmod(index, _COLOR_PAIRS)
        colors = _pair(COLORS, color_pair)
        clauses = [_clause(name, color=color) for name, color in zip(_pair(_COLORED, pair), colors, strict=True)]
    made: Line = {"tag": tag, "include": clauses}
    if tag == "counting":  # one more of them would be wrong
        made["exclude"] = [{"class": clauses[0]["class"], "count": clauses[0]["count"] + 1}]
    return made | {"prompt": prompt_of(made)}


def prompt_of(metadata: Mapping[str, Any]) -> str:
    """The words for a line's metadata."""
    first, *others = metadata["include"]
    if metadata["tag"] == "counting":
        return f"a photo of {NUMBERS[first['count']]} {_plural(first['class'])}"
    if metadata["tag"] == "position":
        (placed,) = others
        return f"a photo of {_named(placed)} {placed['position'][0]} {_named(first)}"
    return f"a photo of {' and '.join(_named(clause) for clause in metadata['include'])}"


def lines(seed: int, per_tag: int) -> list[Line]:
    """`per_tag` different prompts of every tag, or all that it has where they are fewer; the tags take turns."""
    drawn = [
        [line(tag, index) for index in Random(f"{seed}/{tag}").sample(range(total), min(per_tag, total))]
        for tag in TAGS
        for total in (num_prompts(tag),)
    ]
    return [made for made in chain.from_iterable(zip_longest(*drawn)) if made is not None]


def _clause(name: str, **more: Any) -> dict[str, Any]:
    return {"class": name, "count": 1, **more}


def _pair(words: Sequence[str], index: int) -> tuple[str, str]:
    """Ordered pair `index` of two different words."""
    first, second = divmod(index, len(words) - 1)
    return words[first], words[second + (second >= first)]


def _named(clause: Mapping[str, Any]) -> str:
    words = f"{clause['color']} {clause['class']}" if "color" in clause else clause["class"]
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _plural(name: str) -> str:
    return f"{name}es" if name.endswith("s") else f"{name}s"
