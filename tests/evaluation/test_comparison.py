"""Paired differences: line by line, on the same lines and seeds only."""

from dataclasses import replace

import pytest

from nft_ray.evaluation.comparison import compare, comparison_table
from nft_ray.evaluation.results import LineResult

NAMES = ("a", "b")


def lines(*scores: float | None, tags: str = "xxyy") -> list[LineResult]:
    return [
        LineResult(line=i, prompt=f"prompt {i}", tag=tag, seed=100 + i, scores={"ocr": score}, details={})
        for i, (score, tag) in enumerate(zip(scores, tags, strict=True))
    ]


def test_differences_are_taken_line_by_line() -> None:
    pairs = compare(lines(0.0, 0.5, 1.0, 0.5), lines(1.0, 0.5, 0.75, 1.0), NAMES)
    whole = pairs["ocr"]
    assert (whole.a, whole.b, whole.difference) == (0.5, 0.8125, 0.3125)
    assert (whole.better, whole.worse, whole.count, whole.missing) == (2, 1, 4, 0)
    assert whole.low < whole.difference < whole.high
    assert (pairs["ocr/x"].difference, pairs["ocr/y"].difference) == (0.5, 0.125)


def test_pairing_is_narrower_than_two_intervals() -> None:
    a = [i / 40 for i in range(40)]
    (pair, *_) = compare(lines(*a, tags="x" * 40), lines(*(v + 0.1 for v in a), tags="x" * 40), NAMES).values()
    assert pair.low == pytest.approx(0.1)
    assert pair.high == pytest.approx(0.1)
    assert pair.better == 40


def test_lines_of_one_prompt_are_drawn_together() -> None:
    a = [0.0] * 40
    b = [float(i // 10 % 2) for i in range(40)]  # four prompts of ten lines: all better, or all as they were
    same = [
        [replace(line, prompt=f"prompt {i // 10}") for i, line in enumerate(lines(*s, tags="x" * 40))] for s in (a, b)
    ]
    (pair, *_) = compare(*same, NAMES).values()
    assert (pair.low, pair.high) == (0.0, 1.0)


def test_a_line_that_misses_a_score_in_either_is_left_out_and_counted() -> None:
    pairs = compare(lines(0.0, None, 1.0, 0.0), lines(1.0, 1.0, None, 0.0), NAMES)
    assert (pairs["ocr"].count, pairs["ocr"].missing, pairs["ocr"].difference) == (2, 2, 0.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 7}, "line 2: seed is 102 in a and 7 in b"),
        ({"prompt": "other"}, "line 2: prompt is 'prompt 2' in a and 'other' in b"),
    ],
)
def test_other_seeds_or_prompts_cannot_be_paired(change: dict[str, object], message: str) -> None:
    a, b = lines(0, 0, 0, 0), lines(1, 1, 1, 1)
    b[2] = replace(b[2], **change)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        compare(a, b, NAMES)


def test_an_unfinished_evaluation_and_other_rewards_are_refused() -> None:
    with pytest.raises(ValueError, match="a has 4 lines and b has 3"):
        compare(lines(0, 0, 0, 0), lines(1, 1, 1, tags="xxy"), NAMES)
    other = [replace(line, scores={"geneval": 1.0}) for line in lines(1, 1, 1, 1)]
    with pytest.raises(ValueError, match="no metric in common"):
        compare(lines(0, 0, 0, 0), other, NAMES)


def test_the_table_has_a_row_per_metric() -> None:
    shown = comparison_table(compare(lines(0.0, 0.5, 1.0, 0.5), lines(1.0, 0.5, 0.75, 1.0), NAMES)).splitlines()
    assert shown[2].split()[:5] == ["ocr", "4", "0.5000", "0.8125", "+0.3125"]
    assert shown[2].split()[-2:] == ["2", "1"]
    assert [row.split()[0] for row in shown[2:]] == ["ocr", "ocr/x", "ocr/y"]
    assert len({len(line) for line in shown}) == 1
