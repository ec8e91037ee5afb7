"""Samplers on nodes that come and go: their seats, and what they drew."""

import os
import re
import shutil
import subprocess
import sys
import tempfile

import pytest

from tests.command_line import REPO

pytestmark = [pytest.mark.ray, pytest.mark.full]

QUICK_HEALTH = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}
"""A lost node is found within seconds, instead of a minute: the same path, only sooner."""


def test_seats_come_back_with_the_node_and_new_room_is_used() -> None:
    """Started with one of three, joined by two, of which a node takes both for longer than all attempts last."""
    folder = tempfile.mkdtemp(prefix="nr-", dir="/tmp")  # short: Ray's socket paths have a limit
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"RAY_TMPDIR": folder, "HOME": folder, "PYTHONPATH": str(REPO)} | QUICK_HEALTH
    command = [sys.executable, "-m", "tests.chaos.seats_on_nodes"]
    try:
        done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, timeout=240)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-6000:]
    for line in (
        r"^nodes/sampler: 1 of 3 samplers serve; the others join when there is room$",
        r"^nodes/sampler-\d\.?\d* serves; 3 of 3 samplers serve$",
        r"^nodes/sampler-\d\.?\d* failed and is replaced; 1 of 3 samplers serve: ActorDiedError: ",
        r"^nodes/sampler-3 serves; 4 of 4 samplers serve$",
    ):
        assert re.search(line, said, re.MULTILINE), f"{line} is not in\n{said[-6000:]}"
    assert max(map(len, re.findall(r"^nodes/.*$", said, re.MULTILINE))) < 600
