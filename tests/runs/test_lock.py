"""One process at a time in a run folder, and no more said than one line when another one is gone."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path

import pytest

from nft_ray.roles import TryAgainError
from nft_ray.runs.lock import Holder, RunLock, this_process

REPO = Path(__file__).parents[2]
HOLD = """
import sys, time
from pathlib import Path
from nft_ray.runs.lock import RunLock
with RunLock(Path(sys.argv[1]), beat_s=0.05, stale_s=0.4) as lock:
    print("held", flush=True)
    while sys.stdin.readline():
        try:
            lock.check()
            print("mine", flush=True)
        except RuntimeError as error:
            print(error, flush=True)
"""


@contextmanager
def holding(run: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock; each line that it is sent, it looks whether it still does."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run)], cwd=REPO, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def lock_on(run: Path) -> RunLock:
    return RunLock(run, beat_s=0.05, stale_s=0.4)


def elsewhere(lock: RunLock) -> Holder:
    """As a process on another machine leaves it: its pid says nothing here, though one has it."""
    other = replace(this_process(), host="gpu-07", machine="gpu-07 another boot", job="raysubmit_7")
    lock.path.write_text(json.dumps(asdict(other)))
    return other


def test_a_live_one_is_named_and_nothing_is_touched(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with holding(run) as process:
        before = (run.with_name(".run.lock")).read_bytes()
        with pytest.raises(ValueError, match=r"^run run is at work: .* is held by process") as refused, lock_on(run):
            pass
        assert f"process {process.pid} on {socket.gethostname()}, there since 20" in str(refused.value)
        assert "\n" not in str(refused.value)
        assert run.with_name(".run.lock").read_bytes() == before
        process.stdin.write("\n"), process.stdin.flush()  # type: ignore[union-attr,func-returns-value]
        assert process.stdout.readline() == "mine\n"  # type: ignore[union-attr]


def test_one_that_is_stopped_on_this_machine_is_live(tmp_path: Path) -> None:
    with holding(tmp_path / "run") as process:
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(0.6)
        with pytest.raises(ValueError, match="is at work"), lock_on(tmp_path / "run"):
            pass


def test_one_that_was_killed_is_taken_over_with_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with holding(tmp_path / "run") as process:
        process.kill()
        process.wait()
        with lock_on(tmp_path / "run") as lock:
            lock.check()
            (record,) = caplog.records
            assert f"was held by process {process.pid} on" in record.getMessage()
            assert "which is gone: this run takes it over" in record.getMessage()
    assert os.listdir(tmp_path) == []


def test_a_pid_that_is_used_again_is_another_process(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lock = lock_on(tmp_path / "run")
    lock.path.write_text(json.dumps(asdict(replace(this_process(), started="1"))))
    with lock:
        assert "which is gone" in caplog.text


def test_one_of_another_machine_that_gives_signs_of_life_is_live(tmp_path: Path) -> None:
    lock, ended = lock_on(tmp_path / "run"), threading.Event()
    elsewhere(lock)

    def beat() -> None:
        while not ended.wait(0.05):
            os.utime(lock.path)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with (
            pytest.raises(TryAgainError, match=r"held by process \d+ on gpu-07 \(Ray job raysubmit_7\), there since"),
            lock,
        ):
            pass
    finally:
        ended.set()
        thread.join()


def test_one_of_another_machine_without_signs_of_life_is_taken_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lock = lock_on(tmp_path / "run")
    elsewhere(lock)
    started = time.monotonic()
    with lock:
        assert time.monotonic() - started >= 0.4
        waiting, taken = (record.getMessage() for record in caplog.records)
        assert "waiting for a sign of life, at most" in waiting
        assert "without a sign of life for" in taken


def test_who_was_taken_for_gone_learns_it_and_gives_nothing_back(tmp_path: Path) -> None:
    """As one that was stopped for so long, or cut off from the shared folder."""
    run = tmp_path / "run"
    with holding(run) as process:
        other = elsewhere(lock_on(run))
        process.stdin.write("\n"), process.stdin.flush()  # type: ignore[union-attr,func-returns-value]
        line = process.stdout.readline()  # type: ignore[union-attr]
        assert "was taken over by process" in line
        assert "on gpu-07" in line
        process.communicate(timeout=20)
    assert json.loads(run.with_name(".run.lock").read_text()) == asdict(other)


def test_a_lock_that_was_cleaned_away_is_written_again(tmp_path: Path) -> None:
    with lock_on(tmp_path / "run") as lock:
        lock.path.unlink()
        lock.check()
        assert json.loads(lock.path.read_text())["pid"] == os.getpid()


def test_a_torn_one_is_nobodys(tmp_path: Path) -> None:
    lock = lock_on(tmp_path / "run")
    lock.path.write_text('{"token": "12')
    with lock:
        lock.check()


def test_it_beats_and_leaves_no_folder_that_it_made(tmp_path: Path) -> None:
    run = tmp_path / "some" / "runs" / "run"
    with lock_on(run) as lock:
        os.utime(lock.path, (0, 0))
        deadline = time.monotonic() + 10
        while lock.path.stat().st_mtime < time.time() - 60 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert time.time() - lock.path.stat().st_mtime < 60
    assert os.listdir(tmp_path) == []


def test_of_many_at_once_one_has_it(tmp_path: Path) -> None:
    """Also over the remains of one that was killed: all of them see that it is gone."""
    run = tmp_path / "run"
    lock_on(run).path.write_text(json.dumps(asdict(replace(this_process(), pid=2**22 + 1))))
    script = """
import sys, time
from pathlib import Path
from nft_ray.runs.lock import RunLock
while not Path(sys.argv[2]).exists():
    time.sleep(0.001)
with RunLock(Path(sys.argv[1])):
    began = time.monotonic()
    time.sleep(0.3)
    print(began, time.monotonic())
"""
    command = [sys.executable, "-c", script, str(run), str(tmp_path / "go")]
    processes = [
        subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        for _ in "1234"
    ]
    time.sleep(0.5)
    (tmp_path / "go").touch()
    held = sorted(tuple(map(float, out.split())) for one in processes if (out := one.communicate(timeout=60)[0]))
    assert held
    assert all(before[1] <= after[0] for before, after in pairwise(held))
    assert os.listdir(tmp_path) == ["go"]


def test_it_is_known_without_an_error_whether_it_was_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = lock_on(tmp_path / "run")
    assert not lock.lost
    with lock:
        assert not lock.lost
        with monkeypatch.context() as patch:
            patch.setattr(os, "open", lambda *_: exec('raise OSError(5, "Input/output error")'))
            assert not lock.lost, "a file server that is away says nothing"
        elsewhere(lock)
        assert lock.lost
    assert lock.lost
