"""Which checkpoints stay, what --overwrite may replace, and what a start that failed leaves."""

from pathlib import Path

import pytest

from nft_ray.runs.evaluations import evaluated_epochs, lines_folder, save_evaluation
from nft_ray.runs.folder import RunFolder
from nft_ray.runs.metrics import Metrics
from nft_ray.runs.remote import Remote
from nft_ray.types import EvalResult
from tests.examples import example_config
from tests.runs.states import learner_state, names

CONFIG = example_config("run.num_epochs=30")


def figures_of(value: float) -> EvalResult:
    return EvalResult(metrics={"geneval/strict": value, "geneval": -value}, counts={}, images={}, seconds=1.0)


class TestBest:
    def test_the_best_evaluated_stays_beside_the_newest(self, tmp_path: Path) -> None:
        """The run collapses after epoch 4: its best policy is not lost to those that came later."""
        folder = RunFolder(tmp_path, keep=2, metric="geneval/strict")
        for epoch, value in enumerate((0.5, 0.6, 0.7, 0.9, 0.1, 0.0, 0.0, 0.0), start=1):
            folder.save(epoch, learner_state(epoch))
            save_evaluation(tmp_path, epoch, figures_of(value))
        assert names(folder) == [f"epoch-{epoch:06d}" for epoch in (4, 7, 8)]
        save_evaluation(tmp_path, 8, figures_of(0.95))
        folder.save(9, learner_state(9))
        folder.save(10, learner_state(10))
        assert names(folder) == [f"epoch-{epoch:06d}" for epoch in (8, 9, 10)]

    def test_of_equals_the_newest_is_the_best(self, tmp_path: Path) -> None:
        folder = RunFolder(tmp_path, keep=1, metric="geneval/strict")
        for epoch in (1, 2, 3, 4):
            folder.save(epoch, learner_state(epoch))
            save_evaluation(tmp_path, epoch, figures_of(0.5))
        assert names(folder) == ["epoch-000003", "epoch-000004"]

    def test_figures_that_cannot_be_read_are_none(self, tmp_path: Path) -> None:
        folder = RunFolder(tmp_path, keep=1, metric="geneval/strict")
        for epoch in (1, 2, 3):
            folder.save(epoch, learner_state(epoch))
            save_evaluation(tmp_path, epoch, figures_of(1 / epoch))
            lines_folder(tmp_path, epoch).with_suffix(".json").write_text('{"metrics"')
        assert names(folder) == ["epoch-000003"]

    def test_before_the_first_evaluation_it_is_the_one_that_earned_most(self, tmp_path: Path) -> None:
        """The run collapses after epoch 2, long before its evaluation."""
        folder = RunFolder(tmp_path, keep=2, metric="geneval/strict")
        metrics = Metrics(tmp_path)
        for epoch, reward in enumerate((0.5, 0.6, 0.7, 0.1, float("nan"), 0.0), start=1):  # of the policy before
            metrics.add(epoch, {"reward/total": reward})
            folder.save(epoch, learner_state(epoch))
        assert names(folder) == [f"epoch-{epoch:06d}" for epoch in (2, 5, 6)]
        save_evaluation(tmp_path, 6, figures_of(0.2))
        folder.save(7, learner_state(7))
        folder.save(8, learner_state(8))
        assert names(folder) == [f"epoch-{epoch:06d}" for epoch in (6, 7, 8)], "what was evaluated counts"

    def test_a_stage_has_figures_of_its_own(self, tmp_path: Path) -> None:
        folder = RunFolder(tmp_path, keep=1, metric="geneval/strict")
        stage = folder.for_stage(tmp_path / "stages" / "two", "geneval")
        for epoch in (1, 2, 3):
            stage.save(epoch, learner_state(epoch))
            save_evaluation(stage.results, epoch, figures_of(float(epoch)))  # of the stage's metric, 1 is the best
        assert names(folder) == ["epoch-000001", "epoch-000003"]


