"""The sliding window of restarts, and what learners say and change at one."""

from typing import Any

import pytest
import torch

from actors.learners import LearnerGroup
from actors.ranks import GroupError
from actors.restarts import Restarts
from tests.fakes import fake_config


def test_a_restart_is_forgotten_after_the_window() -> None:
    now = [0.0]
    restarts = Restarts(2, 10.0, lambda: now[0])
    assert restarts.take()
    now[0] = 6.0
    assert restarts.take()
    assert not restarts.take()
    assert restarts.count == 2
    now[0] = 10.0  # the first one is forgotten, the refused one was never counted
    assert restarts.count == 1
    assert restarts.take()
    assert not restarts.take()


def test_none_at_all() -> None:
    assert not Restarts(0, 10.0).take()


@pytest.mark.parametrize(
    ("learner", "start", "line"),
    [
        (
            {},
            8,
            "; all learners start again, after epoch 0 (restart 2 of 3); lower learner.micro_batch_size, which is 8",
        ),
        (
            {"shrink_on_oom": True},
            4,
            "; all learners start again with learner.micro_batch_size = 4 (set it so; the last bits of an update "
            "change), after epoch 0 (restart 2 of 3)",
        ),
        (
            {"micro_batch_size": 1, "shrink_on_oom": True},
            1,
            "; all learners start again, after epoch 0 (restart 2 of 3); set learner.gradient_checkpointing to true",
        ),
    ],
)
def test_the_micro_batch_is_halved_only_where_that_was_asked_for(
    learner: dict[str, Any], start: int, line: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It changes the last bits. Once is an accident, of which nothing more is said."""
    group = LearnerGroup(fake_config(learner={"micro_batch_size": 8, **learner}), bundles=None)  # type: ignore[arg-type]
    failure = GroupError("learner 0 failed")
    failure.__cause__ = torch.OutOfMemoryError("CUDA out of memory")
    group._count(failure)
    group._count(failure)
    first, second = [record.getMessage() for record in caplog.records]
    assert first == "learner 0 failed; all learners start again, after epoch 0 (restart 1 of 3)"
    assert second == f"learner 0 failed{line}"
    assert group._config.learner.micro_batch_size == start
