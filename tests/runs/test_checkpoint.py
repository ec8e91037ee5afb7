"""Checkpoints are whole or absent, come back bit for bit, and belong to one experiment."""

import errno
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors import SafetensorError

from nft_ray.config import ExperimentConfig, parse, resolved
from nft_ray.runs import checkpoint as module
from nft_ray.runs.checkpoint import RunFolder, in_submitted_job, run_root, write_atomically
from nft_ray.types import AdapterWeights, LearnerState, Weights
from tests.examples import example_config

JOB = {"RAY_JOB_CONFIG_JSON_ENV_VAR": "{}"}
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
NUM_FILES = 7  # policy, ema, optimizer, and old and ema of two versions


def weights(seed: int) -> Weights:
    rng = np.random.default_rng(seed)
    return {
        "lora_A": rng.standard_normal((4, 8), dtype=np.float32),
        "lora_B": rng.standard_normal((8, 4), dtype=np.float32).T,  # not contiguous
        "odd": np.array([np.nan, np.inf, -0.0, 1e-45, 1 / 3], dtype=np.float32),
    }


def learner_state(version: int = 6) -> LearnerState:
    """As with max_staleness 1: two versions."""
    optimizer: dict[str, np.ndarray] = {"step/lora_A": np.array(12.0, dtype=np.float32)}
    optimizer |= {f"exp_avg/{name}": value * 2 for name, value in weights(3).items()}
    return LearnerState(
        version=version,
        optimizer_step=2 * version,
        policy=weights(1),
        ema=weights(2),
        versions={
            version - 1: AdapterWeights(old=weights(10), ema=weights(11)),
            version: AdapterWeights(old=weights(12), ema=weights(13)),
        },
        optimizer=optimizer,
    )


