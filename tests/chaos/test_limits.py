"""Too little room: a full disk under the run folder, a small object store. Small tmpfs mounts; needs root."""

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.chaos.cluster import Cluster, cluster
from tests.chaos.conftest import Calm, Scenarios


@contextmanager
def small_disk(folder: Path, mib: int) -> Iterator[Path]:
    """A file system of `mib` MiB."""
    folder.mkdir()
    if os.geteuid() != 0:
        pytest.skip("needs root: a small tmpfs is mounted")
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={mib}m", "chaos", str(folder)], capture_output=True, check=False
    )
    if made.returncode:
        pytest.skip(f"tmpfs cannot be mounted here: {made.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.full
def test_the_disk_of_the_run_is_full_and_then_has_room_again(
    ray_cluster: Cluster, scenarios: Scenarios, calm: Calm
) -> None:
    """The run ends with one line; the newest whole checkpoint is there, and the same command goes on from it."""
    epochs = 20
    reference = calm.run(epochs)
    with small_disk(scenarios.folder / "small", 24) as disk:
        run = scenarios.run("full", ray_cluster, f"run.num_epochs={epochs}", f"run.root={disk}")
        run.runs = disk
        run.path = disk / "full"
        for number in range(5):
            run.start()
            run.reach(run.saved + 2)
            filler = disk / "filler"
            with filler.open("wb", buffering=0) as file:  # no fallocate: until not one page is left
                while True:
                    try:
                        file.write(b"x" * 4096)
                    except OSError:
                        break
            status = run.end(90)
            assert status == 1, run.said[-3000:]
            assert "disk is full" in run.last_line, run.said[-3000:]
            assert "Traceback" not in run.said
            filler.unlink()
            before, started = run.saved, time.monotonic()
            assert before >= 1
            run.start()
            line = run.until("it goes on", lambda: run.line("going on after epoch"))
            assert line.endswith(f"epoch {before}")
            run.reach(before + 1)
            run.table.add("the disk of the run is full", seconds=time.monotonic() - started)
            if number < 4:
                run.kill()
        run.same_as(reference, epochs)
    ray_cluster.nothing_left()


@pytest.mark.full
@pytest.mark.parametrize("mib", [80])
def test_an_object_store_that_is_too_small_is_said_at_the_start_or_spills(
    mib: int, scenarios: Scenarios, calm: Calm
) -> None:
    """An epoch that does not fit goes through the disk, slower; the update is the same."""
    epochs = 6
    reference = calm.run(epochs)
    with cluster(store_bytes=mib * 2**20) as ray:
        run = scenarios.run("spill", ray, f"run.num_epochs={epochs}").start()
        run.same_as(reference, epochs)
        run.table.add(f"an object store of {mib} MiB", injected=epochs)
        ray.nothing_left()
