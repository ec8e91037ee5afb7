"""Where a run's figures go: RUN/metrics.jsonl and steps.jsonl at once, and MLflow, when it works.

    trainer ──log_*──► metrics.jsonl (the truth)
                └────► wakes one thread: import mlflow (3 s), its tables (8 s), then what it lacks is delivered

Training never waits for MLflow and never fails with it: whatever it raises is one warning, and one line when it answers
again. What it had not been given at the end is given by the next process that goes on with the run, or by
`nft-ray track RUN`: both compare what MLflow has with the folder (mlflow_run.py). This file knows neither the loop nor
how pictures are composed (report.py).
"""

import logging
import os
import re
import shlex
import sys
import threading
from collections.abc import Iterable
from pathlib import Path

from nft_ray.config import ExperimentConfig, masked_text, masked_uri, without_userinfo
from nft_ray.roles import Tracker
from nft_ray.runs.database import mend
from nft_ray.runs.ledger import STATUS, Ended, digest, read_ledger, write_ledger
from nft_ray.runs.metrics import Metrics
from nft_ray.runs.mlflow_run import MlflowRun
from nft_ray.types import EvalResult

CLOSE_S = 30.0
"""Seconds that `close` waits for MLflow to take what it lacks."""
RETRY_DELAYS_S = (1.0, 5.0)
"""Pauses between the attempts of one delivery: another run may hold the database."""
AGAIN_S = 60.0
"""Seconds until the next delivery after one that failed."""
ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
}
"""Of MLflow, where it is not set: its own 7 retries of each request are minutes in which nothing is known."""
SHOWN = 160
"""Characters of what MLflow raised, at most: it stands in one line with what that means."""
WRAPPED = re.compile(r"^(HTTPS?Connection(Pool)?\([^)]*\): |\w+\(|\d+, |<[^>]*>[,:] |['\"])+")
ENDING = re.compile(r"['\"]\)+[\s.]*$")
"""Around the message of the innermost of urllib3's errors."""
_log = logging.getLogger(__name__)


class RunTracker(Tracker):
    """Figures of one run. Nothing is read, written or asked before `begin`, nor by `close` without it."""

    def __init__(self, folder: Path, config: ExperimentConfig) -> None:
        self._folder, self._config = folder, config
        self._waiting: dict[int, dict[str, float]] = {}
        self._delivery: Delivery | None = None

    @property
    def run_id(self) -> str | None:
        """The run in MLflow; None until MLflow has answered."""
        return self._begun.run.run_id

    def begin(self, epoch: int = 0) -> None:
        """The run folder is this process's, and the run goes on after `epoch` finished epochs, 0 when fresh."""
        # Here and not in the thread: changing the environment is not safe beside a thread that reads it.
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._metrics = Metrics(self._folder)
        self._metrics.rewind(epoch)
        write_ledger(self._folder, ended=None)
        self._delivery = Delivery(self._folder, self._config, self._metrics)
        self._delivery.start()

    def log_evaluation(self, epoch: int, result: EvalResult) -> None:
        """Add the figures to the epoch's line, or keep them for it; the pictures are taken from the run folder.

        Epoch 0, the base, is a line of its own: the base on the lines of every stage, each when that stage begins.
        """
        metrics = {f"eval/{name}": value for name, value in result.metrics.items()}
        if epoch == 0 and epoch not in self._metrics:
            self._add(epoch, metrics)
        else:
            self.log_late(epoch, metrics)

    def log_epoch(self, epoch: int, metrics: dict[str, float], steps: tuple[dict[str, float], ...]) -> None:
        """Write the line of a finished epoch, and those of its optimizer steps. One that was there was not so."""
        if epoch in self._metrics:
            self._metrics.rewind(epoch - 1)
        self._add(epoch, metrics, steps)

    def log_late(self, epoch: int, metrics: dict[str, float]) -> None:
        """Add figures to the line of a finished epoch; where it is not there yet, they wait for it."""
        if epoch in self._metrics:
            self._metrics.add_late(epoch, metrics)
            self._begun.wake()
        else:
            self._waiting.setdefault(epoch, {}).update(metrics)

    def rewind(self, epoch: int) -> None:
        """Drop the lines after `epoch`, and what waits for one of them."""
        self._waiting = {at: metrics for at, metrics in self._waiting.items() if at <= epoch}
        self._metrics.rewind(epoch)

    def log_progress(self, what: str, done: int, total: int) -> None:
        """Nothing is kept."""

    def log_artifacts(self, paths: Iterable[Path]) -> None:
        """Send files, and folders under their own name, to MLflow."""
        self._begun.artifacts += paths
        self._begun.wake()

    def close(self, ended: Ended = "finished", *, timeout_s: float = CLOSE_S) -> None:
        """End the run in MLflow, after at most `timeout_s` for what it lacks. More calls do nothing."""
        if self._delivery is not None:
            self._delivery.close(ended, timeout_s)

    @property
    def _begun(self) -> "Delivery":
        assert self._delivery is not None, "RunTracker.begin was not called"
        return self._delivery

    def _add(self, epoch: int, metrics: dict[str, float], steps: Iterable[dict[str, float]] = ()) -> None:
        self._metrics.add(epoch, metrics | self._waiting.pop(epoch, {}), steps)
        self._begun.wake()


