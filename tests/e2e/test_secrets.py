"""A planted secret is in no file, log, address of MLflow, process list or line of a run."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.command_line import REPO, environment, nft_ray, ray_of_its_own, sets
from tests.conftest import free_port
from tests.examples import QUICKSTART, SMALL, few_lines

pytestmark = pytest.mark.slow
PLANTED = {
    "HF_TOKEN": "hf_plantedHubToken7Q",
    "UNIFIED_REWARD_API_KEY": "plantedServerKey8W",
    "PLANTED_URI": "http://me:plantedPassword9E@127.0.0.1:1",
    "PLANTED_TOKEN": "plantedBearer2R",
    "PLANTED_VALUE": "plantedVariable3T",
}
SECRETS = [value.partition("me:")[2].partition("@")[0] or value for value in PLANTED.values()]
SETTINGS = (
    "run.name=planted",
    "tracking.uri=${oc.env:PLANTED_URI}",
    "scorers.http.token=${oc.env:PLANTED_TOKEN}",
    "rewards.geneval.runtime_env.env_vars.PLANTED=${oc.env:PLANTED_VALUE}",
)


def test_a_secret_is_found_nowhere_of_a_local_run(tmp_path: Path) -> None:
    arguments = [*sets(*SMALL, few_lines(tmp_path, 60), *SETTINGS), "--local"]
    done = nft_ray("train", str(QUICKSTART), *arguments, runs=tmp_path, ray=PLANTED)
    assert done.returncode == 0, done.stderr
    assert "http://**********@127.0.0.1:1" in done.stdout
    assert found(done.stdout + done.stderr, tmp_path) == []
    again = nft_ray("train", str(tmp_path / "planted" / "config.yaml"), "--local", runs=tmp_path)
    assert again.returncode == 1
    assert again.stderr.endswith("a secret is masked in the files of a run; write it again, as ${oc.env:NAME}\n")


@pytest.fixture(scope="module")
def ray_home() -> Iterator[dict[str, str]]:
    with ray_of_its_own() as extra:
        yield extra


def test_a_secret_is_found_nowhere_of_a_run_on_ray(tmp_path: Path, ray_home: dict[str, str]) -> None:
    settings = sets(*SMALL, few_lines(tmp_path, 60), *SETTINGS, f"scorers.http.port={free_port()}")
    process = subprocess.Popen(
        [sys.executable, "-m", "nft_ray", "train", str(QUICKSTART), *settings],
        cwd=REPO, env=environment(tmp_path, ray_home | PLANTED),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    lists = ""
    while process.poll() is None:
        lists += "".join(command_lines())
        time.sleep(0.5)
    assert process.stdout is not None
    output = process.stdout.read()
    assert process.returncode == 0, output
    assert "default_worker.py" in lists
    sessions = Path(ray_home["RAY_TMPDIR"])
    assert list(sessions.rglob("raylet.out"))
    assert found(output + lists, tmp_path, sessions) == []


def command_lines() -> Iterator[str]:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            yield path.read_bytes().replace(b"\0", b" ").decode(errors="replace") + "\n"
        except OSError:
            continue


def found(text: str, *folders: Path) -> list[str]:
    """Where a secret is: "SECRET in FILE"."""
    hits = [f"{secret} in the output" for secret in SECRETS if secret in text]
    for folder in folders:
        for path in folder.rglob("*"):
            if path.is_file() and not path.is_symlink() and os.access(path, os.R_OK):
                content = path.read_bytes()
                hits += [f"{secret} in {path}" for secret in SECRETS if secret.encode() in content]
    return hits
