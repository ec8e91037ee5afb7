"""A local MLflow database is made whole or not at all, by real processes, and a broken one is named with its mend."""

import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nft_ray.runs.database import database_file, mend

FIRST = """
import sys
from pathlib import Path
from nft_ray.runs.metrics import Metrics
from nft_ray.runs.tracking import RunTracker
from tests.examples import example_config

folder = Path(sys.argv[1])
tracker = RunTracker(folder, example_config(f"run.name={folder.name}"))
tracker.begin()
tracker.log_epoch(1, {"reward/total": 0.5}, ())
tracker.close(timeout_s=120)
"""
"""The first run of a root."""


def start(folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", FIRST, str(folder)], stderr=subprocess.PIPE, text=True)


def runs_in(root: Path) -> list[tuple[str, str]]:
    """(name, status) of the runs in the database."""
    with sqlite3.connect(root / "mlflow.db") as database:
        return sorted(database.execute("SELECT name, status FROM runs"))


def hidden(root: Path) -> list[str]:
    return sorted(path.name for path in root.glob(".mlflow.db.*") if path.name != ".mlflow.db.lock")


@pytest.mark.slow
def test_killed_while_it_makes_the_database_and_then_two_at_once(tmp_path: Path) -> None:
    killed = start(tmp_path / "killed")
    deadline = time.monotonic() + 60
    while not any((tmp_path / name).stat().st_size for name in hidden(tmp_path)):  # the tables are being made
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert not (tmp_path / "mlflow.db").exists()
    assert hidden(tmp_path)

    both = [start(tmp_path / name) for name in ("one", "two")]
    errors = [process.communicate(timeout=120)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert not any("MLflow at" in error for error in errors), errors
    assert runs_in(tmp_path) == [("one", "FINISHED"), ("two", "FINISHED")]
    assert hidden(tmp_path) == []


def test_what_helps_is_said_of_a_broken_local_database() -> None:
    uri = "sqlite:////runs/mlflow.db"
    for problem in ("table _alembic_tmp_experiments already exists", "file is not a database"):
        assert "mv /runs/mlflow.db /runs/mlflow.db.broken" in mend(uri, problem)
    assert mend(uri, "database is locked") == ""
    assert mend("http://host:5000", "file is not a database") == ""


def test_the_file_of_an_address() -> None:
    assert database_file("sqlite:////runs/mlflow.db?timeout=30") == Path("/runs/mlflow.db")
    assert database_file("sqlite:///mlflow.db") == Path("mlflow.db")
    assert database_file("postgresql://host/mlflow") is None
