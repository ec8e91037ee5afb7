"""What a setting may change is read off its field, on whatever path it is reached."""

from typing import Any

import pytest

from nft_ray.config import ExperimentConfig, essence, mark_of, parse, resolved
from nft_ray.config.marks import field_mark
from nft_ray.rewards.base import RewardConfig, RewardUse, reward_class, reward_names
from nft_ray.types import Mark
from tests.fakes import fake_config


@pytest.fixture(scope="module")
def config() -> ExperimentConfig:
    rewards: dict[str, Any] = {
        "ocr": {},
        "pickscore": {"runtime_env": {"pip": ["x"]}},
        "geneval": {"detector": "shapes"},
    }
    rewards["unified_reward"] = {"server": {"model_path": "a/model", "python": "python3"}, "deadline_s": 90}
    stages = [{"name": "one", "num_epochs": 2, "scorers": {"max_in_flight": 2}, "rewards": {"ocr": {"num_cpus": 2}}}]
    return parse({**resolved(fake_config(rewards=rewards, scorers={"timeout_s": 100, "http": {}})), "stages": stages})


@pytest.mark.parametrize(
    ("key", "mark"),
    [
        ("run.num_epochs", "placement"),
        ("run.seed", "result"),
        ("cluster.placement", "placement"),
        ("model.dtype", "rounding"),
        ("model.path", "result"),
        ("model.lora.rank", "result"),
        ("model.precomputed", "placement"),
        ("sampler.num_workers", "placement"),  # of the class that it shares with the learner
        ("sampler.solver", "result"),
        ("sampler.lora", "rounding"),
        ("learner.sharding", "rounding"),
        ("algorithm.beta", "result"),
        ("scorers.http", "placement"),
        ("scorers.http.port", "placement"),
        ("evaluation.every", "placement"),
        ("evaluation.guidance", "result"),
        ("rewards.ocr.weight", "result"),
        ("rewards.ocr.engine", "result"),
        ("rewards.ocr.memory_gib", "placement"),  # which has a default of its own there
        ("rewards.pickscore.runtime_env.pip", "placement"),
        ("rewards.pickscore.dtype", "rounding"),
        ("rewards.unified_reward.server.port", "placement"),
        ("rewards.unified_reward.server.model_path", "result"),
        ("rewards.unified_reward.server.env.X", "result"),
        ("stages.0.scorers.max_in_flight", "placement"),
        ("stages.0.scorers.combine", "result"),
        ("stages.0.rewards.ocr.num_cpus", "placement"),
        ("stages.0.rewards.ocr", "result"),
        ("stages.0.num_epochs", "result"),
        ("stages", "result"),
    ],
)
def test_the_mark_of_a_path(config: ExperimentConfig, key: str, mark: str) -> None:
    assert mark_of(config, key) == mark


@pytest.mark.parametrize(
    "key",
    [
        "gone",
        "gone.key",
        "sampler.gone",
        "rewards.gone",
        "rewards.gone.num_cpus",
        "rewards",
        "stages.7.learner.x",
        "stages.x.sampler.num_workers",
    ],
)
def test_what_nothing_is_known_of_is_a_result(config: ExperimentConfig, key: str) -> None:
    assert mark_of(config, key) is Mark.RESULT


@pytest.mark.parametrize("name", reward_names())
def test_what_all_rewards_have_is_marked_in_each(name: str) -> None:
    fields = reward_class(name).model_fields
    for key in RewardConfig.model_fields.keys() - RewardUse.model_fields.keys():
        assert field_mark(fields[key]) is Mark.PLACEMENT, key


def test_the_essence_of_a_section_is_what_is_not_placement(config: ExperimentConfig) -> None:
    rewards = config.reward_configs
    assert essence(rewards["pickscore"]) == {"weight": 1.0, "eval_only": False, "dtype": "float32"}
    assert essence(rewards["geneval"], exclude=RewardUse.model_fields) == {
        "dtype": "float32",
        "detector": "shapes",
        "credit": "soft",
    }
    server = essence(rewards["unified_reward"])["server"]
    assert server == {
        "model_path": "a/model",
        "chat_template": None,
        "tensor_parallel_size": 1,
        "extra_args": [],
        "env": {},
    }
    assert essence(config.tracking) == {}
