"""The held-out figures of a run: what was written comes back, and which there are."""

import json
from pathlib import Path

import numpy as np

from nft_ray.runs.evaluations import evaluated_epochs, lines_folder, load_evaluation, save_evaluation
from nft_ray.types import EvalResult

IMAGE = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
RESULT = EvalResult(
    metrics={"geneval": 0.1}, counts={"geneval": 1, "ocr": 0}, images={5: IMAGE}, seconds=2.0, right={5: True}
)


def test_a_saved_evaluation_comes_back(tmp_path: Path) -> None:
    save_evaluation(tmp_path, 10, RESULT)
    back = load_evaluation(tmp_path, 10)
    assert (back.metrics, back.counts, back.right, back.seconds) == ({"geneval": 0.1}, RESULT.counts, {5: True}, 2.0)
    np.testing.assert_array_equal(back.images[5], IMAGE)
    target = tmp_path / "evaluations" / "epoch-000010.json"
    figures = json.loads(target.read_text())
    target.write_text(json.dumps({key: value for key, value in figures.items() if key != "right"}))
    assert load_evaluation(tmp_path, 10).right == {}, "runs of an earlier version have no verdicts"


def test_the_epochs_are_those_with_figures(tmp_path: Path) -> None:
    assert evaluated_epochs(tmp_path) == []
    for epoch in (10, 0, 100):
        save_evaluation(tmp_path, epoch, RESULT)
    lines_folder(tmp_path, 110).mkdir()  # killed before its end
    assert evaluated_epochs(tmp_path) == [0, 10, 100]