def assert_bit_identical(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> None:
    assert sorted(one) == sorted(other)
    for name, value in one.items():
        assert (other[name].shape, other[name].dtype) == (value.shape, value.dtype), name
        assert other[name].tobytes() == value.tobytes(), name


def assert_same_state(one: LearnerState, other: LearnerState) -> None:
    assert (one.version, one.optimizer_step) == (other.version, other.optimizer_step)
    assert sorted(one.versions) == sorted(other.versions)
    for name in ("policy", "ema", "optimizer"):
        assert_bit_identical(getattr(one, name), getattr(other, name))
    for number in one.versions:
        assert_bit_identical(one.versions[number].old, other.versions[number].old)
        assert_bit_identical(one.versions[number].ema, other.versions[number].ema)


def names(folder: RunFolder) -> list[str]:
    return sorted(path.name for path in (folder.path / "checkpoints").iterdir())


class TestSave:
    def test_a_state_comes_back_bit_for_bit(self, tmp_path: Path) -> None:
        folder, state = RunFolder(tmp_path), learner_state()
        path = folder.save(6, state)
        found = RunFolder(tmp_path).latest()
        assert found is not None
        assert (found.epoch, found.path) == (6, path)
        assert_same_state(state, found.state)

    def test_a_scalar_of_the_optimizer_stays_a_scalar(self, tmp_path: Path) -> None:
        folder = RunFolder(tmp_path)
        folder.save(6, learner_state())
        found = folder.latest()
        assert found is not None
        step = found.state.optimizer["step/lora_A"]
        assert (step.shape, step.dtype, float(step)) == ((), np.float32, 12.0)

    def test_a_learner_before_its_first_step_has_no_optimizer_state(self, tmp_path: Path) -> None:
        zero = {"lora": np.zeros(4, dtype=np.float32)}
        versions = {0: AdapterWeights(old=zero, ema=zero)}
        state = LearnerState(version=0, optimizer_step=0, policy=zero, ema=zero, versions=versions, optimizer={})
        RunFolder(tmp_path).save(1, state)
        found = RunFolder(tmp_path).latest()
        assert found is not None
        assert_same_state(state, found.state)

    def test_nothing_is_found_where_nothing_was_saved(self, tmp_path: Path) -> None:
        assert RunFolder(tmp_path / "none").latest() is None
        assert not (tmp_path / "none").exists()

    @pytest.mark.parametrize("keep", [1, 2, 3])
    def test_the_newest_are_kept(self, tmp_path: Path, keep: int) -> None:
        folder = RunFolder(tmp_path, keep=keep)
        for epoch in (8, 9, 10, 11):
            folder.save(epoch, learner_state(epoch))
        assert names(folder) == [f"epoch-{epoch:06d}" for epoch in range(12 - keep, 12)]
        found = folder.latest()
        assert found is not None
        assert (found.epoch, found.state.version) == (11, 11)

    def test_the_same_epoch_again_replaces_it(self, tmp_path: Path) -> None:
        folder = RunFolder(tmp_path)
        folder.save(6, learner_state(5))
        folder.save(6, learner_state(6))
        found = folder.latest()
        assert found is not None
        assert found.state.version == 6
        assert not (found.path / "old-000004.safetensors").exists()

    def test_a_directory_that_is_not_whole_is_no_checkpoint(self, tmp_path: Path) -> None:
        folder = RunFolder(tmp_path, keep=1)
        folder.save(6, learner_state())
        (tmp_path / "checkpoints" / "epoch-000007").mkdir()
        partial = tmp_path / "checkpoints" / "epoch-000008.partial"
        partial.mkdir()
        (partial / "state.json").write_text("{}")
        found = folder.latest()
        assert found is not None
        assert found.epoch == 6
        folder.save(8, learner_state(8))  # what a killed save left is no obstacle
        found = folder.latest()
        assert found is not None
        assert_same_state(learner_state(8), found.state)
        assert not partial.exists()

    def test_the_facts_beside_the_tensors(self, tmp_path: Path) -> None:
        folder, config = RunFolder(tmp_path), example_config()
        folder.claim(config)
        (tmp_path / "mlflow_run_id.txt").write_text("abc123\n")
        facts = json.loads((folder.save(6, learner_state()) / "state.json").read_text())
        assert (facts["epoch"], facts["version"], facts["optimizer_step"], facts["versions"]) == (6, 6, 12, [5, 6])
        assert facts["tracker_run_id"] == "abc123"
        assert facts["config"] == resolved(config)
        assert {"python", "torch", "numpy"} <= set(facts["packages"])
        assert "run.seed" in facts["random_state"]


class TestFailure:
    """A save that fails leaves the earlier checkpoint as it was, nothing of itself, and one clear line."""

    @pytest.mark.parametrize("keep", [1, 2])
    @pytest.mark.parametrize("nth", range(1, NUM_FILES + 1))
    def test_a_full_disk_at_any_file(self, tmp_path: Path, nth: int, keep: int) -> None:
        assert "the disk is full" in failed_save(tmp_path, "save_file", FULL, nth=nth, keep=keep)

    @pytest.mark.parametrize("nth", range(1, NUM_FILES + 3))
    def test_a_full_disk_that_shows_when_files_are_flushed(self, tmp_path: Path, nth: int) -> None:
        assert "the disk is full" in failed_save(tmp_path, "_flush", FULL, nth=nth)

    def test_a_full_disk_while_the_facts_are_written(self, tmp_path: Path) -> None:
        assert "the disk is full" in failed_save(tmp_path, "package_versions", FULL)

    @pytest.mark.parametrize(
        ("error", "what"),
        [
            (SafetensorError("Error: I/O error: No space left on device (os error 28)"), "the disk is full"),
            (SafetensorError("I/O error: File too large (os error 27)"), "the disk is full"),
            (OSError(errno.EDQUOT, "Disk quota exceeded"), "the disk is full"),
            (OSError(errno.EIO, "Input/output\nerror"), "[Errno 5] Input/output error"),
        ],
    )
    def test_the_cause_is_told(self, tmp_path: Path, error: Exception, what: str) -> None:
        line = failed_save(tmp_path, "save_file", error, nth=2)
        assert line.endswith(f"epoch-000007 could not be written: {what}; earlier checkpoints are intact")

    def test_after_the_failure_the_same_epoch_can_be_saved(self, tmp_path: Path) -> None:
        failed_save(tmp_path, "save_file", FULL, nth=3)
        RunFolder(tmp_path).save(7, learner_state(7))
        found = RunFolder(tmp_path).latest()
        assert found is not None
        assert_same_state(learner_state(7), found.state)


def failed_save(path: Path, function: str, error: Exception, *, nth: int = 1, keep: int = 2) -> str:
    """Save epoch 6, then 7 with the n-th call of a function failing half way; the line that says so."""
    folder, count, original = RunFolder(path, keep=keep), 0, getattr(module, function)
    folder.save(6, learner_state(6))

    def replacement(*of: Any) -> Any:
        nonlocal count
        count += 1
        if count < nth:
            return original(*of)
        if function == "save_file":
            of[1].write_bytes(b"half of it")
        raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, function, replacement)
        with pytest.raises(OSError) as raised:
            folder.save(7, learner_state(7))
    assert count == nth
    assert "\n" not in str(raised.value)
    assert names(folder) == ["epoch-000006"]
    found = folder.latest()
    assert found is not None
    assert_same_state(learner_state(6), found.state)
    return str(raised.value)


