"""What may happen to a checkpoint that lies there: one line says it, and the whole one beside it is used."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from nft_ray.runs.checkpoint import newest_whole
from nft_ray.runs.export import export_run
from nft_ray.runs.folder import RunFolder
from tests.examples import example_config
from tests.runs.states import learner_state, names

CONFIG = example_config("run.num_epochs=9")
TENSORS = ("policy", "ema", "optimizer", "old-000006", "ema-000006", "old-000007", "ema-000007")


def flipped(file: Path, at: int = -20) -> None:
    """16 other bytes."""
    data = bytearray(file.read_bytes())
    data[at : at + 16 if at + 16 else None] = bytes(255 - byte for byte in data[at : at + 16 if at + 16 else None])
    file.write_bytes(data)


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def emptied(file: Path) -> None:
    os.truncate(file, 0)


def removed(file: Path) -> None:
    file.unlink()


def run_with(path: Path, *epochs: int) -> RunFolder:
    folder = RunFolder(path)
    folder.claim(CONFIG)
    for epoch in epochs:
        folder.save(epoch, learner_state(epoch))
    return folder


def assert_epoch_6_is_used(path: Path, caplog: pytest.LogCaptureFixture, *said: str) -> None:
    found = RunFolder(path).latest()
    assert found is not None
    assert found.epoch == 6
    np.testing.assert_array_equal(found.state.policy["lora_A"], learner_state().policy["lora_A"])
    (record,) = caplog.records
    line = record.getMessage()
    assert "\n" not in line
    for part in ("epoch-000007", "epoch 6, which is whole, is used", *said):
        assert part in line


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize(
    ("damage", "reason"),
    [(flipped, "holds other bytes than were written (sha256)"), (cut, "were written"), (emptied, "has 0 bytes"),
     (removed, "is missing")],
)  # fmt: skip
def test_a_damaged_file_of_tensors(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, damage: Callable[[Path], None], reason: str
) -> None:
    run_with(tmp_path, 6, 7)
    damage(tmp_path / "checkpoints" / "epoch-000007" / f"{name}.safetensors")
    assert_epoch_6_is_used(tmp_path, caplog, f"{name}.safetensors: ", reason)


@pytest.mark.parametrize("damage", [cut, emptied, removed])
def test_damaged_facts(tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None]) -> None:
    run_with(tmp_path, 6, 7)
    damage(tmp_path / "checkpoints" / "epoch-000007" / "state.json")
    assert_epoch_6_is_used(tmp_path, caplog, "state.json: ")


@pytest.mark.parametrize(
    ("key", "value"), [("version", 8), ("optimizer_step", 13), ("versions", [7]), ("files", {}), ("run", "0" * 32)]
)
def test_facts_that_still_are_json(tmp_path: Path, caplog: pytest.LogCaptureFixture, key: str, value: Any) -> None:
    run_with(tmp_path, 6, 7)
    file = tmp_path / "checkpoints" / "epoch-000007" / "state.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    assert_epoch_6_is_used(tmp_path, caplog, "state.json: its sum is another than it says")


def test_every_byte_of_the_facts_counts(tmp_path: Path) -> None:
    run_with(tmp_path, 6, 7)
    file = tmp_path / "checkpoints" / "epoch-000007" / "state.json"
    whole = file.read_bytes()
    for at in range(0, len(whole), 97):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        found = RunFolder(tmp_path).latest()
        assert found is not None
        if found.epoch == 7:  # a space of the layout: nothing that it says
            assert json.loads(file.read_bytes()) == json.loads(whole)


def test_one_of_another_run_that_was_copied_in(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run_with(tmp_path / "run", 6)
    run_with(tmp_path / "other", 7)
    shutil.copytree(tmp_path / "other" / "checkpoints" / "epoch-000007", tmp_path / "run/checkpoints/epoch-000007")
    assert_epoch_6_is_used(tmp_path / "run", caplog, "state.json: is of another run (")


def test_one_under_another_number(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run_with(tmp_path, 6)
    shutil.copytree(tmp_path / "checkpoints" / "epoch-000006", tmp_path / "checkpoints" / "epoch-000007")
    assert_epoch_6_is_used(tmp_path, caplog, "state.json: is of epoch 6")


def renamed(checkpoint: Path) -> None:
    """As by a hand that slipped."""
    checkpoint.rename(checkpoint.with_name("epoch-000012"))


def cut_far_on(checkpoint: Path) -> None:
    renamed(checkpoint)
    cut(checkpoint.with_name("epoch-000012") / "policy.safetensors")


def of_another_run(checkpoint: Path) -> None:
    other = RunFolder(checkpoint.parents[2] / "other")
    other.claim(example_config("run.num_epochs=12"))
    shutil.copytree(other.save(12, learner_state(12)), checkpoint.with_name("epoch-000012"))


@pytest.mark.parametrize("damage", [renamed, cut_far_on, of_another_run])
def test_what_is_no_checkpoint_of_ours_counts_as_no_finished_epoch(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None]
) -> None:
    """Epoch 12 of 9 is not finished, whatever a folder is called: the command goes on from the whole one beside it."""
    damage(run_with(tmp_path / "run", 6, 7).checkpoints / "epoch-000007")
    folder = RunFolder(tmp_path / "run")
    folder.check(CONFIG)
    folder.claim(CONFIG)
    assert folder.finished() == (7 if damage is of_another_run else 6)
    assert "epoch-000012.damaged" in names(folder)
    assert "epoch-000012 is damaged and put aside as epoch-000012.damaged: " in caplog.text


def without_sums(checkpoint: Path, **facts: Any) -> None:
    """As they were written before there were any."""
    file = checkpoint / "state.json"
    kept = {
        name: value for name, value in json.loads(file.read_text()).items() if name not in ("sha256", "files", "run")
    }
    file.write_text(json.dumps(kept | facts))


def test_one_from_before_there_were_sums_is_taken_with_a_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    without_sums(run_with(tmp_path, 6).checkpoints / "epoch-000006")
    folder = RunFolder(tmp_path)
    folder.claim(CONFIG)
    found = folder.latest()
    assert found is not None
    assert found.epoch == 6
    (record,) = caplog.records
    assert "has no sums of its files" in record.getMessage()


@pytest.mark.parametrize("damage", [cut, emptied, removed])
def test_one_without_sums_that_cannot_be_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None]
) -> None:
    checkpoint = run_with(tmp_path, 6, 7).checkpoints / "epoch-000007"
    without_sums(checkpoint)
    damage(checkpoint / "old-000006.safetensors")
    found = RunFolder(tmp_path).latest()
    assert found is not None
    assert found.epoch == 6
    assert "old-000006.safetensors: " in caplog.records[-1].getMessage()


def test_one_without_sums_of_another_rank(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It says with which experiment it was made."""
    folder = run_with(tmp_path / "run", 6)
    other = RunFolder(tmp_path / "other")
    other.claim(example_config("run.num_epochs=9", "model.lora.rank=8"))
    without_sums(other.save(7, learner_state(7)))
    shutil.copytree(other.checkpoints / "epoch-000007", folder.checkpoints / "epoch-000007")
    folder.claim(CONFIG)
    found = folder.latest()
    assert found is not None
    assert found.epoch == 6
    assert "is of another experiment (differs in: model.lora.rank = 8 there, 4 here)" in caplog.text


