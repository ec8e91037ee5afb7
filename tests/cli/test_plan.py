"""`nft-ray plan` from the command line, on the pipeline that comes with this package."""

import json
from pathlib import Path

import pytest

from nft_ray.cli.main import main
from nft_ray.cli.plan import configured, ground_of
from nft_ray.config import load
from nft_ray.planning import devices
from nft_ray.planning.devices import device_named
from nft_ray.planning.layouts import changed, forecasts
from nft_ray.planning.places import Nodes, num_gpus
from tests.examples import QUICKSTART

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.slow
def test_a_plan_is_a_table_a_picture_and_layouts_that_the_loader_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["plan", str(QUICKSTART), "--gpus", "2", "--price", "2", "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out.splitlines()

    assert printed[0] == "quickstart on 2 GPUs (h100)"
    heads = [line.split("  ")[0] for line in printed[1:4]]
    assert heads == ["assumed", "run", "bound"], "nobody has measured an H100"
    said = [line.split(" --set ") for line in printed if line.startswith("   --set ") or line == "   as configured"]
    assert len(said) >= 3
    for line in said:
        load(QUICKSTART, [part for part in (one.strip() for one in line[0:]) if "=" in part])
    assert {file.suffix for file in tmp_path.iterdir()} == {".png", ".json"}
    numbers = json.loads((tmp_path / "quickstart-2xh100.json").read_text())
    (stage,) = numbers["stages"]
    assert numbers["seconds"] == pytest.approx(
        stage["epochs"] * stage["epoch_s"] + stage["evaluations"] * stage["evaluation_s"]
    )
    assert sum(stage["phases_s"].values()) == pytest.approx(stage["epoch_s"], rel=0.02)


@pytest.mark.parametrize(
    ("name", "gpus", "profile"),
    [
        ("sd3_geneval", 1, "one_gpu"),
        ("sd3_geneval", 8, ""),
        ("sd3_geneval", 9, ""),
        ("sd3_geneval", 32, "thirty_two_gpus"),
        ("sd3_ocr", 32, "thirty_two_gpus"),
        ("quickstart", 8, ""),
    ],
)
def test_so_many_cards_choose_the_profile_that_uses_them(name: str, gpus: int, profile: str):
    assert configured(str(CONFIGS / f"{name}.yaml"), [], gpus)[1] == profile


def test_a_profile_that_is_named_stays():
    config, profile = configured(str(CONFIGS / "sd3_geneval.yaml"), ["cluster=one_gpu"], 32)

    assert profile == ""
    assert config.sampler.num_workers == 1


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--nodes", "4by8"], "--nodes 4by8: write nodes x cards, such as 4x8"),
        (["--gpus", "0"], "--gpus 0: must be at least 1"),
        (["--gpus", "8", "--nodes", "4x8"], "--gpus 8: --nodes 4x8 are 32; leave one of them out"),
        (["--device", "h1000"], "h1000"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]):
    assert main(["plan", str(QUICKSTART), *arguments]) == 1
    (said,) = capsys.readouterr().err.splitlines()
    assert line in said


def test_a_dry_run_says_the_estimate_and_what_this_machine_lacks(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    settings = ["--set", f"run.root={tmp_path}", "--set", "sampler.timeout_s=0.001"]
    assert main(["train", str(QUICKSTART), "--dry-run", *settings]) == 0
    printed = capsys.readouterr().out.splitlines()

    (at,) = [number for number, line in enumerate(printed) if line.startswith("estimate for CPUs")]
    assert "s an epoch" in printed[at + 1]
    assert "for 30 epochs" in printed[at + 1]
    assert any(line.startswith("warning: sampler.timeout_s = 0.001 is shorter than a rollout") for line in printed)


def test_without_gpus_there_are_no_cards_to_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["plan", str(QUICKSTART), "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out

    assert printed.startswith("quickstart on CPUs\n")
    assert "best layouts" not in printed
    assert (tmp_path / "quickstart-cpu.png").is_file()


@pytest.mark.slow
def test_a_dry_run_of_a_preset_says_what_eight_cards_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Counted without weights and without a network, in seconds."""
    for variable in ("NFT_RAY_DATA", "NFT_RAY_WEIGHTS", "NFT_RAY_RUNS"):
        monkeypatch.setenv(variable, str(tmp_path / variable))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["train", str(CONFIGS / "sd3_geneval.yaml"), "--dry-run"]) == 0
    printed = capsys.readouterr().out.splitlines()

    (at,) = [
        number for number, line in enumerate(printed) if line == "estimate for 8 GPUs (h100) (nft-ray plan says more):"
    ]
    assert "s an epoch" in printed[at + 1]
    assert "for 1,000 epochs" in printed[at + 1]
    assert printed[at + 2].strip().startswith(("samplers", "learners", "reward geneval"))
    assert list(tmp_path.iterdir()) == []


def test_workers_without_a_gpu_are_no_faster_beside_cards():
    config = load(QUICKSTART)
    card = ground_of(config, Nodes(count=1, cards=8), device_named("h100"))
    core = ground_of(config, Nodes(count=1, cards=0), device_named("cpu"))
    on_cards = changed(config, {"sampler.num_gpus": 1, "learner.num_gpus": 1})

    assert card.estimate(config)[0] == core.estimate(config)[0]
    assert card.estimate(on_cards)[0].draw_s < card.estimate(config)[0].draw_s / 3


@pytest.mark.slow
def test_the_lines_of_a_layout_stand_on_the_profile_that_was_chosen(tmp_path: Path):
    """The YAML's own profile is another one: without `cluster=` they would mean something else."""
    file = CONFIGS / "sd3_geneval.yaml"
    assert main(["plan", str(file), "--gpus", "4", "--output", str(tmp_path)]) == 0
    numbers = json.loads((tmp_path / "sd3_geneval-4xh100.json").read_text())

    for layout in numbers["layouts"]:
        made = load(file, layout["set"])
        assert layout["set"][0] == "cluster=one_gpu"
        assert num_gpus(made) <= 4 + 1e-4
        ground = ground_of(made, Nodes(count=1, cards=4), device_named("h100"))
        assert sum(stage.seconds for stage in forecasts(made, ground)) == pytest.approx(layout["seconds"])


def test_cards_that_are_too_small_for_any_layout(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    tiny = tmp_path / "tiny.yaml"
    h100 = (devices.FOLDER / "h100.yaml").read_text()
    tiny.write_text(h100.replace("memory_bytes: 80_000_000_000", "memory_bytes: 805_000_000"))
    on_cards = ["--set", "sampler.num_gpus=1", "--set", "learner.num_gpus=1"]
    assert main(["plan", str(QUICKSTART), *on_cards, "--device", str(tiny), "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out

    assert "warning: a card has 0.8 GB and" in printed
    assert "no layout fits 4 GPUs of this memory" in printed
