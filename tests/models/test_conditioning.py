"""A prompt is encoded once, alone; kept on the host, in a folder or not at all, its conditioning is the same bits."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nft_ray.cli.main import main
from nft_ray.cores.sampler import SamplerCore
from nft_ray.models import conditioning
from nft_ray.models.base import Conditioning, load_model
from nft_ray.models.conditioning import Conditioner, TextEncoders, conditioner, identity, lent
from tests.examples import QUICKSTART, example_config
from tests.models.tiny import OF_EACH_FAMILY, tiny_model

CPU = torch.device("cpu")
PROMPTS = ["a dog", "two red circles", "a photo of a blue square"]


class Encoders:
    """One layer that counts what it is asked for; a prompt's features are a function of its letters."""

    def __init__(self) -> None:
        self.modules = [torch.nn.Embedding(200, 4)]
        self.asked: list[str] = []

    def __call__(self, prompt: str, device: torch.device) -> Conditioning:
        assert self.modules[0].weight.device.type == device.type
        self.asked.append(prompt)
        ids = torch.tensor([[ord(letter) for letter in prompt.ljust(30)]])
        return {"features": self.modules[0](ids), "mask": torch.ones(1, 30, dtype=torch.int64)}


def make(
    load: Callable[[], TextEncoders], folder: Path | None = None, size: int = 2, resident: bool = True
) -> Conditioner:
    return Conditioner(
        load, identity="x", device=CPU, dtype=torch.bfloat16, size=size, resident=resident, folder=folder
    )


def same(a: Conditioning, b: Conditioning) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_last_prompts_are_kept_and_give_the_same_bits() -> None:
    encoders = Encoders()
    prompts = make(lambda: encoders)
    first = prompts.encode(PROMPTS[:2])
    assert (first["features"].dtype, first["mask"].dtype) == (torch.bfloat16, torch.int64)
    assert same(prompts.encode(PROMPTS[:2]), first)
    assert encoders.asked == PROMPTS[:2]
    prompts.encode([PROMPTS[0], PROMPTS[2], PROMPTS[0]])  # the second, longest unused, must go
    assert encoders.asked == PROMPTS
    assert same(prompts.encode(PROMPTS[:1]), {name: value[:1] for name, value in first.items()})
    assert encoders.asked == PROMPTS
    again = prompts.encode(PROMPTS[1:2])
    assert encoders.asked == [*PROMPTS, PROMPTS[1]]
    assert same(again, {name: value[1:] for name, value in first.items()})
    none_kept = make(lambda: encoders, size=0)
    assert same(none_kept.encode(PROMPTS[:2]), first)


def test_who_is_asked_for_together_does_not_matter(tiny_folder: Path) -> None:
    for kind in OF_EACH_FAMILY:
        model = load_model(tiny_model(kind, tiny_folder, conditioning_cache=0), CPU)
        together = model.encode(PROMPTS)
        for i, prompt in enumerate(PROMPTS):
            assert same(model.encode([prompt]), {name: value[i : i + 1] for name, value in together.items()})


def test_a_folder_is_shared_and_needs_no_encoder(tmp_path: Path) -> None:
    def never() -> TextEncoders:
        raise AssertionError("a text encoder was loaded")

    encoders = Encoders()
    writer = make(lambda: encoders, tmp_path)
    assert not writer.loaded
    assert writer.absent(PROMPTS) == PROMPTS
    wanted = writer.encode(PROMPTS)
    assert writer.absent(PROMPTS) == []
    assert same(make(never, tmp_path).encode(PROMPTS), wanted)
    with pytest.raises(AssertionError, match="was loaded"):
        make(never, tmp_path).encode(["another"])
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 3
    assert all(path.suffix == ".safetensors" for path in files)  # nothing half written is left
    files[0].write_bytes(files[0].read_bytes()[:-3])
    other = Encoders()
    other.modules = encoders.modules
    assert same(make(lambda: other, tmp_path).encode(PROMPTS), wanted)  # a broken file is made again
    assert len(other.asked) == 1
    assert same(make(never, tmp_path).encode(PROMPTS), wanted)


