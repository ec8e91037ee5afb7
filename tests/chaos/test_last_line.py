"""A replica is stopped, as a machine that hangs: the run ends, and the last line is the cause."""

import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.chaos.test_head import until_a_checkpoint
from tests.command_line import NO_MLFLOW, REPO, environment, ray_of_its_own, sets
from tests.examples import QUICKSTART, SMALL, few_lines


@pytest.mark.ray
@pytest.mark.slow
def test_the_cause_is_the_last_line_when_a_replica_hangs(tmp_path: Path) -> None:
    short = ["scorers.timeout_s=2", "scorers.max_attempts=1", "run.num_epochs=500", "run.name=stopped"]
    settings = sets(*SMALL, NO_MLFLOW, few_lines(tmp_path, every=40), *short)
    with ray_of_its_own() as home:
        process = subprocess.Popen(
            [sys.executable, "-m", "nft_ray", "train", str(QUICKSTART), *settings],
            cwd=REPO,
            env=environment(tmp_path, home),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        until_a_checkpoint(process, tmp_path / "stopped")
        (replica,) = [
            child
            for child in psutil.Process(process.pid).children(recursive=True)
            if "ServeReplica" in " ".join(child.cmdline())
        ]
        replica.send_signal(signal.SIGSTOP)
        _, errors = process.communicate(timeout=120)
    lines = errors.splitlines()
    assert process.returncode == 1, errors
    assert "of the samples miss a reward" in lines[-1]
    assert "is kept in" in lines[-1]
    assert not [line for line in lines if "never retrieved" in line or "Traceback" in line]
    log = (tmp_path / "stopped" / "log.txt").read_text()
    assert "of the samples miss a reward" in log
    assert "Traceback" in log