class Delivery:
    """What goes from one run folder to MLflow: beside a run in a thread (`start`, `close`), or at once (`finish`)."""

    def __init__(self, folder: Path, config: ExperimentConfig, metrics: Metrics) -> None:
        self.uri = tracking_uri(config, folder.parent)
        self.run = MlflowRun(folder, config, self.uri)
        self.artifacts: list[Path] = []
        self._folder, self._metrics = folder, metrics
        self._wake, self._closing = threading.Event(), threading.Event()
        self._ended: Ended | None = None
        self._failed = self._complete = False
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)

    def start(self) -> None:
        """In its thread, the only one that touches MLflow."""
        self._wake.set()
        self._thread.start()

    def wake(self) -> None:
        """There is something new."""
        self._wake.set()

    def close(self, ended: Ended, timeout_s: float) -> None:
        """The last delivery; the folder remembers how the run ended, and whether MLflow knows it all."""
        if self._closing.is_set():
            return
        write_ledger(self._folder, ended=ended)
        self._ended = ended
        self._closing.set()
        self._wake.set()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            self._warn(f"did not take everything within {timeout_s:.0f} s")

    def finish(self, ended: Ended | None) -> None:
        """Deliver everything and make the status right; raises what MLflow does.

        None: its process was killed, and nobody goes on with it now.
        """
        self.run.connect()
        self.run.deliver(self._metrics, self.artifacts)
        found, status = self.run.status, STATUS[ended] if ended else "KILLED"
        if found != status and (ended or found == "RUNNING"):
            self.run.set_status(status)
        write_ledger(self._folder, ended=ended, delivered=digest(self._folder, masked_uri(self.uri)))

    def _work(self) -> None:
        while not self._complete:
            self._wake.wait(AGAIN_S if self._failed else None)
            self._wake.clear()
            closing = self._closing.is_set()
            if not self._attempt() and closing:
                return

    def _attempt(self) -> bool:
        for delay in (*RETRY_DELAYS_S, None):
            try:
                self._once()
                return True
            except Exception as error:  # noqa: BLE001  whatever MLflow raises must not end the training
                self.run.disconnect()
                if delay is None or self._closing.wait(delay):
                    self._warn(explained(error, self.uri))
                    return False
        raise AssertionError("the last delay is None")

    def _once(self) -> None:
        if self._closing.is_set():
            self.finish(self._ended)
            self._complete = True
        else:
            new = not self.run.connected
            self.run.connect()
            if new:
                self.run.set_status("RUNNING")
            self.run.deliver(self._metrics, self.artifacts)
        if self._failed:
            _log.info("MLflow at %s answers again, and has everything", masked_uri(self.uri))
        self._failed = False

    def _warn(self, what: str) -> None:
        if not self._failed:
            _log.warning(
                "MLflow at %s: %s; metrics.jsonl goes on, and `nft-ray track %s` delivers what MLflow lacks in the end",
                masked_uri(self.uri), what, self._folder,
            )  # fmt: skip
        self._failed = True


def deliver(folder: Path, config: ExperimentConfig, artifacts: Iterable[Path], *, finished: bool) -> Delivery:
    """Give MLflow all of a run that no process is at work on. RuntimeError, one line, where MLflow does not take it."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    delivery = Delivery(folder, config, Metrics(folder))
    delivery.artifacts += artifacts
    try:
        delivery.finish("finished" if finished else read_ledger(folder).ended)
    except Exception as error:
        raise RuntimeError(f"MLflow at {masked_uri(delivery.uri)}: {explained(error, delivery.uri)}") from error
    return delivery


def explained(error: Exception, uri: str) -> str:
    """What MLflow raised, on one line of some 160 characters, with what helps where that is known."""
    text = str(error)
    words = _cause(masked_text(" ".join(without_userinfo(text, uri).split()))) or type(error).__name__
    return "; ".join(filter(None, (_shortened(words), mend(uri, text))))


def _cause(words: str) -> str:
    """Of requests' and urllib3's errors, each within the other, what the innermost says; any other text as it is."""
    _, found, inner = words.rpartition("Caused by ")
    if not found:
        return words
    said = WRAPPED.sub("", ENDING.sub("", inner))
    return said or words


def _shortened(words: str) -> str:
    """Whole words; where there is but one, its beginning."""
    if len(words) <= SHOWN:
        return words
    return f"{words[:SHOWN].rpartition(' ')[0] or words[:SHOWN]} ..."


def ui_command(config: ExperimentConfig, root: Path) -> str:
    """The command that shows all runs of `root`; for a tracking server, its address. Without a password."""
    uri = masked_uri(tracking_uri(config, root))
    if uri.startswith(("http://", "https://")):
        return uri
    beside = Path(sys.executable).with_name("mlflow")  # runs in an environment that is not activated, too
    program = str(beside) if beside.exists() else "mlflow"
    return f"{shlex.quote(program)} ui --backend-store-uri {shlex.quote(uri)} --workers 1"


def tracking_uri(config: ExperimentConfig, root: Path) -> str:
    """`tracking.uri`, or the database that all runs of `root` share."""
    return config.tracking.uri or f"sqlite:///{root.absolute() / 'mlflow.db'}"
