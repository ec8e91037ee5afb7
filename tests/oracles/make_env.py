"""Environments of their own for what cannot share the main one: open_clip's torchvision, published code as an oracle.

    python tests/oracles/make_env.py openclip hpsv2x      makes .envs/openclip and .envs/hpsv2x, once

An environment NAME is tests/oracles/NAME/requirements.txt on top of the environment of the Python that runs this:
exact versions, installed without their dependencies, so that torch is never installed a second time. Its own packages
come first.
"""

import hashlib
import logging
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
REPO = HERE.parents[1]
ENVIRONMENTS = REPO / ".envs"


def python_of(name: str) -> Path:
    """The Python of an environment; skips the test that asks where it is not there as its list says."""
    if not _is_complete(name):
        pytest.skip(f"no environment {name}: run `{sys.executable} tests/oracles/make_env.py {name}`")
    return ENVIRONMENTS / name / "bin" / "python"


def run_tests(name: str, file: str, *arguments: str) -> str:
    """Run a test file by an environment's Python; what pytest said. Fails the calling test where one of them fails."""
    command = [str(python_of(name)), "-m", "pytest", "-p", "no:cacheprovider", "-rs", file, *arguments]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def make(name: str) -> None:
    """Make the environment NAME anew, unless it is there and complete. RuntimeError where pip fails."""
    folder = ENVIRONMENTS / name
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    main_environment = f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n"
    link = site / "main_environment.pth"
    if _is_complete(name) and link.read_text() == main_environment:
        return
    logging.info("making %s", folder)
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder)
    link.write_text(main_environment)
    shutil.copy(HERE / "torchvision_on_cpu.py", site)
    (site / "torchvision_on_cpu.pth").write_text("import torchvision_on_cpu\n")
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "install", "--quiet", "--no-deps"]
    command = [*pip, "--requirement", str(_requirements(name))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    (folder / ".complete").write_text(_fingerprint(name))


def _requirements(name: str) -> Path:
    path = HERE / name / "requirements.txt"
    if not path.is_file():
        known = ", ".join(sorted(found.parent.name for found in HERE.glob("*/requirements.txt")))
        raise ValueError(f"no environment {name!r}: {path} is missing; known: {known}")
    return path


def _fingerprint(name: str) -> str:
    """What an environment is made of: it is made anew when this has changed."""
    parts = (_requirements(name), HERE / "torchvision_on_cpu.py", Path(__file__))
    return hashlib.sha256(b"\n".join(part.read_bytes() for part in parts)).hexdigest()


def _is_complete(name: str) -> bool:
    stamp = ENVIRONMENTS / name / ".complete"
    return stamp.is_file() and stamp.read_text() == _fingerprint(name)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for environment in sys.argv[1:]:
        make(environment)
