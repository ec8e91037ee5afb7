"""What rewards that only monitor say comes late, or with its epoch: it stands in the epoch that it is of."""

from pathlib import Path

from tests.test_trainer import config_for, train


def test_what_monitors_say_late_is_added_to_its_own_epoch(tmp_path: Path) -> None:
    """Nobody waits for it, and the last of it is asked for when the last epoch is over."""
    _, diary = train(config_for(), tmp_path)
    assert diary.late == [(epoch + 1, {"reward/ocr": float(epoch)}) for epoch in range(3)] + [(4, {"reward/ocr": -1.0})]
    assert all("reward/ocr" not in metrics for metrics in diary.metrics)
