"""LoRA files, checkpoints and prompt files, damaged in any way: used as they were meant, or refused in a line."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from nft_ray.models.lora import read_lora
from nft_ray.prompts.draw import load_prompts
from nft_ray.rewards.base import check_lines, reward_config
from nft_ray.runs.folder import RunFolder
from tests.examples import example_config
from tests.fuzz.strategies import changed, damaged, one_line
from tests.runs.states import learner_state

pytestmark = pytest.mark.slow
LAYER = "transformer.transformer_blocks.0.attn.to_q"
GENEVAL = {
    "tag": "counting",
    "include": [{"class": "circle", "count": 2, "color": "red"}],
    "exclude": [{"class": "circle", "count": 3}],
    "prompt": "a photo of two circles",
}


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    file = tmp_path_factory.mktemp("lora") / "pytorch_lora_weights.safetensors"
    a, b = np.ones((4, 8), dtype=np.float32), np.ones((8, 4), dtype=np.float32)
    names = {f"{LAYER}.lora_A.weight": a, f"{LAYER}.lora_B.weight": b}
    options = json.dumps({"transformer.r": 4, "transformer.lora_alpha": 8, "transformer.target_modules": ["to_q"]})
    save_file(names, file, metadata={"lora_adapter_metadata": options, "format": "pt"})
    return file.read_bytes()


def test_any_lora_file(lora: bytes, tmp_path: Path) -> None:
    """Also with its header's JSON changed, which a flipped byte seldom leaves readable."""
    size = int.from_bytes(lora[:8], "little")
    header = json.loads(lora[8 : 8 + size])

    def with_header(tree: object) -> bytes:
        text = json.dumps(tree).encode()
        return len(text).to_bytes(8, "little") + text + lora[8 + size :]

    @given(damaged(lora) | changed(header).map(with_header))
    @example(b"\xff" * 8)
    @example((2**40).to_bytes(8, "little") + b"{}")
    def check(text: bytes) -> None:
        file = tmp_path / "pytorch_lora_weights.safetensors"
        file.write_bytes(text)
        try:
            weights, _ = read_lora(file)
        except Exception as error:  # noqa: BLE001 - which one is the question
            one_line(error)
        else:
            assert weights

    check()


def test_any_lora_metadata(lora: bytes, tmp_path: Path) -> None:
    """peft's adapter_config.json beside the file."""
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["to_q"], "peft_type": "LORA", "rank_pattern": {}}

    @given(damaged(json.dumps(options).encode()) | changed(options).map(lambda tree: json.dumps(tree).encode()))
    def check(text: bytes) -> None:
        (tmp_path / "adapter_model.safetensors").write_bytes(lora)
        (tmp_path / "adapter_config.json").write_bytes(text)
        try:
            read_lora(tmp_path)
        except Exception as error:  # noqa: BLE001
            one_line(error)

    check()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two checkpoints."""
    folder = RunFolder(tmp_path_factory.mktemp("saved") / "run", keep=2)
    folder.claim(example_config("run.name=run"))
    for epoch in (1, 2):
        folder.save(epoch, learner_state(epoch))
    return folder.path


def test_any_checkpoint(saved: Path, tmp_path: Path) -> None:
    """The newest is damaged: it is refused and the older one is used, or it is whole after all. Never anything else."""
    whole = {epoch: learner_state(epoch) for epoch in (1, 2)}
    newest = saved / "checkpoints" / "epoch-000002"
    files = sorted(file.name for file in newest.iterdir())

    @given(st.data(), st.sampled_from(files), st.booleans())
    def check(data: st.DataObject, name: str, gone: bool) -> None:
        copy = tmp_path / "run"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(saved, copy)
        file = copy / "checkpoints" / "epoch-000002" / name
        before = file.read_bytes()
        file.unlink()
        if not gone:
            file.write_bytes(data.draw(damaged(before)))
        try:
            found = RunFolder(copy, keep=2).latest()
        except Exception as error:  # noqa: BLE001
            one_line(error)
            return
        assert found is not None, "there is a whole one"
        state = whole[found.epoch]
        assert (found.state.version, found.state.optimizer_step) == (state.version, state.optimizer_step)
        for part in ("policy", "ema", "optimizer"):
            mine, theirs = getattr(found.state, part), getattr(state, part)
            assert mine.keys() == theirs.keys()
            assert all(mine[key].tobytes() == np.ascontiguousarray(theirs[key]).tobytes() for key in mine)

    check()


@given(st.binary(max_size=80) | damaged(json.dumps(GENEVAL).encode()), st.sampled_from([".txt", ".jsonl"]))
@example(b"\xff\xfe", ".txt")
@example(b"[" * 5000, ".jsonl")
@example(b'{"prompt": 1}', ".jsonl")
@example(b'{"prompt": "\\ud800"}', ".jsonl")
@example(b"1" * 5000, ".jsonl")
def test_any_prompt_file(tmp_path: Path, text: bytes, suffix: str) -> None:
    file = tmp_path / f"prompts{suffix}"
    file.write_bytes(text)
    try:
        assert len(load_prompts(str(file))) > 0
    except Exception as error:  # noqa: BLE001
        one_line(error)


@given(changed(GENEVAL))
def test_any_geneval_line(line: object) -> None:
    if not isinstance(line, dict):
        return
    config = reward_config("geneval", {"detector": "shapes"})
    try:
        check_lines("geneval", [("a photo", line)], config)
    except Exception as error:  # noqa: BLE001
        one_line(error)