def long_config(*overrides: str) -> ExperimentConfig:
    """An experiment with more epochs than these checkpoints have."""
    return example_config("run.num_epochs=9", *overrides)


class TestClaim:
    def test_a_fresh_folder_gets_the_resolved_config(self, tmp_path: Path) -> None:
        config = long_config()
        assert not (tmp_path / "a").exists()
        RunFolder(tmp_path / "a" / "b").claim(config)
        assert yaml.safe_load((tmp_path / "a" / "b" / "config.yaml").read_text()) == resolved(config)

    def test_the_same_config_goes_on(self, tmp_path: Path) -> None:
        folder = RunFolder(tmp_path)
        for _ in range(2):
            folder.claim(long_config("learner.learning_rate=1e-7"))  # the numbers survive the YAML
            folder.save(6, learner_state())
        assert names(folder) == ["epoch-000006"]

    def test_a_run_from_before_a_field_was_there_goes_on(self, tmp_path: Path) -> None:
        folder, config = RunFolder(tmp_path), long_config()
        folder.claim(config)
        before = resolved(config)
        del before["stages"], before["model"]["tuning"], before["algorithm"]["kl_fraction"]
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(before))
        with pytest.raises(ValueError, match=r"differs in: algorithm\.kl_fraction = 1\.0 there, 0\.5 here\)"):
            folder.claim(long_config("algorithm.kl_fraction=0.5"))
        folder.claim(config)
        assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == resolved(config)

    @pytest.mark.parametrize(
        "override",
        [
            "run.num_epochs=12",
            "run.root=elsewhere",
            "run.keep_checkpoints=5",
            "run.checkpoint_every=3",
            "tracking.uri=sqlite:///x.db",
            "tracking.experiment=other",
            "cluster.num_cpus=7",
            "cluster.wait_s=5",
            "learner.num_workers=5",
            "sampler.micro_batch_size=5",
            "scorers.attach=True",
            "evaluation.every=5",
        ],
    )
    def test_with_another_placement_it_goes_on_silently(
        self, tmp_path: Path, override: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        folder = RunFolder(tmp_path)
        folder.claim(long_config())
        folder.save(6, learner_state())
        folder.claim(long_config(override))
        assert names(folder) == ["epoch-000006"]
        assert not caplog.records
        key, _, value = override.partition("=")
        section, name = key.split(".")
        assert str(yaml.safe_load((tmp_path / "config.yaml").read_text())[section][name]) in (value, f"{value}.0")

    def test_with_another_rounding_it_goes_on_with_one_warning(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        folder, other = RunFolder(tmp_path), long_config("model.dtype=bfloat16", "sampler.lora=merged")
        folder.claim(long_config())
        for _ in range(2):  # the second time nothing is new
            folder.claim(other)
        (record,) = caplog.records
        assert (record.levelname, record.getMessage()) == (
            "WARNING",
            "run quickstart goes on with other last bits: model.dtype = 'float32' there, 'bfloat16' here; "
            "sampler.lora = 'auto' there, 'merged' here",
        )

    def test_a_stage_goes_on_as_the_run_does(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        def staged(section: dict[str, Any]) -> ExperimentConfig:
            data = resolved(example_config())
            stage = {"name": "one", "num_epochs": 2, "rewards": {"geneval": None}}
            return parse({**data, "stages": [stage | section]})

        folder = RunFolder(tmp_path)
        folder.claim(staged({}))
        folder.claim(staged({"learner": {"micro_batch_size": 8}, "rewards": {"geneval": {"num_replicas": 2}}}))
        assert not caplog.records
        with pytest.raises(ValueError, match=r"differs in: stages.0.algorithm.beta = None there, 0.3 here\)"):
            folder.claim(staged({"algorithm": {"beta": 0.3}}))
        with pytest.raises(ValueError, match=r"differs in: stages = \["):
            folder.claim(long_config())

    def test_every_configuration_is_kept_with_the_epoch_it_began_at(self, tmp_path: Path) -> None:
        def history() -> dict[str, Any]:
            return {file.name: yaml.safe_load(file.read_text()) for file in sorted(tmp_path.glob("configs/*"))}

        folder, other = RunFolder(tmp_path), long_config("learner.num_workers=3")
        folder.claim(long_config())
        assert history() == {"epoch-000000.yaml": resolved(long_config())}
        folder.save(6, learner_state())
        folder.claim(long_config())  # nothing changed
        folder.claim(other)
        assert history() == {
            "epoch-000000.yaml": resolved(long_config()),
            "epoch-000006.yaml": resolved(other),
        }
        shutil.rmtree(tmp_path / "configs")  # as in a run from before it was kept
        folder.save(8, learner_state(8))
        folder.claim(long_config())
        assert list(history()) == ["epoch-000000.yaml", "epoch-000008.yaml"]
        assert history()["epoch-000000.yaml"] == resolved(other)

    @pytest.mark.parametrize(
        ("overrides", "keys"),
        [
            (["run.seed=1"], "run.seed = 0 there, 1 here"),
            (["run.num_epochs=12", "model.lora.rank=2"], "model.lora.rank = 4 there, 2 here"),
            (["learner.num_workers=9", "algorithm.beta=0.3"], "algorithm.beta = 0.15 there, 0.3 here"),
            (
                ["learner.betas=[0.8,0.9]", "algorithm.kl_weight=1"],
                "algorithm.kl_weight = 0.0 there, 1.0 here; learner.betas = [0.9, 0.999] there, [0.8, 0.9] here",
            ),
            (["rewards.geneval.weight=2"], "rewards.geneval.weight = 1.0 there, 2.0 here"),
            (["rewards.jpeg_compressibility.weight=2"], "rewards.jpeg_compressibility = None there, {"),
        ],
    )
    def test_another_experiment_is_refused_by_its_keys(self, tmp_path: Path, overrides: list[str], keys: str) -> None:
        folder = RunFolder(tmp_path)
        folder.claim(long_config())
        folder.save(6, learner_state())
        before = (tmp_path / "config.yaml").read_text()
        with pytest.raises(ValueError, match=r"^run quickstart exists in .*--set run\.name=.*--overwrite$") as error:
            folder.claim(long_config(*overrides))
        assert f"(differs in: {keys}" in str(error.value)
        assert "\n" not in str(error.value)
        assert (tmp_path / "config.yaml").read_text() == before
        assert names(folder) == ["epoch-000006"]

    def test_many_keys_are_cut_off(self, tmp_path: Path) -> None:
        RunFolder(tmp_path).claim(long_config())
        learner = [f"learner.{key}" for key in ("learning_rate=9", "weight_decay=9", "max_grad_norm=9")]
        others = [f"algorithm.{key}" for key in ("beta=9", "kl_weight=9", "advantage_clip=9", "ema_decay=0.1")]
        with pytest.raises(ValueError, match=r"differs in: algorithm\..*prompts\.groups_per_epoch = .*; \.\.\.\)"):
            RunFolder(tmp_path).claim(long_config("run.seed=3", "prompts.groups_per_epoch=9", *learner, *others))

    def test_overwrite_begins_anew(self, tmp_path: Path) -> None:
        folder = RunFolder(tmp_path / "run")
        (tmp_path / "other").mkdir()
        folder.claim(long_config())
        folder.save(6, learner_state())
        folder.claim(long_config("run.seed=1"), overwrite=True)
        assert folder.latest() is None
        assert sorted(path.name for path in folder.path.rglob("*.yaml")) == ["config.yaml", "epoch-000000.yaml"]
        assert (tmp_path / "other").is_dir()
        RunFolder(tmp_path / "new").claim(long_config(), overwrite=True)  # nothing there to replace
        assert (tmp_path / "new" / "config.yaml").exists()

    def test_fewer_epochs_than_are_finished_are_refused_before_anything_is_written(self, tmp_path: Path) -> None:
        folder = RunFolder(tmp_path)
        folder.claim(long_config())
        folder.save(6, learner_state())
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        with pytest.raises(ValueError, match=r"^run\.num_epochs = 5: 6 epochs are finished in .*; use at least 6, or"):
            folder.claim(long_config("run.num_epochs=5"))
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
        folder.claim(long_config("run.num_epochs=6"))
        folder.claim(long_config("run.num_epochs=5"), overwrite=True)


class TestRunRoot:
    config = example_config("run.root=some/runs")

    @pytest.fixture(autouse=True)
    def home(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        (tmp_path / "work").mkdir()
        monkeypatch.chdir(tmp_path / "work")
        return tmp_path / "home"

    def test_a_relative_root_is_taken_from_the_working_directory(self, tmp_path: Path) -> None:
        assert run_root(self.config, {}) == tmp_path / "work" / "some" / "runs"

    def test_within_a_job_it_is_taken_from_the_home_folder(self, home: Path) -> None:
        assert run_root(self.config, JOB) == home / "nft_ray" / "some" / "runs"
        assert run_root(self.config, {**JOB, "NFT_RAY_RUNS": "mine"}) == home / "nft_ray" / "mine"

    @pytest.mark.parametrize("environment", [{}, JOB])
    def test_an_absolute_root_stays(self, tmp_path: Path, environment: dict[str, str]) -> None:
        config = example_config(f"run.root={tmp_path}/runs")
        assert run_root(config, environment) == tmp_path / "runs"

    @pytest.mark.parametrize("environment", [{}, JOB])
    def test_the_variable_goes_first(self, tmp_path: Path, home: Path, environment: dict[str, str]) -> None:
        assert run_root(self.config, {**environment, "NFT_RAY_RUNS": f"{tmp_path}/else"}) == tmp_path / "else"
        assert run_root(self.config, {**environment, "NFT_RAY_RUNS": "~/else"}) == home / "else"

    def test_an_empty_variable_is_none(self, tmp_path: Path) -> None:
        assert run_root(self.config, {"NFT_RAY_RUNS": ""}) == tmp_path / "work" / "some" / "runs"

    @pytest.mark.parametrize("environment", [{}, JOB])
    def test_a_tilde_is_the_home_folder(self, home: Path, environment: dict[str, str]) -> None:
        assert run_root(example_config("run.root=~/mine"), environment) == home / "mine"

    def test_a_job_is_told_by_rays_variable(self) -> None:
        assert in_submitted_job(JOB)
        assert not in_submitted_job({"RAY_ADDRESS": "auto"})


def test_a_file_is_replaced_or_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "config.yaml"
    write_atomically(target, "one")
    write_atomically(target, "two")
    assert target.read_text() == "two"
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]

    def half(path: Path, text: str) -> int:
        with path.open("w") as file:
            file.write(text[:2])
        raise FULL

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(target, "three")
    assert target.read_text() == "two"
