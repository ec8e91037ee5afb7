"""What runs is the file, its profile, the overrides and the stage, in this order, and nothing else."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from nft_ray.config import ExperimentConfig, dump, load, parse, resolved
from nft_ray.config.composition import stage_data

PROFILES = """
run: {name: a, seed: 1}
cluster: small
learner: {num_workers: 3, num_cpus: 2}
rewards: {geneval: {detector: shapes, num_cpus: 0.5}, jpeg_compressibility: }
profiles:
  small:
    cluster: {num_cpus: 4}
    learner: {num_workers: 1}
  large:
    learner: {num_workers: 8, micro_batch_size: 64}
    rewards: {geneval: {num_replicas: 4}}
"""
STAGES = """
run: {name: a}
prompts: {groups_per_epoch: 8, images_per_group: 4}
algorithm: {old_policy_decay: {flat_steps: 1, rate: 0.5, max: 0.9}}
rewards: {geneval: {detector: shapes, num_replicas: 2}, jpeg_compressibility: {weight: 0.5}}
stages:
  - {name: first, num_epochs: 3, rewards: {jpeg_compressibility: }}
  - name: second
    num_epochs: 2
    prompts: {train: small/geneval}
    algorithm: {beta: 0.5, old_policy_decay: {rate: 0.25}}
    rewards: {geneval: {credit: strict}, jpeg_incompressibility: {eval_only: true}}
  - {name: third, num_epochs: 4, learner: {optimizer_steps: 2}}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "experiment.yaml"


def loaded(file: Path, text: str, *overrides: str) -> ExperimentConfig:
    file.write_text(text)
    return load(file, overrides)


def refusal(file: Path, text: str, *overrides: str) -> str:
    with pytest.raises(ValueError) as error:
        loaded(file, text, *overrides)
    assert "\n" not in str(error.value)
    return str(error.value)


class TestProfiles:
    def test_the_file_picks_one(self, file: Path) -> None:
        config = loaded(file, PROFILES)
        assert (config.cluster.num_cpus, config.learner.num_workers, config.learner.num_cpus) == (4, 1, 2)

    def test_another_is_picked_by_name_and_only_that_one_counts(self, file: Path) -> None:
        config = loaded(file, PROFILES, "cluster=large")
        assert (config.cluster.num_cpus, config.learner.num_workers, config.learner.num_cpus) == (None, 8, 2)
        geneval = config.reward_configs["geneval"]
        assert (geneval.num_replicas, geneval.num_cpus) == (4, 0.5)
        assert loaded(file, PROFILES, "cluster=large", "cluster=small") == loaded(file, PROFILES)

    def test_other_overrides_lie_over_it_wherever_they_stand(self, file: Path) -> None:
        for overrides in (("learner.num_workers=5", "cluster=large"), ("cluster=large", "learner.num_workers=5")):
            assert loaded(file, PROFILES, *overrides).learner.num_workers == 5
        config = loaded(file, PROFILES, "cluster=large", "cluster.num_cpus=7")
        assert (config.cluster.num_cpus, config.learner.num_workers) == (7, 8)

    def test_a_mapping_stays_a_mapping(self, file: Path) -> None:
        plain = PROFILES.replace("cluster: small\n", "cluster: {num_cpus: 3, wait_s: 9}\n")
        config = loaded(file, plain)
        assert (config.cluster.num_cpus, config.cluster.wait_s, config.learner.num_workers) == (3, 9, 3)
        config = loaded(file, plain, "cluster=small")
        assert (config.cluster.num_cpus, config.cluster.wait_s, config.learner.num_workers) == (4, 9, 1)
        assert loaded(file, PROFILES, "cluster={num_cpus: 2}").learner.num_workers == 1

    def test_the_resolved_experiment_shows_what_runs(self, file: Path) -> None:
        config = loaded(file, PROFILES, "cluster=large")
        data = yaml.safe_load(dump(config))
        assert "profiles" not in data
        assert data["learner"]["micro_batch_size"] == 64
        assert parse(data).learner == config.learner

    @pytest.mark.parametrize(
        ("text", "overrides", "message"),
        [
            (PROFILES, ["cluster=larg"], "cluster = 'larg': no such profile; did you mean large?"),
            (PROFILES, ["cluster=zzz"], "cluster = 'zzz': no such profile; known: small, large"),
            (PROFILES.replace("cluster: small", "cluster: smal"), [], "did you mean small?"),
            (
                "run: {name: a}",
                ["cluster=small"],
                "this file has no profiles; write a mapping, such as cluster.num_cpus",
            ),
            ("cluster: a\nprofiles: [a]", [], "profiles: must be a mapping of names"),
            ("cluster: a\nprofiles: {a: 3}", [], "profiles: must be a mapping of names"),
            (
                PROFILES.replace("micro_batch_size", "micro_batch"),
                ["cluster=large"],
                "learner.micro_batch: unknown key",
            ),
            (PROFILES, ["cluster=3"], "cluster = 3: "),
        ],
    )
    def test_a_mistake_is_one_line(self, file: Path, text: str, overrides: list[str], message: str) -> None:
        assert message in refusal(file, text, *overrides)


