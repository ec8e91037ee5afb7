"""Checkpoints are whole or absent, and come back bit for bit. Whose they are: test_claim.py."""

import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import SafetensorError

from nft_ray.config import resolved
from nft_ray.runs import checkpoint as module
from nft_ray.runs.checkpoint import write_atomically
from nft_ray.runs.folder import RunFolder
from nft_ray.types import AdapterWeights, LearnerState
from tests.examples import example_config
from tests.runs.states import learner_state, names

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
NUM_FILES = 7  # policy, ema, optimizer, and old and ema of two versions


def assert_bit_identical(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> None:
    assert sorted(one) == sorted(other)
    for name, value in one.items():
        assert (other[name].shape, other[name].dtype) == (value.shape, value.dtype), name
        assert other[name].tobytes() == value.tobytes(), name


def assert_same_state(one: LearnerState, other: LearnerState) -> None:
    assert (one.version, one.optimizer_step) == (other.version, other.optimizer_step)
    assert sorted(one.versions) == sorted(other.versions)
    for name in ("policy", "ema", "optimizer"):
        assert_bit_identical(getattr(one, name), getattr(other, name))
    for number in one.versions:
        assert_bit_identical(one.versions[number].old, other.versions[number].old)
        assert_bit_identical(one.versions[number].ema, other.versions[number].ema)


class TestSave:
    def test_a_state_comes_back_bit_for_bit(self, tmp_path: Path) -> None:
        folder, state = RunFolder(tmp_path), learner_state()
        path = folder.save(6, state)
        found = RunFolder(tmp_path).latest()
        assert found is not None
        assert (found.epoch, found.path) == (6, path)
        assert_same_state(state, found.state)

    def test_a_scalar_of_the_optimizer_stays_a_scalar(self, tmp_path: Path) -> None:
        folder = RunFolder(tmp_path)
        folder.save(6, learner_state())
        found = folder.latest()
        assert found is not None
        step = found.state.optimizer["step/lora_A"]
        assert (step.shape, step.dtype, float(step)) == ((), np.float32, 12.0)

    def test_a_learner_before_its_first_step_has_no_optimizer_state(self, tmp_path: Path) -> None:
        zero = {"lora": np.zeros(4, dtype=np.float32)}
        versions = {0: AdapterWeights(old=zero, ema=zero)}
        state = LearnerState(version=0, optimizer_step=0, policy=zero, ema=zero, versions=versions, optimizer={})
        RunFolder(tmp_path).save(1, state)
        found = RunFolder(tmp_path).latest()
        assert found is not None
        assert_same_state(state, found.state)

    def test_nothing_is_found_where_nothing_was_saved(self, tmp_path: Path) -> None:
        assert RunFolder(tmp_path / "none").latest() is None
        assert not (tmp_path / "none").exists()

    @pytest.mark.parametrize("keep", [1, 2, 3])
    def test_the_newest_are_kept(self, tmp_path: Path, keep: int) -> None:
        folder = RunFolder(tmp_path, keep=keep)
        for epoch in (8, 9, 10, 11):
            folder.save(epoch, learner_state(epoch))
        assert names(folder) == [f"epoch-{epoch:06d}" for epoch in range(12 - keep, 12)]
        found = folder.latest()
        assert found is not None
        assert (found.epoch, found.state.version) == (11, 11)

    def test_the_same_epoch_again_replaces_it(self, tmp_path: Path) -> None:
        folder = RunFolder(tmp_path)
        folder.save(6, learner_state(5))
        folder.save(6, learner_state(6))
        found = folder.latest()
        assert found is not None
        assert found.state.version == 6
        assert not (found.path / "old-000004.safetensors").exists()

    def test_a_directory_that_is_not_whole_is_no_checkpoint(self, tmp_path: Path) -> None:
        folder = RunFolder(tmp_path, keep=1)
        folder.save(6, learner_state())
        (tmp_path / "checkpoints" / "epoch-000007").mkdir()
        partial = tmp_path / "checkpoints" / "epoch-000008.partial"
        partial.mkdir()
        (partial / "state.json").write_text("{}")
        found = folder.latest()
        assert found is not None
        assert found.epoch == 6
        folder.save(8, learner_state(8))  # what a killed save left is no obstacle
        found = folder.latest()
        assert found is not None
        assert_same_state(learner_state(8), found.state)
        assert not partial.exists()

    def test_the_facts_beside_the_tensors(self, tmp_path: Path) -> None:
        folder, config = RunFolder(tmp_path), example_config()
        folder.claim(config)
        (tmp_path / "mlflow_run_id.txt").write_text("abc123\n")
        facts = json.loads((folder.save(6, learner_state()) / "state.json").read_text())
        assert (facts["epoch"], facts["version"], facts["optimizer_step"], facts["versions"]) == (6, 6, 12, [5, 6])
        assert facts["tracker_run_id"] == "abc123"
        assert facts["config"] == resolved(config)
        assert {"python", "torch", "numpy"} <= set(facts["packages"])
        assert "run.seed" in facts["random_state"]


class TestFailure:
    """A save that fails leaves the earlier checkpoint as it was, nothing of itself, and one clear line."""

    @pytest.mark.parametrize("keep", [1, 2])
    @pytest.mark.parametrize("nth", range(1, NUM_FILES + 1))
    def test_a_full_disk_at_any_file(self, tmp_path: Path, nth: int, keep: int) -> None:
        assert "the disk is full" in failed_save(tmp_path, "save_file", FULL, nth=nth, keep=keep)

    @pytest.mark.parametrize("nth", range(1, NUM_FILES + 3))
    def test_a_full_disk_that_shows_when_files_are_flushed(self, tmp_path: Path, nth: int) -> None:
        assert "the disk is full" in failed_save(tmp_path, "_flush", FULL, nth=nth)

    def test_a_full_disk_while_the_facts_are_written(self, tmp_path: Path) -> None:
        assert "the disk is full" in failed_save(tmp_path, "package_versions", FULL)

    @pytest.mark.parametrize(
        ("error", "what"),
        [
            (SafetensorError("Error: I/O error: No space left on device (os error 28)"), "the disk is full"),
            (SafetensorError("I/O error: File too large (os error 27)"), "the disk is full"),
            (OSError(errno.EDQUOT, "Disk quota exceeded"), "the disk is full"),
            (OSError(errno.EIO, "Input/output\nerror"), "[Errno 5] Input/output error"),
        ],
    )
    def test_the_cause_is_told(self, tmp_path: Path, error: Exception, what: str) -> None:
        line = failed_save(tmp_path, "save_file", error, nth=2)
        assert line.endswith(f"epoch-000007 could not be written: {what}; earlier checkpoints are intact")

    def test_after_the_failure_the_same_epoch_can_be_saved(self, tmp_path: Path) -> None:
        failed_save(tmp_path, "save_file", FULL, nth=3)
        RunFolder(tmp_path).save(7, learner_state(7))
        found = RunFolder(tmp_path).latest()
        assert found is not None
        assert_same_state(learner_state(7), found.state)


def failed_save(path: Path, function: str, error: Exception, *, nth: int = 1, keep: int = 2) -> str:
    """Save epoch 6, then 7 with the n-th call of a function failing half way; the line that says so."""
    folder, count, original = RunFolder(path, keep=keep), 0, getattr(module, function)
    folder.save(6, learner_state(6))

    def replacement(*of: Any) -> Any:
        nonlocal count
        count += 1
        if count < nth:
            return original(*of)
        if function == "save_file":
            of[1].write_bytes(b"half of it")
        raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, function, replacement)
        with pytest.raises(OSError) as raised:
            folder.save(7, learner_state(7))
    assert count == nth
    assert "\n" not in str(raised.value)
    assert names(folder) == ["epoch-000006"]
    found = folder.latest()
    assert found is not None
    assert_same_state(learner_state(6), found.state)
    return str(raised.value)


def test_a_file_is_replaced_or_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "config.yaml"
    write_atomically(target, "one")
    write_atomically(target, "two")
    assert target.read_text() == "two"
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]

    def half(path: Path, text: str) -> int:
        with path.open("w") as file:
            file.write(text[:2])
        raise FULL

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(target, "three")
    assert target.read_text() == "two"
