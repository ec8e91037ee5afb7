"""Files of the Hub come to a worker's node before its model loads, with the driver's token and lines of progress."""

import asyncio
import shutil
from pathlib import Path
from typing import Any

import pytest
import ray
from huggingface_hub import constants

from actors.downloads import download
from actors.samplers import SamplerActor
from nft_ray.config import ExperimentConfig
from nft_ray.downloads.pipelines import location
from tests.fakes import FakeSamplerCore, fake_config
from tests.models.stand_in_hub import COMMIT, stand_in_hub

pytestmark = pytest.mark.usefixtures("local_ray")
NAME = "nice-people/nano"
TOKEN = "hf_" + "s3cret" * 5


def sampler(config: ExperimentConfig, environment: dict[str, str]) -> Any:
    """The actor as the pool makes it, on a node whose environment points at the stand-in."""
    actor = ray.remote(SamplerActor).options(num_cpus=0.25, runtime_env={"env_vars": environment})  # type: ignore[attr-defined]
    return actor.remote(FakeSamplerCore, config, "sampler")


@pytest.mark.slow
def test_the_drivers_token_opens_a_gated_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    nano = location("nano-sd3")
    assert nano is not None
    shutil.copytree(nano, tmp_path / "repository")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    config = fake_config(model={"path": NAME})
    with stand_in_hub() as hub:
        hub.repositories[NAME], hub.gated[NAME] = tmp_path / "repository", TOKEN
        node = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
        actor = sampler(config, node)
        with pytest.raises(ValueError, match=r"^model\.path = nice-people/nano: gated, and HF_TOKEN is not set"):
            asyncio.run(download(actor, config.model, "a sampler"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        with caplog.at_level("INFO"):
            asyncio.run(download(actor, config.model, "a sampler"))
        assert f"Bearer {TOKEN}" in hub.tokens
        ray.kill(actor)
    assert f"a sampler: downloaded {NAME}" in caplog.text
    assert list((tmp_path / "home" / "hub").glob(f"*/snapshots/{COMMIT}/transformer/*.safetensors"))
    assert TOKEN not in caplog.text
    session = Path(ray._private.worker._global_node.get_session_dir_path())  # type: ignore[union-attr]
    logs = [file for file in (session / "logs").rglob("*") if file.is_file()]
    assert logs
    assert [file.name for file in logs if TOKEN.encode() in file.read_bytes()] == []


def test_a_local_folder_needs_no_call() -> None:
    asyncio.run(download(None, fake_config().model, "a sampler"))
