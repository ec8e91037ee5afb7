"""Ends a run whose cluster is gone, with a line that says so, before Ray ends it without one.

    every 2 s: does the head's port answer?
        │ no, for 22 s                     what is finished is saved; the work goes on, as far as it can
        ▼ no, for 45 s                     saved once more, the tracker closed, the line, exit status 75

Ray's own core kills the driver when its head has not answered for 60 s (RAY_gcs_rpc_server_reconnect_timeout_s), with a
line of its own or none. A head that is back sooner (its state kept in Redis) is waited for: ours comes at 3/4 of that.
Nothing that asks the cluster may run then: every such call, `ray.shutdown` too, waits for what is gone. So a thread
ends the process, whatever the others wait for; what is being written is whole or absent (runs/checkpoint.py).
"""

import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NoReturn

from nft_ray.cli.failures import TRY_AGAIN

logger = logging.getLogger(__name__)
PROBE_S = 2.0
RAYS_OWN_S, SHARE = 60.0, 0.75
SAVE_S, CLOSE_S = 20.0, 10.0
"""What has to be saved and closed gets so long and no longer: it may wait for the cluster, too. Ray may end the process
before, which is why the first save comes early."""


def _nothing() -> None:
    """What keeps nothing has nothing to save."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """What a command does when the cluster is gone: `kept` is how its last line ends, `close` closes what it holds.

    save: writes what is finished and not kept yet, from a thread beside the work; before `close`, and in time.
    """

    kept: Callable[[], str]
    close: Callable[[], None]
    save: Callable[[], None] = _nothing


class Silence:
    """How long a head has not answered. Fed with probes and the time of each (s)."""

    def __init__(self, most_s: float) -> None:
        self.most_s = most_s
        self._since: float | None = None

    def heard(self, answers: bool, now: float) -> bool:
        """Told of a probe; is the cluster gone by now?"""
        if answers:
            if self._since is not None:
                logger.warning("the cluster's head answers again after %.0f s", now - self._since)
            self._since = None
            return False
        if self._since is None:
            self._since = now
            logger.warning("the cluster's head does not answer: the run ends if it stays so for %.0f s", self.most_s)
        return now - self._since >= self.most_s

    def doubtful(self, now: float) -> bool:
        """Has half of the time passed?"""
        return self._since is not None and now - self._since >= self.most_s / 2


class Watch:
    """A thread that asks `answers` and calls `gone`, once, when nothing has answered for `most_s` seconds.

    After half of them, in each silence, `doubt` is called in a thread of its own.
    """

    def __init__(
        self,
        answers: Callable[[], bool],
        gone: Callable[[], None],
        most_s: float,
        doubt: Callable[[], None] = _nothing,
    ) -> None:
        self._answers, self._gone, self._doubt = answers, gone, doubt
        self._silence, self._stopped = Silence(most_s), threading.Event()
        self._every_s = min(PROBE_S, most_s / 4)
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()

    def settle(self) -> None:
        """After a failure, perhaps the echo of a lost head: returns once the head answers, or `gone` was called."""
        while self._thread.is_alive() and not self._answers():
            self._thread.join(self._every_s)

    def _run(self) -> None:
        doubted = False
        while not self._stopped.wait(self._every_s):
            if self._silence.heard(self._answers(), time.monotonic()):
                return self._gone()
            doubts = self._silence.doubtful(time.monotonic())
            if doubts and not doubted:
                threading.Thread(target=_quietly, args=(self._doubt,), daemon=True).start()
            doubted = doubts


@contextmanager
def watched(head: str, ending: Ending, kill: Callable[[], None]) -> Iterator[None]:
    """While the body runs, the head at host:port is watched; `kill` ends what this process has started of the cluster.

    The body takes down what it has built on the cluster: there a lost one is waited for.
    """

    def gone() -> None:
        logger.error("the cluster is gone: its head at %s does not answer", head)
        _quietly(ending.save, most_s=SAVE_S)
        leave(f"nft-ray: the cluster is gone: {ending.kept()}", ending.close, kill)

    watch = Watch(lambda: answers(head), gone, patience_s(os.environ), ending.save)
    watch.start()
    try:
        yield
    except BaseException:
        watch.settle()
        raise
    finally:
        watch.stop()


def leave(line: str, *closing: Callable[[], None]) -> NoReturn:
    """End this process now, with its last line; whatever other threads wait for."""

    _quietly(*closing, most_s=CLOSE_S)
    logging.disable()
    sys.stdout.flush()
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()
    os._exit(TRY_AGAIN)


def _quietly(*work: Callable[[], None], most_s: float | None = None) -> None:
    """One after the other in a thread that is left behind after so many seconds; what fails is for the log."""

    def run() -> None:
        for each in work:
            try:
                each()
            except Exception as error:  # noqa: BLE001  the process ends, whatever it is
                logger.warning("without the cluster: %s: %s", type(error).__name__, error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(most_s)


def answers(head: str) -> bool:
    """Does anybody listen at host:port?"""
    host, _, port = head.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=PROBE_S).close()
    except OSError:
        return False
    return True


def patience_s(environment: Mapping[str, str]) -> float:
    """Seconds of silence until the cluster is gone: a share of those after which Ray kills its driver."""
    return SHARE * float(environment.get("RAY_gcs_rpc_server_reconnect_timeout_s") or RAYS_OWN_S)
