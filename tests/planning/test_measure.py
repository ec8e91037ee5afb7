"""`nft-ray profile`: what is measured is a device that can be read again."""

from pathlib import Path

import pytest
import torch

from nft_ray.cli.main import main
from nft_ray.planning import measure
from nft_ray.planning.devices import device_named


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "REPEATS", 1)
    monkeypatch.setattr(measure, "MATMUL", {"cpu": 128})
    monkeypatch.setattr(measure, "COPIED", {"cpu": 1 << 20})
    monkeypatch.setattr(measure, "HOST_COPIED", 1 << 20)
    monkeypatch.setattr(measure, "NANO_BATCHES", (1, 8))


@pytest.mark.usefixtures("small")
def test_the_file_is_a_device(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads, file = torch.get_num_threads(), tmp_path / "this.yaml"
    assert main(["profile", "--device", "cpu", "--output", str(file)]) == 0
    device = device_named(str(file))
    assert (device.name, device.kind) == ("this", "cpu")
    assert 1e8 < device.matmul_per_s["float32"] < 1e14
    assert 1e9 < device.memory_bytes < 1e14
    assert 0 <= device.operation_s < 1e-2
    assert device.sources["matmul_per_s"].startswith("measured here")
    assert f"{file}" in capsys.readouterr().out
    assert torch.get_num_threads() == threads


def test_no_card_and_no_folder_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="sees no GPU; measure --device cpu"):
            measure.measured("x", "cuda")
    assert main(["profile", "--device", "cpu", "--output", str(tmp_path / "no" / "x.yaml")]) == 1
    assert "no such folder" in capsys.readouterr().err
