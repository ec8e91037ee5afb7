"""`nft-ray export` of a short run: plain diffusers draws our image, with the LoRA and with the merged transformer."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file

from nft_ray.cli.main import main
from nft_ray.config import load
from nft_ray.cores.publish import announced
from nft_ray.cores.sampler import SamplerCore
from nft_ray.downloads.pipelines import location
from nft_ray.seeding import noise
from nft_ray.types import AdapterWeights, Prompt, RolloutItem, RolloutRequest
from tests.cli.stand_in_hub import Hub, stand_in_hub
from tests.examples import QUICKSTART, SMALL

TEXT, SEEDS = "a photo of two circles", (11, 12)
LORA = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two epochs with a learning rate that shows; six held-out lines, no MLflow."""
    runs = tmp_path_factory.mktemp("runs")
    lines = (QUICKSTART.parents[1] / "nft_ray" / "shapes" / "prompts" / "test.jsonl").read_text().splitlines()
    (runs / "test.jsonl").write_text("\n".join(lines[:6]))
    settings = [
        *SMALL,
        "run.name=exported",
        "run.checkpoint_every=1",
        "run.keep_checkpoints=5",
        "learner.learning_rate=0.03",
        "evaluation.picture_lines=[0]",
        f"prompts.test={runs / 'test.jsonl'}",
        "tracking.uri=file:///dev/null/x",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NFT_RAY_RUNS", str(runs))
        options = [part for setting in settings for part in ("--set", setting)]
        assert main(["train", str(QUICKSTART), "--local", *options]) == 0
    return runs / "exported"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with stand_in_hub() as hub:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        monkeypatch.setenv("HF_TOKEN", "hf_of_this_test")
        yield hub


def ours(run: Path, epoch: int) -> np.ndarray:
    """Our sampler's images with a checkpoint's EMA policy."""
    core = SamplerCore(load(run / "config.yaml"))
    weights = load_file(run / "checkpoints" / f"epoch-{epoch:06d}" / "ema.safetensors")
    core.load(announced(weights), AdapterWeights(old=weights, ema=weights))
    items = (RolloutItem(group_id=0, prompt=Prompt(id=0, text=TEXT), seeds=SEEDS),)
    return core.rollout(RolloutRequest(epoch=0, items=items, adapter="ema", policy_version=0, split="eval"))[1]


def draw(pipeline: Any) -> np.ndarray:
    """Plain diffusers, as the card says, but with our noise."""
    pipeline.set_progress_bar_config(disable=True)
    options: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 1, "max_sequence_length": 0}
    latents = noise(SEEDS, (8, 8, 8))
    images = pipeline([TEXT] * 2, height=32, width=32, latents=latents, output_type="np", **options).images
    return np.round(images * 255).astype(np.uint8)


def distance(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.abs(a.astype(int) - b.astype(int)).max())


def contents(file: Path) -> dict[str, bytes]:
    """The tensors of a file; the order of its metadata is another each time."""
    return {name: value.tobytes() for name, value in load_file(file).items()}


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["export", *arguments]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1, errors
    return errors[0]


def test_the_code_on_the_card_draws_our_image(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(trained), "--output", str(tmp_path)]) == 0
    assert str(tmp_path / LORA) in capsys.readouterr().out
    assert contents(tmp_path / LORA) == contents(trained / "lora" / LORA), "as the run itself exported it"
    with safe_open(tmp_path / LORA, "np") as file:
        assert json.loads(file.metadata()["lora_adapter_metadata"])["transformer.lora_alpha"] == 8
    code = (tmp_path / "README.md").read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert isinstance(names["image"], Image.Image)
    with_lora = draw(names["pipeline"])
    names["pipeline"].unload_lora_weights()
    assert distance(with_lora, ours(trained, 2)) <= 1  # float32 rounding at a uint8 boundary
    assert distance(with_lora, draw(names["pipeline"])) > 20


