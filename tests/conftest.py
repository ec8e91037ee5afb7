"""What every test shares: threads that suit a small machine, and a local Ray that leaves no trace."""

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")


GOLDENS = Path(os.environ.get("NFT_RAY_GOLDENS", Path(__file__).parents[2] / "shared" / "goldens"))


@pytest.fixture(scope="session")
def goldens() -> Path:
    """Folder with the numbers of the published implementation; it comes with the task, not with the repository."""
    if not GOLDENS.is_dir():
        pytest.skip(f"no goldens at {GOLDENS}; set NFT_RAY_GOLDENS")
    return GOLDENS


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    """A Ray of 2 logical CPUs with its own folder and token, for all tests of a module."""
    import ray

    folder = tempfile.mkdtemp(prefix="nr-", dir="/tmp")  # short: Ray's socket paths have a limit
    with pytest.MonkeyPatch.context() as patch:
        (Path(folder) / "token").write_text(secrets.token_hex(32))
        patch.setenv("RAY_AUTH_TOKEN_PATH", f"{folder}/token")
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))  # workers import the fakes
        patch.delenv("RAY_ADDRESS", raising=False)
        ray.init(
            num_cpus=2,
            include_dashboard=False,
            object_store_memory=200 * 2**20,
            log_to_driver=False,
            _temp_dir=folder,
        )
        try:
            yield
        finally:
            ray.shutdown()
            os.environ.pop("RAY_AUTH_MODE", None)  # ray.init sets it, and it would outlive the token
            shutil.rmtree(folder, ignore_errors=True)
