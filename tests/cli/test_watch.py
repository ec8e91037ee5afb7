"""A head that is silent for too long ends the process, with a line, whatever its other threads wait for."""

import logging
import socket
import subprocess
import sys
import threading
import time

import pytest

from nft_ray.cli.watch import Silence, Watch, _quietly, answers, patience_s
from tests.conftest import free_port


def test_a_head_is_gone_after_so_many_seconds_of_silence_and_not_before(caplog: pytest.LogCaptureFixture) -> None:
    silence = Silence(45)
    with caplog.at_level(logging.WARNING):
        assert not silence.heard(True, 0)
        assert [silence.heard(False, now) for now in (10, 30, 54.9, 55)] == [False, False, False, True]
    assert len(caplog.records) == 1


def test_a_head_that_is_back_is_told_of_and_starts_anew(caplog: pytest.LogCaptureFixture) -> None:
    silence = Silence(45)
    with caplog.at_level(logging.WARNING):
        assert [silence.heard(False, now) for now in (0, 44)] == [False, False]
        assert not silence.heard(True, 44.5)
        assert not silence.heard(False, 50)
    assert "answers again after 44 s" in caplog.text


def test_it_comes_before_ray_ends_the_process() -> None:
    assert patience_s({}) == 45
    assert patience_s({"RAY_gcs_rpc_server_reconnect_timeout_s": "300"}) == 225


def test_who_listens_answers() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert answers(f"127.0.0.1:{port}")
    assert not answers(f"127.0.0.1:{free_port()}")


def test_it_is_told_once() -> None:
    told = threading.Event()
    watch = Watch(lambda: False, told.set, 0.02)
    watch.start()
    watch.settle()
    assert told.is_set()


def test_after_half_of_a_silence_the_work_is_saved_beside_it_however_long_that_takes() -> None:
    """Ray ends the process at its own time: the end of the silence is late for a first save."""
    order, head, gone, never = list[str](), [False], threading.Event(), threading.Event()

    def save() -> None:
        order.append("save")
        never.wait(10)

    def end() -> None:
        order.append("gone")
        gone.set()

    watch = Watch(lambda: head[0], end, 1.0, save)
    watch.start()
    while not order:
        time.sleep(0.01)
    head[0] = True
    time.sleep(0.4)  # it is heard
    assert order == ["save"]
    head[0] = False
    assert gone.wait(10)
    assert order == ["save", "save", "gone"], "each silence is one of its own"
    never.set()


def test_what_hangs_while_it_is_saved_is_left_behind() -> None:
    started, never = time.monotonic(), threading.Event()
    _quietly(lambda: bool(never.wait(10)) and None, most_s=0.05)
    assert time.monotonic() - started < 2
    never.set()


def test_a_failure_beside_a_living_head_is_not_waited_for() -> None:
    watch = Watch(lambda: True, lambda: pytest.fail("it lives"), 60)
    watch.start()
    started = time.monotonic()
    watch.settle()
    watch.stop()
    assert time.monotonic() - started < 1


@pytest.mark.parametrize("end", ["time.sleep(60)", "raise RuntimeError('the echo')"])
def test_the_process_ends_with_the_line_whatever_it_waits_for(end: str) -> None:
    code = f"""
import os, sys, time
os.environ["RAY_gcs_rpc_server_reconnect_timeout_s"] = "0.4"
from nft_ray.cli.watch import Ending, watched
epochs = [3]
def save():
    print("saved", flush=True)
    epochs.append(4)
    raise OSError("and fails")
def close():
    print("closed", flush=True)
    raise OSError("and fails")
ending = Ending(kept=lambda: f"epoch {{epochs[-1]}} is kept", close=close, save=save)
with watched("127.0.0.1:{free_port()}", ending, lambda: None):
    {end}
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=20)
    assert done.returncode == 75, done.stderr
    assert done.stdout == "saved\nsaved\nclosed\n"  # early, and once more
    assert done.stderr.splitlines()[-1] == ("nft-ray: the cluster is gone: epoch 4 is kept")
