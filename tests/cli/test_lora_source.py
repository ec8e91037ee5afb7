"""What `--lora` may name: a run stands for its newest checkpoint, anything that is no file for a Hub id."""

from pathlib import Path

import huggingface_hub.constants
import pytest

from nft_ray.cli.lora_source import find_source
from tests.cli.stand_in_hub import stand_in_hub


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
    assert find_source(str(first)) == first


@pytest.mark.parametrize("name", ["/nowhere", "runs/a/b", "no-such-thing", "a b/c"])
def test_neither_a_file_nor_a_hub_id(name: str) -> None:
    with pytest.raises(ValueError, match=r"no such file or folder, and no Hub id"):
        find_source(name)


@pytest.mark.parametrize("status", [401, 404])
def test_a_repository_that_is_not_there_or_not_for_us(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with stand_in_hub() as hub:
        hub.status = status
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        with pytest.raises(ValueError, match=f"^LoRA me/lora: no such file or folder, and the Hub answers {status}"):
            find_source("me/lora")


def test_a_hub_that_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match=r"^LoRA me/lora: no such file or folder, and the Hub cannot be asked: "):
        find_source("me/lora")
