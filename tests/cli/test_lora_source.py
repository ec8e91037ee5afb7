"""What `--lora` may name: a run stands for its newest checkpoint; other names are left to who reads LoRAs."""

from pathlib import Path

import pytest

from nft_ray.cli.lora_source import find_source


def checkpoint(run: Path, epoch: int, whole: bool = True) -> Path:
    folder = run / "checkpoints" / f"epoch-{epoch:06d}"
    folder.mkdir(parents=True)
    if whole:
        (folder / "state.json").write_text("{}")
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
