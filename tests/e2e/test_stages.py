"""A run in stages through the command line: other prompts and rewards, one policy; killed and resumed, no other bit."""

import json
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from nft_ray.prompts.sets import PACKAGED
from nft_ray.runs.folder import RunFolder
from tests.command_line import NO_MLFLOW, killed_after, nft_ray_here, sets
from tests.examples import QUICKSTART, SMALL

pytestmark = pytest.mark.slow
STAGES = (
    "stages=["
    "{name: small-files, num_epochs: 2, rewards: {jpeg_compressibility: {weight: 1}}, evaluation: {num_steps: 3}}, "
    "{name: shapes, num_epochs: 3, algorithm: {beta: 0.3}, rewards: {geneval: }, prompts: {groups_per_epoch: 4}}]"
)


def command(experiment: Path, name: str) -> list[str]:
    small = [setting for setting in SMALL if not setting.startswith("run.num_epochs")]
    file = {"run.max_staleness": 1, "run.checkpoint_every": 1, "run.name": name, "evaluation.picture_lines": "[0, 1]"}
    settings = [*small, *(f"{key}={value}" for key, value in file.items()), NO_MLFLOW, STAGES]
    return ["train", str(experiment), "--local", *sets(*settings)]


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quickstart without its number of epochs, which the stages have, and with few lines to test on."""
    folder = tmp_path_factory.mktemp("staged")
    path, test = folder / "staged.yaml", folder / "test.jsonl"
    test.write_text("".join(PACKAGED["shapes/test"].read_text().splitlines(keepends=True)[:24]))
    text = QUICKSTART.read_text().replace("num_epochs: 30, ", "").replace("test: shapes/test", f"test: {test}")
    path.write_text(text)
    return path


def test_killed_in_its_second_stage_it_goes_on_there(experiment: Path, tmp_path: Path) -> None:
    straight = nft_ray_here(*command(experiment, "straight"), runs=tmp_path)
    assert straight.returncode == 0, straight.stderr
    killed_after(RunFolder, "save", 3, *command(experiment, "killed"), runs=tmp_path)
    saved = tmp_path / "killed" / "checkpoints"
    assert max(path.name for path in saved.iterdir()) == "epoch-000003"
    resumed = nft_ray_here(*command(experiment, "killed"), runs=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    shown, shown_again = straight.stdout, resumed.stdout

    assert [line for line in shown.splitlines() if line.startswith("stage ") and "epochs " in line][:2] == [
        "stage small-files: epochs 1 to 2",
        "stage shapes: epochs 3 to 5",
    ]
    assert "stage small-files: epochs" not in shown_again
    assert "stage shapes: epochs 3 to 5" in shown_again
    loras = [load_file(tmp_path / name / "lora/pytorch_lora_weights.safetensors") for name in ("straight", "killed")]
    assert {key: value.tobytes() for key, value in loras[0].items()} == {k: v.tobytes() for k, v in loras[1].items()}
    for name in ("straight", "killed"):
        run = tmp_path / name
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert [line["epoch"] for line in lines] == [0, 1, 2, 3, 4, 5]
        assert {"eval/jpeg_compressibility", "eval/geneval/strict"} <= lines[0].keys()
        assert "reward/jpeg_compressibility" in lines[2]
        assert "reward/geneval" not in lines[2]
        assert "reward/geneval" in lines[3]
        summary = json.loads((run / "summary.json").read_text())
        assert list(summary["stages"]) == ["small-files", "shapes"]
        assert summary["trained"] == summary["stages"]["shapes"]["trained"]
        assert summary["epochs"] == 5
        assert sorted(path.name for path in (run / "stages").iterdir()) == ["shapes", "small-files"]
        table = (run / "table.txt").read_text()
        assert "stage small-files, after 2 epochs" in table
        assert "stage shapes, after 5 epochs" in table
