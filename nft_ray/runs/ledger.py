"""What a run folder remembers of its run in MLflow: RUN/mlflow_run_id.txt and RUN/mlflow.json.

ended        how the last process left it; null while one is at work, and where that one was killed
delivered    a digest of all that MLflow was known to have when it had everything
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from nft_ray.runs.checkpoint import write_atomically
from nft_ray.runs.metrics import METRICS, STEPS

Ended = Literal["finished", "preempted", "interrupted", "failed"]
"""preempted: SIGTERM, or its cluster is gone: somebody else will go on with it. interrupted: by Ctrl-C."""
STATUS = {"finished": "FINISHED", "preempted": "RUNNING", "interrupted": "KILLED", "failed": "FAILED"}
"""In MLflow: one that is preempted goes on."""
RUN_ID, LEDGER = "mlflow_run_id.txt", "mlflow.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ledger:
    """The content of mlflow.json."""

    ended: Ended | None = None
    delivered: str | None = None


def read_ledger(folder: Path) -> Ledger:
    """Empty where there is none, or what is there is not one."""
    try:
        return Ledger(**json.loads((folder / LEDGER).read_text()))
    except (OSError, ValueError, TypeError):
        return Ledger()


def write_ledger(folder: Path, *, ended: Ended | None, delivered: str | None = None) -> None:
    """Replace it."""
    ledger = Ledger(ended=ended, delivered=delivered)
    write_atomically(folder / LEDGER, json.dumps(asdict(ledger), indent=1) + "\n")


def digest(folder: Path, uri: str) -> str:
    """Of the figures and of where they are sent; `uri` without its password."""
    found = hashlib.sha256(uri.encode())
    for name in (METRICS, STEPS):
        path = folder / name
        found.update(path.read_bytes() if path.exists() else b"")
    return found.hexdigest()


def is_delivered(folder: Path, uri: str) -> bool:
    """Has that MLflow been given all that is here? Asks nobody."""
    return read_ledger(folder).delivered == digest(folder, uri)


def read_run_id(folder: Path) -> str | None:
    """The run in MLflow; None until MLflow has answered once."""
    path = folder / RUN_ID
    return (path.read_text().strip() or None) if path.exists() else None
