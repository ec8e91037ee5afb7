"""`nft-ray track RUN` gives MLflow what it lacks, once each: after an outage, of a killed run, of a broken database."""

import logging
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from nft_ray.cli.main import main
from nft_ray.cli.track import catch_up
from nft_ray.config import ExperimentConfig, dump
from nft_ray.runs import tracking
from nft_ray.runs.evaluations import save_evaluation
from nft_ray.runs.folder import RunFolder
from nft_ray.runs.tracking import RunTracker
from nft_ray.types import EvalResult
from tests.conftest import free_port
from tests.examples import example_config


def claimed(folder: Path, *settings: str) -> tuple[RunTracker, ExperimentConfig]:
    """A run folder as `nft-ray train` leaves it for its tracker, and that tracker, at work."""
    config = example_config(f"run.name={folder.name}", *settings)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(dump(config))
    (folder / "identity").write_text(f"{folder.name:x<32}\n")
    tracker = RunTracker(folder, config)
    tracker.begin()
    return tracker, config


def train(tracker: RunTracker, epochs: range) -> None:
    """An evaluation with a picture, and two optimizer steps, for every epoch."""
    for epoch in epochs:
        images = {0: np.full((16, 16, 3), epoch, dtype=np.uint8)}
        result = EvalResult(metrics={"geneval": epoch / 4}, counts={"geneval": 6}, images=images, seconds=0.5)
        save_evaluation(tracker._folder, epoch, result)
        steps = tuple({"nft/loss": 0.1, "nft/optimizer_step": float(number)} for number in (2 * epoch - 1, 2 * epoch))
        tracker.log_evaluation(epoch, result)
        tracker.log_epoch(epoch, {"reward/total": epoch / 8}, steps)


