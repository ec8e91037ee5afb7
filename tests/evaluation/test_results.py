"""The folder of one evaluation: whole lines only, one evaluation only, nothing else touched."""

import errno
import fcntl
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nft_ray.config import differences
from nft_ray.evaluation.results import EvaluationFolder, LineResult, identity, line_results, read_results
from nft_ray.prompts.draw import PromptSet
from nft_ray.rewards.base import Scores
from nft_ray.rewards.combine import assemble
from nft_ray.types import Prompt, RolloutItem, RolloutRequest
from tests.examples import example_config

WHAT = {"evaluation": {"seed": 0, "guidance": 1.0}, "lora": None}


def result(line: int, score: float | None = 0.1, tag: str = "") -> LineResult:
    return LineResult(
        line=line, prompt="Füße \u2028", tag=tag, seed=line, scores={"ocr": score}, details={"ocr/x": 1.0}
    )


def test_lines_come_back_and_stand_in_order_in_the_end(tmp_path: Path) -> None:
    folder = EvaluationFolder(tmp_path)
    folder.append([result(2), result(3)])
    folder.append([result(0, None), result(1)])
    assert [line.line for line in folder.results()] == [2, 3, 0, 1]
    folder.replace(folder.results())
    assert folder.results() == [result(0, None), result(1), result(2), result(3)]
    assert '"scores": {"ocr": null}' in (tmp_path / "results.jsonl").read_text()


@pytest.mark.parametrize("cut", [1, 5, 30])
def test_what_is_torn_or_damaged_is_left_out(cut: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder, file = EvaluationFolder(tmp_path), tmp_path / "results.jsonl"
    folder.append([result(0), result(1)])
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) - cut])
    assert folder.results() == ([result(0), result(1)] if cut == 1 else [result(0)])
    assert not caplog.records, "that is what a kill leaves"
    file.write_bytes(b'"x\x00\xff\n7\n' + whole[cut + 1 :])
    assert folder.results() == [result(1)]
    (warning,) = caplog.records
    assert warning.getMessage() == f"{file}: 3 damaged lines are left out (the first: line 1)"
    with pytest.raises(ValueError, match="line 1: is no result"):
        read_results(tmp_path)


def test_another_evaluation_is_refused_with_what_differs(tmp_path: Path) -> None:
    folder = EvaluationFolder(tmp_path / "new")
    with folder.claim(WHAT, {}, overwrite=False):
        folder.append([result(0)])
    other = {"evaluation": {"seed": 0, "guidance": 4.5}, "lora": None}
    with (
        pytest.raises(ValueError, match=r"differs in: evaluation.guidance = 1.0 there, 4.5 here\).*--overwrite"),
        folder.claim(other, {}, overwrite=False),
    ):
        pass
    (folder.path / "mine.txt").write_text("kept")
    folder.save_image(0, np.zeros((2, 2, 3), np.uint8))
    with folder.claim(other, {}, overwrite=True):
        assert folder.results() == []
        assert not folder.image_path(0).exists()
    assert (folder.path / "mine.txt").read_text() == "kept"


def test_it_is_known_whether_a_folder_may_go_on(tmp_path: Path) -> None:
    folder = EvaluationFolder(tmp_path)
    assert not folder.holds(WHAT)
    with folder.claim(WHAT, {}, overwrite=False):
        pass
    assert folder.holds(WHAT)
    assert not folder.holds(WHAT | {"lora": {"checksum": "another"}})
    (tmp_path / "evaluation.json").write_text("{")
    assert not folder.holds(WHAT)


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    folder = EvaluationFolder(tmp_path)
    with (
        folder.claim(WHAT, {}, overwrite=False),
        pytest.raises(ValueError, match="another evaluation is at work"),
        folder.claim(WHAT, {}, overwrite=False),
    ):
        pass


def test_where_the_file_system_has_no_locks_it_goes_on_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Some network file systems: a training run must not end at its first evaluation."""

    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    folder = EvaluationFolder(tmp_path)
    with folder.claim(WHAT, {}, overwrite=False):
        folder.append([result(0)])
    assert folder.results() == [result(0)]
    assert "No locks available" in caplog.text


def test_results_without_their_identity_are_not_gone_on_with(tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").write_text("")
    with (
        pytest.raises(ValueError, match="without evaluation"),
        EvaluationFolder(tmp_path).claim(WHAT, {}, overwrite=False),
    ):
        pass
    with pytest.raises(ValueError, match="holds no results"):
        read_results(tmp_path / "nowhere")


def test_an_image_comes_back(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    folder = EvaluationFolder(tmp_path)
    folder.save_image(123, image)
    assert [path.name for path in (tmp_path / "images").iterdir()] == ["000123.png"]
    np.testing.assert_array_equal(folder.image(123), image)


@pytest.mark.parametrize("left", [0, 4, 40, 200, -6])
def test_a_picture_that_is_cut_off_is_none(left: int, tmp_path: Path) -> None:
    folder = EvaluationFolder(tmp_path)
    assert not folder.has_image(3)
    folder.save_image(3, np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8))
    assert folder.has_image(3)
    whole = folder.image_path(3).read_bytes()
    folder.image_path(3).write_bytes(whole[:left])
    assert not folder.has_image(3)
    folder.image_path(3).write_bytes(whole[:100] + b"\x00\x00" + whole[102:])
    assert not folder.has_image(3)


def test_a_picture_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, flushed = EvaluationFolder(tmp_path), list[int]()

    def fsync(file: int) -> None:
        assert not folder.image_path(3).exists()
        flushed.append(os.fstat(file).st_size)

    monkeypatch.setattr(os, "fsync", fsync)
    folder.save_image(3, np.zeros((4, 4, 3), np.uint8))
    assert flushed == [folder.image_path(3).stat().st_size]


def test_a_missing_reward_is_null_and_counted() -> None:
    items = tuple(
        RolloutItem(group_id=i, prompt=Prompt(id=i, text="x", metadata={"tag": "t"}), seeds=(i,)) for i in range(2)
    )
    request = RolloutRequest(epoch=0, items=items, adapter="ema", policy_version=0, split="eval")
    scores = Scores(values=np.array([0.1, np.nan], np.float32), details={"x": np.array([1, np.nan], np.float32)})
    lines = line_results(request, assemble({"ocr": scores, "gone": None}, 2, {"ocr": 1.0}))
    assert lines[0].scores == {"gone": None, "ocr": float(np.float32(0.1))}
    assert lines[1].scores == {"gone": None, "ocr": None}
    assert lines[1].details == {"ocr/x": None}
    assert [line.missing for line in lines] == [["gone"], ["gone", "ocr"]]


def test_placement_is_no_part_of_an_evaluation_and_rounding_is() -> None:
    def of(*overrides: str) -> dict[str, Any]:
        return identity(example_config(*overrides), prompts, None, None)

    prompts = PromptSet(lines=(Prompt(id=0, text="x"),))
    placed = ("sampler.micro_batch_size=3", "sampler.compile=true", "model.precomputed=/x", "evaluation.every=7")
    assert of(*placed, "rewards.geneval.device=cpu", "rewards.geneval.weight=3", "learner.num_workers=7") == of()
    for key, value in {
        "model.dtype": "bfloat16",
        "sampler.lora": "merged",
        "evaluation.batch_size": 3,
        "rewards.geneval.dtype": "bfloat16",
        "rewards.geneval.credit": "soft",
    }.items():
        assert differences(of(), of(f"{key}={value}")) == [key]
