"""A run that was stopped goes on with other settings, as far as their marks allow."""

import asyncio
import json
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from nft_ray.cli.main import main
from nft_ray.cli.place import Place
from nft_ray.cli.watch import Ending
from nft_ray.config import ExperimentConfig
from nft_ray.local import LocalSamplers
from nft_ray.roles import Seen
from nft_ray.runs import tracking
from nft_ray.runs.checkpoint import whole_checkpoints
from nft_ray.runs.evaluations import evaluated_epochs
from nft_ray.runs.ledger import read_ledger
from nft_ray.runs.metrics import read_metrics
from nft_ray.trainer import Trainer
from nft_ray.types import Adapters, Rollout, RolloutRequest
from tests.examples import QUICKSTART, SMALL

Train = Callable[..., int]


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    """`nft-ray train --local` with a checkpoint per epoch, two held-out lines and no MLflow."""
    monkeypatch.setenv("NFT_RAY_RUNS", str(tmp_path))
    monkeypatch.setattr(tracking, "RETRY_DELAYS_S", ())
    lines = (QUICKSTART.parents[1] / "nft_ray" / "shapes" / "prompts" / "test.jsonl").read_text().splitlines()
    (tmp_path / "test.jsonl").write_text("\n".join(lines[:2]))
    always = (*SMALL, "run.checkpoint_every=1", "evaluation.picture_lines=[0]", "tracking.uri=file:///dev/null/x")

    def run(*settings: str) -> int:
        chosen = [*always, f"prompts.test={tmp_path / 'test.jsonl'}", *settings]
        return main(["train", str(QUICKSTART), "--local", *(part for one in chosen for part in ("--set", one))])

    return run


def test_where_the_cluster_goes_what_is_finished_is_saved_beside_the_work(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No checkpoint is due, and the loop gets no turn for it."""
    endings, saved = list[Ending](), list[list[str]]()
    checkpoints = tmp_path / "quickstart" / "checkpoints"

    @contextmanager
    def no_ray(_: Place, config: ExperimentConfig, ending: Ending) -> Iterator[None]:
        endings.append(ending)
        ending.save()  # nothing is there yet
        yield

    original = Trainer.maybe_evaluate

    async def evaluate(trainer: Trainer, epoch: int, adapters: Adapters) -> None:
        thread = threading.Thread(target=endings[0].save)
        thread.start()
        thread.join(10)
        saved.append([path.name for path in whole_checkpoints(checkpoints)])
        await original(trainer, epoch, adapters)

    monkeypatch.setattr(Place, "ray", no_ray)
    monkeypatch.setattr(Trainer, "maybe_evaluate", evaluate)
    assert train("run.num_epochs=2", "evaluation.every=2", "run.checkpoint_every=1000") == 0
    assert saved[0] == ["epoch-000001"]


def test_a_stopped_run_goes_on_as_the_marks_say(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "quickstart"
    assert train("run.num_epochs=1", "learner.num_workers=2") == 0
    capsys.readouterr(), caplog.clear()

    elsewhere = ("learner.micro_batch_size=7", "sampler.num_workers=1", "sampler.timeout_s=300", "evaluation.every=1")
    assert train("run.num_epochs=2", *elsewhere) == 0
    assert "going on after epoch 1" in capsys.readouterr().out
    assert not [record for record in caplog.records if record.name.startswith("nft_ray.runs.checkpoint")]
    assert whole_checkpoints(run / "checkpoints")[-1].name == "epoch-000002"
    assert [line["epoch"] for line in read_metrics(run)] == [0, 1, 2]
    workers = [yaml.safe_load(file.read_text())["learner"]["num_workers"] for file in sorted(run.glob("configs/*"))]
    assert workers == [2, 1]
    assert [file.name for file in sorted(run.glob("configs/*"))] == ["epoch-000000.yaml", "epoch-000001.yaml"]

    assert train("run.num_epochs=3", *elsewhere, "algorithm.beta=0.3") == 1
    error = capsys.readouterr().err
    assert "exists in" in error
    assert "(differs in: algorithm.beta = 0.15 there, 0.3 here)" in error


def test_a_run_is_ended_at_its_newest_checkpoint_and_not_before(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without figures there: it was to go on. Its last epoch is evaluated all the same, and nothing trained again."""
    run, begin, asked = tmp_path / "quickstart", LocalSamplers.rollout, list[int]()

    async def stopped(samplers: LocalSamplers, request: RolloutRequest, seen: Seen | None = None) -> Rollout:
        if request.epoch == 2 and request.split == "train":
            if not asked.count(2):
                signal.raise_signal(signal.SIGINT)
            asked.append(request.epoch)
            await asyncio.sleep(60)
        return await begin(samplers, request, seen)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalSamplers, "rollout", stopped)
        assert train("run.num_epochs=4", "evaluation.every=10") != 0
    assert evaluated_epochs(run) == [0]
    capsys.readouterr()

    checkpoint = whole_checkpoints(run / "checkpoints")[-1]
    assert train("run.num_epochs=2", "evaluation.every=10") == 0
    assert whole_checkpoints(run / "checkpoints")[-1] == checkpoint
    assert evaluated_epochs(run) == [0, 2]
    assert (run / "table.txt").read_text() in capsys.readouterr().out
    last = read_metrics(run)[-1]
    assert last["epoch"] == 2
    assert {name.split("/")[0] for name in last} >= {"eval", "rollout", "reward", "nft", "time"}
    assert train("run.num_epochs=2", "evaluation.every=10") == 0
    assert "is finished" in capsys.readouterr().out


