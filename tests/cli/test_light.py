"""What a command loads before it has something to say: nobody waits seconds for torch to read of a typing mistake."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.command_line import REPO, environment

HEAVY = ("torch", "diffusers", "transformers", "peft", "mlflow")
LOADED = f"print('loaded', *(name for name in {HEAVY} if name in sys.modules))"
COMMANDS = ("main", "train", "evaluate", "export", "encode", "track", "rewards", "data", "cluster")


def python(code: str, *arguments: str, runs: Path) -> tuple[int, str, str]:
    """Exit status, standard output without its last line, and that line: what was loaded in the end."""
    command = [sys.executable, "-c", f"import sys\n{code}\n{LOADED}", *arguments]
    done = subprocess.run(command, cwd=REPO, env=environment(runs), capture_output=True, text=True)
    said, _, last = done.stdout.strip().rpartition("\n")
    return done.returncode, said + done.stderr, last


def test_commands_families_and_the_driver_of_a_ray_are_imported_without_torch(tmp_path: Path) -> None:
    """In one process: most of its 2 s are ray.serve."""
    code = f"import {', '.join(f'nft_ray.cli.{name}' for name in COMMANDS)}\n"
    code += "import actors.roles, deployments.build, deployments.plane\n"
    code += "from nft_ray.config import ModelConfig\nfrom nft_ray.models.base import families, family\n"
    code += "for name in families(): family(ModelConfig(family=name))"
    assert python(code, runs=tmp_path) == (0, "", "loaded")


MAIN = "from nft_ray.cli.main import main\nprint('status', main(sys.argv[1:]))"
QUICKSTART = "configs/quickstart.yaml"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "status", "line"),
    [
        (["train", QUICKSTART, "--set", "foo=1"], 1, "foo: unknown key"),
        (["train", QUICKSTART, "--set", "model.height=33"], 1, "model.height = 33: must be a multiple of 8"),
        (["train", QUICKSTART, "--set", "sampler.num_workers=4000"], 1, "CPUs"),
        (["train", QUICKSTART, "--local", "--set", "prompts.train=/none.txt"], 1, "prompts /none.txt: no such file"),
        (["train", QUICKSTART, "--set", "model.lora.start=/none"], 1, "LoRA /none: no such file or folder"),
        (["evaluate", QUICKSTART, "--output", "none", "--dataset", "/none.txt"], 1, "prompts /none.txt: no such file"),
        (["export", "none"], 1, "export none: holds no config.yaml"),
        (["encode", QUICKSTART], 1, "model.precomputed = null"),
    ],
    ids=lambda value: " ".join(value[-2:]) if isinstance(value, list) else "",
)
def test_a_run_is_checked_without_torch(arguments: list[str], status: int, line: str, tmp_path: Path) -> None:
    code, said, loaded = python(MAIN, *arguments, runs=tmp_path)
    assert (code, loaded) == (0, "loaded")
    assert f"status {status}" in said
    assert line in said
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
def test_a_whole_training_goes_by_on_the_driver_without_torch(tmp_path: Path) -> None:
    """The loop with roles that cost nothing: what happens on the driver happens here, up to the export in the end."""
    code = "from pathlib import Path\nfrom tests.test_trainer import config_for, train\n"
    code += "world, tracker = train(config_for(), Path(sys.argv[1]))\nprint(tracker.epochs)"
    status, said, loaded = python(code, str(tmp_path), runs=tmp_path)
    assert (status, said, loaded) == (0, "[1, 2, 3, 4]", "loaded")
