"""A local MLflow database: it appears whole, or not at all; and what helps where it is broken.

Its tables take MLflow 8 s, in steps that neither a kill nor a second process may come between: what they leave is
broken for every later run. So they are made under a lock, in a file beside the place, which is then renamed into it.
"""

import contextlib
import fcntl
import logging
import secrets
from collections.abc import Iterator
from pathlib import Path

SQLITE = "sqlite:///"
PARTIAL = ".partial"
BROKEN = (
    "_alembic_tmp_",
    "already exists",
    "database disk image is malformed",
    "file is not a database",
    "no such table",
    "no such column",
    "Can't locate revision",
)
"""Words of SQLite and Alembic; the last ones are of tables that were half made, or by a newer MLflow."""
_log = logging.getLogger(__name__)


def prepare(uri: str) -> None:
    """Make the database of a `sqlite:///PATH` where there is none. Other addresses have their own."""
    path = database_file(uri)
    if path is None or _is_there(path):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with _alone(path.with_name(f".{path.name}.lock")):
        if not _is_there(path):
            for left in path.parent.glob(f".{path.name}.*{PARTIAL}*"):  # by a process that was killed
                left.unlink()
            partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}{PARTIAL}")  # MLflow caches by name
            try:
                _create(partial)
                partial.rename(path)
            finally:
                partial.unlink(missing_ok=True)


def database_file(uri: str) -> Path | None:
    """The file of a local database; None for any other address."""
    return Path(uri.removeprefix(SQLITE).partition("?")[0]) if uri.startswith(SQLITE) else None


def mend(uri: str, problem: str) -> str:
    """What to do about an error of a local database that no other try will cure; empty for any other."""
    path = database_file(uri)
    if path is None or not any(words in problem for words in BROKEN):
        return ""
    return f"that database is broken: move it away (mv {path} {path}.broken), then `nft-ray track RUN` for each run"


def _is_there(path: Path) -> bool:
    """An empty file is what SQLite makes before it writes anything."""
    return path.exists() and path.stat().st_size > 0


def _create(path: Path) -> None:
    from mlflow import MlflowClient

    MlflowClient(tracking_uri=f"{SQLITE}{path}").search_experiments(max_results=1)


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One process at a time; the lock ends with its process."""
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            _log.debug("%s: no locks here: %s", path, error)
        yield