def test_told_to_end_at_an_earlier_checkpoint_it_evaluates_there_and_reports(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "quickstart"
    assert train("run.num_epochs=3", "evaluation.every=10") == 0
    capsys.readouterr()

    assert train("run.num_epochs=1", "evaluation.every=10") == 1
    error = capsys.readouterr().err
    assert "run.num_epochs = 1: 3 epochs are finished in" in error
    assert "use at least 3, or one that is kept (2)" in error

    assert train("run.num_epochs=2", "evaluation.every=10") == 0
    assert evaluated_epochs(run) == [0, 2, 3]
    assert [line["epoch"] for line in read_metrics(run)] == [0, 1, 2]
    assert json.loads((run / "summary.json").read_text())["epochs"] == 2
    assert "epoch-000003 is put aside as epoch-000003.beyond" in caplog.text
    capsys.readouterr()
    assert train("run.num_epochs=2", "evaluation.every=10") == 0
    assert "is finished" in capsys.readouterr().out


def test_where_all_evaluations_of_a_finished_run_are_gone_they_are_made_again(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The table alone does not make it finished."""
    run = tmp_path / "quickstart"
    assert train("run.num_epochs=1", "evaluation.every=10") == 0
    table = (run / "table.txt").read_text()
    shutil.rmtree(run / "evaluations")
    assert train("run.num_epochs=1", "evaluation.every=10") == 0
    assert "is finished" not in capsys.readouterr().out
    assert evaluated_epochs(run) == [0, 1]
    assert (run / "table.txt").read_text() == table


@pytest.mark.slow
@pytest.mark.parametrize(
    ("epoch", "ending", "how"),
    [(2, "json", "lost"), (2, "npz", "lost"), (2, "npz", "changed"), (0, "json", "changed"), (0, "npz", "lost")],
)
def test_an_evaluation_that_was_lost_is_made_again(
    train: Train, tmp_path: Path, epoch: int, ending: str, how: str
) -> None:
    """`ray job stop` at the end, say: the checkpoint is there, the report is not, and figures are missing."""
    run = tmp_path / "quickstart"
    assert train("run.num_epochs=2", "evaluation.every=10") == 0
    file = run / "evaluations" / f"epoch-{epoch:06d}.{ending}"
    table, before = (run / "table.txt").read_text(), file.read_bytes()
    (run / "table.txt").unlink()
    if how == "lost":
        file.unlink()
    else:
        file.write_bytes(before[: len(before) // 2] + bytes(16) + before[len(before) // 2 + 16 :])
    assert train("run.num_epochs=2", "evaluation.every=10") == 0
    assert (run / "table.txt").read_text() == table
    assert evaluated_epochs(run) == [0, 2]


def test_who_was_taken_over_touches_nothing_in_the_end(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped for so long that a process on another machine went on: it says so, and the other one's run stays."""
    run, begin, before = tmp_path / "quickstart", LocalSamplers.rollout, dict[Path, bytes]()

    def files() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "log.txt"}

    async def woken(samplers: LocalSamplers, request: RolloutRequest, seen: Seen | None = None) -> Rollout:
        if request.epoch == 1 and request.split == "train":
            lock = run.with_name(".quickstart.lock")
            lock.write_text(json.dumps(json.loads(lock.read_text()) | {"token": "another", "host": "gpu-07"}))
            before.update(files())
            raise RuntimeError("the first thing that fails")
        return await begin(samplers, request, seen)

    monkeypatch.setattr(LocalSamplers, "rollout", woken)
    assert train("run.num_epochs=3", "run.checkpoint_every=10", f"run.checkpoint_url=memory://{tmp_path.name}") == 1
    assert "was taken over by process" in capsys.readouterr().err
    assert before
    assert files() == before
    assert read_ledger(run).ended is None, "that is the other one's to say"
    assert "Traceback" not in (run / "log.txt").read_text()
    assert "another" in run.with_name(".quickstart.lock").read_text()


def test_a_finished_run_whose_copy_was_cut_off_sends_it(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = "run.checkpoint_url=file://" + str(tmp_path / "copy")
    assert train("run.num_epochs=1", url) == 0
    there = tmp_path / "copy" / "quickstart" / "checkpoints" / "epoch-000001"
    (there / "state.json").unlink()
    assert train("run.num_epochs=1", url) == 0
    assert (there / "state.json").is_file()
    capsys.readouterr()
    assert train("run.num_epochs=1", url) == 0
    assert "is finished" in capsys.readouterr().out
