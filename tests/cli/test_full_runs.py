"""A run that trained all weights: it evaluates as it was, and its checkpoints are exported for plain diffusers."""

import json
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
from diffusers import SD3Transformer2DModel
from safetensors.numpy import load_file, save_file

from nft_ray.cli.main import main
from tests.cli.stand_in_hub import stand_in_hub
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
        "learner.learning_rate=0.0003",  # ten times that, and the second epoch has no signal
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
    own = full / "evaluations"
    assert main(["evaluate", "--compare", str(own / "epoch-000002"), str(tmp_path / "after")]) == 0
    assert "they differ in: nothing" in capsys.readouterr().out
    assert main(["evaluate", "--compare", str(own / "epoch-000000"), str(own / "epoch-000002")]) == 0
    assert "they differ in: lora" in capsys.readouterr().out
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


def test_any_checkpoint_is_exported(full: Path, tmp_path: Path) -> None:
    assert main(["export", str(full), "--checkpoint", "1", "--output", str(tmp_path / "out")]) == 0
    transformer = SD3Transformer2DModel.from_pretrained(tmp_path / "out" / "transformer")
    wanted = load_file(full / "checkpoints" / "epoch-000001" / "ema.safetensors")
    assert all(np.array_equal(value.detach().numpy(), wanted[name]) for name, value in transformer.named_parameters())
    assert not (tmp_path / "out" / "pytorch_lora_weights.safetensors").exists()
    assert "# full: all weights of the transformer of nano-sd3" in (tmp_path / "out" / "README.md").read_text()


def test_the_code_on_the_card_draws_the_runs_image(full: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["export", str(full), "--output", str(tmp_path)]) == 0
    code = (tmp_path / "README.md").read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), names)
    wanted = load_file(full / "checkpoints" / "epoch-000002" / "ema.safetensors")
    found = dict(names["pipeline"].transformer.named_parameters())
    assert all(np.array_equal(found[name].detach().numpy(), value) for name, value in wanted.items())
    assert names["image"].size == (32, 32)


def test_it_is_pushed_with_its_card(full: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with stand_in_hub() as hub:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        monkeypatch.setenv("HF_TOKEN", "hf_of_this_test")
        assert main(["export", str(full), "--output", str(tmp_path), "--push", "me/it"]) == 0
    transformer = {f"transformer/{path.name}" for path in (tmp_path / "transformer").iterdir()}
    assert hub.files.keys() == {"README.md", "reward_curve.png", "config.yaml", *transformer}
    assert 'AutoModel.from_pretrained("me/it", subfolder="transformer"' in hub.files["README.md"].decode()
    assert "lora" not in hub.files["README.md"].decode().split("---")[1]
