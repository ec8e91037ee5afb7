"""Where a run's metrics go: FOLDER/metrics.jsonl, always, and MLflow, when it works.

    trainer ──log_*──► metrics.jsonl (at once)
                └────► queue ──► one thread: import mlflow (3 s), schema (8 s), runs, metrics, pictures

Training never waits for MLflow and never fails with it: whatever it raises is one warning. Both places are safe
against a resume: lines behind the checkpoint are dropped and written anew, steps that MLflow has are not sent again,
and lines that it lacks (it failed, or `tracking.uri` is another one) are sent at the start. This file knows neither
the loop nor how pictures are composed (report.py).
"""

import json
import logging
import math
import os
import posixpath
import queue
import re
import shlex
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from nft_ray.config import ExperimentConfig, dump, resolved
from nft_ray.roles import Tracker
from nft_ray.runs.checkpoint import write_atomically
from nft_ray.runs.report import contact_sheet
from nft_ray.types import EvalResult

CLOSE_S = 30.0
"""Seconds that `close` waits for MLflow to take what is queued."""
RETRY_DELAYS_S = (1.0, 5.0)
"""Pauses between the attempts of one MLflow call: another run may hold the database or be creating its tables."""
METRICS_PER_BATCH = 1000
PARAMS_PER_BATCH = 100
PARAM_LENGTH = 6000
NAME_LENGTH = 250
"""The four limits of MLflow 3.17 (mlflow.utils.validation); above them it raises."""
METRICS = "metrics.jsonl"
PICTURES = "evaluation"
STEP = "/optimizer_step"
"""How the metric's name ends; it begins with the algorithm's."""

Job = Callable[["_MlflowRun"], None]
_log = logging.getLogger(__name__)


class RunTracker(Tracker):
    """Metrics of one run. `start_epoch` is the epoch of the checkpoint that the run goes on from, 0 when fresh."""

    def __init__(
        self, folder: Path, config: ExperimentConfig, *, run_id: str | None = None, start_epoch: int = 0
    ) -> None:
        # Here and not in the thread: changing the environment is not safe beside a thread that reads it.
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / METRICS
        kept = [line for line in read_metrics(folder) if start_epoch and line["epoch"] <= start_epoch]
        self._lines = {line["epoch"]: line for line in kept}
        self._write()
        self._waiting: dict[int, dict[str, float]] = {}
        self._mlflow = _Worker(_MlflowRun(folder, config, run_id))
        for line in kept:
            self._mlflow.put(partial(_MlflowRun.log_line, line=line))

    @property
    def run_id(self) -> str | None:
        """The run in MLflow; None until MLflow has answered."""
        return self._mlflow.run.run_id

    def log_evaluation(self, epoch: int, result: EvalResult) -> None:
        """Keep the figures for the epoch's line; send the pictures.

        Epoch 0, the base, is a line of its own: the base on the lines of every stage, each when that stage begins. So
        is added to the line of an epoch that is evaluated later: the run ends there, which was to go on.
        """
        metrics = {f"eval/{name}": value for name, value in result.metrics.items()}
        self._mlflow.put(lambda run: run.log_pictures(epoch, result))
        if epoch == 0 and 0 not in self._lines:
            self._add(0, metrics)
        else:
            self.log_late(epoch, metrics)

    def log_epoch(self, epoch: int, metrics: dict[str, float], steps: tuple[dict[str, float], ...]) -> None:
        """Write the line of a finished epoch; the metrics of single optimizer steps go to MLflow only."""
        if epoch in self._lines:
            self.rewind(epoch - 1)
        self._add(epoch, metrics)
        self._mlflow.put(lambda run: run.log_steps(steps))

    def log_late(self, epoch: int, metrics: dict[str, float]) -> None:
        """Add figures to the line of a finished epoch; where it is not there yet, they wait for it."""
        if epoch in self._lines:
            line = self._lines[epoch] | {name: _finite(value) for name, value in metrics.items()}
            self._lines[epoch] = line
            self._write()
            self._mlflow.put(lambda run: run.log_line(line))
        else:
            self._waiting.setdefault(epoch, {}).update(metrics)

    def rewind(self, epoch: int) -> None:
        """Drop the lines after `epoch`, and what waits for one of them."""
        self._waiting = {at: metrics for at, metrics in self._waiting.items() if at <= epoch}
        if max(self._lines, default=0) > epoch:
            self._lines = {at: line for at, line in self._lines.items() if at <= epoch}
            self._write()

    def log_progress(self, what: str, done: int, total: int) -> None:
        """Nothing is kept."""

    def log_artifacts(self, paths: Iterable[Path]) -> None:
        """Send files, and folders under their own name, to MLflow."""
        for path in paths:
            self._mlflow.put(partial(_MlflowRun.log_artifact, path=path))

    def close(self, *, failed: bool = False, goes_on: bool = False, timeout_s: float = CLOSE_S) -> None:
        """End the run in MLflow, after at most `timeout_s` for what is still queued. More calls do nothing.

        `goes_on`: the machine is taken away and the run goes on elsewhere: it stays RUNNING.
        """
        self._mlflow.close("RUNNING" if goes_on else "FAILED" if failed else "FINISHED", timeout_s)

    def _add(self, epoch: int, metrics: Mapping[str, float]) -> None:
        values = {**metrics, **self._waiting.pop(epoch, {})}
        line = {"epoch": epoch, "time": time.time()} | {name: _finite(value) for name, value in values.items()}
        self._lines[epoch] = line
        with self._path.open("a", encoding="utf-8") as file:
            file.write(_encoded(line))
        self._mlflow.put(lambda run: run.log_line(line))

    def _write(self) -> None:
        write_atomically(self._path, "".join(_encoded(self._lines[epoch]) for epoch in sorted(self._lines)))


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The whole lines of a run's metrics.jsonl; the last one may have been cut off by a kill."""
    path = folder / METRICS
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def ui_command(config: ExperimentConfig, root: Path) -> str:
    """The command that shows all runs of `root`; for a tracking server, its address."""
    uri = tracking_uri(config, root)
    if uri.startswith(("http://", "https://")):
        return uri
    beside = Path(sys.executable).with_name("mlflow")  # runs in an environment that is not activated, too
    program = str(beside) if beside.exists() else "mlflow"
    return f"{shlex.quote(program)} ui --backend-store-uri {shlex.quote(uri)} --workers 1"


