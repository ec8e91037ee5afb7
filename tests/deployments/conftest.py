"""A stand-in for sglang, which is gone after the test."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deployments.sglang_folder import StandIn


@pytest.fixture
def stand_in(tmp_path: Path) -> Iterator[StandIn]:
    stand_in = StandIn(tmp_path)
    yield stand_in
    for pid in stand_in.alive():
        os.kill(pid, signal.SIGKILL)
