"""What a command says when it fails: one line, the last one, a status for retry policies, and where the traceback is.

    ValueError                       the user's: the line says what to change                          1
    RuntimeError, OSError            the world's: its message                                          1
    RewardError                      of a reward's code: its message, the traceback                    1
    TryAgainError, a lost worker     the world's, and gone when it is tried again                     75
    anything else                    perhaps a fault of ours: its type, its message, the traceback     1

Ray is not imported here: where it is not loaded, no error is Ray's.
"""

import logging
import os
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nft_ray.config import masked_text
from nft_ray.failures import death
from nft_ray.roles import ObjectsLostError, RewardError, StateLostError, TryAgainError

FAILED, TRY_AGAIN, INTERRUPTED = 1, 75, 130
LOG = "log.txt"
"""Within a run's folder: what was logged, and every traceback."""
EXPECTED = (ValueError, RuntimeError, OSError)
RETRYABLE = (TryAgainError, ObjectsLostError, StateLostError)
MESSAGES = "ray.messages"
"""Logger of what a cluster tells its drivers, such as the traceback of a raylet that cannot spill."""
NOISY = ("asyncio", "ray.serve", "concurrent.futures", MESSAGES)
"""They tell of calls that nobody waits for any more, after the line that says why: for the log file only."""
FULL = {
    "OutOfDiskError": "the disk of a node is full, so Ray can neither keep nor spill what the samplers drew: free some "
    "(`ray start --object-spilling-directory` names another), or lower prompts.groups_per_epoch",
    "ObjectStoreFullError": "the object store of a node is full: `ray start --object-store-memory` makes it larger, or "
    "lower prompts.groups_per_epoch or images_per_group",
}


class RunLog(logging.FileHandler):
    """A run's own log file, with time, level and tracebacks; the screen shows less."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, delay=True, encoding="utf-8")
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))


def log_no_more() -> None:
    """The folder that was named is gone again."""
    for logger in (logging.getLogger(), *map(logging.getLogger, NOISY)):
        for old in [handler for handler in logger.handlers if isinstance(handler, RunLog)]:
            logger.removeHandler(old)
            old.close()


def log_to(folder: Path) -> None:
    """From here on everything is logged in this folder, too; instead of in the folder that was named before."""
    log_no_more()
    handler = RunLog(folder / LOG)
    logging.getLogger().addHandler(handler)
    for name in NOISY:
        logging.getLogger(name).addHandler(handler)


def quiet() -> None:
    """What `NOISY` says is no longer shown, nor what Ray says of calls that nobody waits for any more."""
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    for name in NOISY:
        logger = logging.getLogger(name)
        logger.propagate = False
        if not logger.handlers:  # or Python's last resort shows it
            logger.addHandler(logging.NullHandler())


def explained(error: BaseException) -> tuple[str, int]:
    """The line and the status of a failure; the traceback of all but a user's mistake is in a file, see `log_to`.

    A note on the error (`add_note`) says what is kept, and stands at the end.
    """
    cause = _cause(error)
    line, expected = _line(cause), isinstance(cause, EXPECTED) or _of_ray(cause)
    if type(cause).__module__ == "builtins" and not expected:
        line = f"{line} (a fault of nft_ray: please report it)"
    notes = [note for each in {id(one): one for one in (error, cause)}.values() for note in _notes(each)]
    if not expected or not isinstance(cause, ValueError):
        foreign = not expected or isinstance(cause, RewardError)  # only the traceback says where to look
        place = write_traceback(error, always=foreign)
        notes += [f"the traceback is in {place}"] if place and foreign else []
    return f"nft-ray: {'; '.join([line, *notes])}", TRY_AGAIN if retryable(error) else FAILED


def retryable(error: BaseException) -> bool:
    """Did something go away that comes back: a node, a worker, the cluster? Then the same command may succeed."""
    return any(isinstance(one, RETRYABLE) or _is_lost(one) for one in _chain(error))


def write_traceback(error: BaseException, *, always: bool = True) -> Path | None:
    """Into the run's log; where there is none yet, into a file of its own, or nowhere unless `always`. Never raises."""
    text = masked_text("".join(traceback.format_exception(error)))
    if os.environ.get("NFT_RAY_DEBUG"):
        sys.stderr.write(text)
    try:
        for handler in logging.getLogger().handlers:
            if isinstance(handler, RunLog):
                handler.handle(logging.makeLogRecord({"name": "nft_ray", "levelname": "ERROR", "msg": text.rstrip()}))
                return Path(handler.baseFilename)
        if not always:
            return None
        number, name = tempfile.mkstemp(prefix="nft-ray-", suffix=".txt")
        with os.fdopen(number, "w", encoding="utf-8") as file:
            file.write(text)
    except OSError:
        return None
    return Path(name)


def _line(error: BaseException) -> str:
    """An error's own message on one line; with its type where that says more than the message."""
    name, message = type(error).__name__, " ".join(str(error).split())
    if _of_ray(error):
        return FULL.get(name) or f"Ray: {name}: {death(error) or message[:300]}"
    if isinstance(error, EXPECTED) and message:
        return message
    return f"{name}: {message}" if message else name


def _cause(error: BaseException) -> BaseException:
    """What is at the bottom: of a group its first error, of an error that came from another process that one."""
    if isinstance(error, BaseExceptionGroup):
        return _cause(error.exceptions[0])
    task_error = _ray("RayTaskError")
    if task_error is not None and isinstance(error, task_error):
        cause: Any = error.cause  # type: ignore[attr-defined]
        return _cause(cause) if isinstance(cause, BaseException) and cause is not error else error
    return error


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error, and those that it came from."""
    one: BaseException | None = _cause(error)
    while one is not None:
        yield one
        one = _cause(one.__cause__) if one.__cause__ is not None else None


def _is_lost(error: BaseException) -> bool:
    names = ("RayActorError", "NodeDiedError", "WorkerCrashedError", "ObjectLostError", "OwnerDiedError")
    return any(kind is not None and isinstance(error, kind) for kind in map(_ray, names))


def _of_ray(error: BaseException) -> bool:
    kind = _ray("RayError")
    return kind is not None and isinstance(error, kind)


def _ray(name: str) -> Any:
    """A class of Ray's errors; None where Ray is not loaded."""
    module = sys.modules.get("ray.exceptions")
    return module.__dict__.get(name) if module is not None else None


def _notes(error: BaseException) -> list[str]:
    return list(error.__dict__.get("__notes__", ()))