def test_the_merged_transformer_draws_our_image(trained: Path, tmp_path: Path) -> None:
    assert main(["export", str(trained), "--output", str(tmp_path), "--merge"]) == 0
    transformer = SD3Transformer2DModel.from_pretrained(tmp_path / "transformer")
    options: dict[str, Any] = {"text_encoder_3": None, "tokenizer_3": None, "transformer": transformer}
    merged = StableDiffusion3Pipeline.from_pretrained(str(location("nano-sd3")), **options)
    assert distance(draw(merged), ours(trained, 2)) <= 1
    assert "(float32)" in (tmp_path / "README.md").read_text()


def test_the_card_tells_the_run(trained: Path, tmp_path: Path) -> None:
    assert main(["export", str(trained), "--output", str(tmp_path)]) == 0
    text = (tmp_path / "README.md").read_text()
    summary = json.loads((trained / "summary.json").read_text())
    state = json.loads((trained / "checkpoints" / "epoch-000002" / "state.json").read_text())
    assert state["packages"].get("commit", "") in text
    assert f"{summary['trained']['geneval/soft']:.3f}" in text
    assert f"{summary['base']['geneval/soft']:.3f}" in text
    assert "* prompts of this tag also occur in training" in text
    assert load(tmp_path / "config.yaml").learner.learning_rate == 0.03
    for name in ("README.md", "config.yaml"):
        assert "/dev/null" not in (tmp_path / name).read_text(), "where it was tracked is nobody else's business"
    assert min(Image.open(tmp_path / "reward_curve.png").size) > 100


def test_an_earlier_checkpoint(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(trained), "--checkpoint", "1"]) == 0
    target = trained / "export-epoch-000001"
    wanted = load_file(trained / "checkpoints" / "epoch-000001" / "ema.safetensors")
    found = contents(target / LORA)
    assert found == {f"transformer.{name}": value.tobytes() for name, value in wanted.items()}
    assert "not evaluated since training began" in (target / "README.md").read_text()
    assert "there are: 1, 2" in refused(capsys, str(trained), "--checkpoint", "3")
    shutil.rmtree(target)


def test_what_was_merged_before_is_not_mixed_with_another_lora(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "transformer").mkdir()
    line = refused(capsys, str(trained), "--output", str(tmp_path))
    assert "holds a merged transformer" in line
    assert os.listdir(tmp_path) == ["transformer"]


def test_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "name the folder of a run" in refused(capsys, str(tmp_path))
    (tmp_path / "config.yaml").write_text(QUICKSTART.read_text())
    assert "holds no checkpoint yet" in refused(capsys, str(tmp_path))


def test_pushing_sends_the_export_and_nothing_else(
    trained: Path, tmp_path: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "secret.txt").write_text("mine")
    assert main(["export", str(trained), "--output", str(tmp_path), "--push", "me/lora"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"{hub.url}/me/lora"
    assert hub.created[0]["name"] == "lora"
    assert "private" in json.dumps(hub.created[0])
    assert hub.tokens == {"Bearer hf_of_this_test"}
    assert hub.files.keys() == {LORA, "README.md", "reward_curve.png", "config.yaml"}
    assert hub.files[LORA] == (tmp_path / LORA).read_bytes()
    assert 'load_lora_weights("me/lora")' in hub.files["README.md"].decode()


@pytest.mark.parametrize("status", [401, 403])
def test_a_token_that_may_not_write_is_one_line(
    status: int, trained: Path, tmp_path: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.status = status
    line = refused(capsys, str(trained), "--output", str(tmp_path), "--push", "me/lora")
    assert f"the Hub refuses HF_TOKEN ({status})" in line
    assert "hf_of_this_test" not in line


def test_a_hub_that_is_away_is_one_line(
    trained: Path, tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    line = refused(capsys, str(trained), "--output", str(tmp_path), "--push", "me/lora")
    assert "--push me/lora: " in line
    assert "push again" in line
    assert (tmp_path / LORA).exists()


@pytest.mark.parametrize(("name", "part"), [("lora", "is no Hub id"), ("me/lora", "HF_TOKEN is not set")])
def test_what_a_push_needs_is_asked_first(
    name: str,
    part: str,
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    assert part in refused(capsys, str(trained), "--output", str(tmp_path / "out"), "--push", name)
    assert not (tmp_path / "out").exists()