class TestStages:
    def test_epochs_are_counted_through(self, file: Path) -> None:
        config = loaded(file, STAGES)
        assert config.run.num_epochs == 9
        assert [one.run.num_epochs for one in config.stage_configs] == [3, 5, 9]
        assert [one.run.name for one in config.stage_configs] == ["a"] * 3
        assert not any(one.stages for one in config.stage_configs)

    def test_rewards_are_chosen_and_everything_else_is_merged(self, file: Path) -> None:
        first, second, third = loaded(file, STAGES).stage_configs
        assert first.trained_weights == {"jpeg_compressibility": 0.5}
        assert first.prompts.train == "shapes/train"
        assert list(second.rewards) == ["geneval", "jpeg_incompressibility"]
        geneval: Any = second.reward_configs["geneval"]
        assert (geneval.credit, geneval.num_replicas, geneval.detector) == ("strict", 2, "shapes")
        assert second.trained_weights == {"geneval": 1.0}
        assert (second.prompts.train, second.prompts.groups_per_epoch) == ("small/geneval", 8)
        decay: Any = second.algorithm.old_policy_decay
        assert (second.algorithm.beta, decay.flat_steps, decay.rate) == (0.5, 1, 0.25)
        assert list(third.rewards) == ["geneval", "jpeg_compressibility"]
        assert (third.learner.optimizer_steps, third.algorithm.beta) == (2, 1.0)

    def test_without_stages_the_experiment_is_the_only_part(self, file: Path) -> None:
        config = loaded(file, PROFILES)
        assert config.stage_configs == (config,)

    def test_a_stage_can_be_overridden_by_its_number(self, file: Path) -> None:
        config = loaded(file, STAGES, "stages.1.num_epochs=7", "stages.1.rewards.geneval.weight=2")
        assert config.run.num_epochs == 14
        second = config.stage_configs[1]
        assert second.trained_weights == {"geneval": 2.0}
        assert second.algorithm.beta == 0.5
        assert loaded(file, STAGES, "stages=[{name: only, num_epochs: 1}]").run.num_epochs == 1

    def test_the_dump_is_the_same_experiment(self, file: Path) -> None:
        config = loaded(file, STAGES)
        again = parse(yaml.safe_load(dump(config)))
        assert resolved(again) == resolved(config)
        assert [resolved(one) for one in again.stage_configs] == [resolved(one) for one in config.stage_configs]

    def test_nothing_is_changed_in_place(self) -> None:
        data = yaml.safe_load(STAGES)
        stage_data(data, 1)
        assert data == yaml.safe_load(STAGES)

    @pytest.mark.parametrize(
        ("override", "message"),
        [
            ("run.num_epochs=100", "run.num_epochs = 100: the stages have 9; leave it out, or change a stage"),
            ("stages.0.num_epochs=0", "stages.0.num_epochs = 0: Input should be greater than or equal to 1"),
            ("stages.0.num_epochs=a", "stages.0.num_epochs = 'a': "),
            ("stages.1.name=first", "stages.1.name = 'first': an earlier stage has it; choose another"),
            ("stages.1.name=../up", "stages.1.name = '../up': "),
            (
                "stages.0.model.path=x",
                "stages.0.model: unknown key; known: name, num_epochs, prompts, sampler, learner",
            ),
            ("stages.0.promts.train=x", "stages.0.promts: unknown key; did you mean prompts?"),
            (
                "stages.0.learner.num_workers=2",
                "stages.0.learner.num_workers: workers are the whole run's; set learner.",
            ),
            (
                "stages.1.sampler.num_stps=2",
                "stages.1 (second): sampler.num_stps: unknown key; did you mean num_steps?",
            ),
            ("stages.1.rewards.genevl.weight=1", "stages.1 (second): unknown reward 'genevl'; did you mean 'geneval'?"),
            ("stages.1.sampler.num_steps=4", "stages.1 (second): sampler.num_times = 9: "),
            ("stages.2.rewards.geneval.weight=0", "stages.2 (third): rewards: none has a weight to train on"),
            ("stages.2.rewards={}", "stages.2.rewards = {}: "),
            (
                "stages.3.num_epochs=1",
                "--set stages.3.num_epochs: there are 3 stages; write stages.N.key with N from 0",
            ),
            ("stages=3", "stages = 3: Input should be a valid tuple"),
            ("stages.first.num_epochs=1", "write stages.N.key with N from 0"),
        ],
    )
    def test_a_mistake_is_one_line(self, file: Path, override: str, message: str) -> None:
        assert message in refusal(file, STAGES, override)
