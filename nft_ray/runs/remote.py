"""The copy of a run at a URL that outlives the machine: a shared folder, S3, whatever fsspec reaches.

    URL/NAME/identity, owner.json          whose run this is; the process that writes here now
    URL/NAME/config.yaml, configs/, metrics.jsonl, evaluations/, stages/...      small files, as they are in the folder
    URL/NAME/checkpoints/epoch-000010/     as in the folder; state.json, with the sums of the rest, is sent last

    save ──► put ──► one thread: send the newest, then drop what the folder has dropped
                     (training waits for it only at its end)

An object store has no rename: what has no state.json, or wrong sums, is no checkpoint. What cannot be sent is one
warning, and is sent with the next one.
"""

import json
import logging
import secrets
import threading
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import fsspec

from nft_ray.runs.checkpoint import (
    BEYOND,
    PARTIAL,
    STATE,
    DamagedError,
    checkpoint_folders,
    epoch_of,
    facts_of,
    name_of,
)
from nft_ray.runs.lock import this_process

IDENTITY, OWNER = "identity", "owner.json"
FIGURES = ("evaluations/*.json", "evaluations/*.npz", "stages/*/evaluations/*.json", "stages/*/evaluations/*.npz")
SMALL = (
    *("config.yaml", IDENTITY, "mlflow_run_id.txt", "metrics.jsonl", "steps.jsonl", "summary.json", "configs/*.yaml"),
    *FIGURES,
)
DROP_S = 120.0
"""Seconds that a run which goes back waits until what it gives up is put aside at the URL."""
Best = Callable[[Collection[int]], int | None]
_log = logging.getLogger(__name__)


