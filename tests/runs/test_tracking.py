"""metrics.jsonl and MLflow: complete, never twice, never in the way of training."""

import logging
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from nft_ray.config import ExperimentConfig
from nft_ray.runs import tracking
from nft_ray.runs.ledger import Ended, read_ledger
from nft_ray.runs.metrics import Metrics
from nft_ray.runs.mlflow_run import MlflowRun
from nft_ray.runs.tracking import RunTracker, explained, ui_command
from nft_ray.types import EvalResult
from tests.examples import example_config
from tests.runs.tracked import FULL_S, UNUSABLE, abandon, begun, evaluation, lines, train


@pytest.fixture(autouse=True)
def abandoned() -> Iterator[None]:
    """No thread outlives its test."""
    yield
    abandon()


class TestJsonl:
    """Without a usable MLflow, which is also the test that nothing depends on it."""

    @pytest.fixture
    def config(self) -> ExperimentConfig:
        return example_config(UNUSABLE)

    def test_one_line_per_epoch_with_its_evaluation(self, tmp_path: Path, config: ExperimentConfig) -> None:
        before = time.time()
        train(begun(tmp_path, config), range(1, 4))
        found = lines(tmp_path)
        assert all(before <= line.pop("time") <= time.time() for line in found)
        assert found == [
            {"epoch": 0, "eval/geneval/strict": 0.5},
            {"epoch": 1, "reward/total": 0.1, "nft/loss": None},
            {"epoch": 2, "reward/total": 0.2, "nft/loss": None, "eval/geneval/strict": 0.52},
            {"epoch": 3, "reward/total": 0.3, "nft/loss": None},
        ]

    def test_the_base_on_the_lines_of_every_stage_is_one_line(self, tmp_path: Path, config: ExperimentConfig) -> None:
        train(begun(tmp_path, config), range(1, 3))
        tracker = begun(tmp_path, config, epoch=2)  # a stage begins, in another process
        for value in (0.25, 0.75):
            tracker.log_evaluation(0, EvalResult(metrics={"ocr": value}, counts={"ocr": 6}, images={}, seconds=0.5))
        tracker.log_epoch(3, {"reward/total": 1.0}, ())
        found = lines(tmp_path)
        assert [line["epoch"] for line in found] == [0, 1, 2, 3]
        assert found[0].keys() == {"epoch", "time", "eval/geneval/strict", "eval/ocr"}
        assert (found[0]["eval/geneval/strict"], found[0]["eval/ocr"]) == (0.5, 0.75)

    def test_nan_and_infinity_are_null(self, tmp_path: Path, config: ExperimentConfig) -> None:
        begun(tmp_path, config).log_epoch(1, {"a": float("nan"), "b": float("-inf"), "c": 1.5}, ())
        text = (tmp_path / "metrics.jsonl").read_text()
        assert "NaN" not in text
        assert "Infinity" not in text
        assert [lines(tmp_path)[0][name] for name in "abc"] == [None, None, 1.5]

    def test_resume_drops_what_lies_behind_the_checkpoint(self, tmp_path: Path, config: ExperimentConfig) -> None:
        train(begun(tmp_path, config), range(1, 6))
        resumed = begun(tmp_path, config, epoch=2)
        assert [line["epoch"] for line in lines(tmp_path)] == [0, 1, 2]
        train(resumed, range(3, 7))
        assert [line["epoch"] for line in lines(tmp_path)] == [0, 1, 2, 3, 4, 5, 6]
        assert [line["epoch"] for line in lines(tmp_path) if "eval/geneval/strict" in line] == [0, 2, 4, 6]

    def test_a_restart_before_the_first_checkpoint_begins_anew(self, tmp_path: Path, config: ExperimentConfig) -> None:
        train(begun(tmp_path, config), range(1, 3))
        train(begun(tmp_path, config), range(1, 2))
        assert [line["epoch"] for line in lines(tmp_path)] == [0, 1]

    def test_a_line_that_a_kill_cut_off_is_dropped(self, tmp_path: Path, config: ExperimentConfig) -> None:
        train(begun(tmp_path, config), range(1, 3))
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write('{"epoch": 3, "rew')
        train(begun(tmp_path, config, epoch=2), range(3, 4))
        assert [line["epoch"] for line in lines(tmp_path)] == [0, 1, 2, 3]

    def test_the_same_epoch_again_replaces_its_line(self, tmp_path: Path, config: ExperimentConfig) -> None:
        tracker = begun(tmp_path, config)
        for value in (1.0, 2.0):
            tracker.log_epoch(1, {"a": value}, ())
        assert [(line["epoch"], line["a"]) for line in lines(tmp_path)] == [(1, 2.0)]

    def test_the_same_epoch_again_drops_the_later_lines(self, tmp_path: Path, config: ExperimentConfig) -> None:
        tracker = begun(tmp_path, config)
        train(tracker, range(1, 6))
        tracker.log_epoch(3, {"a": 1.0}, ())
        assert [line["epoch"] for line in lines(tmp_path)] == [0, 1, 2, 3]
        assert lines(tmp_path)[3]["a"] == 1.0

    def test_rewind_drops_later_lines_and_what_waits_for_them(self, tmp_path: Path, config: ExperimentConfig) -> None:
        tracker = begun(tmp_path, config)
        train(tracker, range(1, 6))
        tracker.log_evaluation(6, evaluation(0.9))
        tracker.log_late(6, {"reward/ocr": 0.5})
        tracker.rewind(2)
        assert [line["epoch"] for line in lines(tmp_path)] == [0, 1, 2]
        for epoch in range(3, 7):
            tracker.log_epoch(epoch, {"a": 1.0}, ())
        assert [line["epoch"] for line in lines(tmp_path)] == [0, 1, 2, 3, 4, 5, 6]
        assert lines(tmp_path)[-1].keys() == {"epoch", "time", "a"}

    def test_late_figures_are_added_to_the_line_of_their_epoch(self, tmp_path: Path, config: ExperimentConfig) -> None:
        tracker = begun(tmp_path, config)
        tracker.log_late(2, {"reward/early": 0.5})  # before its epoch is logged
        train(tracker, range(1, 4))
        before = lines(tmp_path)
        tracker.log_late(1, {"reward/late": 0.25, "reward/odd": float("nan")})
        assert lines(tmp_path) == [before[0], before[1] | {"reward/late": 0.25, "reward/odd": None}, *before[2:]]
        assert before[2]["reward/early"] == 0.5

    def test_an_evaluation_whose_epoch_never_finished_is_not_in_the_file(
        self, tmp_path: Path, config: ExperimentConfig
    ) -> None:
        tracker = begun(tmp_path, config)
        tracker.log_evaluation(0, evaluation(0.5))
        tracker.log_evaluation(1, evaluation(0.6))
        assert [line["epoch"] for line in lines(tmp_path)] == [0]