class TestOverwrite:
    def test_what_was_there_is_kept_under_another_name(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        folder = RunFolder(tmp_path / "run")
        folder.claim(CONFIG)
        first = folder.identity
        folder.save(6, learner_state())
        for _ in range(2):  # twice within a second, too
            folder.claim(CONFIG, overwrite=True)
            (tmp_path / "run" / "note").touch()
        kept = sorted(path for path in tmp_path.iterdir() if path.name.startswith("run.old-"))
        assert len(kept) == 2
        assert (kept[0] / "identity").read_text().strip() == first != folder.identity
        assert (kept[0] / "checkpoints" / "epoch-000006" / "state.json").is_file()
        assert "is kept as run.old-" in caplog.text

    @pytest.mark.parametrize("text", ["", "run: {name: cu", "\0" * 40])
    def test_what_cannot_be_read_is_replaced_too(self, tmp_path: Path, text: str) -> None:
        """That is what its error recommends."""
        folder = RunFolder(tmp_path / "run")
        folder.claim(CONFIG)
        folder.save(6, learner_state())
        for file in (folder.path / "config.yaml", *folder.path.glob("configs/*")):
            file.write_text(text)
        with pytest.raises(ValueError, match=r"config\.yaml: holds no experiment .* --overwrite"):
            RunFolder(tmp_path / "run").check(CONFIG)
        again = RunFolder(tmp_path / "run")
        again.check(CONFIG, overwrite=True)
        again.claim(CONFIG, overwrite=True)
        assert again.finished() == 0

    @pytest.mark.parametrize("name", ["thesis.tex", "checkpoints"])
    def test_what_is_no_run_is_refused(self, tmp_path: Path, name: str) -> None:
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / name).write_text("years of work")
        for start in (RunFolder.check, RunFolder.claim):
            with pytest.raises(ValueError, match=rf"^--overwrite: .*/run is no run: .*\(but {name}\)"):
                start(RunFolder(tmp_path / "run"), CONFIG, overwrite=True)
        assert (tmp_path / "run" / name).read_text() == "years of work"

    def test_a_file_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "run").write_text("a file")
        with pytest.raises(ValueError, match="is no run"):
            RunFolder(tmp_path / "run").claim(CONFIG, overwrite=True)


class TestPlace:
    """Where no run can be, or where something else is: one line, and nothing is touched."""

    @pytest.mark.parametrize(
        ("file", "said"),
        [
            ("root", r"^run\.root: .*/root is a file, so no run can lie below it; choose another folder"),
            ("root/run", r"^run\.name = 'run': .*/root/run is no run: it is a file; choose another name"),
            (
                "root/run/thesis.tex",
                r"^run\.name = 'run': .* is no run: it holds no config\.yaml \(but thesis\.tex\)",
            ),
            ("root/run/checkpoints", r"^run\.name = 'run': .* is no run: it holds no config\.yaml \(but checkpoints\)"),
        ],
    )
    def test_something_else_is_there(self, tmp_path: Path, file: str, said: str) -> None:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("years of work")
        for start in (RunFolder.check, RunFolder.claim):
            with pytest.raises(ValueError, match=said):
                start(RunFolder(tmp_path / "root" / "run"), CONFIG)
        assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / file]

    def test_a_run_whose_checkpoints_are_a_file(self, tmp_path: Path) -> None:
        RunFolder(tmp_path / "run").claim(CONFIG)
        (tmp_path / "run" / "checkpoints").write_text("")
        with pytest.raises(ValueError, match=r"^run\.name = 'run': .*/run/checkpoints is a file, where a run has"):
            RunFolder(tmp_path / "run").check(CONFIG)
        RunFolder(tmp_path / "run").claim(CONFIG, overwrite=True)

    def test_an_empty_folder_is_taken(self, tmp_path: Path) -> None:
        (tmp_path / "run").mkdir()
        RunFolder(tmp_path / "run").claim(CONFIG)
        assert (tmp_path / "run" / "config.yaml").is_file()


