"""A pipeline of the Hub: fetched once per node, only what is needed, told in one line when it cannot be.

The Hub is a stand-in on loopback. Only what is killed, or runs twice at once, is a process of its own.
"""

import functools
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from safetensors.numpy import save_file

from nft_ray.config import ModelConfig
from nft_ray.downloads import pipelines, transfer
from nft_ray.downloads.transfer import PIECE_BYTES
from nft_ray.models.base import load_model
from nft_ray.models.lora import read_lora
from nft_ray.models.parts import folder_of, missing_parts, prepare
from tests.models.stand_in_hub import COMMIT, Hub, stand_in_hub
from tests.models.tiny import tiny_model

NAME = "nice-people/tiny-sd3"
TOKEN = "hf_" + "s3cret" * 5
CLIENT = """
import logging, sys
from nft_ray.config import ModelConfig
from nft_ray.downloads import pipelines
from nft_ray.models.parts import prepare
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
logging.getLogger("httpx2").setLevel(logging.WARNING)
pipelines.REPORT_S = 0.1
print("at", prepare(ModelConfig(path=sys.argv[1]), sys.argv[2:], transformer_only=False))
"""
FP16 = "transformer/diffusion_pytorch_model.fp16.safetensors"
NOBODY = "http://127.0.0.1:9"
WANTED = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")


