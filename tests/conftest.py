"""What every test shares: threads that suit a small machine, and a local Ray that leaves no trace."""

import os
import secrets
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")


TOKEN = secrets.token_hex(32)
"""One for all Rays of this process: Ray reads it once."""
GOLDENS = Path(os.environ.get("NFT_RAY_GOLDENS", Path(__file__).parents[2] / "shared" / "goldens"))


@pytest.fixture(scope="session")
def goldens() -> Path:
    """Folder with the numbers of the published implementation; it comes with the task, not with the repository."""
    if not GOLDENS.is_dir():
        pytest.skip(f"no goldens at {GOLDENS}; set NFT_RAY_GOLDENS")
    return GOLDENS


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `tiny_model` keeps the tiny pipelines, made once per session."""
    return tmp_path_factory.mktemp("tiny")


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    """A Ray of 2 logical CPUs with its own folder and token, for all tests of a module."""
    with own_ray(include_dashboard=False):
        yield


@pytest.fixture(scope="module")
def dashboard_ray() -> Iterator[str]:
    """The same with a dashboard, on a port that is free; gives its host:port."""
    with own_ray(include_dashboard=True, dashboard_port=free_port()) as url:
        assert url
        yield url


def free_port() -> int:
    """A port of loopback that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def own_ray(**options: Any) -> Iterator[str | None]:
    """A local Ray with its own folder and token; gives its dashboard's host:port."""
    import ray

    folder = tempfile.mkdtemp(prefix="nr-", dir="/tmp")  # short: Ray's socket paths have a limit
    with pytest.MonkeyPatch.context() as patch:
        (Path(folder) / "token").write_text(TOKEN)
        patch.setenv("RAY_AUTH_TOKEN_PATH", f"{folder}/token")
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))  # workers import the fakes
        patch.delenv("RAY_ADDRESS", raising=False)
        context = ray.init(
            num_cpus=2, object_store_memory=200 * 2**20, log_to_driver=False, _temp_dir=folder, **options
        )
        try:
            yield context.dashboard_url
        finally:
            if "ray.serve" in sys.modules:
                sys.modules["ray.serve"].shutdown()  # or this process goes on looking for this cluster's controller
            ray.shutdown()
            os.environ.pop("RAY_AUTH_MODE", None)  # ray.init sets it, and it would outlive the token
            shutil.rmtree(folder, ignore_errors=True)
