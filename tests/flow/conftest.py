import os
from pathlib import Path

import pytest

GOLDENS = Path(os.environ.get("NFT_RAY_GOLDENS", Path(__file__).parents[3] / "shared" / "goldens"))


@pytest.fixture(scope="session")
def goldens() -> Path:
    """Folder with the numbers of the published implementation; it comes with the task, not with the repository."""
    if not GOLDENS.is_dir():
        pytest.skip(f"no goldens at {GOLDENS}; set NFT_RAY_GOLDENS")
    return GOLDENS
