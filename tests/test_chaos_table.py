"""The table of the chaos suite: one line per event, whatever the order in which they happened."""

from pathlib import Path

from tests.chaos.table import Table, markdown


def test_a_line_per_event_with_sums_and_the_median(tmp_path: Path) -> None:
    table = Table(tmp_path / "rows.jsonl")
    assert markdown(table.rows()).count("\n") == 2
    table.add("a sampler is killed", seconds=1.0)
    table.add("a second start")
    table.add("a sampler is killed", seconds=9.0, injected=2, redone=1)
    table.add("a sampler is killed", seconds=2.0, lost=3)
    lines = markdown(Table(table.file).rows()).splitlines()[2:]
    assert lines == ["| a sampler is killed | 4 | 2.0 | 9.0 | 1 | 3 |", "| a second start | 1 |  |  | 0 | 0 |"]
