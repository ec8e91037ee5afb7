"""When a deployed reward may be shared: what its scores depend on is the same, and where it runs does not matter."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from deployments import build, lock
from deployments.build import check_shared, describe
from nft_ray.config import ExperimentConfig
from nft_ray.roles import TryAgainError
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


@pytest.mark.parametrize("wait", ["the lock", "room", "another job"])
def test_what_did_not_come_in_time_may_come_when_it_is_tried_again(wait: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def until_alone() -> None:
        async with lock.alone(0.01):
            pytest.fail("another job has it")

    deploying = SimpleNamespace(applications={"run/a": SimpleNamespace(status="DEPLOYING")})
    monkeypatch.setattr(lock, "_take", lambda: None)
    monkeypatch.setattr(build.serve, "status", lambda: deploying)
    monkeypatch.setattr(build.ray, "available_resources", dict)
    monkeypatch.setattr(build.claims, "read_claims", dict)
    monkeypatch.setattr(build.claims, "live_jobs", list)
    waits = {
        "the lock": (until_alone(), "another job deploys rewards since"),
        "room": (build._wait_until_running(["run/a"], 0.01), "run/a: not running after"),
        "another job": (build._is_deployed("run/b", None, 5), "has given up"),  # type: ignore[arg-type]
    }
    work, line = waits.pop(wait)
    for other, _ in waits.values():
        other.close()
    with pytest.raises(TryAgainError, match=line):
        asyncio.run(work)