class TestFailingMlflow:
    def test_is_one_warning_and_the_lines_go_on(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        tracker = begun(tmp_path, example_config(UNUSABLE))
        with caplog.at_level(logging.WARNING, logger="nft_ray"):
            train(tracker, range(1, 6))
            tracker.close(timeout_s=FULL_S)
            tracker.close()
        warnings = [record.getMessage() for record in caplog.records if record.name.startswith("nft_ray")]
        assert len(warnings) == 1
        assert "no-such-store://nowhere" in warnings[0]
        assert "metrics.jsonl goes on" in warnings[0]
        assert "\n" not in warnings[0]
        assert len(lines(tmp_path)) == 6
        assert tracker.run_id is None

    def test_a_slow_one_delays_neither_training_nor_the_end(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        released = threading.Event()

        def slow(run: MlflowRun) -> None:
            released.wait(20)
            raise OSError("too late")

        monkeypatch.setattr(MlflowRun, "connect", slow)
        tracker = begun(tmp_path, example_config())
        started = time.monotonic()
        train(tracker, range(1, 20))
        assert time.monotonic() - started < 2
        assert len(lines(tmp_path)) == 20
        with caplog.at_level(logging.WARNING, logger="nft_ray"):
            tracker.close(timeout_s=0.2)
        assert time.monotonic() - started < 4
        assert "did not take everything within 0 s" in caplog.text
        assert f"`nft-ray track {tmp_path}` delivers what MLflow lacks" in caplog.text
        released.set()
        for thread in threading.enumerate():  # or it would meet what the next test puts in MLflow's place
            if thread.name == "mlflow":
                thread.join(10)

    def test_one_that_answers_again_gets_everything_with_a_line_for_each_turn(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.INFO, logger="nft_ray")
        stand_in = StandIn(monkeypatch)
        tracker = begun(tmp_path, example_config())
        stand_in.wait_for(1)
        stand_in.away = True
        train(tracker, range(1, 4))
        stand_in.wait_for(stand_in.tries + 3)  # tried again and again
        stand_in.away = False
        tracker.close(timeout_s=10)
        assert stand_in.sent == [0, 1, 2, 3]
        assert stand_in.status == "FINISHED"
        away, again = [record.getMessage() for record in caplog.records]
        assert "the server is away; metrics.jsonl goes on" in away
        assert "answers again, and has everything" in again


class StandIn:
    """Instead of MlflowRun's own methods: an MLflow that is there or away."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.away, self.tries, self.status = False, 0, "none"
        self.sent: list[int] = []
        monkeypatch.setattr(tracking, "RETRY_DELAYS_S", (0.0,))
        monkeypatch.setattr(tracking, "AGAIN_S", 0.01)
        monkeypatch.setattr(MlflowRun, "connect", lambda run: None)
        monkeypatch.setattr(MlflowRun, "status", property(lambda run: self.status))
        monkeypatch.setattr(MlflowRun, "set_status", lambda run, status: setattr(self, "status", status))
        monkeypatch.setattr(MlflowRun, "deliver", lambda run, metrics, artifacts: self.deliver(metrics))

    def deliver(self, metrics: Metrics) -> None:
        self.tries += 1
        if self.away:
            raise OSError("the server is away")
        self.sent = [line["epoch"] for line in metrics.lines]

    def wait_for(self, goal: int) -> None:
        """Until so many deliveries were tried in all."""
        deadline = time.monotonic() + 10
        while self.tries < goal and time.monotonic() < deadline:
            time.sleep(0.01)
        assert self.tries >= goal


@pytest.mark.parametrize(
    ("ended", "status"),
    [("finished", "FINISHED"), ("preempted", "RUNNING"), ("interrupted", "KILLED"), ("failed", "FAILED")],
)
def test_how_a_run_ended_is_its_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ended: Ended, status: str
) -> None:
    stand_in = StandIn(monkeypatch)
    begun(tmp_path, example_config()).close(ended)
    assert stand_in.status == status
    assert read_ledger(tmp_path).ended == ended


def test_nothing_is_touched_before_the_run_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = StandIn(monkeypatch)
    live = begun(tmp_path, example_config())
    train(live, range(1, 4))
    before = {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()}
    RunTracker(tmp_path, example_config()).close("failed")  # a second start that was refused
    assert {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()} == before
    live.close()
    assert stand_in.status == "FINISHED"
    assert not RunTracker(tmp_path / "new", example_config()).close("failed")
    assert not (tmp_path / "new").exists()


def test_importing_the_module_imports_no_mlflow() -> None:
    code = "import sys, nft_ray.runs.tracking; sys.exit('mlflow' in sys.modules or 'matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_ui_command_names_the_shared_database_or_the_server(tmp_path: Path) -> None:
    command = ui_command(example_config(), tmp_path)
    assert f"mlflow ui --backend-store-uri sqlite:///{tmp_path}/mlflow.db" in command
    program = command.split()[0]
    assert shutil.which(program)
    assert ui_command(example_config("tracking.uri=http://host:5000"), tmp_path) == "http://host:5000"
    assert "'sqlite:///" in ui_command(example_config(), tmp_path / "a b")


POOL = "HTTPConnectionPool(host='127.0.0.1', port=9): Max retries exceeded with url: /api/2.0/mlflow (Caused by "
VIA = "API request to http://127.0.0.1:9/api/2.0/mlflow/experiments/get-by-name failed with exception "


@pytest.mark.parametrize(
    ("caused", "said"),
    [
        (
            "NewConnectionError(\"HTTPConnection(host='127.0.0.1', port=9): Failed to establish a new connection: "
            '[Errno 111] Connection refused"))',
            "Failed to establish a new connection: [Errno 111] Connection refused",
        ),
        (
            "NameResolutionError(\"HTTPConnection(host='mlflow', port=9): Failed to resolve 'mlflow' ([Errno -2] "
            'Name or service not known)"))',
            "Failed to resolve 'mlflow' ([Errno -2] Name or service not known)",
        ),
        ("ResponseError('too many 500 error responses'))", "too many 500 error responses"),
        (
            "ConnectTimeoutError(<HTTPConnection(host='10.0.0.1', port=9) at 0x7f>, 'Connection to 10.0.0.1 timed out. "
            "(connect timeout=10)'))",
            "Connection to 10.0.0.1 timed out. (connect timeout=10)",
        ),
        (
            "SSLError(SSLCertVerificationError(1, '[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed')))",
            "[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed",
        ),
    ],
)
def test_of_a_chain_of_errors_the_cause_is_told(caused: str, said: str) -> None:
    assert explained(RuntimeError(VIA + POOL + caused), "http://127.0.0.1:9") == said


def test_a_server_that_is_dead_is_told_as_that() -> None:
    """In the words of the library that is here."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # and nobody listens
        with pytest.raises(requests.ConnectionError) as raised:
            requests.get(f"http://127.0.0.1:{bound.getsockname()[1]}/api/2.0/mlflow/experiments", timeout=5)
    line = explained(raised.value, "http://127.0.0.1")
    assert line.endswith("Connection refused")
    assert len(line) < 100


def test_a_long_error_is_cut_at_a_word() -> None:
    line = explained(RuntimeError("word " * 100), "http://127.0.0.1")
    assert line == "word " * 32 + "..."
    assert len(explained(RuntimeError("x" * 500), "http://127.0.0.1")) == 164
    assert explained(RuntimeError(), "http://127.0.0.1") == "RuntimeError"
