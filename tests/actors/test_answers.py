"""Waits have deadlines and say what they wait for."""

import asyncio
import logging
from typing import Any

import pytest
from ray.exceptions import WorkerCrashedError

from actors import answers
from actors.answers import MESSAGES, DeadlineError, one_line, put_aside, together, waiting
from nft_ray.cli.failures import NOISY


def test_a_wait_says_what_it_waits_for(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(answers, "REPORT_S", 0.01)
    with caplog.at_level(logging.INFO), pytest.raises(DeadlineError, match=r"^a place: no answer within 0\.05 s$"):
        asyncio.run(waiting(asyncio.sleep(60), "a place", 0.05, lambda: "and the cluster has 1 free"))
    assert caplog.messages[0] == "waiting for a place (0 s) and the cluster has 1 free"


def test_the_first_failure_cancels_the_rest() -> None:
    cancelled = []

    async def slow() -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    async def fast() -> None:
        raise ValueError("first")

    with pytest.raises(ValueError, match="first"):
        asyncio.run(_together(slow, fast))
    assert cancelled == [True]


async def _together(*work: Any) -> None:
    await together([item() for item in work])


def test_rays_paragraph_on_a_death_is_kept_for_the_log_file(caplog: pytest.LogCaptureFixture) -> None:
    error = WorkerCrashedError()
    assert one_line(error) == "WorkerCrashedError: its process has died"
    put_aside(error)
    put_aside(ValueError("is told in full"))
    assert [(one.name, one.getMessage()) for one in caplog.records] == [(MESSAGES, f"WorkerCrashedError: {error}")]
    assert MESSAGES in NOISY
