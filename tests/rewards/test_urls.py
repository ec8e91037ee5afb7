"""Servers in turn, with a clock that the test moves: who is asked, who is put aside, and for how long."""

import random
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from types import SimpleNamespace
from typing import Any

import pytest

from nft_ray.rewards import _urls
from nft_ray.rewards._urls import Server, Servers, parse_retry_after

NO_CLIENT: Any = None


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """`clock.now` in seconds; no jitter; whoever asks is the task `clock.task`."""
    clock = SimpleNamespace(now=100.0, task="first")
    monkeypatch.setattr(time, "monotonic", lambda: clock.now)
    monkeypatch.setattr(random, "uniform", lambda low, high: (low + high) / 2)
    monkeypatch.setattr(_urls.asyncio, "current_task", lambda: clock.task)
    return clock


def two() -> tuple[Server, Server, Servers]:
    a, b = Server("rewards.mine", "http://a", NO_CLIENT), Server("rewards.mine", "http://b", NO_CLIENT)
    return a, b, Servers([a, b])


def test_servers_are_asked_in_turn_and_one_that_fails_is_left_out(clock: SimpleNamespace) -> None:
    a, b, servers = two()
    assert [servers.take() for _ in range(4)] == [a, b, a, b]
    a.failed(clock.now, "HTTP 500", backoff_s=1.0, retry_after_s=None)
    assert [servers.take() for _ in range(3)] == [b, b, b]
    b.failed(clock.now, "HTTP 503", backoff_s=1.0, retry_after_s=None)
    assert servers.take() is None
    assert servers.num_rounds_failed == 1
    assert servers.trouble == "every URL fails, http://a: HTTP 500; http://b: HTTP 503"


def test_after_its_pause_one_request_tries_and_the_others_follow_when_it_was_answered(clock: SimpleNamespace) -> None:
    a, b, servers = two()
    b.failed(clock.now, "away", backoff_s=100.0, retry_after_s=None)
    a.failed(clock.now, "away", backoff_s=1.0, retry_after_s=None)
    clock.now += 1.01
    assert [servers.take(), servers.take()] == [a, None]
    assert a.tried_by == "first"
    a.tried_by = None
    a.succeeded()
    assert [servers.take(), servers.take()] == [a, a]


def test_pauses_double_up_to_a_bound_and_start_afresh_with_a_new_call(clock: SimpleNamespace) -> None:
    a, _, servers = two()
    pauses = []
    for _ in range(7):
        a.failed(clock.now, "away", backoff_s=1.0, retry_after_s=None)
        pauses.append(a.aside_until - clock.now)
        clock.now += 100
    assert pauses == [1, 2, 4, 8, 16, 30, 30]
    servers.forgive()
    a.failed(clock.now, "away", backoff_s=1.0, retry_after_s=None)
    assert a.aside_until - clock.now == 2


def test_requests_that_were_under_way_are_one_failure(clock: SimpleNamespace) -> None:
    a, _, _ = two()
    sent_at = clock.now
    for _ in range(5):
        clock.now += 0.1
        a.failed(sent_at, "away", backoff_s=1.0, retry_after_s=None)
    assert (a.failures, a.aside_until) == (1, 101.1)
    a.failed(sent_at, "HTTP 429", backoff_s=1.0, retry_after_s=9.0)
    assert (a.failures, a.aside_until) == (1, clock.now + 9)


def test_retry_after_as_seconds_or_date_is_capped() -> None:
    now = datetime.now(UTC)
    assert parse_retry_after("2.5") == 2.5
    assert parse_retry_after("86400") == 60
    assert parse_retry_after("-3") == 0
    assert parse_retry_after(format_datetime(now + timedelta(seconds=20), usegmt=True)) == pytest.approx(20, abs=2)
    assert parse_retry_after(format_datetime(now + timedelta(days=1), usegmt=True)) == 60
    assert parse_retry_after(format_datetime(now - timedelta(days=1), usegmt=True)) == 0
    for nothing in (None, "soon", "nan", ""):
        assert parse_retry_after(nothing) is None
