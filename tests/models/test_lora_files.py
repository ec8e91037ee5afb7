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
from nft_ray.models.lora import export_lora, peft_config, random_weights, read_lora
from nft_ray.models.sd3 import LORA_TARGETS
from nft_ray.types import Weights
from tests.models.tiny import numpy_weights

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


NAMED = {"transformer": "transformer.b.0.q.lora_{}.weight", "peft": "base_model.model.b.0.q.lora_{}.weight"}


def beside(folder: Path, options: object, name: str = "x.safetensors", kind: str = "peft") -> Path:
    """FOLDER/NAME, and an adapter_config.json that says `options`."""
    (folder / "adapter_config.json").write_text(json.dumps(options))
    return write(folder / name, name=NAMED[kind])


@pytest.mark.parametrize("kind", NAMED)
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "best.safetensors"])
def test_alpha_stands_in_the_configuration_beside_it_whatever_the_tensors_are_called(
    kind: str, name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A folder is the one LoRA in it, however its file is called."""
    file = beside(tmp_path, {"lora_alpha": 16}, name, kind)
    for path in (tmp_path, file):
        assert read_lora(path)[1] == LoraConfig(rank=2, alpha=16, targets=("b.0.q",))
    assert not caplog.records


def test_diffusers_own_file_does_not_look_beside_itself(tmp_path: Path) -> None:
    file = beside(tmp_path, {"lora_alpha": 16}, "pytorch_lora_weights.safetensors", "transformer")
    assert read_lora(file)[1].alpha == 2


def test_a_configuration_without_alpha_has_pefts(tmp_path: Path) -> None:
    assert read_lora(beside(tmp_path, {}))[1].alpha == peft.LoraConfig().lora_alpha == 8
    file = tmp_path / "pytorch_lora_weights.safetensors"
    metadata = {"lora_adapter_metadata": json.dumps({"transformer.r": 2})}
    save_file({NAMED["transformer"].format(end): torch.ones(2, 2) for end in "AB"}, file, metadata)
    assert read_lora(file)[1].alpha == 8


def test_two_files_beside_a_configuration_are_refused(tmp_path: Path) -> None:
    beside(tmp_path, {"lora_alpha": 16})
    write(tmp_path / "y.safetensors")
    with pytest.raises(
        ValueError, match=r"without adapter_model\.safetensors; name one of x\.safetensors, y\.safetens"
    ):
        read_lora(tmp_path)


@pytest.mark.parametrize(
    ("alpha", "shown"),
    [(None, "None"), ("16", "'16'"), (True, "True"), (2.5, "2.5"), (0, "0"), (1e999, "inf"), ([16], "[16]")],
)
def test_an_alpha_that_is_no_whole_number(alpha: object, shown: str, tmp_path: Path) -> None:
    file = beside(tmp_path, {"lora_alpha": alpha})
    with pytest.raises(ValueError) as refused:
        read_lora(file)
    assert str(refused.value) == (
        f"LoRA {file}: lora_alpha = {shown} in adapter_config.json; a whole number from 1 is needed, as 16"
    )


@pytest.mark.parametrize("said", ["{", "[]", "null", "16"])
@pytest.mark.parametrize("where", ["adapter_config.json", "lora_adapter_metadata"])
def test_options_that_are_no_json_object(where: str, said: str, tmp_path: Path) -> None:
    file = write(tmp_path / "x.safetensors", name=NAMED["peft"])
    if where == "adapter_config.json":
        (tmp_path / where).write_text(said)
    else:
        save_file({NAMED["peft"].format(end): torch.ones(2, 2) for end in "AB"}, file, {where: said})
    with pytest.raises(ValueError) as refused:
        read_lora(file)
    assert str(refused.value).startswith(f"LoRA {file}: {where}: no JSON object (")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("state", [{}, {"config": None}, {"config": {"model": {"lora": {"alpha": 4}}}}])
def test_a_state_that_does_not_say_its_lora(state: dict, tmp_path: Path) -> None:
    file = write(tmp_path / "ema.safetensors", name="b.0.q.lora_{}.weight")
    (tmp_path / "state.json").write_text(json.dumps(state))
    with pytest.raises(
        ValueError, match=r"ema\.safetensors: state\.json does not say config\.model\.lora's alpha and "
    ):
        read_lora(file)


@pytest.mark.parametrize("shape", [(), (4,), (0, 4)])
def test_a_tensor_that_is_no_matrix(shape: tuple[int, ...], tmp_path: Path) -> None:
    """An optimizer's state beside our checkpoints: its number of steps is a scalar per tensor."""
    file = tmp_path / "optimizer.safetensors"
    save_file({"exp_avg/b.lora_A.weight": torch.ones(2, 4), "step/b.lora_A.weight": torch.ones(shape)}, file)
    with pytest.raises(ValueError) as refused:
        read_lora(file)
    assert str(refused.value) == (
        f"LoRA {file}: tensor step/b.lora_A.weight has shape {shape}; lora_A and lora_B are matrices: is it a LoRA?"
    )


@pytest.mark.parametrize(
    "header",
    [
        [],
        {"a": 1},
        {"a": {"data_offsets": [0]}},
        {"a": {"data_offsets": [0, 0]}},
        {"a": {"data_offsets": [0, 0], "shape": 3}},
        {"a": {"data_offsets": [0, 0], "shape": ["3"]}},
        {"__metadata__": [], "a": {"data_offsets": [0, 0], "shape": [0]}},
    ],
)
def test_a_header_that_is_none(header: object, tmp_path: Path) -> None:
    file, text = tmp_path / "x.safetensors", json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(ValueError, match=rf"^LoRA {file}: not a whole safetensors file \([^\n]+\)$"):
        read_lora(file)


def epochs(folder: Path, *numbers: str) -> None:
    for number in numbers:
        (folder / f"epoch-{number}").mkdir(parents=True)
        (folder / f"epoch-{number}" / "state.json").write_text("{}")


@pytest.mark.parametrize("named", ["", "checkpoints"])
def test_a_run_is_told_which_checkpoint_to_name(named: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("")
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    with pytest.raises(ValueError) as refused:
        read_lora(tmp_path / named)
    assert str(refused.value) == f"LoRA {tmp_path / named}: no checkpoint is there yet"
    epochs(folder, "000010", "000020", "000030.partial")
    (folder / "epoch-000040").mkdir()
    with pytest.raises(ValueError) as refused:
        read_lora(tmp_path / named)
    assert str(refused.value) == (
        f"LoRA {tmp_path / named}: holds checkpoints of a run (epoch-000010, epoch-000020); name one, the newest is "
        f"{folder / 'epoch-000020'}"
    )


def test_checkpoints_of_the_published_code_are_listed(tmp_path: Path) -> None:
    for step in (120, 30):
        (tmp_path / "checkpoints" / f"checkpoint-{step}" / "lora").mkdir(parents=True)
    with pytest.raises(
        ValueError, match=r"published code \(checkpoint-30, checkpoint-120\); name one, the newest is .*120$"
    ):
        read_lora(tmp_path)


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
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors: adapter_config\.json: no JSON object"):
        read_lora(tmp_path)
    config.write_text(json.dumps(options))
    weights.unlink()
    with pytest.raises(ValueError, match=r"without adapter_model\.safetensors"):
        read_lora(tmp_path)
