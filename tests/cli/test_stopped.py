"""Real processes that are stopped, killed, or started twice: what they say, what they leave, and what goes on."""

import asyncio
import fcntl
import json
import os
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path

import pytest

from nft_ray.cli.place import Terminated
from nft_ray.runs.checkpoint import whole_checkpoints
from nft_ray.runs.folder import RunFolder
from nft_ray.runs.metrics import read_metrics
from nft_ray.runs.tracking import RunTracker
from nft_ray.trainer import Trainer
from tests.command_line import NO_MLFLOW, REPO, environment, killed_after, nft_ray_here, sets
from tests.examples import QUICKSTART, SMALL, few_lines

pytestmark = pytest.mark.slow


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    """A run that takes some minutes, unless it is stopped or told to end earlier."""
    few = few_lines(tmp_path, every=240)
    settings = (*SMALL, "run.num_epochs=2000", "evaluation.every=2000", NO_MLFLOW, few, "evaluation.picture_lines=[0]")
    return ["train", str(QUICKSTART), "--local", *sets(*settings)]


@contextmanager
def running(command: list[str], runs: Path, epochs: int = 1) -> Iterator[subprocess.Popen[str]]:
    """`nft-ray ...` in a process, once so many epochs are finished."""
    process = subprocess.Popen(
        [sys.executable, "-m", "nft_ray", *command],
        cwd=REPO, env=environment(runs), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 100
        while process.poll() is None and time.monotonic() < deadline:
            if any(line["epoch"] >= epochs for line in read_metrics(runs / "quickstart")):
                break
            time.sleep(0.05)
        else:
            pytest.fail(f"it did not get to epoch {epochs}: {process.communicate(timeout=5)}")
        yield process
    finally:
        process.kill()
        process.communicate()


def sums(folder: Path) -> dict[str, str]:
    """Of every file its SHA-256, so that a difference can be read."""
    return {str(file): sha256(file.read_bytes()).hexdigest() for file in folder.rglob("*") if file.is_file()}


def stop(pid: int) -> None:
    """SIGSTOP, and until every thread has stopped: one that is in the kernel finishes its write first."""
    os.kill(pid, signal.SIGSTOP)
    deadline = time.monotonic() + 30
    while any(state(task) != "T" for task in Path(f"/proc/{pid}/task").iterdir()):
        assert time.monotonic() < deadline, "it does not stop"
        time.sleep(0.01)


def state(task: Path) -> str:
    return (task / "stat").read_text().rpartition(")")[2].split()[0]


def contents(folder: Path) -> dict[str, bytes]:
    """Of all files but what a running process adds to."""
    return {str(file): file.read_bytes() for file in folder.rglob("*.yaml")}


def test_sigterm_keeps_the_last_finished_epoch_and_says_so(command: list[str], tmp_path: Path) -> None:
    """A checkpoint is not due for long: it is written because the machine is taken away."""
    command = [*command, *sets("run.checkpoint_every=1000")]
    with running(command, tmp_path, epochs=3) as process:
        started = time.monotonic()
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
        assert time.monotonic() - started < 25
    assert process.returncode == 0, err
    assert "Traceback" not in err
    run = tmp_path / "quickstart"
    trained = read_metrics(run)[-1]["epoch"]
    (kept,) = whole_checkpoints(run / "checkpoints")
    assert kept.name == f"epoch-{trained:06d}"
    assert out.splitlines()[-1] == f"preempted: epoch {trained} is kept in {kept}; run the same command to go on"
    assert not (tmp_path / ".quickstart.lock").exists()
    done = nft_ray_here(*command, *sets(f"run.num_epochs={trained}"), runs=tmp_path)
    assert done.returncode == 0
    assert f"going on after epoch {trained}" in done.stdout


@pytest.mark.parametrize("nohup", [False, True])
def test_a_closed_terminal_keeps_the_last_finished_epoch_unless_nohup_lets_it_go_on(
    nohup: bool, command: list[str], tmp_path: Path
) -> None:
    last = 30
    command = [*command, *sets("run.checkpoint_every=1000", *([f"run.num_epochs={last}"] if nohup else []))]
    ours, its = os.openpty()
    os.set_blocking(ours, False)

    def terminal() -> None:
        fcntl.ioctl(its, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGHUP, signal.SIG_IGN if nohup else signal.SIG_DFL)

    process = subprocess.Popen(
        [sys.executable, "-m", "nft_ray", *command],
        cwd=REPO,
        env=environment(tmp_path),
        stdin=its,
        stdout=subprocess.DEVNULL if nohup else its,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=terminal,
    )
    os.close(its)
    run, deadline = tmp_path / "quickstart", time.monotonic() + 100
    while not any(line["epoch"] >= 3 for line in read_metrics(run)):
        assert process.poll() is None
        assert time.monotonic() < deadline
        with suppress(BlockingIOError):  # a full terminal would stop it
            os.read(ours, 65536)
        time.sleep(0.05)
    os.close(ours)
    assert process.wait(60) == 0
    trained = read_metrics(run)[-1]["epoch"]
    assert [kept.name for kept in whole_checkpoints(run / "checkpoints")][-1] == f"epoch-{trained:06d}"
    assert (trained == last) == nohup


def sigterm(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


class Preempted:
    """SIGTERM where no loop runs: of a run in this process, the status, its last line, and how its tracker ended."""

    def __init__(self, command: list[str], runs: Path, patch: pytest.MonkeyPatch) -> None:
        self.ended: list[str] = []
        self.patch, self._command, self._runs = patch, command, runs
        patch.setattr(RunTracker, "close", lambda _, ended, timeout_s: self.ended.append(ended))

    def __call__(self, *settings: str) -> str:
        before = signal.getsignal(signal.SIGTERM)
        done = nft_ray_here(*self._command, *sets(*settings), runs=self._runs)
        assert signal.getsignal(signal.SIGTERM) is before
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout.splitlines()[-1]


@pytest.fixture
def preempted(command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Preempted:
    return Preempted(command, tmp_path, monkeypatch)


NOTHING_YET = "preempted: before the first epoch was finished; run the same command to begin"


def test_sigterm_while_it_looks_at_the_folder(preempted: Preempted) -> None:
    preempted.patch.setattr(RunFolder, "check", sigterm)
    assert preempted() == NOTHING_YET


def test_sigterm_while_it_waits_for_the_lock_of_another_machine(preempted: Preempted, tmp_path: Path) -> None:
    other = {"host": "b", "machine": "another", "pid": 1, "started": "1", "since": 1.0, "job": None, "token": "t"}
    (tmp_path / ".quickstart.lock").write_text(json.dumps(other))
    preempted.patch.setattr(time, "sleep", sigterm)
    assert preempted() == NOTHING_YET


def test_sigterm_while_a_failed_run_is_copied_closes_the_tracker_and_tells_the_failure(
    preempted: Preempted, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(_: object) -> None:
        raise ValueError("the workers cannot start")

    preempted.patch.setattr("nft_ray.local.local_roles", broken)
    preempted.patch.setattr(RunFolder, "send_all", sigterm)
    assert preempted() == NOTHING_YET
    assert preempted.ended == ["failed"]
    assert "nft-ray: the workers cannot start" in caplog.messages


def test_a_second_sigterm_cuts_nothing_off(preempted: Preempted) -> None:
    copied = []

    async def run(_: object) -> None:
        sigterm()
        await asyncio.sleep(60)

    def send_all(*_: object) -> None:
        sigterm()
        copied.append(True)

    preempted.patch.setattr(Trainer, "run", run)
    preempted.patch.setattr(RunFolder, "send_all", send_all)
    assert preempted() == NOTHING_YET
    assert copied == [True]
    assert preempted.ended == ["preempted"]


def test_sigterm_while_a_finished_run_is_delivered(preempted: Preempted) -> None:
    settings = ("run.num_epochs=1", "evaluation.every=1")
    preempted(*settings)
    preempted.patch.setattr("nft_ray.cli.train.catch_up", sigterm)
    assert preempted(*settings).startswith("preempted: epoch 1 is kept in ")


@pytest.mark.parametrize(("name", "status"), [("train", 0), ("evaluate", 130)])
def test_sigterm_anywhere_else_is_one_line(name: str, status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(_: object) -> int:
        raise Terminated

    monkeypatch.setattr("nft_ray.cli.main._command", stopped)
    done = nft_ray_here(name, "none.yaml", runs=Path("none"))
    assert (done.returncode, done.stderr) == (status, "stopped by SIGTERM: run the same command again\n")


def test_ctrl_c_keeps_it_too_and_is_130(command: list[str], tmp_path: Path) -> None:
    with running([*command, *sets("run.checkpoint_every=1000")], tmp_path, epochs=2) as process:
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    trained = read_metrics(tmp_path / "quickstart")[-1]["epoch"]
    assert err.splitlines()[-1].startswith(f"interrupted: epoch {trained} is kept in ")


def test_a_second_start_of_a_live_run_is_refused_and_touches_nothing(command: list[str], tmp_path: Path) -> None:
    run = tmp_path / "quickstart"
    with running(command, tmp_path, epochs=2) as process:
        stop(process.pid)  # so that nothing changes but by the second one
        before = sums(tmp_path)
        for more in ([], ["--overwrite"]):
            done = nft_ray_here(*command, *more, runs=tmp_path)
            assert done.returncode == 1
            line = done.stderr.splitlines()[-1]
            assert f"nft-ray: run quickstart is at work: {run} is held by process {process.pid} on " in line
        assert sums(tmp_path) == before
        os.kill(process.pid, signal.SIGCONT)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    assert process.returncode == 0
    epochs = [line["epoch"] for line in read_metrics(run)]
    assert epochs == list(range(len(epochs))), "every line once"


def test_of_two_started_at_once_one_runs(command: list[str], tmp_path: Path) -> None:
    command = [*command, *sets("run.num_epochs=3", "evaluation.every=3")]
    both = [
        subprocess.Popen(
            [sys.executable, "-m", "nft_ray", *command],
            cwd=REPO, env=environment(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for _ in range(2)
    ]  # fmt: skip
    said = [process.communicate(timeout=120) for process in both]
    finished = [process.returncode for process in both]
    if sorted(finished) != [0, 1]:  # the second came when the first was done: it says so
        assert finished == [0, 0]
        assert any("is finished" in out for out, _ in said)
    else:
        assert "is at work" in said[finished.index(1)][1].splitlines()[-1]
    assert [line["epoch"] for line in read_metrics(tmp_path / "quickstart")] == [0, 1, 2, 3]


def test_a_killed_one_is_taken_over_at_once_with_one_line(command: list[str], tmp_path: Path) -> None:
    command = [*command, *sets("run.num_epochs=3", "evaluation.every=3")]
    killed_after(RunTracker, "log_epoch", 2, *command, runs=tmp_path)
    lock = json.loads((tmp_path / ".quickstart.lock").read_text())
    done = subprocess.run(
        [sys.executable, "-m", "nft_ray", *command],
        cwd=REPO, env=environment(tmp_path), capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (line,) = (line for line in done.stderr.splitlines() if "was held by" in line)
    assert f"was held by process {lock['pid']} on" in line
    assert "which is gone: this run takes it over" in line
    assert [line["epoch"] for line in read_metrics(tmp_path / "quickstart")] == [0, 1, 2, 3]


def test_killed_in_the_middle_of_a_save_it_goes_on_at_the_last_whole_one(command: list[str], tmp_path: Path) -> None:
    """With one checkpoint kept, too: there is one at any moment."""
    command = [
        *command,
        *sets("run.num_epochs=3", "evaluation.every=3", "run.keep_checkpoints=1", "run.checkpoint_every=1"),
    ]
    killed_after(Path, "rename", 2, *command, runs=tmp_path)  # the second epoch takes its place
    folder = RunFolder(tmp_path / "quickstart")
    found = folder.latest()
    assert found is not None
    assert found.epoch in (1, 2)
    done = nft_ray_here(*command, runs=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("fault", ["reward", "folder"])
def test_a_start_that_fails_leaves_no_folder_and_no_claim(
    command: list[str], tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found when the workers start: the corrected command begins, as if nothing had been."""

    def broken(_: object) -> None:
        raise RuntimeError("the workers cannot start")

    runs = tmp_path / "runs" if fault == "reward" else tmp_path
    before = sorted(os.listdir(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr("nft_ray.local.local_roles", broken)
        done = nft_ray_here(*command, *sets("learner.learning_rate=0.3"), runs=runs)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (1, "nft-ray: the workers cannot start")
    assert sorted(os.listdir(tmp_path)) == before
    done = nft_ray_here(*command, *sets("run.num_epochs=1", "evaluation.every=1"), runs=runs)
    assert done.returncode == 0, done.stderr


def test_another_machine_goes_on_from_the_copy(command: list[str], tmp_path: Path) -> None:
    command = [*command, *sets(f"run.checkpoint_url=file://{tmp_path}/shared", "run.checkpoint_every=1")]
    with running(command, tmp_path / "a", epochs=2) as process:
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    trained = read_metrics(tmp_path / "a" / "quickstart")[-1]["epoch"]
    end = sets(f"run.num_epochs={trained + 1}", "evaluation.every=2000")
    done = nft_ray_here(*command, *end, runs=tmp_path / "b")
    assert done.returncode == 0, done.stderr
    assert f"going on after epoch {trained}" in done.stdout
    lines = read_metrics(tmp_path / "b" / "quickstart")
    assert [line["epoch"] for line in lines] == list(range(trained + 2))
    assert contents(tmp_path / "b" / "quickstart")
