"""What a worker loads before it builds its core: its start is most of what a replacement costs."""

import subprocess
import sys

import pytest

HEAVY = ("torch", "diffusers", "transformers", "peft", "mlflow")


@pytest.mark.parametrize("module", ["actors.samplers", "actors.rank"])
def test_an_actors_own_module_loads_no_torch(module: str) -> None:
    code = f"import sys, {module}; print(*(name for name in {HEAVY} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