def test_tensors_that_are_none_of_a_checkpoint_do_not_pass_with_a_new_sum(tmp_path: Path) -> None:
    """Somebody's own edit of one file: the facts' sum is that of all."""
    file = run_with(tmp_path, 6, 7).checkpoints / "epoch-000007" / "policy.safetensors"
    save_file({name: value + 1 for name, value in load_file(file).items()}, file)
    found = RunFolder(tmp_path).latest()
    assert found is not None
    assert found.epoch == 6


def test_with_none_whole_it_is_refused_and_nothing_begins_anew(tmp_path: Path) -> None:
    folder = run_with(tmp_path, 6, 7)
    for epoch in (6, 7):
        flipped(tmp_path / "checkpoints" / f"epoch-{epoch:06d}" / "policy.safetensors")
    with pytest.raises(ValueError, match=r"^no whole checkpoint is left of run .*: .*epoch-000006.*epoch-000007.*"):
        folder.latest()
    for _ in range(2):  # nor the next time, when they are put aside
        with pytest.raises(ValueError, match=r"left of run .*: epoch-000006\.damaged, epoch-000007\.dam") as refused:
            RunFolder(tmp_path).claim(CONFIG)
        assert "\n" not in str(refused.value)


def test_a_damaged_one_is_put_aside_and_counts_in_no_rotation(tmp_path: Path) -> None:
    run_with(tmp_path, 6, 7)
    flipped(tmp_path / "checkpoints" / "epoch-000007" / "ema.safetensors")
    folder = RunFolder(tmp_path, keep=2)
    folder.claim(CONFIG)
    assert names(folder) == ["epoch-000006", "epoch-000007.damaged"]
    folder.save(8, learner_state(8))
    assert names(folder) == ["epoch-000006", "epoch-000007.damaged", "epoch-000008"]


@pytest.mark.parametrize("suffix", [".partial", ".replaced"])
def test_a_whole_one_that_a_kill_left_beside_its_place_is_used(tmp_path: Path, suffix: str) -> None:
    checkpoints = run_with(tmp_path, 6).checkpoints
    (checkpoints / "epoch-000006").rename(checkpoints / f"epoch-000006{suffix}")
    folder = RunFolder(tmp_path)
    folder.claim(CONFIG)
    found = folder.latest()
    assert found is not None
    assert found.epoch == 6


def test_an_earlier_one_can_be_asked_for(tmp_path: Path) -> None:
    folder = run_with(tmp_path, 6, 7)
    assert [getattr(folder.latest(before=epoch), "epoch", None) for epoch in (9, 7, 6, 5)] == [7, 7, 6, None]


def test_what_is_exported_or_evaluated_is_whole(tmp_path: Path) -> None:
    run_with(tmp_path, 6, 7)
    assert newest_whole(tmp_path / "checkpoints") == tmp_path / "checkpoints" / "epoch-000007"
    flipped(tmp_path / "checkpoints" / "epoch-000007" / "ema.safetensors")
    assert newest_whole(tmp_path / "checkpoints") == tmp_path / "checkpoints" / "epoch-000006"
    with pytest.raises(ValueError, match=r"epoch-000007 is damaged: ema\.safetensors: holds other bytes"):
        export_run(tmp_path, tmp_path / "out", epoch=7, merge=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["", "run: [", "- 1", "run:\n"])
def test_an_experiment_that_was_cut_off_is_taken_from_its_history(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    folder = run_with(tmp_path, 6)
    whole = (tmp_path / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"differs in: run\.seed = 0 there, 1 here"):
        folder.check(example_config("run.num_epochs=9", "run.seed=1"))
    caplog.clear()
    started = RunFolder(tmp_path)
    for start in (started.check, started.check, started.claim):
        start(CONFIG)
    assert (tmp_path / "config.yaml").read_text() == whole
    assert caplog.text.count("cannot be read") == 1
    (tmp_path / "config.yaml").write_text(text)
    shutil.rmtree(tmp_path / "configs")
    with pytest.raises(ValueError, match=r"config\.yaml: holds no experiment"):
        RunFolder(tmp_path).claim(CONFIG)
