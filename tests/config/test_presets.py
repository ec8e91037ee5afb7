"""The published experiments: their hyperparameters, the same on any number of GPUs, and a dry run without a network."""

from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

from actors.placement import needs
from nft_ray.cli.main import main
from nft_ray.config import ExperimentConfig, differences, load, mark_of, resolved
from nft_ray.prompts.sets import PUBLISHED
from nft_ray.types import Mark

CONFIGS = Path(__file__).parents[2] / "configs"
PRESETS = ("sd3_geneval", "sd3_ocr", "sd3_pickscore", "sd3_hpsv2", "sd3_multi_reward", "sd3_staged", "flux_pickscore")
PROFILES = {"one_gpu": 1, "eight_gpus": 8, "thirty_two_gpus": 32}
PUBLISHED_VALUES: dict[str, dict[str, Any]] = {
    "sd3_geneval": {"beta": 1.0, "decay": "linear", "optimizer_steps": 1, "num_steps": 10, "num_times": 9},
    "sd3_ocr": {"beta": 0.1, "decay": "delayed", "optimizer_steps": 2, "num_steps": 10, "num_times": 9},
    "sd3_pickscore": {"beta": 1.0, "decay": "linear", "optimizer_steps": 1, "num_steps": 10, "num_times": 9},
    "sd3_hpsv2": {"beta": 1.0, "decay": "linear", "optimizer_steps": 1, "num_steps": 10, "num_times": 9},
    "sd3_multi_reward": {"beta": 0.1, "decay": "linear", "optimizer_steps": 1, "num_steps": 25, "num_times": 24},
    "sd3_staged": {"beta": 0.1, "decay": "linear", "optimizer_steps": 1, "num_steps": 40, "num_times": 39},
    "flux_pickscore": {"beta": 1.0, "decay": "linear", "optimizer_steps": 1, "num_steps": 10, "num_times": 9},
}
"""NVlabs/DiffusionNFT, config/nft.py; of the staged run the paper's text. FLUX is trained by the recipe of SD3.5."""
REWARDS = {
    "sd3_geneval": ["geneval"],
    "sd3_ocr": ["ocr"],
    "sd3_pickscore": ["pickscore"],
    "sd3_hpsv2": ["hpsv2"],
    "sd3_multi_reward": ["clipscore", "hpsv2", "pickscore"],
    "flux_pickscore": ["pickscore"],
}


def preset(name: str, *overrides: str) -> ExperimentConfig:
    return load(CONFIGS / f"{name}.yaml", overrides)


def test_these_are_all_of_them() -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml") if path.stem.startswith(("sd3", "flux"))} == {*PRESETS}


@pytest.mark.parametrize("name", PRESETS)
def test_the_hyperparameters_are_the_published_ones(name: str) -> None:
    config = preset(name)
    for one in config.stage_configs:
        assert {
            "beta": one.algorithm.beta,
            "decay": one.algorithm.old_policy_decay,
            "optimizer_steps": one.learner.optimizer_steps,
            "num_steps": one.sampler.num_steps,
            "num_times": one.sampler.num_times,
        } == PUBLISHED_VALUES[name]
        assert (one.prompts.groups_per_epoch, one.prompts.images_per_group) == (48, 24)
        assert (one.sampler.solver, one.sampler.guidance) == ("dpm2", 1.0)
        assert (one.learner.learning_rate, one.learner.betas, one.learner.weight_decay) == (3e-4, (0.9, 0.999), 1e-4)
        assert (one.learner.max_grad_norm, one.algorithm.kl_weight, one.algorithm.advantage_clip) == (1.0, 1e-4, 5.0)
        assert (one.algorithm.advantage_std, one.algorithm.advantage_mode) == ("global", "all")
        assert one.algorithm.ema_decay == 0.9
        assert (one.model.lora.rank, one.model.lora.alpha, one.model.lora.targets) == (32, 64, None)
        assert (one.model.height, one.model.width, one.model.max_sequence_length) == (512, 512, 128)
        assert (one.evaluation.every, one.evaluation.num_steps, one.evaluation.solver) == (10, 40, "euler")
        assert (one.evaluation.guidance, one.run.max_staleness) == (1.0, 0)
        assert set(one.trained_weights.values()) == {1.0}
    if name in REWARDS:
        assert sorted(config.trained_weights) == REWARDS[name]


