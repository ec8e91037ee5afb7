"""`nft-ray` as tests call it: in this process, which has imported everything, or in one of its own."""

import contextlib
import io
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from unittest import mock

from nft_ray.cli.main import main

REPO = Path(__file__).parents[1]
NO_MLFLOW = "tracking.uri=file:///dev/null/x"

KILLED = """
import importlib, os, signal, sys
from nft_ray.cli.main import main

module, name, method, times = sys.argv[1:5]
owner, returned = getattr(importlib.import_module(module), name), []
original = getattr(owner, method)

def call(*args, **kwargs):
    original(*args, **kwargs)
    returned.append(1)
    if len(returned) == int(times):
        os.kill(os.getpid(), signal.SIGKILL)

setattr(owner, method, call)
main(sys.argv[5:])
"""


def sets(*settings: str) -> list[str]:
    """The options of these settings."""
    return [part for setting in settings for part in ("--set", setting)]


def environment(runs: Path, extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Of a process whose runs are in `runs` and which knows no Ray but that of `extra`."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    return kept | {"NFT_RAY_RUNS": str(runs), "OMP_NUM_THREADS": "1"} | dict(extra or {})


def nft_ray(
    *arguments: str, runs: Path, ray: Mapping[str, str] | None = None, timeout_s: float = 200
) -> subprocess.CompletedProcess[str]:
    """`nft-ray ...` in a process of its own; `ray` is the environment of the Ray that it starts or joins."""
    return subprocess.run(
        [sys.executable, "-m", "nft_ray", *arguments],
        cwd=REPO,
        env=environment(runs, ray),
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def nft_ray_here(*arguments: str, runs: Path) -> subprocess.CompletedProcess[str]:
    """The same in this process, with `--local`: what it returns and says. Lines of the log are not caught."""
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.dict(os.environ, {"NFT_RAY_RUNS": str(runs)}),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        status = main(arguments)
    return subprocess.CompletedProcess(arguments, status, out.getvalue(), err.getvalue())


def killed_after(owner: type, method: str, times: int, *arguments: str, runs: Path) -> None:
    """`nft-ray ...` in a process that is killed, as the kernel would, once this method has returned so many times."""
    killer = [sys.executable, "-c", KILLED, owner.__module__, owner.__name__, method, str(times)]
    done = subprocess.run(
        [*killer, *arguments], cwd=REPO, env=environment(runs), capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stdout + done.stderr


@contextlib.contextmanager
def ray_of_its_own() -> Iterator[dict[str, str]]:
    """The environment of a process that starts a Ray: its files in a short path, its token nobody else's."""
    folder = tempfile.mkdtemp(prefix="nr-", dir="/tmp")  # Ray's socket paths have a limit
    Path(folder, "token").write_text(secrets.token_hex(32))
    try:
        yield {"RAY_AUTH_TOKEN_PATH": f"{folder}/token", "RAY_TMPDIR": folder, "HOME": folder}
    finally:
        shutil.rmtree(folder, ignore_errors=True)
