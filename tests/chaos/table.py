"""What was injected, how soon the run went on, what it lost: lines of a file while the suite runs, then a table."""

import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

HEAD = ("event", "injected", "recovered in s, median", "max", "epochs redone", "lost")


class Table:
    """Appends rows to a file; whoever reads it needs no shared process."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def add(
        self, event: str, *, seconds: float | None = None, injected: int = 1, redone: int = 0, lost: int = 0
    ) -> None:
        """`seconds`: from the injection to the next finished epoch, None where nothing has to go on."""
        row = {"event": event, "seconds": seconds, "injected": injected, "redone": redone, "lost": lost}
        with self.file.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def rows(self) -> list[dict[str, Any]]:
        if not self.file.exists():
            return []
        return [json.loads(line) for line in self.file.read_text().splitlines()]


def markdown(rows: Iterable[dict[str, Any]]) -> str:
    """One line per event, in the order in which they first happened."""
    events: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        events.setdefault(row["event"], []).append(row)
    lines = ["| " + " | ".join(HEAD) + " |", "|---" * len(HEAD) + "|"]
    for event, found in events.items():
        seconds = [row["seconds"] for row in found if row["seconds"] is not None]
        times = (f"{statistics.median(seconds):.1f}", f"{max(seconds):.1f}") if seconds else ("", "")
        sums = (str(sum(row[key] for row in found)) for key in ("redone", "lost"))
        lines.append("| " + " | ".join((event, str(sum(row["injected"] for row in found)), *times, *sums)) + " |")
    return "\n".join(lines) + "\n"