def tracking_uri(config: ExperimentConfig, root: Path) -> str:
    """`tracking.uri`, or the database that all runs of `root` share."""
    return config.tracking.uri or f"sqlite:///{root.absolute() / 'mlflow.db'}"


class _Worker:
    """The only thread that touches MLflow: jobs in order, each retried, a failure warned of once."""

    def __init__(self, run: "_MlflowRun") -> None:
        self.run = run
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._warned = False
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()

    def put(self, job: Job) -> None:
        self._jobs.put(job)

    def close(self, status: str, timeout_s: float) -> None:
        if self._closing.is_set():
            return
        self._closing.set()
        self._jobs.put(lambda run: run.end(status))
        self._jobs.put(None)
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            self._warn(f"did not take everything within {timeout_s:.0f} s")

    def _work(self) -> None:
        job: Job | None = _MlflowRun.connect
        while job is not None:
            if not self._attempt(job) and self._closing.is_set() and not self.run.connected:
                return  # `close` does not wait for the rest to fail, too
            job = self._jobs.get()

    def _attempt(self, job: Job) -> bool:
        for delay in (*RETRY_DELAYS_S, None):
            try:
                self.run.connect()
                job(self.run)
                return True
            except Exception as error:  # noqa: BLE001  whatever MLflow raises must not end the training
                if delay is None or self._closing.wait(delay):
                    self._warn(" ".join(str(error).split())[:300] or type(error).__name__)
                    return False
        raise AssertionError("the last delay is None")

    def _warn(self, what: str) -> None:
        if not self._warned:
            _log.warning("MLflow at %s: %s; metrics.jsonl goes on, MLflow may lack something", self.run.uri, what)
        self._warned = True


