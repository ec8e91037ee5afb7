import subprocess
import sys

import pytest

from nft_ray.rewards.base import RewardConfig, load_reward, reward_config, reward_names


def test_every_public_module_is_a_reward() -> None:
    names = reward_names()
    assert {"geneval", "jpeg_compressibility", "jpeg_incompressibility"} <= set(names)
    assert not {"base", "combine"} & set(names)
    assert names == sorted(names)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("genevel", "; did you mean 'geneval'?"), ("jpeg_compresibility", "; did you mean 'jpeg_compressibility'?"),
     ("qqqq", ""), ("base", ""), ("../geneval", "; did you mean 'geneval'?")],
)  # fmt: skip
def test_an_unknown_reward_names_the_known_and_the_nearest_on_one_line(name: str, nearest: str) -> None:
    for look_up in (reward_config, load_reward):
        with pytest.raises(ValueError, match="unknown reward") as error:
            look_up(name, {})
        assert str(error.value) == f"unknown reward {name!r}{nearest}; known: {', '.join(reward_names())}"


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({}, "rewards.geneval.detector: missing"),
        (
            {"detector": "mmdet"},
            "rewards.geneval.detector = 'mmdet': Input should be 'shapes' or 'mask2former'",
        ),
        (
            {"detector": "shapes", "num_replicas": 0},
            "rewards.geneval.num_replicas = 0: Input should be greater than or equal to 1",
        ),
        (
            {"detector": "shapes", "weight": float("nan")},
            "rewards.geneval.weight = nan: Input should be a finite number",
        ),
        (
            {"detektor": "shapes", "detector": "shapes"},
            "rewards.geneval.detektor: unknown key; did you mean 'detector'?",
        ),
        ("shapes", "rewards.geneval = 'shapes': Input should be a valid dictionary or instance of Config"),
    ],
)
def test_a_bad_section_takes_one_line_with_path_value_and_rule(section: dict, message: str) -> None:
    with pytest.raises(ValueError, match=r"^rewards\.geneval") as error:
        reward_config("geneval", section)
    assert str(error.value) == message


def test_defaults() -> None:
    config = RewardConfig()
    assert config.model_dump() == {
        "weight": 1.0,
        "eval_only": False,
        "num_replicas": 1,
        "autoscaling": None,
        "num_cpus": 1.0,
        "num_gpus": 0.0,
        "memory_gib": 0.3,
        "batch_size": 1,
        "batch_wait_s": 0.01,
        "runtime_env": None,
        "py_executable": None,
    }


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ({"min_replicas": 3, "max_replicas": 2}, "min_replicas 3 is above max_replicas 2"),
        ({"max_replicas": 0}, "greater than or equal to 1"),
        ({"min_replicas": 1}, r"autoscaling\.max_replicas: missing"),
    ],
)
def test_autoscaling_bounds_are_checked(bounds: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        reward_config("jpeg_compressibility", {"autoscaling": bounds})


def test_names_and_base_import_no_reward() -> None:
    script = "import sys; from nft_ray.rewards import base; base.reward_names(); print(*sys.modules, sep='\\n')"
    modules = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert "nft_ray.rewards.base" in modules
    assert not {f"nft_ray.rewards.{name}" for name in reward_names()} & set(modules)
    assert not {"torch", "cv2", "ray"} & set(modules)
