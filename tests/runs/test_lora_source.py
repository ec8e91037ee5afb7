"""What `--lora` may name: a run stands for its newest checkpoint; other names are left to who reads LoRAs."""

import os
from pathlib import Path

import pytest

from nft_ray.runs.folder import RunFolder
from nft_ray.runs.lora_source import find_source
from tests.runs.states import learner_state


def checkpoint(run: Path, epoch: int, whole: bool = True) -> Path:
    folder = RunFolder(run, keep=9).save(epoch, learner_state())
    if not whole:
        with (folder / "ema.safetensors").open("r+b") as file:
            file.seek(-4, os.SEEK_END)
            file.write(b"\0\1\2\3")
    return folder


def test_a_run_and_its_checkpoints_are_the_newest_whole_one(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("")
    first, second = checkpoint(tmp_path, 10), checkpoint(tmp_path, 20)
    checkpoint(tmp_path, 30, whole=False)
    assert find_source(str(tmp_path)) == find_source(str(tmp_path / "checkpoints")) == second
    assert find_source(str(first)) == str(first)


@pytest.mark.parametrize("name", ["owner/lora", "/some/checkpoint-40", "lora.safetensors"])
def test_other_names_are_passed_on(name: str) -> None:
    assert find_source(name) == name


def test_a_run_without_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("")
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match="no checkpoint is there yet"):
        find_source(str(tmp_path))


@pytest.mark.parametrize("named", ["", "checkpoints"])
@pytest.mark.parametrize("below", ["", "checkpoints"])
def test_checkpoints_of_the_published_code_are_listed_and_the_newest_is_named(
    named: str, below: str, tmp_path: Path
) -> None:
    """Its layout is LOGS/checkpoints/checkpoint-30/lora: which one is meant is the user's to say."""
    folder = tmp_path / named
    for step in (120, 30, 60):
        (folder / below / f"checkpoint-{step}" / "lora").mkdir(parents=True)
    with pytest.raises(ValueError) as refused:
        find_source(str(folder))
    assert str(refused.value) == (
        f"LoRA {folder}: holds checkpoints of the published code (checkpoint-30, checkpoint-60, checkpoint-120); "
        f"name one, the newest is {folder / below / 'checkpoint-120'}"
    )


def test_a_lora_in_a_folder_with_such_checkpoints_is_that_lora(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-30" / "lora").mkdir(parents=True)
    (tmp_path / "adapter_config.json").write_text("{}")
    assert find_source(str(tmp_path)) == str(tmp_path)
