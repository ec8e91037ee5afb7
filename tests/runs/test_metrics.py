"""metrics.jsonl and steps.jsonl: whole lines, whatever a kill, a bad disk or a full one did."""

import json
import logging
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from nft_ray.runs.metrics import METRICS, STEPS, Metrics, read_metrics


def written(folder: Path, epochs: int) -> Metrics:
    """Two steps an epoch."""
    metrics = Metrics(folder)
    for epoch in range(1, epochs + 1):
        metrics.add(
            epoch, {"a": epoch / 2}, [{"nft/optimizer_step": 2.0 * epoch - 1}, {"nft/optimizer_step": 2.0 * epoch}]
        )
    return metrics


def numbers(folder: Path) -> tuple[list[int], list[int]]:
    """(epochs, optimizer steps) on disk."""
    steps = [json.loads(line) for line in (folder / STEPS).read_text().splitlines()]
    return [line["epoch"] for line in read_metrics(folder)], [int(line["nft/optimizer_step"]) for line in steps]


def test_looking_writes_nothing(tmp_path: Path) -> None:
    assert Metrics(tmp_path).lines == []
    assert Metrics(tmp_path).steps_from(0) == ([], 0)
    assert list(tmp_path.iterdir()) == []


def test_epochs_and_steps_are_there_again(tmp_path: Path) -> None:
    written(tmp_path, 3)
    again = Metrics(tmp_path)
    assert [line["a"] for line in again.lines] == [0.5, 1.0, 1.5]
    assert numbers(tmp_path) == ([1, 2, 3], [1, 2, 3, 4, 5, 6])
    again.rewind(1)
    assert numbers(tmp_path) == ([1], [1, 2])
    assert again.num_rewinds == 1


@pytest.mark.parametrize("name", [METRICS, STEPS])
def test_what_a_kill_cut_off_is_gone_after_the_next_start(tmp_path: Path, name: str) -> None:
    written(tmp_path, 2)
    with (tmp_path / name).open("a") as file:
        file.write('{"epoch": 3, "rew')
    again = Metrics(tmp_path)
    again.rewind(2)
    again.add(3, {"a": 1.0}, [{"nft/optimizer_step": 5.0}])
    assert numbers(tmp_path) == ([1, 2, 3], [1, 2, 3, 4, 5])


def test_a_damaged_line_is_left_out_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    written(tmp_path, 3)
    first, _, third = (tmp_path / METRICS).read_bytes().splitlines(keepends=True)
    for damage in (b"\0" * 40 + b"\n", b'{"epoch": 2, "ti\xff\n', b"[]\n", b'{"a": 1.0}\n'):
        (tmp_path / METRICS).write_bytes(first + damage + third)
        with caplog.at_level(logging.WARNING):
            assert [line["epoch"] for line in read_metrics(tmp_path)] == [1, 3]
        assert caplog.messages == [f"{tmp_path / METRICS}: line 2 is damaged, and left out"]
        caplog.clear()


def test_steps_are_read_on_from_where_one_was(tmp_path: Path) -> None:
    metrics = written(tmp_path, 1)
    first, place = metrics.steps_from(0)
    with (tmp_path / STEPS).open("a") as file:
        file.write('{"epoch": 2')  # a line that is being written
    assert len(first) == 2
    assert metrics.steps_from(place) == ([], place)
    metrics.rewind(1)
    metrics.add(2, {}, [{"nft/optimizer_step": 3.0}])
    more, end = metrics.steps_from(place)
    assert [line["nft/optimizer_step"] for line in more] == [3.0]
    assert end == (tmp_path / STEPS).stat().st_size


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """64 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting needs root")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.skipif(shutil.which("mount") is None, reason="no mount here")
def test_a_full_disk_is_one_line_and_leaves_whole_lines(small_disk: Path) -> None:
    metrics = Metrics(small_disk)

    def fill() -> None:
        for epoch in range(1, 10000):
            metrics.add(epoch, {"a": 1.0})

    with pytest.raises(OSError, match="could not be written: No space left on device"):
        fill()
    text = (small_disk / METRICS).read_text()
    assert text.endswith("}\n")
    assert len(read_metrics(small_disk)) == len(metrics.lines) == text.count("\n") > 100
