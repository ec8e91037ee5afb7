"""LoRAs of others are read as they were meant: diffusers' files, peft's folders, the published layout, ours."""

import json
import shutil
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import save_file

from nft_ray.config import LoraConfig, ModelConfig
from nft_ray.models.base import load_model
from nft_ray.models.lora import export_lora, numpy_weights, peft_config, random_weights, read_lora
from nft_ray.models.sd3 import LORA_TARGETS
from nft_ray.types import Weights

CPU = torch.device("cpu")
LORA = LoraConfig(rank=6, alpha=9, targets=("attn.to_q", "attn.to_out.0"))


@pytest.fixture
def trained() -> tuple[peft.PeftModel, Weights]:
    """peft's own model around nano-sd3's transformer with a random LoRA, and its tensors by wire name."""
    transformer = load_model(ModelConfig(), CPU, transformer_only=True).transformer
    model = peft.get_peft_model(transformer, peft_config(LORA, LORA_TARGETS))
    parameters = {
        name.removeprefix("base_model.model.").replace(".default.", "."): value
        for name, value in model.named_parameters()
        if ".lora_" in name
    }
    weights = random_weights(numpy_weights(parameters), seed=3)
    with torch.no_grad():
        for name, value in parameters.items():
            value.copy_(torch.from_numpy(weights[name]))
    return model, weights


def same(found: Weights, wanted: Weights) -> bool:
    return found.keys() == wanted.keys() and all(np.array_equal(found[name], wanted[name]) for name in wanted)


def test_a_folder_that_peft_wrote(trained: tuple[peft.PeftModel, Weights], tmp_path: Path) -> None:
    model, weights = trained
    model.save_pretrained(str(tmp_path / "checkpoint-40" / "lora"))
    for path in (tmp_path / "checkpoint-40" / "lora", tmp_path / "checkpoint-40", str(tmp_path / "checkpoint-40")):
        found, config = read_lora(path)
        assert same(found, weights)
        assert (config.rank, config.alpha, set(config.targets or ())) == (6, 9, set(LORA.targets or ()))


def test_a_peft_file_has_the_alpha_of_the_configuration_beside_it(
    trained: tuple[peft.PeftModel, Weights], tmp_path: Path
) -> None:
    model, weights = trained
    model.save_pretrained(str(tmp_path))
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "best.safetensors")
    shutil.copy(tmp_path / "best.safetensors", tmp_path / "adapter_model.safetensors")
    for name in ("adapter_model.safetensors", "best.safetensors"):
        found, config = read_lora(tmp_path / name)
        assert same(found, weights)
        assert (config.rank, config.alpha, set(config.targets or ())) == (6, 9, set(LORA.targets or ()))
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(
        ValueError, match=r"best\.safetensors: a file of peft whose adapter_config\.json is missing beside it"
    ):
        read_lora(tmp_path / "best.safetensors")


def test_diffusers_files_with_and_without_metadata(
    trained: tuple[peft.PeftModel, Weights], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, weights = trained
    export_lora(weights, ModelConfig(lora=LORA), tmp_path / "ours")
    found, config = read_lora(tmp_path / "ours")
    assert same(found, weights)
    assert (config.rank, config.alpha, set(config.targets or ())) == (6, 9, set(LORA.targets or ()))

    assert not caplog.records

    (tmp_path / "renamed").mkdir()
    tensors = {name: torch.from_numpy(value).bfloat16() for name, value in weights.items()}
    StableDiffusion3Pipeline.save_lora_weights(str(tmp_path / "bare"), transformer_lora_layers=tensors)
    (file,) = (tmp_path / "bare").iterdir()
    other = shutil.copy(file, tmp_path / "renamed" / "x.safetensors")
    for path in (tmp_path / "bare", file, other, tmp_path / "renamed"):
        found, config = read_lora(path)
        assert same(found, {name: value.float().numpy() for name, value in tensors.items()})
        assert (config.rank, config.alpha) == (6, 6)  # what diffusers makes of a file that does not say
        assert set(config.targets or ()) == {name.rsplit(".lora_", 1)[0] for name in weights}
    assert [record.getMessage() for record in caplog.records if str(file) in record.getMessage()] == [
        f"LoRA {file}: does not say its alpha; it is scaled by 1, as diffusers does: alpha = rank = 6"
    ]  # once, however often it is read


def test_our_own_checkpoint_gives_the_ema_policy(tmp_path: Path) -> None:
    ema = {
        "blocks.0.a.lora_A.weight": np.ones((2, 4), np.float32),
        "blocks.0.a.lora_B.weight": np.ones((4, 2), np.float32),
    }
    save_file({name: torch.from_numpy(value) for name, value in ema.items()}, tmp_path / "ema.safetensors")
    save_file({name: torch.from_numpy(0 * value) for name, value in ema.items()}, tmp_path / "policy.safetensors")
    state = {"config": {"model": {"lora": {"rank": 2, "alpha": 5, "targets": None}}}}
    (tmp_path / "state.json").write_text(json.dumps(state))
    for path in (tmp_path, tmp_path / "ema.safetensors"):
        found, config = read_lora(path)
        assert same(found, ema)
        assert config == LoraConfig(rank=2, alpha=5, targets=("blocks.0.a",))
    (tmp_path / "state.json").unlink()
    with pytest.raises(ValueError, match=r"ema\.safetensors: .* state\.json .* missing beside it"):
        read_lora(tmp_path / "ema.safetensors")


def write(path: Path, ranks: tuple[int, int] = (2, 2), name: str = "transformer.b.0.q.lora_{}.weight") -> Path:
    tensors = {name.format("A"): torch.ones(ranks[0], 4), name.format("B"): torch.ones(4, ranks[1])}
    save_file(tensors, path)
    return path


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: f / "none", "no such file or folder"),
        (lambda f: f, "holds neither pytorch_lora_weights.safetensors nor adapter_config.json"),
        (lambda f: write(f / "x.safetensors", ranks=(2, 3)), "layers of ranks [2, 3]"),
        (lambda f: write(f / "x.safetensors", name="unet.q.lora_{}.weight.alpha"), "is not a transformer's lora_A"),
        (lambda f: write(f / "x.safetensors", name="text_encoder.q.lora_{}.weight"), "is not a transformer's lora_A"),
    ],
)
def test_what_cannot_be_used_is_one_clear_line(make: object, message: str, tmp_path: Path) -> None:
    path = make(tmp_path)  # type: ignore[operator]
    with pytest.raises(ValueError) as caught:
        read_lora(path)
    assert str(caught.value).startswith(f"LoRA {path}")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_cut_files_and_other_kinds_of_lora_are_refused(trained: tuple[peft.PeftModel, Weights], tmp_path: Path) -> None:
    model, _ = trained
    model.save_pretrained(str(tmp_path))
    config, weights = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    options = json.loads(config.read_text())
    config.write_text(json.dumps(options | {"use_dora": True}))
    with pytest.raises(ValueError, match="use_dora = True is not supported"):
        read_lora(tmp_path)
    config.write_text(json.dumps(options))
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-5])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        read_lora(tmp_path)
    weights.write_bytes(whole)
    config.write_text("{")
    with pytest.raises(ValueError, match=r"adapter_config\.json: "):
        read_lora(tmp_path)
    config.write_text(json.dumps(options))
    weights.unlink()
    with pytest.raises(ValueError, match=r"without adapter_model\.safetensors"):
        read_lora(tmp_path)