class TestClaimOfAStartThatFailed:
    def test_checking_writes_nothing(self, tmp_path: Path) -> None:
        RunFolder(tmp_path / "a" / "run").check(CONFIG)
        assert list(tmp_path.iterdir()) == []

    def test_it_leaves_no_folder(self, tmp_path: Path) -> None:
        folder = RunFolder(tmp_path / "run")
        with folder.locked():
            folder.claim(CONFIG)
            (tmp_path / "run" / "metrics.jsonl").touch()
            folder.abandon()
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("what", ["an epoch", "an evaluation", "the folder was there"])
    def test_what_was_worked_out_stays(self, tmp_path: Path, what: str) -> None:
        folder = RunFolder(tmp_path / "run")
        if what == "the folder was there":
            folder.path.mkdir()
        folder.claim(CONFIG)
        if what == "an epoch":
            folder.save(1, learner_state(1))
        if what == "an evaluation":
            lines_folder(folder.path, 0).mkdir(parents=True)
            (lines_folder(folder.path, 0) / "results.jsonl").write_text("{}\n")
        folder.abandon()
        assert (folder.path / "config.yaml").is_file()

    def test_storage_that_is_away_hides_no_error(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Nor does what was saved at the URL keep an empty folder here."""

        def away(*_: object) -> list[int]:
            raise OSError("503 Slow Down")

        folder = RunFolder(tmp_path / "run", url=f"memory://{tmp_path.name}")
        folder.claim(CONFIG)
        monkeypatch.setattr(Remote, "epochs", away)
        assert folder.abandon()
        assert list(tmp_path.iterdir()) == []

    def test_a_disk_that_is_away_hides_no_error(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def away(*_: object) -> None:
            raise OSError(5, "Input/output error")

        folder = RunFolder(tmp_path / "run")
        folder.claim(CONFIG)
        monkeypatch.setattr(Path, "rglob", away)
        assert not folder.abandon()

    def test_what_a_kill_left_of_a_first_save_is_no_epoch(self, tmp_path: Path) -> None:
        first = RunFolder(tmp_path / "run")
        first.claim(example_config("run.num_epochs=30", "learner.learning_rate=0.3"))
        (first.checkpoints / "epoch-000001.partial").mkdir(parents=True)
        (first.checkpoints / "epoch-000001.partial" / "policy.safetensors").write_bytes(b"cut")
        RunFolder(tmp_path / "run").claim(CONFIG)
        whole = RunFolder(tmp_path / "whole")
        whole.claim(example_config("run.num_epochs=30", "learner.learning_rate=0.3"))
        whole.save(1, learner_state(1)).rename(whole.checkpoints / "epoch-000001.partial")
        with pytest.raises(ValueError, match=r"with another config .*learning_rate"):
            RunFolder(tmp_path / "whole").claim(CONFIG)

    def test_one_that_was_killed_stands_in_nobodys_way(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        """No epoch was finished with its settings: the corrected command begins, and nothing is deleted."""
        RunFolder(tmp_path / "run").claim(example_config("run.num_epochs=30", "learner.learning_rate=0.3"))
        folder = RunFolder(tmp_path / "run")
        folder.claim(CONFIG)
        assert "no epoch was finished with its settings" in caplog.text
        (old,) = (path for path in tmp_path.iterdir() if path.name != "run")
        assert "learning_rate: 0.3" in (old / "config.yaml").read_text()
        caplog.clear()
        RunFolder(tmp_path / "run").claim(CONFIG)  # nothing differs
        assert not caplog.records


def test_the_run_is_known_by_its_identity(tmp_path: Path) -> None:
    one, other = RunFolder(tmp_path / "one"), RunFolder(tmp_path / "other")
    assert one.identity == ""
    for folder in (one, other):
        folder.claim(CONFIG)
    assert len(one.identity) == 32
    assert one.identity != other.identity
    before = one.identity
    RunFolder(tmp_path / "one").claim(CONFIG)
    assert one.identity == before


def test_a_run_that_was_taken_over_saves_no_more(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    with folder.locked():
        folder.claim(CONFIG)
        folder.save(1, learner_state(1))
        text = folder.lock.path.read_text()
        folder.lock.path.write_text(text.replace('"token": "', '"token": "f'))
        with pytest.raises(RuntimeError, match="was taken over by process"):
            folder.save(2, learner_state(2))
    assert names(folder) == ["epoch-000001"]


class TestGoingBack:
    def test_what_was_given_up_is_found_by_no_start(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        """Epochs 11 and 12 were not finite: the run goes on from 10, and is killed before it is at 11 again."""
        folder = RunFolder(tmp_path / "run", metric="geneval/strict")
        folder.claim(CONFIG)
        for epoch in (10, 11, 12):
            folder.save(epoch, learner_state(epoch))
            save_evaluation(folder.path, epoch, figures_of(epoch))
        folder.drop_after(10)
        folder.save(10, learner_state(10))
        again = RunFolder(tmp_path / "run")
        again.claim(CONFIG)
        found = again.latest()
        assert found is not None
        assert found.epoch == 10
        assert names(folder) == ["epoch-000010", "epoch-000011.beyond", "epoch-000012.beyond"]
        assert evaluated_epochs(folder.path) == [10], "those of 11 and 12 are of a policy that is given up"
        assert "the run goes back to epoch 10: " in caplog.text
        assert "epoch-000012 is put aside as epoch-000012.beyond" in caplog.text
        folder.save(11, learner_state(11))
        folder.drop_after(10)  # a second time at one place
        assert names(folder) == ["epoch-000010", "epoch-000011.beyond", "epoch-000012.beyond"]

    def test_what_was_just_written_stays(self, tmp_path: Path) -> None:
        """Whatever lies there that is newer."""
        folder = RunFolder(tmp_path, keep=2)
        for epoch in (10, 11, 12, 9):
            folder.save(epoch, learner_state(epoch))
        assert names(folder) == ["epoch-000009", "epoch-000011", "epoch-000012"]

    def test_who_was_taken_over_puts_nothing_aside(self, tmp_path: Path) -> None:
        folder = RunFolder(tmp_path / "run")
        with folder.locked():
            folder.save(2, learner_state(2))
            text = folder.lock.path.read_text()
            folder.lock.path.write_text(text.replace('"token": "', '"token": "f'))
            with pytest.raises(RuntimeError, match="was taken over by process"):
                folder.drop_after(1)
            with pytest.raises(RuntimeError, match="was taken over by process"):
                folder.check_lock()
        assert names(folder) == ["epoch-000002"]
