"""One run in MLflow, made equal to its folder: `deliver` sends what is there and not yet here, once each.

What MLflow has is read from it when it is connected, and again after every failure; a figure carries the time of its
line, so that one which did arrive although no answer came back is the same row, not another. A figure that MLflow has
stays as it is: where a repeated epoch gave another, a tag says so. Every method raises whatever MLflow does.
"""

import json
import logging
import posixpath
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from nft_ray.config import ExperimentConfig, dump, resolved
from nft_ray.runs.checkpoint import write_atomically
from nft_ray.runs.database import prepare
from nft_ray.runs.evaluations import evaluated_epochs, load_evaluation
from nft_ray.runs.ledger import RUN_ID, read_run_id
from nft_ray.runs.metrics import OWN, Line, Metrics
from nft_ray.runs.remote import IDENTITY
from nft_ray.runs.report import contact_sheet

METRICS_PER_BATCH = 1000
PARAMS_PER_BATCH = 100
PARAM_LENGTH = 6000
NAME_LENGTH = 250
TAG_LENGTH = 5000
"""The limits of MLflow 3.17 (mlflow.utils.validation); above them it raises."""
PICTURES = "evaluation"
STEP = "/optimizer_step"
"""How the metric's name ends; it begins with the algorithm's."""
REPEATED = "nft_ray.repeated_epochs"
LOUD = ("mlflow", "alembic", "sqlalchemy", "urllib3.connectionpool")
"""Loggers that say all that is raised, too: 60 lines while the tables are made, 1,100 where the disk is full."""


