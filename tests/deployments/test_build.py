"""When a deployed reward may be shared: what its scores depend on is the same, and where it runs does not matter."""

from typing import Any

import pytest

from deployments.build import check_shared, describe
from nft_ray.config import ExperimentConfig
from tests.fakes import fake_config

SERVER = {"model_path": "a/model", "python": "python3"}


def job(name: str, section: dict[str, Any], timeout_s: float = 200) -> ExperimentConfig:
    return fake_config(rewards={name: section}, scorers={"timeout_s": timeout_s})


def check(name: str, there: dict[str, Any], here: dict[str, Any], timeout_s: float = 200) -> None:
    """One job deployed the reward as `there`, another wants it as `here`."""
    config, deployed = job(name, here, timeout_s), job(name, there).reward_configs[name]
    check_shared(name, describe(name, deployed), describe(name, config.reward_configs[name]), config)


@pytest.mark.parametrize(
    ("name", "there", "here"),
    [
        ("ocr", {}, {"weight": -0.5}),
        ("ocr", {}, {"num_replicas": 4, "num_cpus": 2, "batch_size": 7, "memory_gib": 9}),
        ("ocr", {"autoscaling": {"max_replicas": 2}}, {"py_executable": "/opt/ocr/bin/python"}),
        ("pickscore", {"device": "cpu"}, {"weights": "/elsewhere", "micro_batch_size": 8}),
        ("unified_reward", {"urls": ["http://a/v1"]}, {"urls": ["http://b/v1"], "timeout_s": 5, "deadline_s": 50}),
        ("unified_reward", {"server": SERVER}, {"server": SERVER | {"port": 7, "data_parallel_size": 2}}),
    ],
)
def test_one_that_only_runs_elsewhere_is_shared(name: str, there: dict[str, Any], here: dict[str, Any]) -> None:
    check(name, there, here)


@pytest.mark.parametrize(
    ("name", "there", "here", "what"),
    [
        ("ocr", {}, {"engine": "paddleocr"}, "ocr.engine = 'rapidocr' there, 'paddleocr' here"),
        (
            "geneval",
            {"detector": "shapes"},
            {"detector": "shapes", "credit": "strict"},
            "geneval.credit = 'soft' there",
        ),
        ("pickscore", {}, {"dtype": "bfloat16", "device": "cpu"}, "pickscore.dtype = 'float32' there"),
        (
            "unified_reward",
            {"server": SERVER},
            {"server": SERVER | {"model_path": "another/model"}},
            "unified_reward.server.model_path = 'a/model' there, 'another/model' here",
        ),
        ("unified_reward", {"server": SERVER}, {"urls": ["http://a/v1"]}, "unified_reward.server = {"),
    ],
)
def test_another_is_refused_with_what_differs(
    name: str, there: dict[str, Any], here: dict[str, Any], what: str
) -> None:
    with pytest.raises(ValueError, match="another configuration: rewards") as error:
        check(name, there, here)
    assert f"another configuration: rewards.{what}" in str(error.value)
    assert "\n" not in str(error.value)


def test_another_release_is_refused() -> None:
    config = job("ocr", {})
    wanted = describe("ocr", config.reward_configs["ocr"])
    with pytest.raises(ValueError, match=r"another configuration: nft_ray = '0' there"):
        check_shared("ocr", {**wanted, "nft_ray": "0"}, wanted, config)


def test_its_deadline_must_be_below_the_jobs_own() -> None:
    urls = {"urls": ["http://a/v1"]}
    with pytest.raises(ValueError, match=r"deadline_s = 110: .* scorers.timeout_s = 60; raise that"):
        check("unified_reward", urls, urls | {"timeout_s": 5, "deadline_s": 50}, timeout_s=60)