def test_the_stages_are_the_papers() -> None:
    config = preset("sd3_staged")
    stages = list(zip(config.stages, config.stage_configs, strict=True))
    assert [(stage.num_epochs, one.prompts.train) for stage, one in stages] == [
        (800, "pickscore/train"),
        (300, "geneval/train"),
        (200, "pickscore/train"),
        (200, "geneval/train"),
        (100, "ocr/train"),
    ]
    preference = ["clipscore", "hpsv2", "pickscore"]
    ruled = [["geneval"], [], ["geneval"], ["ocr"]]
    assert [sorted(one.trained_weights) for _, one in stages] == [
        preference,
        *(sorted([*preference, *rule]) for rule in ruled),
    ]


@pytest.mark.parametrize("name", PRESETS)
def test_every_number_of_gpus_runs_the_same_experiment(name: str) -> None:
    default = preset(name)
    for profile in PROFILES:
        config = preset(name, f"cluster={profile}")
        for key in differences(resolved(default), resolved(config)):
            assert mark_of(config, key) is Mark.PLACEMENT, key
    assert default == preset(name, "cluster=eight_gpus")
    assert preset(name, "cluster=one_gpu") != default


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("name", PRESETS)
def test_the_gpus_of_a_profile_are_used_and_suffice(name: str, profile: str) -> None:
    for one in preset(name, f"cluster={profile}").stage_configs:
        pairs, *rewards = needs(one)
        on_gpus = [need for need in rewards if need.num_gpus]
        total = sum(need.num_workers * need.num_gpus for need in (pairs, *on_gpus))
        wanted = PROFILES[profile] if on_gpus else min(PROFILES[profile], 24)
        # a pair is whole on its card: fractions of others must not lie beside it, but on the only one
        assert total <= wanted + 1e-9
        assert total > wanted - (2.5 if len(on_gpus) > 2 else 1e-9)
        assert pairs.num_gpus == pytest.approx(1.0 if profile != "one_gpu" or not on_gpus else 0.8)


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("name", PRESETS)
def test_every_replica_of_a_reward_can_be_at_work(name: str, profile: str) -> None:
    for one in preset(name, f"cluster={profile}").stage_configs:
        calls = min(one.scorers.max_in_flight, one.prompts.groups_per_epoch)  # a call scores one group
        assert all(reward.num_replicas <= calls for reward in one.reward_configs.values())


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("name", PRESETS)
def test_a_dry_run_needs_no_network_and_says_what_to_fetch(
    name: str, profile: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for variable in ("NFT_RAY_DATA", "NFT_RAY_WEIGHTS", "NFT_RAY_RUNS"):
        monkeypatch.setenv(variable, str(tmp_path / variable))
    monkeypatch.setattr("nft_ray.cli.train.dry_run_lines", lambda *_: [])  # counts a model: tests/cli/test_plan.py
    arguments = ["train", str(CONFIGS / f"{name}.yaml"), "--set", f"cluster={profile}", "--dry-run"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    config = preset(name, f"cluster={profile}")
    for one in config.stage_configs:
        assert f"not here yet: prompts {one.prompts.train}: " in printed
    assert f"sampler + learner  {config.sampler.num_workers:>7}" in printed
    assert all(f"reward-{reward}" in printed for reward in config.rewards)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", PRESETS)
def test_training_does_not_start_without_the_published_prompts(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("NFT_RAY_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("NFT_RAY_RUNS", str(tmp_path / "runs"))
    assert main(["train", str(CONFIGS / f"{name}.yaml")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "run `nft-ray data fetch " in line
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", PRESETS)
def test_a_small_set_stands_in_for_the_published_one_where_it_is_named(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("NFT_RAY_DATA", str(tmp_path))
    config = preset(name)
    settings = []
    for split in ("train", "test"):
        spec = getattr(config.prompts, split)
        assert spec in PUBLISHED
        settings.append(f"prompts.{split}=small/{spec.partition('/')[0]}")
    for number, stage in enumerate(config.stages):
        settings += [
            f"stages.{number}.prompts.{split}=small/{spec.partition('/')[0]}" for split, spec in stage.prompts.items()
        ]
    monkeypatch.setattr("nft_ray.cli.train.dry_run_lines", lambda *_: [])
    arguments = ["train", str(CONFIGS / f"{name}.yaml"), "--dry-run"]
    for setting in settings:
        arguments += ["--set", setting]
    assert main(arguments) == 0
    assert "not here yet: prompts" not in capsys.readouterr().out
