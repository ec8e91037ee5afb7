"""Kill the driver of a run with -9 every minute or two, and repeat the same command until it ends with exit status 0.

    python -m tests.chaos.kill_loop                        the quickstart, each start with a Ray of its own
    python -m tests.chaos.kill_loop --joined               on one cluster that stays
    python -m tests.chaos.kill_loop --every 20 40 --set run.num_epochs=10

Then the same experiment once more, left in peace, and the LoRA of both must be the same to the bit. What a killed
driver leaves of a Ray that it started is watched, too: nothing may pile up.
"""

import argparse
import hashlib
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from safetensors.numpy import load_file

from tests.chaos.cluster import Cluster, until
from tests.chaos.running import LORA
from tests.command_line import REPO, environment, ray_of_its_own, sets
from tests.examples import QUICKSTART

GRACE_S = 60.0


def say(line: str) -> None:
    sys.stdout.write(f"{time.strftime('%H:%M:%S')} {line}\n")
    sys.stdout.flush()


def processes(home: str) -> list[psutil.Process]:
    """Of the Ray whose home that is."""
    found = []
    for one in psutil.process_iter():
        try:
            if one.environ().get("HOME") == home and one.status() != psutil.STATUS_ZOMBIE:
                found.append(one)
        except psutil.Error:
            continue
    return found


def start(folder: Path, ray: dict[str, str], settings: list[str]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "nft_ray", "train", str(QUICKSTART), *sets(*settings)]
    with (folder / "log.txt").open("ab") as log:
        return subprocess.Popen(
            command,
            cwd=REPO,
            env=environment(folder, ray),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def fingerprint(folder: Path) -> str:
    weights, digest = load_file(folder / "quickstart" / LORA), hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode() + weights[name].tobytes())
    return digest.hexdigest()


def epochs(folder: Path) -> int:
    file = folder / "quickstart" / "metrics.jsonl"
    lines = (
        [line for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")] if file.exists() else []
    )
    return max((json.loads(line)["epoch"] for line in lines), default=-1)


def unattended(
    folder: Path,
    ray: dict[str, str],
    settings: list[str],
    every: tuple[float, float],
    chosen: random.Random,
    alone: bool,
) -> list[tuple[float, int]]:
    """(seconds that it lived, epoch that it had reached) of every start that was killed."""
    killed: list[tuple[float, int]] = []
    while True:
        process, started, wait_s = start(folder, ray, settings), time.monotonic(), chosen.uniform(*every)
        try:
            status = process.wait(wait_s)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            killed.append((time.monotonic() - started, epochs(folder)))
            say(f"killed after {killed[-1][0]:.0f} s at epoch {killed[-1][1]}")
            if alone:
                until("what the killed driver started ends by itself", lambda: not processes(ray["HOME"]), GRACE_S)
            continue
        last = (folder / "log.txt").read_text(errors="replace").splitlines()[-1]
        if status == 0:
            return killed
        assert status == 75, f"exit status {status}: {last}"
        say(f"exit status 75, to be tried again: {last}")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--every", type=float, nargs=2, default=(60.0, 120.0), metavar="S", help="seconds, from to")
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--joined", action="store_true", help="on a cluster that outlives the driver")
    arguments.add_argument("--set", action="append", default=[], metavar="a.b=c")
    args = arguments.parse_args()
    chosen, folder = random.Random(args.seed), Path(tempfile.mkdtemp(prefix="kill-loop-"))
    cluster = Cluster(cpus=4) if args.joined else None
    with ray_of_its_own() as own:
        ray = cluster.environment if cluster else own
        try:
            started = time.monotonic()
            (folder / "killed").mkdir()
            (folder / "calm").mkdir()
            killed = unattended(folder / "killed", ray, args.set, tuple(args.every), chosen, cluster is None)
            say(f"finished after {len(killed)} kills in {time.monotonic() - started:.0f} s; now left in peace")
            process = start(folder / "calm", ray, args.set)
            assert process.wait() == 0, (folder / "calm" / "log.txt").read_text(errors="replace")[-3000:]
            if cluster is None:
                until("nothing is left", lambda: not processes(own["HOME"]), GRACE_S)
            else:
                cluster.nothing_left()
        finally:
            if cluster:
                cluster.end()
    mine, calm = fingerprint(folder / "killed"), fingerprint(folder / "calm")
    say(f"LoRA {mine}; undisturbed {calm}: {'the same' if mine == calm else 'DIFFERENT'}")
    lines = (folder / "killed" / "quickstart" / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line)["epoch"] for line in lines]
    assert found == list(range(len(found))), f"epochs {found}"
    assert mine == calm
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
