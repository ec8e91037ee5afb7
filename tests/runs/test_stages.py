"""Which part of a run an epoch belongs to."""

from pathlib import Path

import pytest

from nft_ray.config import ExperimentConfig, parse
from nft_ray.runs.stages import stage_at, stages_of


@pytest.fixture
def config() -> ExperimentConfig:
    stages = [{"name": "one", "num_epochs": 3}, {"name": "two", "num_epochs": 2}]
    return parse({"run": {"name": "a"}, "rewards": {"jpeg_compressibility": None}, "stages": stages})


def test_stages_follow_each_other(config: ExperimentConfig) -> None:
    assert [(stage.name, stage.first_epoch, stage.last_epoch) for stage in stages_of(config)] == [
        ("one", 0, 3),
        ("two", 3, 5),
    ]


@pytest.mark.parametrize(("epoch", "name"), [(0, "one"), (1, "one"), (3, "one"), (4, "two"), (5, "two"), (9, "two")])
def test_a_policy_is_of_the_stage_that_trained_it(config: ExperimentConfig, epoch: int, name: str) -> None:
    assert stage_at(config, epoch).name == name


def test_a_run_without_stages_is_one_part_in_its_own_folder(config: ExperimentConfig) -> None:
    plain = config.model_copy(update={"stages": ()})
    (only,) = stages_of(plain)
    assert (only.name, only.first_epoch, only.config) == ("", 0, plain)
    assert only.results(Path("runs/a")) == Path("runs/a")
    assert stages_of(config)[1].results(Path("runs/a")) == Path("runs/a/stages/two")
