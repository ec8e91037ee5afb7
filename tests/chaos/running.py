"""A run of the command line in a process of its own: watched by what it writes, hurt from outside, judged last."""

import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

from tests.chaos.cluster import T, until
from tests.chaos.table import Table
from tests.command_line import NO_MLFLOW, REPO, environment, sets
from tests.examples import QUICKSTART, few_lines

LORA = "lora/pytorch_lora_weights.safetensors"
TINY = [
    "prompts.groups_per_epoch=6",
    "prompts.images_per_group=6",
    "sampler.num_steps=4",
    "sampler.num_times=2",
    "sampler.num_workers=1",
    "sampler.num_cpus=0.4",
    "evaluation.num_steps=4",
    "evaluation.every=500",
    "evaluation.picture_lines=[0,1]",
    "model.lora.rank=4",
    "model.lora.alpha=8",
    "run.checkpoint_every=1",
]
"""An epoch of about half a second on one core."""


class Run:
    """`nft-ray train`, as often as it is started; `ray` is the environment of the Ray that it joins or starts."""

    def __init__(
        self, name: str, folder: Path, table: Table, ray: Mapping[str, str] | None, *settings: str, mlflow: bool = False
    ) -> None:
        self.name, self.table = name, table
        self.runs, self.log_file = folder / "runs", folder / f"{name}.log"
        self.path = self.runs / name
        self._ray = ray
        self.settings = [*TINY, few_lines(folder, 20), f"run.name={name}", *settings]
        self.settings += [] if mlflow else [NO_MLFLOW]
        self.process: subprocess.Popen[bytes] | None = None
        self._said = 0

    def on(self, ray: Mapping[str, str]) -> "Run":
        """From now on on this Ray."""
        self._ray = ray
        return self

    @property
    def command(self) -> list[str]:
        local = ["--local"] if self._ray is None else []
        return [sys.executable, "-m", "nft_ray", "train", str(QUICKSTART), *local, *sets(*self.settings)]

    def start(self, *more: str) -> "Run":
        """Start it, or the same command again; `more` settings are of this start only."""
        self._said = self.log_file.stat().st_size if self.log_file.exists() else 0
        with self.log_file.open("ab") as log:
            self.process = subprocess.Popen(
                [*self.command, *sets(*more)],
                cwd=REPO,
                env=environment(self.runs, self._ray),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # background jobs ignore it
            )
        return self

    @property
    def pid(self) -> int:
        assert self.process is not None, "not started"
        return self.process.pid

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    @property
    def said(self) -> str:
        """The log since the last start."""
        return self.log_file.read_bytes()[self._said :].decode(errors="replace")

    @property
    def last_line(self) -> str:
        lines = [line for line in self.said.splitlines() if line.strip()]
        return lines[-1] if lines else ""

    def line(self, pattern: str) -> str | None:
        """The first line of the log in which `pattern` is found."""
        return next((line for line in self.said.splitlines() if re.search(pattern, line)), None)

    def lines(self) -> list[dict[str, Any]]:
        """metrics.jsonl, whole lines."""
        try:
            text = (self.path / "metrics.jsonl").read_text()
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    @property
    def epoch(self) -> int:
        """Finished epochs; -1 before the base is evaluated."""
        return max((line["epoch"] for line in self.lines()), default=-1)

    @property
    def saved(self) -> int:
        """Epochs of the newest whole checkpoint."""
        found = self.path.glob("checkpoints/epoch-??????/state.json")
        return max((int(file.parent.name.removeprefix("epoch-")) for file in found), default=0)

    def until(self, what: str, found: Callable[[], Any], timeout_s: float = 120.0) -> Any:
        """As `until`, but it ends at once where the run does."""

        def look() -> Any:
            value = found()
            if not value and self.process is not None and self.process.poll() is not None:
                value = found()  # it may have finished meanwhile
                assert value, f"the run ended before {what}: {self.said[-3000:]}"
            return value

        try:
            return until(what, look, timeout_s)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.said[-3000:]}") from None

    def reach(self, epoch: int, timeout_s: float = 120.0) -> None:
        self.until(f"epoch {epoch} is finished", lambda: self.epoch >= epoch, timeout_s)

    def hit(
        self,
        event: str,
        inject: Callable[[T], Any],
        aim: Callable[[], T],
        *,
        count: int = 1,
        timeout_s: float = 120.0,
    ) -> None:
        """Wait for what is to be hit, inject; a row of the table with the seconds until the next epoch is finished."""
        target = self.until(f"there is something to hit: {event}", aim, timeout_s)
        before, started = self.epoch, time.monotonic()
        inject(target)
        self.reach(before + 1, timeout_s)
        self.table.add(event, seconds=time.monotonic() - started, injected=count)

    def end(self, timeout_s: float = 150.0) -> int:
        """The exit status."""
        assert self.process is not None
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the run does not end within {timeout_s:g} s:\n{self.said[-3000:]}") from None

    def kill(self) -> None:
        """It and what is left in its session; for tests that fail."""
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.pid, signal.SIGKILL)
            self.process.wait()

    def lora(self) -> dict[str, bytes]:
        return {key: value.tobytes() for key, value in load_file(self.path / LORA).items()}

    def state(self, epoch: int) -> dict[str, bytes]:
        """Policy and EMA policy of the checkpoint after so many epochs."""
        folder = self.path / "checkpoints" / f"epoch-{epoch:06d}"
        return {
            f"{name}/{key}": value.tobytes()
            for name in ("policy", "ema")
            for key, value in load_file(folder / f"{name}.safetensors").items()
        }

    def whole(self, num_epochs: int) -> None:
        """Every epoch stands once in metrics.jsonl, and no sample missed a reward."""
        lines = self.lines()
        assert [line["epoch"] for line in lines] == list(range(num_epochs + 1)), [line["epoch"] for line in lines]
        missing = {line["epoch"]: line["reward/missing"] for line in lines[1:] if line["reward/missing"]}
        assert not missing, f"samples without a reward by epoch: {missing}"

    def same_as(self, calm: "Run", num_epochs: int) -> None:
        """It ended with the bits of a run that was left in peace, and lost nothing on its way."""
        status = self.end()
        assert status == 0, self.said[-3000:]
        self.whole(num_epochs)
        assert self.state(num_epochs) == calm.state(num_epochs), "the policy differs from that of the undisturbed run"
        ema = {key.removeprefix("ema/") for key in self.state(num_epochs) if key.startswith("ema/")}
        assert len(self.lora()) == len(ema)

    def stopped_as(self, calm: Callable[[int], "Run"]) -> int:
        """SIGTERM, which keeps the last finished epoch: its policy is that of `calm(epochs)`; gives that number."""
        self.send(signal.SIGTERM)
        assert self.end(90) == 0, self.said[-3000:]
        epochs = self.saved
        self.whole(epochs)
        assert self.state(epochs) == calm(epochs).state(epochs), "the policy differs from that of the undisturbed run"
        return epochs

    def once_in_mlflow(self, num_epochs: int, status: str = "FINISHED") -> None:
        """MLflow holds every epoch once, in one run; one that was stopped to go on is RUNNING there."""
        assert mlflow_steps(self.runs, self.name) == Counter(range(1, num_epochs + 1))
        assert mlflow_statuses(self.runs, self.name) == [status]


def mlflow_steps(runs: Path, name: str, metric: str = "nft/loss") -> Counter[int]:
    """How often MLflow holds each step of a metric of a run, by its database."""
    with sqlite3.connect(f"file:{runs / 'mlflow.db'}?mode=ro", uri=True) as database:
        rows = database.execute(
            "select m.step from metrics m join runs r on r.run_uuid = m.run_uuid where r.name = ? and m.key = ?",
            (name, metric),
        ).fetchall()
    return Counter(step for (step,) in rows)


def mlflow_statuses(runs: Path, name: str) -> list[str]:
    with sqlite3.connect(f"file:{runs / 'mlflow.db'}?mode=ro", uri=True) as database:
        return [status for (status,) in database.execute("select status from runs where name = ?", (name,))]