@pytest.fixture(scope="module")
def repository(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline as it lies on the Hub: beside it what nobody here needs."""
    folder = tmp_path_factory.mktemp("repository") / "tiny"
    shutil.copytree(tiny_model("sd35_medium", tiny_folder).path, folder)
    for extra in ("sd3.safetensors", FP16, "vae/old.bin", "a.png"):
        (folder / extra).write_bytes(b"\0" * 1000)
    return folder


@pytest.fixture
def hub(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with stand_in_hub() as running:
        running.repositories[NAME] = repository
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        template = running.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield running


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache, and no token, of this test's own."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(pipelines, "REPORT_S", 0.1)


def fetched(path: str = NAME, *, transformer_only: bool = False, **changes: str) -> Path:
    return prepare(ModelConfig(path=path, **changes), WANTED, transformer_only=transformer_only)


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(ValueError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_needed_is_fetched_and_used_again_without_the_hub(
    hub: Hub, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with caplog.at_level("INFO", logger="nft_ray"):
        folder = fetched()
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("nft_ray")]
    assert lines[0].startswith(f"downloading {NAME}: 0.00 GiB in ")
    assert lines[-1] == f"downloaded {NAME}"
    assert folder.name == COMMIT
    assert missing_parts(folder, WANTED) == []
    assert not {"sd3.safetensors", "a.png", "vae/old.bin", FP16} & set(hub.sent)
    assert set(hub.sent.values()) == {1}
    model = load_model(ModelConfig(path=str(folder), max_sequence_length=8), torch.device("cpu"))
    assert model.encode(["a dog"])["prompt_embeds"].shape == (1, 22, 64)

    monkeypatch.setattr(constants, "ENDPOINT", NOBODY)
    assert fetched() == folder
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetched() == folder


def test_a_learners_node_fetches_the_transformer_alone(hub: Hub) -> None:
    folder = fetched(transformer_only=True)
    weights = [path for path in hub.sent if path.endswith(".safetensors")]
    assert weights == ["transformer/diffusion_pytorch_model.safetensors"]
    assert missing_parts(folder, (), True) == []
    assert fetched() == folder  # a sampler comes to the same node: the rest
    assert missing_parts(folder, WANTED) == []
    assert set(hub.sent.values()) == {1}


def test_a_gated_repository_is_one_line_with_its_licence(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hub.gated[NAME] = TOKEN
    licence = f"accept its licence at https://huggingface.co/{NAME} and set HF_TOKEN to a token of that account"
    peek = functools.partial(folder_of, ModelConfig(path=NAME))
    for ask in (peek, fetched):
        assert refusal(ask) == f"model.path = {NAME}: gated, and HF_TOKEN is not set: {licence}"
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    for ask in (peek, fetched):
        assert refusal(ask) == f"model.path = {NAME}: gated, and the token has no access: {licence}"
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with caplog.at_level("DEBUG"):
        assert peek() == fetched()
    assert f"Bearer {TOKEN}" in hub.tokens
    assert TOKEN not in caplog.text
    assert not any(TOKEN.encode() in file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())


def test_names_and_revisions_that_the_hub_does_not_know(hub: Hub) -> None:
    line = refusal(lambda: fetched("nice-people/other"))
    assert line.startswith("model.path = nice-people/other: the Hub shows no such repository, and HF_TOKEN is not set")
    line = refusal(lambda: fetched(revision="v9"))
    assert line.startswith(f"model.path = {NAME} at revision v9: it has no such branch, tag or commit")


def test_without_a_hub_it_says_what_to_give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", NOBODY)
    for offline, why in ((False, "the Hub cannot be reached"), (True, "HF_HUB_OFFLINE is set")):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        assert refusal(fetched) == (
            f"model.path = {NAME}: not (whole) in {tmp_path / 'hub'}, and {why}: name a folder with its files instead, "
            f"as `hf download {NAME} --local-dir FOLDER` makes one where there is a connection"
        )
        assert folder_of(ModelConfig(path=NAME)) is None  # the nodes may have it


def test_a_broken_connection_goes_on_where_it_broke(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "RETRY_S", 0.01)
    cut, reset = "text_encoder_3/model.safetensors", "vae/diffusion_pytorch_model.safetensors"
    hub.cut_once.add(cut)
    hub.reset_once.add(reset)
    folder = fetched()
    half = (hub.repositories[NAME] / cut).stat().st_size // 2 // PIECE_BYTES * PIECE_BYTES
    assert half
    assert f"{cut} bytes={half}-" in hub.ranges
    for path in (cut, reset):
        assert (folder / path).read_bytes() == (hub.repositories[NAME] / path).read_bytes()


def test_a_lora_of_the_hub(hub: Hub, tmp_path: Path) -> None:
    weights = {"b.0.q.lora_A.weight": np.ones((2, 4), np.float32), "b.0.q.lora_B.weight": np.ones((4, 2), np.float32)}
    (tmp_path / "repository").mkdir()
    named = {f"transformer.{name}": value for name, value in weights.items()}
    save_file(named, tmp_path / "repository" / "pytorch_lora_weights.safetensors")
    hub.repositories["nice-people/lora"] = tmp_path / "repository"
    found, config = read_lora("nice-people/lora")
    assert found.keys() == weights.keys()
    assert config.rank == 2
    assert refusal(lambda: read_lora("nice-people/none")).startswith("LoRA nice-people/none: the Hub shows no such")


def client(hub: Hub, home: Path) -> subprocess.Popen[str]:
    """`prepare` in a process of its own."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    own |= {"HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_ENDPOINT": hub.url}
    command = [sys.executable, "-c", CLIENT, NAME, *WANTED]
    return subprocess.Popen(command, env=own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_a_killed_download_goes_on_where_it_was_killed(hub: Hub, tmp_path: Path) -> None:
    hub.chunk_s = 0.2
    killed = client(hub, tmp_path)
    whole = lambda: [file for file in tmp_path.glob("hub/*/snapshots/**/*.json") if file.is_file()]  # noqa: E731
    parts = lambda: sizes(tmp_path.glob("hub/*/blobs/*.part"))  # noqa: E731
    cut = lambda: [size for size in parts() if size and size % PIECE_BYTES == 0]  # noqa: E731
    wait_for(lambda: cut() and whole())
    killed.kill()
    killed.wait()
    (snapshot,) = tmp_path.glob("hub/*/snapshots/*")
    kept = {str(file.relative_to(snapshot)) for file in snapshot.rglob("*") if file.is_file()}
    asked, hub.chunk_s = {f"bytes={size}-" for size in cut()}, 0.0
    hub.sent.clear()
    assert fetched() == snapshot
    assert missing_parts(snapshot, WANTED) == []
    assert kept
    assert not set(hub.sent) & kept
    assert asked <= {line.split()[1] for line in hub.ranges}
    assert not list(tmp_path.glob("hub/*/blobs/*.part*"))


def test_a_blob_whose_process_died_before_it_was_linked_is_linked(hub: Hub) -> None:
    snapshot = fetched()
    (snapshot / "transformer/diffusion_pytorch_model.safetensors").unlink()
    hub.sent.clear()
    assert fetched() == snapshot
    assert missing_parts(snapshot, WANTED) == []
    assert not hub.sent


@pytest.mark.slow
def test_of_two_processes_one_downloads(hub: Hub, tmp_path: Path) -> None:
    hub.chunk_s = 0.15
    both = [client(hub, tmp_path) for _ in range(2)]
    outputs = [process.communicate(timeout=300)[0].splitlines() for process in both]
    assert outputs[0][-1] == outputs[1][-1]
    assert outputs[0][-1].startswith("at ")
    told = [sum(line.startswith("downloading") for line in lines) for lines in outputs]
    assert min(told) == 0
    assert max(told) > 2  # progress, while the slow Hub sends
    assert set(hub.sent.values()) == {1}


def sizes(files: Iterable[Path]) -> list[int]:
    """In bytes; a file may be gone by now."""
    found = []
    for file in files:
        with suppress(FileNotFoundError):
            found.append(file.stat().st_size)
    return found


def wait_for(condition: object, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)
