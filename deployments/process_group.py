"""A process with all that it starts, which ends together: by `end`, or because the process that made it has died.

ProcessGroup -- Popen --> leader and its children: one process group
     '------ pipe ------> watchdog (a process of its own): the pipe breaks, so it kills the group
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

POLL_S = 0.05
KILL_S = 5.0
"""How long a group is waited for after SIGKILL."""
WATCHDOG = """
import os, signal, sys, time
if os.fork():
    os._exit(0)  # no longer the actor's child: Ray kills those when an actor ends
said = b""
while piece := os.read(0, 64):
    said += piece
group, *stopped = said.split() or [b"0"]
for sign, wait_s in ((signal.SIGTERM, float(sys.argv[1])), (signal.SIGKILL, 0)):
    end = time.monotonic() + wait_s
    try:
        if int(group) and not stopped:
            os.killpg(int(group), sign)
            while time.monotonic() < end:
                os.killpg(int(group), 0)
                time.sleep(0.05)
    except ProcessLookupError:
        break
"""
"""Reads the number of the group, then blocks; without a word `stopped` before the pipe ends, the group is killed."""


class ProcessGroup:
    """A process with all that it starts, one process group, and the watchdog that ends it if this process dies."""

    def __init__(self, words: list[str], env: Mapping[str, str], stop_timeout_s: float) -> None:
        self._stop_timeout_s = stop_timeout_s
        self._watchdog = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", WATCHDOG, str(stop_timeout_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._watchdog.wait()  # for its first process, which leaves the second behind
        self._process = subprocess.Popen(
            words,
            env=dict(env),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            text=True,
            errors="replace",
        )
        self.pid = self._process.pid
        """Of the leader; the number of the group too."""
        self._tell_watchdog(f"{self.pid}\n")

    def lines(self) -> Iterator[str]:
        """What it writes, until it ends."""
        assert self._process.stdout
        yield from self._process.stdout

    def poll(self) -> int | None:
        """Exit status of the leader, None while it runs."""
        return self._process.poll()

    def end(self) -> None:
        """SIGTERM, then SIGKILL, to all of them; the leader's own end does not end the rest."""
        for sign, wait_s in ((signal.SIGTERM, self._stop_timeout_s), (signal.SIGKILL, KILL_S)):
            end = time.monotonic() + wait_s
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, sign)
            while _lives(self.pid) and time.monotonic() < end:
                time.sleep(POLL_S)
        self._process.wait()
        self._tell_watchdog("stopped\n")
        assert self._watchdog.stdin
        self._watchdog.stdin.close()

    def _tell_watchdog(self, word: str) -> None:
        assert self._watchdog.stdin
        with contextlib.suppress(BrokenPipeError):  # someone has killed the watchdog; the server is none the worse
            self._watchdog.stdin.write(word.encode())
            self._watchdog.stdin.flush()


def _lives(group: int) -> bool:
    """Whether any process of a group runs. One that is dead and not waited for does not: in a container whose first
    process waits for nobody, orphans stay as zombies for ever, and `killpg(group, 0)` finds them.
    """
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            state, _, its_group = stat.read_text().rpartition(")")[2].split()[:3]
            if int(its_group) == group and state not in "ZX":
                return True
    return False
