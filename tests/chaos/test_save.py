"""`ckpt-chaos` kills a save at every file that it makes, renames or removes, and tears files in two; then it resumes.

A row per kind of kill: `before` (nothing of that file), `torn` (half of it), `unsynced` (what was not flushed is gone).
"""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.chaos.table import Table
from tests.command_line import REPO, environment

CHAOS = str(Path(sys.executable).with_name("ckpt-chaos"))
MODES = ("before", "torn", "unsynced")
BAD = "HARD_FAIL,SILENT_DIVERGENCE,CONTROL_FAIL"


def tried(work: Path, keep: int, points: int, *more: str) -> tuple[Counter[str], str]:
    """Kills by mode, and what ckpt-chaos printed; AssertionError where it found something."""
    command = [CHAOS, "run", "--work", str(work), "--max-points", str(points), "--modes", ",".join(MODES)]
    command += ["--step-regex", r"going on after epoch (\d+)", "--result-file", "{out}/result.txt", *more]
    command += ["--", sys.executable, "-m", "tests.chaos.saving", "{out}", str(keep)]
    path = {"PYTHONPATH": str(REPO)}
    done = subprocess.run(command, cwd=REPO, env=environment(work, path), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr
    found = [json.loads(file.read_text()) for file in sorted(work.glob("pt_*/result.json"))]
    return Counter(row["label"].rpartition("[")[2].rstrip("]") for row in found if row["crashed"]), done.stdout


@pytest.mark.parametrize(
    ("keep", "points"),
    [
        pytest.param(100, 18, id="some"),
        pytest.param(100, 60, id="all kept", marks=pytest.mark.full),
        pytest.param(1, 30, id="rotated", marks=pytest.mark.full),
    ],
)
def test_a_save_that_is_killed_anywhere_leaves_the_newest_whole_checkpoint(
    keep: int, points: int, tmp_path: Path, table: Table
) -> None:
    """Where all checkpoints are kept, nothing older than the newest whole one may be gone on from, either."""
    newest = ["--checkpoint-glob", "{out}/quickstart/checkpoints/epoch-??????", "--fail-on", f"{BAD},LOST_WORK"]
    kills, said = tried(tmp_path / "work", keep, points, *(newest if keep > 1 else ["--fail-on", BAD]))
    assert set(kills) == set(MODES), said
    for mode, count in kills.items():
        table.add(f"a save is killed at a file boundary ({mode})", injected=count)