class MlflowRun:
    """The run of a folder. `run_id` is None until MLflow has answered once."""

    def __init__(self, folder: Path, config: ExperimentConfig, uri: str) -> None:
        self._folder, self._config, self._uri = folder, config, uri
        self.run_id = read_run_id(folder)
        self._artifacts: set[Path] = set()
        self.disconnect()

    @property
    def connected(self) -> bool:
        return self._client is not None

    def disconnect(self) -> None:
        """Forget what MLflow has: it is asked again."""
        self._client: Any = None
        self._sent: dict[tuple[str, int], float] = {}
        self._lines: dict[int, Line] = {}
        self._pictured: set[int] = set()
        self._steps_at = (-1, 0)
        self._repeated: set[int] = set()
        self._artifacts.clear()

    def connect(self) -> None:
        """Import MLflow, make its database, find or create the experiment and the run; nothing when that is done."""
        if self.connected:
            return
        from mlflow import MlflowClient

        for name in LOUD:
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)
        warnings.filterwarnings("ignore", module="alembic")
        prepare(self._uri)
        client = MlflowClient(tracking_uri=self._uri)
        run = self._found(client) or self._created(client)
        self.run_id = run.info.run_id
        write_atomically(self._folder / RUN_ID, f"{self.run_id}\n")
        for key in run.data.metrics:
            history = client.get_metric_history(self.run_id, key)
            self._sent |= {(key, metric.step): metric.value for metric in history}
        names = [posixpath.basename(file.path) for file in client.list_artifacts(self.run_id, "images")]
        self._pictured = {int(match[1]) for name in names if (match := re.match(rf"{PICTURES}[^\d]+(\d+)", name))}
        self._log_config(client, run.data.params)
        self._client = client

    @property
    def status(self) -> str:
        """What MLflow says that the run is."""
        return str(self._client.get_run(self.run_id).info.status)

    def set_status(self, status: str) -> None:
        """RUNNING, or how it ended."""
        if status == "RUNNING":
            self._client.update_run(self.run_id, status=status)
        else:
            self._client.set_terminated(self.run_id, status=status)

    def deliver(self, metrics: Metrics, artifacts: Iterable[Path] = ()) -> None:
        """Send what MLflow lacks: figures of epochs and of steps, pictures, and files or folders under their names."""
        new = [line for line in metrics.lines if self._lines.get(line["epoch"]) is not line]
        self._note_repeated(new)
        self._send(_of_epochs(new))
        self._lines |= {line["epoch"]: line for line in new}
        rewinds, place = metrics.num_rewinds, self._steps_at[1]
        steps, place = metrics.steps_from(place if self._steps_at[0] == rewinds else 0)
        self._send(_of_steps(steps))
        self._steps_at = (rewinds, place)
        for results in (self._folder, *sorted(self._folder.glob("stages/*"))):
            for epoch in evaluated_epochs(results):
                self._send_pictures(results, epoch)
        for path in artifacts:
            if path not in self._artifacts:
                self._client.log_artifact(self.run_id, str(path))
                self._artifacts.add(path)

    def _send_pictures(self, results: Path, epoch: int) -> None:
        """The pictures of the fixed lines, in one image per evaluation."""
        if epoch in self._pictured:
            return
        try:
            images = load_evaluation(results, epoch).images
        except (OSError, ValueError, KeyError):  # a file of it is lost: the run makes it again
            return
        if images:
            sheet = contact_sheet(images)
            self._client.log_image(self.run_id, sheet, key=PICTURES, step=epoch, synchronous=True)
            self._pictured.add(epoch)

    def _found(self, client: Any) -> Any:
        """The run that the folder names, or that was made for it by a process which did not live to note it."""
        from mlflow.exceptions import MlflowException

        if self.run_id is None:
            experiment = client.get_experiment_by_name(self._config.tracking.experiment)
            if experiment is None or not (identity := self._identity()):
                return None
            wanted = f"tags.`nft_ray.{IDENTITY}` = '{identity}'"
            return next(iter(client.search_runs([experiment.experiment_id], filter_string=wanted)), None)
        try:
            run = client.get_run(self.run_id)
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
            place = self._folder.absolute().parent / "mlflow-artifacts"
            local = self._uri.startswith("sqlite:")
            experiment_id = client.create_experiment(name, artifact_location=place.as_uri() if local else None)
        tags = {f"nft_ray.{IDENTITY}": identity} if (identity := self._identity()) else {}
        return client.create_run(experiment_id, run_name=self._config.run.name, tags=tags)

    def _identity(self) -> str:
        path = self._folder / IDENTITY
        return path.read_text().strip() if path.exists() else ""

    def _log_config(self, client: Any, logged: Mapping[str, str]) -> None:
        """The resolved experiment, as parameters and as a file. A parameter keeps its first value: MLflow's rule."""
        from mlflow.entities import Param

        values = {_name(key): value[:PARAM_LENGTH] for key, value in flattened(resolved(self._config))}
        params = [Param(key, value) for key, value in values.items() if key not in logged]
        for start in range(0, len(params), PARAMS_PER_BATCH):
            client.log_batch(self.run_id, params=params[start : start + PARAMS_PER_BATCH])
        client.log_text(self.run_id, dump(self._config), "config.yaml")

    def _note_repeated(self, lines: Iterable[Line]) -> None:
        """Tell the epochs of which MLflow has other figures; seconds are others each time."""
        differ = {
            step
            for name, value, _, step in _of_epochs(lines)
            if not name.endswith("_s") and self._sent.get((_name(name), step), value) != value
        }
        if differ - self._repeated:
            self._repeated |= differ
            epochs = ", ".join(map(str, sorted(self._repeated)))
            text = f"MLflow has the first figures, metrics.jsonl the last ones, of epochs {epochs}"
            self._client.set_tag(self.run_id, REPEATED, text[:TAG_LENGTH])

    def _send(self, values: Iterable[tuple[str, float, int, int]]) -> None:
        from mlflow.entities import Metric

        new = {
            (name, step): Metric(name, value, time, step)
            for name, value, time, step in ((_name(name), *rest) for name, *rest in values)
            if (name, step) not in self._sent
        }
        metrics = list(new.values())
        for start in range(0, len(metrics), METRICS_PER_BATCH):
            batch = metrics[start : start + METRICS_PER_BATCH]
            self._client.log_batch(self.run_id, metrics=batch, synchronous=True)
            self._sent |= {(metric.key, metric.step): metric.value for metric in batch}


def flattened(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, text) of every leaf; lists are one leaf."""
    for key, value in data.items():
        if isinstance(value, Mapping) and value:
            yield from flattened(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value)


def _of_epochs(lines: Iterable[Line]) -> Iterator[tuple[str, float, int, int]]:
    """(name, value, milliseconds, step): the step is the epoch."""
    for line in lines:
        for name, value in line.items():
            if name not in OWN and value is not None:
                yield name, value, int(line["time"] * 1000), line["epoch"]


def _of_steps(lines: Iterable[Line]) -> Iterator[tuple[str, float, int, int]]:
    """The same of optimizer steps, under `step/` and with their own number."""
    for line in lines:
        numbers = [int(value) for name, value in line.items() if name.endswith(STEP) and value is not None]
        for name, value in line.items() if numbers else ():
            if name not in OWN and value is not None:
                yield f"step/{name}", value, int(line["time"] * 1000), numbers[0]


def _name(name: str) -> str:
    """`name` as MLflow takes it: tags and reward sections are free text."""
    return posixpath.normpath(re.sub(r"[^/\w.\- :]", "_", name))[:NAME_LENGTH]