class Remote:
    """The copy of one run. ValueError, one line, for a URL that cannot be used."""

    def __init__(self, url: str, name: str) -> None:
        if (parts := urlsplit(url)).password is not None:
            raise ValueError(
                f"run.checkpoint_url = {parts.scheme}://...@{parts.hostname}: holds a password, which would be printed "
                "and stored; leave it to the environment, as the storage's own tools do"
            )
        self.url = f"{url.rstrip('/')}/{name}"
        try:
            self._fs, self._root = fsspec.core.url_to_fs(self.url, skip_instance_cache=True)
        except (ImportError, ValueError) as error:
            raise ValueError(
                f"run.checkpoint_url = {url}: {_one_line(error)}; pip install --constraint constraints.txt its package "
                "(s3fs for s3://, gcsfs for gs://, adlfs for az://)"
            ) from None
        self._token = ""
        self._wanted: tuple[Path, Path | None, Best] | None = None
        self._given_up: int | None = None
        self._owed: tuple[Path, Best] | None = None
        self._sending: Path | None = None
        self._busy = self._failed = False
        self._sent: dict[str, tuple[int, int]] = {}
        self._change = threading.Condition()
        self._thread: threading.Thread | None = None
        self.newest_sent: int | None = None
        """Epoch of the newest checkpoint that is there whole, as far as this process knows."""

    @property
    def sending(self) -> Path | None:
        """The checkpoint that is on its way, which must stay where it is."""
        return self._sending

    def identity(self) -> str | None:
        """Whose run is there; None where there is none. ValueError, one line, where the storage does not answer."""
        try:
            self._fs.invalidate_cache()
            found = self._text(IDENTITY)
        except Exception as error:  # noqa: BLE001  every storage has errors of its own
            raise ValueError(f"run.checkpoint_url: {self.url} does not answer: {_one_line(error)}") from None
        return found.strip() if found else None

    def config_text(self) -> str | None:
        return self._text("config.yaml")

    def epochs(self) -> list[int]:
        """Of its checkpoints, oldest first; whole or not."""
        folder = f"{self._root}/checkpoints"
        self._fs.invalidate_cache()
        if not self._fs.exists(folder):
            return []
        names = [str(path).rstrip("/").rpartition("/")[2] for path in self._fs.ls(folder, detail=False)]
        return sorted(int(name[6:]) for name in names if name.startswith("epoch-") and name[6:].isdecimal())

    def has(self, checkpoint: Path) -> bool:
        """Is this very checkpoint there, whole? Not, too, where the storage does not answer."""
        try:
            self._fs.invalidate_cache()
            return self._text(f"checkpoints/{checkpoint.name}/{STATE}") == (checkpoint / STATE).read_text()
        except Exception:  # noqa: BLE001  every storage has errors of its own; who sends it will hear of this one
            return False

    def own(self, run: Path) -> None:
        """This process writes here from now on, for this run; another that still does sees it at its next save."""
        before = self._text(OWNER)
        mine = this_process()
        self._token = mine.token
        if before is not None:
            _log.info("%s was written by another process before; this one goes on there", self.url)
        owner = {"token": mine.token, "host": mine.host, "pid": mine.pid, "since": mine.since, "job": mine.job}
        self._fs.makedirs(self._root, exist_ok=True)
        self._fs.pipe_file(f"{self._root}/{OWNER}", json.dumps(owner).encode())
        for name in (IDENTITY, "config.yaml"):
            self._put_small(run / name, name)

    def bring(self, run: Path, last: int) -> None:
        """What the folder lacks: small files, and the newest whole checkpoint where it is newer than the folder's.

        Those of more than `last` epochs, with which the run is to end now, stay where they are.
        """
        for pattern in SMALL:
            for found in self._fs.glob(f"{self._root}/{pattern}"):
                target = run / str(found)[len(self._root) :].lstrip("/")
                if not target.exists():
                    self._get(str(found), target)
        folders = [path for path in checkpoint_folders(run / "checkpoints") if epoch_of(path) <= last]
        here = max((epoch_of(path) for path in folders if _whole(path)), default=0)
        for epoch in reversed([epoch for epoch in self.epochs() if epoch <= last]):
            if epoch <= here:
                return
            target = run / "checkpoints" / name_of(epoch)
            try:
                self._bring_checkpoint(epoch, target)
            except (DamagedError, OSError) as error:
                _log.warning("checkpoint %s of %s is not used: %s", epoch, self.url, _one_line(error))
                continue
            self.newest_sent = epoch
            _log.info("epoch %d comes from %s", epoch, self.url)
            return

    def put(self, run: Path, checkpoint: Path, best: Best) -> None:
        """Send it when the one before is sent; of several that wait only the newest is.

        `best`: which of these epochs stays beside those that the folder keeps, if any.
        """
        with self._change:
            self._wanted = (run, checkpoint, best)
        self._start()

    def drop_after(self, run: Path, epoch: int) -> None:
        """Newer checkpoints and figures are put aside there, before anything else is sent; returns when they are.

        A storage that has not done it within DROP_S is one warning; it has its turn before what is sent next.
        """
        deadline = time.monotonic() + DROP_S
        with self._change:
            self._given_up = epoch if self._given_up is None else min(epoch, self._given_up)
            wanted = self._wanted or (run, None, lambda _: None)
            given_up = wanted[1] is not None and epoch_of(wanted[1]) > epoch
            self._wanted = (run, None if given_up else wanted[1], wanted[2])
        self._start()
        with self._change:
            while self._wanted or self._busy:
                if not self._change.wait(max(0.0, deadline - time.monotonic())) and time.monotonic() >= deadline:
                    break
            if self._given_up is not None:
                _log.warning(
                    "%s still has what came after epoch %d: it is put aside with the next one", self.url, epoch
                )

    def _start(self) -> None:
        with self._change:
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="checkpoint-url", daemon=True)
                self._thread.start()
            self._change.notify_all()

    def finish(self, run: Path, timeout_s: float, say: Callable[[str], None]) -> bool:
        """Wait until all is sent, the newest figures too; False where it is not, after so many seconds."""
        deadline = time.monotonic() + timeout_s
        if not self._token:
            return True  # nothing was claimed
        with self._change:
            self._wanted = self._wanted or (run, None, lambda _: None)
        self._start()
        with self._change:
            if self._sending:
                say(f"sending the newest checkpoint to {self.url}")
            while self._wanted or self._busy:
                if not self._change.wait(max(0.0, deadline - time.monotonic())) and time.monotonic() >= deadline:
                    return False
        return not self._failed

    def move_aside(self, suffix: str) -> None:
        """What is there is no longer this run's: URL/NAME becomes URL/NAME + suffix."""
        self._fs.invalidate_cache()
        found = [str(path) for path in self._fs.find(self._root)] if self._fs.exists(self._root) else []
        for path in found:  # an object store has no folders to move
            there = f"{self._root}{suffix}{path[len(self._root) :]}"
            self._fs.makedirs(there.rpartition("/")[0], exist_ok=True)
            self._fs.cp_file(path, there)
        if found:
            self._fs.rm(self._root, recursive=True)

    def _work(self) -> None:
        while True:
            with self._change:
                while self._wanted is None:
                    self._change.wait()
                (run, checkpoint, best), self._wanted = self._wanted, None
                if checkpoint is None and self._owed is not None and self._owed[0].exists():
                    checkpoint, best = self._owed
                self._owed = None if checkpoint is None else (checkpoint, best)
                self._sending, self._busy = checkpoint, True
            try:
                self._check_owner()
                self._drop_given_up()
                if checkpoint is not None:
                    self._send(checkpoint)
                for pattern in SMALL:
                    for file in run.glob(pattern):
                        self._put_small(file, str(file.relative_to(run)))
                if checkpoint is not None:
                    self._rotate(run, epoch_of(checkpoint), best)
                    self._owed = None
                self._failed = False
            except Exception as error:  # noqa: BLE001  every storage has errors of its own; training goes on
                self._failed = True
                if checkpoint is None or checkpoint.exists():  # else the run went back meanwhile: nobody misses it
                    _log.warning(
                        "%s did not reach %s: %s; it is kept here, the next one is sent",
                        f"checkpoint {checkpoint.name}" if checkpoint else "what is new", self.url, _one_line(error),
                    )  # fmt: skip
            finally:
                with self._change:
                    self._sending, self._busy = None, False
                    self._change.notify_all()

    def _check_owner(self) -> None:
        owner = json.loads(self._text(OWNER) or "{}")
        if owner.get("token") != self._token:
            raise RuntimeError(f"process {owner.get('pid')} on {owner.get('host')} writes there now")

    def _drop_given_up(self) -> None:
        """What came after the epoch to which the run went back: renamed, as in the folder."""
        if (epoch := self._given_up) is None:
            return
        for newer in self.epochs():
            if newer > epoch:
                self._put_aside(f"{self._root}/checkpoints/{name_of(newer)}")
        for pattern in FIGURES:
            for found in map(str, self._fs.glob(f"{self._root}/{pattern}")):
                if int(found.rpartition("/epoch-")[2].partition(".")[0]) > epoch:
                    self._fs.cp_file(found, found + BEYOND)
                    self._fs.rm_file(found)
        with self._change:
            self._given_up = None if self._given_up == epoch else self._given_up

    def _put_aside(self, checkpoint: str) -> None:
        """There is no rename: what makes it a checkpoint goes first, so that a kill leaves none."""
        self._remove_checkpoint(checkpoint + BEYOND)
        self._fs.makedirs(checkpoint + BEYOND, exist_ok=True)
        files = [str(found).rpartition("/")[2] for found in self._fs.ls(checkpoint, detail=False)]
        for name in sorted(files, key=lambda name: name != STATE):
            self._fs.cp_file(f"{checkpoint}/{name}", f"{checkpoint}{BEYOND}/{name}")
            self._fs.rm_file(f"{checkpoint}/{name}")
        self._remove_checkpoint(checkpoint)

    def _send(self, checkpoint: Path) -> None:
        """Tensors, then what says that they are whole."""
        there = f"{self._root}/checkpoints/{checkpoint.name}"
        self._remove_checkpoint(there)
        self._fs.makedirs(there, exist_ok=True)
        for file in sorted(checkpoint.iterdir(), key=lambda file: (file.name == STATE, file.name)):
            self._fs.put_file(str(file), f"{there}/{file.name}")
        self.newest_sent = epoch_of(checkpoint)

    def _rotate(self, run: Path, newest: int, best: Best) -> None:
        """What the folder dropped goes, but for the best."""
        there = self.epochs()
        kept = {epoch_of(path) for path in checkpoint_folders(run / "checkpoints")} | {best(there)}
        for epoch in there:
            if epoch not in kept and epoch < newest:
                self._remove_checkpoint(f"{self._root}/checkpoints/{name_of(epoch)}")

    def _remove_checkpoint(self, folder: str) -> None:
        """What makes it a checkpoint goes first."""
        self._fs.invalidate_cache()
        if self._fs.exists(f"{folder}/{STATE}"):
            self._fs.rm_file(f"{folder}/{STATE}")
        if self._fs.exists(folder):
            self._fs.rm(folder, recursive=True)

    def _put_small(self, file: Path, name: str) -> None:
        found = file.stat()
        version = (found.st_size, found.st_mtime_ns)
        if self._sent.get(name) != version:
            there = f"{self._root}/{name}"
            self._fs.makedirs(there.rpartition("/")[0], exist_ok=True)
            self._fs.put_file(str(file), there)
            self._sent[name] = version

    def _bring_checkpoint(self, epoch: int, target: Path) -> None:
        partial = target.with_name(target.name + PARTIAL)
        for found in self._fs.ls(f"{self._root}/checkpoints/{target.name}", detail=False):
            self._get(str(found), partial / str(found).rpartition("/")[2])
        facts_of(partial)
        if target.exists():  # damaged, or a newer one would not have been looked for
            target.rename(target.with_name(f"{target.name}.damaged-{secrets.token_hex(2)}"))
        partial.rename(target)

    def _get(self, found: str, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(target.name + PARTIAL)
        self._fs.get_file(found, str(partial))
        partial.replace(target)

    def _text(self, name: str) -> str | None:
        try:
            data: Any = self._fs.cat_file(f"{self._root}/{name}")
        except FileNotFoundError:
            return None
        return str(data.decode())


def _whole(path: Path) -> bool:
    try:
        facts_of(path)
    except DamagedError:
        return False
    return True


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
