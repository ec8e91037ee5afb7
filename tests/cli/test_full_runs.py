"""A run that trained all weights: it evaluates as it was, and its checkpoints are exported for plain diffusers."""

import json
from pathlib import Path

import numpy as np
import pytest
from diffusers import SD3Transformer2DModel
from safetensors.numpy import load_file, save_file

from nft_ray.cli.main import main
from tests.examples import QUICKSTART, SMALL


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two epochs, a checkpoint each, six held-out lines, no MLflow."""
    runs = tmp_path_factory.mktemp("runs")
    lines = (QUICKSTART.parents[1] / "nft_ray" / "shapes" / "prompts" / "test.jsonl").read_text().splitlines()
    (runs / "test.jsonl").write_text("\n".join(lines[:6]))
    settings = [
        *SMALL,
        "run.name=full",
        "run.checkpoint_every=1",
        "model.tuning=full",
        "learner.learning_rate=0.003",
        "evaluation.picture_lines=[0]",
        f"prompts.test={runs / 'test.jsonl'}",
        "tracking.uri=file:///dev/null/x",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NFT_RAY_RUNS", str(runs))
        options = [part for setting in settings for part in ("--set", setting)]
        assert main(["train", str(QUICKSTART), "--local", *options]) == 0
    return runs / "full"


def test_it_evaluates_to_its_own_figures(full: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["evaluate", str(full / "config.yaml"), "--local"]
    after = ["--lora", str(full), "--output", str(tmp_path / "after")]
    assert main([*command, *after]) == 0
    found = json.loads((tmp_path / "after" / "summary.json").read_text())
    trained = json.loads((full / "summary.json").read_text())["trained"]
    assert {name: found[name]["mean"] for name in trained} == pytest.approx(trained, abs=1e-7)
    capsys.readouterr()
    earlier = ["--lora", str(full / "checkpoints" / "epoch-000001"), "--output", str(tmp_path / "after")]
    assert main([*command, *earlier]) == 1
    assert "differs in: lora.checksum" in capsys.readouterr().err
    assert main([*command, "--output", str(tmp_path / "base")]) == 0
    pictures = [(tmp_path / name / "images" / "000000.png").read_bytes() for name in ("base", "after")]
    assert pictures[0] != pictures[1]


def test_of_another_model_it_is_refused(full: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "epoch-000001"
    other.mkdir()
    (other / "state.json").write_bytes((full / "checkpoints" / "epoch-000001" / "state.json").read_bytes())
    weights = load_file(full / "checkpoints" / "epoch-000001" / "ema.safetensors")
    name = sorted(weights)[0]
    save_file(weights | {name: np.zeros((3, 3), np.float32)}, other / "ema.safetensors")
    command = ["evaluate", str(full / "config.yaml"), "--local", "--lora", str(other), "--output", str(tmp_path / "x")]
    assert main(command) == 1
    assert f"holds all weights of a transformer, and {name} is (3, 3) there" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_any_checkpoint_is_exported(full: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(full), "--checkpoint", "1", "--output", str(tmp_path / "out")]) == 0
    transformer = SD3Transformer2DModel.from_pretrained(tmp_path / "out" / "transformer")
    wanted = load_file(full / "checkpoints" / "epoch-000001" / "ema.safetensors")
    assert all(np.array_equal(value.detach().numpy(), wanted[name]) for name, value in transformer.named_parameters())
    capsys.readouterr()
    assert main(["export", str(full), "--push", "me/it"]) == 1
    assert "only LoRAs are pushed" in capsys.readouterr().err