def wait_for(what: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def assert_has_all(database: Path, name: str, num_epochs: int, status: str, *, others: int = 0) -> None:
    """Every figure of every epoch and step once, every picture once, and the right end: of one run of that name.

    others: how many figures it has besides.
    """
    with sqlite3.connect(database) as connection:
        ((run_id, found, artifacts),) = connection.execute(
            "SELECT run_uuid, status, artifact_uri FROM runs WHERE name = ?", (name,)
        )
        rows = connection.execute("SELECT key, step FROM metrics WHERE run_uuid = ?", (run_id,))
        sent = Counter(tuple(row) for row in rows)
    epochs, steps = range(1, num_epochs + 1), range(1, 2 * num_epochs + 1)
    expected = [(key, epoch) for key in ("reward/total", "eval/geneval") for epoch in epochs]
    expected += [(f"step/nft/{key}", step) for key in ("loss", "optimizer_step") for step in steps]
    assert sent >= Counter(expected)
    assert (sent - Counter(expected)).total() == others
    pictures = [path.name for path in Path(artifacts.removeprefix("file://")).glob("images/*.png")]
    assert sorted(int(picture.split("+")[2]) for picture in pictures) == list(epochs)
    assert found == status


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs with a database: its tables take 8 s."""
    root = tmp_path_factory.mktemp("runs")
    tracker, _ = claimed(root / "first")
    tracker.close(timeout_s=120)
    return root


@pytest.mark.slow
class TestWithADatabase:
    def test_a_killed_run_is_closed_and_has_everything_once(
        self, root: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = root / "killed"
        code = (
            "import sys, time; from pathlib import Path; from tests.cli.test_track import claimed, train\n"
            "folder = Path(sys.argv[1]); tracker, _ = claimed(folder); train(tracker, range(1, 3))\n"
            "while not (folder / 'mlflow_run_id.txt').exists(): time.sleep(0.01)\n"
            "train(tracker, range(3, 5)); print('there', flush=True); time.sleep(60)"
        )
        process = subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "there\n"
        os.kill(process.pid, signal.SIGKILL)  # somewhere within a delivery
        process.communicate()
        for _ in range(2):  # the second one finds nothing to do
            assert main(["track", str(folder)]) == 0
            assert_has_all(root / "mlflow.db", "killed", 4, "KILLED")
        assert capsys.readouterr().out.splitlines()[-1].endswith("has all of run killed: KILLED")

    def test_a_run_that_nobody_noted_is_found_again(self, root: Path) -> None:
        tracker, _ = claimed(root / "unnoted")
        train(tracker, range(1, 3))
        tracker.close("preempted", timeout_s=60)
        assert_has_all(root / "mlflow.db", "unnoted", 2, "RUNNING")
        (root / "unnoted" / "mlflow_run_id.txt").unlink()  # killed between its creation and the note
        (root / "unnoted" / "mlflow.json").unlink()
        assert main(["track", str(root / "unnoted")]) == 0
        assert_has_all(root / "mlflow.db", "unnoted", 2, "KILLED")

    def test_the_same_command_delivers_what_a_finished_run_kept_for_itself(
        self, root: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(tracking, "RETRY_DELAYS_S", ())
        folder = root / "alone"
        tracker, _ = claimed(folder, "tracking.uri=no-such-store://nowhere")
        train(tracker, range(1, 3))
        tracker.close()
        (folder / "lora").mkdir()
        for name in ("table.txt", "before_after.png", "lora/weights.txt"):
            (folder / name).write_text(name)
        config = example_config("run.name=alone")
        caplog.clear()
        catch_up(RunFolder(folder), example_config("run.name=alone", "tracking.uri=no-such-store://nowhere"))
        assert f"`nft-ray track {folder}` delivers what it lacks" in caplog.text
        catch_up(RunFolder(folder), config)
        assert_has_all(root / "mlflow.db", "alone", 2, "FINISHED")
        run_id = (folder / "mlflow_run_id.txt").read_text().strip()
        sent = {path.name for path in (root / "mlflow-artifacts" / run_id / "artifacts").iterdir()}
        assert sent == {"config.yaml", "images", "lora", "before_after.png"}
        monkeypatch.setattr("nft_ray.cli.track.deliver", None)  # it has all: nobody is asked
        catch_up(RunFolder(folder), config)

    def test_figures_that_a_repeated_epoch_changed_are_told_in_a_tag(self, root: Path) -> None:
        tracker, _ = claimed(root / "repeated")
        train(tracker, range(1, 4))
        wait_for(lambda: tracker._begun.run._sent.get(("reward/total", 3)))
        tracker.rewind(1)
        tracker.log_epoch(2, {"reward/total": 0.25, "time/epoch_s": 3.0}, ())  # as before, but for the time
        tracker.log_epoch(3, {"reward/total": 0.5}, ())
        tracker.close(timeout_s=60)
        assert_has_all(root / "mlflow.db", "repeated", 3, "FINISHED", others=1)
        with sqlite3.connect(root / "mlflow.db") as connection:
            ((text,),) = connection.execute("SELECT value FROM tags WHERE key = 'nft_ray.repeated_epochs'")
        assert text == "MLflow has the first figures, metrics.jsonl the last ones, of epochs 3"

    def test_a_broken_database_is_named_with_what_helps_and_that_helps(
        self, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
    ) -> None:
        database = tmp_path / "mlflow.db"
        shutil.copy(root / "mlflow.db", database)
        with sqlite3.connect(database) as connection:  # as a process that was killed in its migration left it
            connection.execute("DROP TABLE latest_metrics")
            connection.execute("CREATE TABLE _alembic_tmp_experiments (id INTEGER)")
            connection.execute("UPDATE alembic_version SET version_num = '451aebb31d03'")
        tracker, _ = claimed(tmp_path / "hurt")
        train(tracker, range(1, 3))
        tracker.close(timeout_s=60)
        (warning,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
        assert f"mv {database} {database}.broken" in warning
        assert main(["track", str(tmp_path / "hurt")]) == 1
        assert f"mv {database} {database}.broken" in capsys.readouterr().err
        shutil.copy(root / "mlflow.db", tmp_path / "whole.db")  # a new one takes 8 s
        uri = f"tracking.uri=sqlite:///{tmp_path}/whole.db"
        assert main(["track", str(tmp_path / "hurt"), "--set", uri]) == 0
        assert_has_all(tmp_path / "whole.db", "hurt", 2, "FINISHED")

    def test_a_full_disk_is_one_line_and_room_again_is_another(self, root: Path, tmp_path: Path) -> None:
        disk = tmp_path / "disk"
        disk.mkdir()
        size = (root / "mlflow.db").stat().st_size // 1024 + 200
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(disk)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("mounting needs root")
        try:
            shutil.copy(root / "mlflow.db", disk / "mlflow.db")
            filler = disk / "filler"
            filler.write_bytes(bytes(130 * 1024))
            code = (
                "import logging, sys; from pathlib import Path\n"
                "from tests.cli.test_track import claimed, train, wait_for\n"
                "from nft_ray.runs import tracking; tracking.AGAIN_S = 0.2; tracking.RETRY_DELAYS_S = (0.1,)\n"
                "logging.basicConfig(level=logging.INFO)\n"
                "folder, disk = map(Path, sys.argv[1:])\n"
                "tracker, _ = claimed(folder, f'tracking.uri=sqlite:///{disk}/mlflow.db')\n"
                "train(tracker, range(1, 41)); wait_for(lambda: tracker._delivery._failed)\n"
                "(disk / 'filler').unlink(); train(tracker, range(41, 43)); tracker.close(timeout_s=30)"
            )
            command = [sys.executable, "-c", code, str(tmp_path / "crowded"), str(disk)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
            assert done.returncode == 0, done.stderr
            full, again = [line for line in done.stderr.splitlines() if "Warning" not in line and line[:1] != " "]
            assert "database or disk is full" in full
            assert "metrics.jsonl goes on" in full
            assert "answers again, and has everything" in again
            assert_has_all(disk / "mlflow.db", "crowded", 42, "FINISHED")
        finally:
            subprocess.run(["umount", "-l", str(disk)], check=True)


@contextmanager
def server(folder: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """A real `mlflow server` on a database that is there."""
    address = ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    stores = ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db"]
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with (folder / "server.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", *address, *stores],
            stdout=log, stderr=log, env=environment, start_new_session=True,
        )  # fmt: skip

    def answers() -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1) as answer:
                return bool(answer.status == 200)
        except OSError:
            assert process.poll() is None, (folder / "server.log").read_text()
            return False

    try:
        wait_for(answers)
        yield process
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.slow
def test_what_a_server_missed_is_delivered_by_the_run_itself_or_later(
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level(logging.INFO, logger="nft_ray")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(tracking, "RETRY_DELAYS_S", (0.1,))
    monkeypatch.setattr(tracking, "AGAIN_S", 0.2)
    monkeypatch.chdir(tmp_path)  # artifacts of a server without a place for them would go there
    shutil.copy(root / "mlflow.db", tmp_path / "mlflow.db")
    port = free_port()
    address = f"tracking.uri=http://me:hunter2@127.0.0.1:{port}"
    with server(tmp_path, port):
        live, _ = claimed(tmp_path / "live", address)
        train(live, range(1, 3))
        wait_for(lambda: live.run_id is not None)
    train(live, range(3, 5))  # killed: it is away
    wait_for(lambda: "metrics.jsonl goes on" in caplog.text)
    late, _ = claimed(tmp_path / "late", address)
    train(late, range(1, 3))
    late.close(timeout_s=5)  # and did not come back in time for this one
    with server(tmp_path, port):
        train(live, range(5, 6))
        live.close(timeout_s=30)
        assert caplog.text.count("answers again, and has everything") == 1
        assert main(["track", str(tmp_path / "late"), "--set", address]) == 0
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in files if b"hunter2" in path.read_bytes()]
    assert "hunter2" not in caplog.text + "".join(capsys.readouterr())
    assert "http://**********@127.0.0.1" in caplog.text
    for name, num_epochs in (("live", 5), ("late", 2)):
        assert_has_all(tmp_path / "mlflow.db", name, num_epochs, "FINISHED")


def test_a_folder_that_is_no_run_and_an_address_without_its_password_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["track", str(tmp_path)]) == 1
    assert "holds no config.yaml; name the folder of a run" in capsys.readouterr().err
    (tmp_path / "config.yaml").write_text(dump(example_config("tracking.uri=http://me:hunter2@host:5000")))
    assert "hunter2" not in (tmp_path / "config.yaml").read_text()
    assert main(["track", str(tmp_path)]) == 1
    assert "tracking.uri = 'http://**********@host:5000': a run keeps no password" in capsys.readouterr().err