class _MlflowRun:
    """One run in MLflow; every method may be called again without logging anything twice."""

    def __init__(self, folder: Path, config: ExperimentConfig, run_id: str | None) -> None:
        self._id_file = folder / "mlflow_run_id.txt"
        self._config, self._root = config, folder.absolute().parent
        self.uri = tracking_uri(config, folder.parent)
        if run_id is None and self._id_file.exists():
            run_id = self._id_file.read_text().strip()
        self._wanted_id = run_id or None
        self.run_id = self._wanted_id
        self._client: Any = None
        self._sent: set[tuple[str, int]] = set()
        self._pictured: set[int] = set()

    @property
    def connected(self) -> bool:
        return self._client is not None

    def connect(self) -> None:
        """Import MLflow, find or create the experiment and the run; nothing when that is done."""
        if self.connected:
            return
        from mlflow import MlflowClient

        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)  # else 60 lines while it creates its tables
        warnings.filterwarnings("ignore", module="alembic")
        client = MlflowClient(tracking_uri=self.uri)
        run = self._found(client) or self._created(client)
        self.run_id = run.info.run_id
        write_atomically(self._id_file, f"{self.run_id}\n")
        client.update_run(self.run_id, status="RUNNING")
        for key in run.data.metrics:
            self._sent |= {(key, metric.step) for metric in client.get_metric_history(self.run_id, key)}
        names = [posixpath.basename(file.path) for file in client.list_artifacts(self.run_id, "images")]
        self._pictured = {int(match[1]) for name in names if (match := re.match(rf"{PICTURES}[^\d]+(\d+)", name))}
        self._log_config(client, run.data.params)
        self._client = client

    def log_line(self, line: Mapping[str, Any]) -> None:
        """The metrics of an epoch, with the epoch as step."""
        self._send((name, value, line["epoch"]) for name, value in line.items() if name not in ("epoch", "time"))

    def log_steps(self, steps: Sequence[Mapping[str, float]]) -> None:
        """The metrics of single optimizer steps, under `step/`."""
        numbers = [int(next(value for name, value in step.items() if name.endswith(STEP))) for step in steps]
        self._send(
            (f"step/{name}", value, number)
            for number, step in zip(numbers, steps, strict=True)
            for name, value in step.items()
        )

    def log_pictures(self, epoch: int, result: EvalResult) -> None:
        """The pictures of the fixed lines, in one image per evaluation."""
        if result.images and epoch not in self._pictured:
            sheet = contact_sheet(result.images)
            self._client.log_image(self.run_id, sheet, key=PICTURES, step=epoch, synchronous=True)
            self._pictured.add(epoch)

    def log_artifact(self, path: Path) -> None:
        """A file, or a folder under its own name."""
        self._client.log_artifact(self.run_id, str(path))

    def end(self, status: str) -> None:
        if status != "RUNNING":
            self._client.set_terminated(self.run_id, status=status)

    def _found(self, client: Any) -> Any:
        from mlflow.exceptions import MlflowException

        if self._wanted_id is None:
            return None
        try:
            run = client.get_run(self._wanted_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None  # another tracking.uri, or the database is gone
        return run if run.info.lifecycle_stage == "active" else None

    def _created(self, client: Any) -> Any:
        name = self._config.tracking.experiment
        experiment = client.get_experiment_by_name(name)
        if experiment is not None:
            experiment_id = experiment.experiment_id
        else:  # beside a local database MLflow would write artifacts into the current folder
            place = (self._root / "mlflow-artifacts").as_uri() if self.uri.startswith("sqlite:") else None
            experiment_id = client.create_experiment(name, artifact_location=place)
        return client.create_run(experiment_id, run_name=self._config.run.name)

    def _log_config(self, client: Any, logged: Mapping[str, str]) -> None:
        """The resolved experiment, as parameters and as a file. A parameter keeps its first value: MLflow's rule."""
        from mlflow.entities import Param

        values = {_name(key): value[:PARAM_LENGTH] for key, value in flattened(resolved(self._config))}
        params = [Param(key, value) for key, value in values.items() if key not in logged]
        for start in range(0, len(params), PARAMS_PER_BATCH):
            client.log_batch(self.run_id, params=params[start : start + PARAMS_PER_BATCH])
        client.log_text(self.run_id, dump(self._config), "config.yaml")

    def _send(self, values: Iterable[tuple[str, float | None, int]]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        new = {(_name(name), step): value for name, value, step in values if _finite(value) is not None}
        metrics = [
            Metric(name, value, now, step) for (name, step), value in new.items() if (name, step) not in self._sent
        ]
        for start in range(0, len(metrics), METRICS_PER_BATCH):
            batch = metrics[start : start + METRICS_PER_BATCH]
            self._client.log_batch(self.run_id, metrics=batch, synchronous=True)
            self._sent |= {(metric.key, metric.step) for metric in batch}


def flattened(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, text) of every leaf; lists are one leaf."""
    for key, value in data.items():
        if isinstance(value, Mapping) and value:
            yield from flattened(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value)


def _name(name: str) -> str:
    """`name` as MLflow takes it: tags and reward sections are free text."""
    return posixpath.normpath(re.sub(r"[^/\w.\- :]", "_", name))[:NAME_LENGTH]


def _finite(value: float | None) -> float | None:
    """JSON has no NaN and no infinity."""
    return value if value is not None and math.isfinite(value) else None


def _encoded(line: Mapping[str, Any]) -> str:
    return json.dumps(line, allow_nan=False) + "\n"
