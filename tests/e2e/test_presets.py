"""Every preset trains, with a tiny pipeline of its architecture in the place of the gated one, on our small prompts.

The weights of most rewards are not here either: cheap ones stand in. Solver, steps, times, loss, schedules, placement
and stages are the preset's own. In one process all of them; SD3.5 and FLUX also through the whole Ray system.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from nft_ray.cli.main import main
from nft_ray.prompts.sets import PACKAGED
from tests.command_line import NO_MLFLOW, REPO, nft_ray, sets
from tests.conftest import LocalRay
from tests.models.tiny import TOKENS, tiny_model

PRESETS = sorted(path.stem for path in (REPO / "configs").glob("*.yaml") if path.stem.startswith(("sd3", "flux")))
STAND_INS = {
    "pickscore": "jpeg_compressibility",
    "hpsv2": "jpeg_incompressibility",
    "clipscore": "jpeg_compressibility",
}
KINDS = {"sd3": "sd35_medium", "flux": "flux_dev"}
pytestmark = pytest.mark.slow


def rewards_here(sections: dict[str, Any]) -> dict[str, Any]:
    """The rewards that need no weights; beside GenEval and OCR, which find nothing in noise, one to learn from."""
    found = {STAND_INS.get(name, name): {"weight": 1.0, "num_cpus": 0.1} for name in sections}
    if "geneval" in found:
        found["geneval"] |= {"detector": "shapes"}
    if found.keys() & {"geneval", "ocr"}:
        found |= {"jpeg_compressibility": {"weight": 0.1, "num_cpus": 0.1}}
    return found


def small_prompts(section: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Ours of the same task, GenEval's in the world that the detector here knows; of those, a few to test on."""
    name = section["train"].partition("/")[0]
    train = "shapes/train" if name == "geneval" else f"small/{name}"
    source = PACKAGED[train]
    test = folder / f"{name}{source.suffix}"
    test.write_text("".join(source.read_text().splitlines(keepends=True)[:3]))
    return section | {"train": train, "test": str(test)}


def experiment(name: str, tiny: Path, folder: Path) -> Path:
    """The preset with small numbers, as a file beside its run."""
    data = yaml.safe_load((REPO / "configs" / f"{name}.yaml").read_text())
    for profile in data["profiles"].values():
        del profile["rewards"]
    model = tiny_model(KINDS[data["model"]["family"]], tiny)
    data["model"] |= {"path": model.path, "height": 32, "width": 32, "max_sequence_length": TOKENS}
    data["prompts"] = small_prompts(data["prompts"], folder) | {"groups_per_epoch": 2, "images_per_group": 3}
    data["evaluation"] |= {"num_steps": 2, "picture_lines": [0, 1]}
    data["run"] |= {"checkpoint_every": 1} | ({} if "stages" in data else {"num_epochs": 2})
    data["rewards"] = rewards_here(data["rewards"])
    for stage in data.get("stages", ()):
        stage |= {"num_epochs": 1, "rewards": rewards_here(stage["rewards"])}
        stage |= {"prompts": small_prompts(stage["prompts"], folder)} if "prompts" in stage else {}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    return path


def settings(runs: Path, *, compiled: bool = False) -> list[str]:
    """One card's placement, on CPUs; compiling takes them longer than the run."""
    chosen = ["cluster=one_gpu", f"run.root={runs}", NO_MLFLOW]
    for role in ("sampler", "learner"):
        chosen += [f"{role}.num_gpus=0", f"{role}.num_cpus=0.4", f"{role}.num_threads=1", f"{role}.micro_batch_size=6"]
        chosen += [] if compiled else [f"{role}.compile=false"]
    return sets(*chosen)


def check_run(run: Path, num_epochs: int) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == list(range(num_epochs + 1))
    for line in lines[1:]:
        assert line["reward/missing"] == 0
        assert np.isfinite(line["nft/loss"])
        assert line["nft/grad_norm"] > 0
    lora = load_file(run / "lora" / "pytorch_lora_weights.safetensors")
    moved = [name for name, value in lora.items() if ".lora_B." in name and value.any()]
    assert moved, "no layer of the LoRA was trained"
    assert (run / "summary.json").is_file()


def train_here(experiment: Path, runs: Path, capsys: pytest.CaptureFixture[str], *, compiled: bool = False) -> None:
    status = main(["train", str(experiment), "--local", *settings(runs, compiled=compiled)])
    assert status == 0, capsys.readouterr().err
    check_run(runs / experiment.stem, 5 if experiment.stem == "sd3_staged" else 2)


@pytest.fixture(autouse=True)
def no_runs_of_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NFT_RAY_RUNS", raising=False)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_trains_in_one_process(
    name: str, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_here(experiment(name, tiny_folder, tmp_path), tmp_path / "runs", capsys)


@pytest.mark.parametrize("name", [pytest.param("sd3_ocr", marks=pytest.mark.large), "flux_pickscore"])
def test_a_preset_trains_compiled_as_it_is_shipped(
    name: str, compiler: None, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One per architecture; parked in turns, too. Of SD3, nano-sd3 is compiled in tests/cores."""
    train_here(experiment(name, tiny_folder, tmp_path), tmp_path / "runs", capsys, compiled=True)


@pytest.mark.ray
@pytest.mark.parametrize("name", ["sd3_pickscore", "flux_pickscore"])
def test_a_preset_trains_through_ray(name: str, tiny_folder: Path, tmp_path: Path, local_ray: LocalRay) -> None:
    command = ["train", str(experiment(name, tiny_folder, tmp_path)), *settings(tmp_path / "runs")]
    done = nft_ray(*command, runs=tmp_path / "runs", ray=local_ray.environment)
    assert done.returncode == 0, done.stderr
    check_run(tmp_path / "runs" / name, 2)