def test_offloaded_encoders_come_back_to_the_host_unchanged() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    places = [value.data_ptr() for value in module.state_dict().values()]
    with lent([module], torch.device("meta"), keep=False):  # stands for a GPU: its tensors are elsewhere
        assert {value.device.type for value in module.state_dict().values()} == {"meta"}
    after = module.state_dict()
    assert same(after, before)
    assert [value.data_ptr() for value in after.values()] == places  # the very memory: no copy back
    with lent([module], torch.device("meta"), keep=True):
        pass
    assert {value.device.type for value in module.state_dict().values()} == {"meta"}
    encoders = Encoders()
    offloading = make(lambda: encoders, resident=False)
    assert same(offloading.encode(PROMPTS), make(lambda: encoders).encode(PROMPTS))


def test_an_identity_tells_encoders_and_settings_apart(tmp_path: Path) -> None:
    (tmp_path / "text_encoder").mkdir()
    weights = tmp_path / "text_encoder" / "model.safetensors"
    weights.write_bytes(b"\0" * 10_000_000)
    (tmp_path / "text_encoder" / "config.json").write_text("{}")
    known = identity(tmp_path, ["text_encoder"], ["sd3", 128, "bfloat16"])
    assert identity(tmp_path, ["text_encoder"], ["sd3", 128, "bfloat16"]) == known
    assert identity(tmp_path, ["text_encoder"], ["sd3", 256, "bfloat16"]) != known
    with weights.open("r+b") as file:  # trained a little: every tensor differs
        file.seek(9_000_000)
        file.write(b"\1" * 1_000_000)
    assert identity(tmp_path, ["text_encoder"], ["sd3", 128, "bfloat16"]) != known


def test_a_sampler_that_finds_all_prompts_loads_no_text_encoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text("a photo of a red circle\na photo of two crosses\na photo of a red circle\n")
    prompts = f"{tmp_path}/prompts.txt"
    settings = [f"prompts.train={prompts}", f"prompts.test={prompts}", f"model.precomputed={tmp_path}/encoded"]
    command = ["encode", str(QUICKSTART), *[part for setting in settings for part in ("--set", setting)]]
    assert main(command) == 0
    assert "2 prompts encoded, 0 were there" in capsys.readouterr().out
    assert main(command) == 0
    assert "0 prompts encoded, 2 were there" in capsys.readouterr().out
    plain = SamplerCore(example_config()).model.encode(["a photo of two crosses"])

    def refuse(*_: object) -> None:
        raise AssertionError("a text encoder was loaded")

    monkeypatch.setattr(conditioning, "lent", refuse)
    monkeypatch.setattr("nft_ray.models.sd3.load_text", refuse)
    sampler = SamplerCore(example_config(*settings))
    assert same(sampler.model.encode(["a photo of two crosses"]), plain)
    with pytest.raises(AssertionError):
        sampler.model.encode(["a photo of three crosses"])


def test_encode_without_a_folder_is_one_clear_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["encode", str(QUICKSTART)]) == 1
    assert "model.precomputed = null: encode needs a folder" in capsys.readouterr().err


def test_other_text_settings_are_other_files(tiny_folder: Path, tmp_path: Path) -> None:
    config = tiny_model("sd35_medium", tiny_folder, precomputed=str(tmp_path))
    for changes in ({}, {"text_encoder_dtype": "bfloat16"}, {"max_sequence_length": 8}, {"max_sequence_length": 0}):
        changed = config.model_copy(update=changes)
        encoder = conditioner(changed, Path(config.path), CPU)
        assert encoder.absent(PROMPTS) == PROMPTS
        encoder.encode(PROMPTS)
    same_text = config.model_copy(update={"dtype": "bfloat16", "text_encoder_dtype": "float32", "height": 64})
    assert conditioner(same_text, Path(config.path), CPU).absent(PROMPTS) == []
