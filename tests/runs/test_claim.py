"""A run folder belongs to one experiment: what goes on in it, what is refused, and where it lies."""

import getpass
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from nft_ray.config import ExperimentConfig, parse, resolved
from nft_ray.runs.folder import RunFolder
from nft_ray.runs.root import in_submitted_job, run_root
from tests.examples import example_config
from tests.runs.states import learner_state, names

JOB = {"RAY_JOB_CONFIG_JSON_ENV_VAR": "{}"}


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
        folder.save(6, learner_state())
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
        folder.save(1, learner_state())
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
        RunFolder(tmp_path).save(6, learner_state())
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
        """Of the user that the job is for: all jobs of a cluster run as one, and everybody's runs have one name."""
        ada = {"RAY_JOB_CONFIG_JSON_ENV_VAR": '{"metadata": {"user": "ada", "job_submission_id": "raysubmit_1"}}'}
        assert run_root(self.config, JOB) == home / "nft_ray" / getpass.getuser() / "some" / "runs"
        assert run_root(self.config, ada) == home / "nft_ray" / "ada" / "some" / "runs"
        assert run_root(self.config, {**ada, "NFT_RAY_RUNS": "mine"}) == home / "nft_ray" / "ada" / "mine"
        for name in ("../eve", "", "a/b"):
            eve = {"RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps({"metadata": {"user": name}})}
            with pytest.raises(ValueError, match=r"^--metadata-json: user = .* is no folder's name"):
                run_root(self.config, eve)

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
