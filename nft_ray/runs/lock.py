"""Who is at work in a run folder: one process at a time, on whichever machine that shares it.

    RUNS/.NAME.lock    {"token", "host", "machine", "pid", "started", "since", "job"}; touched every BEAT_S

    no file, or an empty one      free
    a process of this machine     held while it lives: its pid and when it started are looked up
    one of another machine        held while the file is touched; watched for STALE_S, then taken over

It lies beside the folder, so that a start which is refused writes nothing there and --overwrite moves no lock. Changes
are made under flock, for an instant; where a file system has none, a look afterwards tells who came last. The holder
looks too: one that was stopped for so long that another took over writes no more (`check`).
"""

import contextlib
import fcntl
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from nft_ray.roles import TryAgainError
from nft_ray.runs.root import job_id

BEAT_S = 10.0
"""Seconds between two signs of life."""
STALE_S = 90.0
"""Seconds without one after which the process on another machine counts as gone."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """One process. `machine`: the boot and pid namespace that `pid` counts in; `started`: against pids used again."""

    token: str
    host: str
    machine: str
    pid: int
    started: str
    since: float
    job: str | None

    def __str__(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        job = f" (Ray job {self.job})" if self.job else ""
        return f"process {self.pid} on {self.host}{job}, there since {since}"

    @property
    def is_here(self) -> bool:
        """Can this process see whether that one lives?"""
        return self.machine == _machine()

    @property
    def lives(self) -> bool:
        """Of one that is here."""
        return _started(self.pid) == self.started


def this_process() -> Holder:
    """Whoever asks; every call is another token."""
    return Holder(
        token=secrets.token_hex(8),
        host=socket.gethostname(),
        machine=_machine(),
        pid=os.getpid(),
        started=_started(os.getpid()) or "",
        since=time.time(),
        job=job_id(os.environ),
    )


class RunLock:
    """The lock of one run folder; used as `with lock:`."""

    def __init__(self, run: Path, *, beat_s: float = BEAT_S, stale_s: float = STALE_S) -> None:
        self.path = run.with_name(f".{run.name}.lock")
        self._run, self._beat_s, self._stale_s = run, beat_s, stale_s
        self._mine: Holder | None = None
        self._lost: Holder | None = None
        self._ended = threading.Event()
        self._made: list[Path] = []

    def __enter__(self) -> "RunLock":
        """Hold it; one that is gone is taken over from. Where another process does, one line: ValueError, or
        TryAgainError where that one is on another machine, as the one that this start is to go on after may be.
        """
        self._made = [folder for folder in self.path.parents if not folder.exists()]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._acquire()
        except BaseException:
            self._remove_empty()
            raise
        self._ended.clear()
        threading.Thread(target=self._beat, name="run-lock", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        """Give it back; folders that were made for it alone go with it."""
        self._ended.set()
        with contextlib.suppress(OSError), self._opened() as file:
            holder = _read(file)
            if holder is not None and holder == self._mine:
                self.path.unlink()
        self._mine = None
        self._remove_empty()

    def check(self) -> None:
        """RuntimeError where another process took over: this one was taken for gone."""
        if self._mine is not None:
            self._look()
        if self._lost is not None:
            raise RuntimeError(
                f"{self._run} was taken over by {self._lost}: this process gave no sign of life for "
                f"{self._stale_s:.0f} s, stops, and writes nothing more there"
            )

    @property
    def lost(self) -> bool:
        """Has another process taken over? As `check`, but a file server that does not answer says nothing."""
        if self._mine is not None:
            with contextlib.suppress(OSError):
                self._look()
        return self._lost is not None

    def _acquire(self) -> None:
        """Either at once, or after one on another machine was watched for so long without a sign of life."""
        watched: tuple[str, float] | None = None
        until = 0.0
        while True:
            with self._opened() as file:
                holder = _read(file)
                sign = (holder.token, os.fstat(file).st_mtime) if holder else None
                if holder is None:
                    return self._take(file)
                if holder.is_here and not holder.lives:
                    _log.warning("%s was held by %s, which is gone: this run takes it over", self._run, holder)
                    return self._take(file)
                if holder.is_here or (watched is not None and sign != watched):
                    raise (ValueError if holder.is_here else TryAgainError)(
                        f"run {self._run.name} is at work: {self._run} is held by {holder}; wait for its end, or "
                        "choose another name with --set run.name=..."
                    )
                if watched is not None and time.monotonic() >= until:
                    _log.warning(
                        "%s was held by %s, without a sign of life for %.0f s: this run takes it over",
                        self._run, holder, self._stale_s,
                    )  # fmt: skip
                    return self._take(file)
            if watched is None:
                watched, until = sign, time.monotonic() + self._stale_s
                _log.warning(
                    "%s is held by %s: waiting for a sign of life, at most %.0f s", self._run, holder, self._stale_s
                )
            time.sleep(min(1.0, self._beat_s / 4))

    def _take(self, file: int) -> None:
        mine = this_process()
        _write(file, mine)
        with open(self.path, "rb") as again:  # where there is no flock, the last one to write has it
            if _read(again.fileno()) != mine:
                raise ValueError(f"run {self._run.name} is at work: another process took {self._run} at this moment")
        self._mine = mine

    def _beat(self) -> None:
        while not self._ended.wait(self._beat_s):
            with contextlib.suppress(OSError):  # a file server that is away for a moment
                self._look()
                if self._lost is not None:
                    return

    def _look(self) -> None:
        """Give a sign of life, or see that it was lost. One that somebody cleaned away is written again."""
        with self._opened() as file:
            holder = _read(file)
            if self._mine is None or self._ended.is_set():
                return
            if holder is None:
                _write(file, self._mine)
            elif holder == self._mine:
                os.utime(file)
            else:
                self._lost = holder

    @contextlib.contextmanager
    def _opened(self) -> Iterator[int]:
        """The file, open and flocked: the one that lies there now, not one that was removed meanwhile."""
        while True:
            file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                with contextlib.suppress(OSError):  # ENOLCK, EOPNOTSUPP: a file system without
                    fcntl.flock(file, fcntl.LOCK_EX)
                try:
                    same = os.path.samestat(os.fstat(file), os.stat(self.path))
                except FileNotFoundError:
                    same = False
                if same:
                    yield file
                    return
            finally:
                os.close(file)

    def _remove_empty(self) -> None:
        with contextlib.suppress(OSError):
            for folder in self._made:
                folder.rmdir()


def _read(file: int) -> Holder | None:
    """None where nobody holds it, or a full disk left no more than the beginning."""
    try:
        return Holder(**json.loads(os.pread(file, 4096, 0)))
    except (ValueError, TypeError):
        return None


def _write(file: int, holder: Holder) -> None:
    text = json.dumps(asdict(holder)).encode()
    os.ftruncate(file, 0)
    os.pwrite(file, text, 0)
    os.fsync(file)


def _started(pid: int) -> str | None:
    """When a process started, in the kernel's ticks; None where it is gone, or only waits to be reaped."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def _machine() -> str:
    """What a pid counts in: containers with one host name have others of their own."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()
