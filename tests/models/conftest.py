"""The tiny pipelines, made once per session."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `tiny_model` keeps what it made."""
    return tmp_path_factory.mktemp("tiny")
