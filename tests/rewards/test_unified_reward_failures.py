"""Servers that misbehave in every way we could think of: which scores are missing, and who is asked again."""

import math
import time

import numpy as np
import pytest

from nft_ray.rewards.base import load_reward
from tests.conftest import free_port
from tests.rewards.misbehaving_server import GARBAGE, MisbehavingServer
from tests.rewards.unified_asking import QUICK, ask, expected, greys


def test_urls_are_asked_in_turn() -> None:
    images = greys(*range(0, 200, 20))
    with MisbehavingServer() as one, MisbehavingServer() as two:
        assert ask([one.url, two.url], images).values.tolist() == expected(images)
        assert (len(one.bodies), len(two.bodies)) == (5, 5)


@pytest.mark.parametrize("deed", ["500", "503", "408", "409", "429", "half", *GARBAGE])
def test_a_failure_that_passes_costs_no_image(deed: str) -> None:
    images = greys(0, 100, 200)
    with MisbehavingServer(deed, deed, "ok") as server:
        scores = ask([server.url], images)
        assert scores.values.tolist() == expected(images)
        assert scores.details["answered"].tolist() == [1, 1, 1]
        assert len(server.bodies) == 5


@pytest.mark.parametrize("deed", ["hang", "drip"])
def test_an_answer_that_does_not_come_costs_no_image(deed: str) -> None:
    images = greys(0, 100, 200)
    with MisbehavingServer(deed, deed, "ok") as server:
        scores = ask([server.url], images, timeout_s=0.5, max_attempts=50)  # an honest one that is late is asked again
        assert scores.values.tolist() == expected(images)
        assert scores.details["answered"].tolist() == [1, 1, 1]
        assert len(server.bodies) >= 5


def test_pauses_grow_and_one_request_finds_out_whether_the_url_works_again() -> None:
    with MisbehavingServer("500", "500", "500", "500", "ok") as server:
        scores = ask([server.url], greys(0, 100, 200, 250), max_concurrency=1)
        assert np.isfinite(scores.values).all()
        pauses = np.diff(server.times)[:4]
        for pause, least in zip(pauses, (0.0375, 0.075, 0.15, 0.3), strict=True):  # how long at most: test_urls.py
            assert pause >= least

    with MisbehavingServer("500", "500", "500", "500", "500", "500", "ok", delay_s=0.05, at_once=4) as server:
        images = greys(*range(0, 240, 30))
        assert ask([server.url], images, max_concurrency=4).values.tolist() == expected(images)
        # The first four at once, then the fifth and the sixth failure alone, then one success, then all.
        assert len(server.bodies) == 6 + 8


def test_retry_after_is_obeyed() -> None:
    with MisbehavingServer("429 after 0.6", "ok") as server:
        assert np.isfinite(ask([server.url], greys(7)).values).all()
        assert server.times[1] - server.times[0] >= 0.6


def test_a_server_that_always_fails_costs_all_scores_but_no_exception(caplog: pytest.LogCaptureFixture) -> None:
    with MisbehavingServer("500") as server:
        scores = ask([server.url], greys(0, 100, 200), max_attempts=3)
    assert np.isnan(scores.values).all()
    assert scores.details["answered"].tolist() == [0, 0, 0]
    assert len(server.bodies) <= 3 * 3
    last = caplog.records[-1].getMessage()
    assert "3 of 3 images have no score" in last
    assert f"{server.url}: HTTP 500" in last


def test_one_image_that_breaks_the_server_does_not_cost_the_others() -> None:
    images = greys(*range(0, 100, 10))
    prompts = ["a cat"] * 10
    prompts[4] = "poison"
    with MisbehavingServer(rules={"poison": "500"}, at_once=10) as server:
        scores = ask([server.url], images, prompts, max_attempts=3)
    assert math.isnan(scores.values[4])
    assert np.delete(scores.values, 4).tolist() == expected(np.delete(images, 4, axis=0))


@pytest.mark.parametrize("status", ["400", "413", "422"])
def test_an_image_that_the_server_refuses_is_missing_and_not_sent_again(status: str) -> None:
    with MisbehavingServer(rules={"poison": status}) as server:
        scores = ask([server.url], greys(10, 20), ["poison", "a cat"])
        assert np.isnan(scores.values).tolist() == [True, False]
        assert scores.details["answered"].tolist() == [0, 1]
        assert len(server.bodies) == 2


def test_a_text_without_a_score_is_asked_for_once_more_and_is_then_missing() -> None:
    with MisbehavingServer(rules={"poison": "unscored"}) as server:
        scores = ask([server.url], greys(10, 20), ["poison", "a cat"])
        assert np.isnan(scores.values).tolist() == [True, False]
        assert scores.details["answered"].tolist() == [1, 1]
        assert len(server.bodies) == 3
    with MisbehavingServer("unscored", "ok") as server:
        assert np.isfinite(ask([server.url], greys(10)).values).all()


def test_a_url_that_dies_in_the_middle_costs_no_image_and_is_left_alone() -> None:
    images = greys(*range(0, 240, 6))
    with MisbehavingServer(delay_s=0.02) as living, MisbehavingServer(*["ok"] * 5, "die", delay_s=0.02) as dying:
        scores = ask([dying.url, living.url], images, max_concurrency=4)
    assert scores.values.tolist() == expected(images)
    assert 6 <= len(dying.bodies) < 20  # its half, were it not left alone
    assert 40 - 5 <= len(living.bodies) <= 40 - 5 + 3  # three others may have been under way when it died


def test_a_url_that_comes_back_is_asked_again() -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}/v1"
    with MisbehavingServer(delay_s=0.05) as living:
        reward = load_reward("unified_reward", {"urls": [url, living.url], "max_concurrency": 4, **QUICK})
        assert np.isfinite(reward.score(greys(1, 2, 3, 4), ["p"] * 4, [{}] * 4).values).all()
        assert len(living.bodies) == 4
        with MisbehavingServer(port=port) as returned:
            deadline = time.monotonic() + 30
            while not returned.bodies:  # its pause is over soon
                assert time.monotonic() < deadline
                assert np.isfinite(reward.score(greys(1, 2, 3, 4), ["p"] * 4, [{}] * 4).values).all()


def test_a_url_that_hangs_holds_one_request_at_a_time() -> None:
    images = greys(*range(0, 240, 6))
    with MisbehavingServer() as living, MisbehavingServer("hang") as hanging:
        scores = ask([hanging.url, living.url], images, max_concurrency=4, timeout_s=0.8, max_attempts=50)
    assert scores.values.tolist() == expected(images)
    assert 1 <= len(hanging.bodies) < 20  # all four until the first time-out, then single ones; in turn it were 20


def test_a_call_ends_at_its_deadline_with_what_it_has() -> None:
    begun = time.monotonic()
    with MisbehavingServer(rules={"slow": "drip"}) as server:
        scores = ask([server.url], greys(10, 20, 30), ["a", "slow", "b"], timeout_s=2.9, deadline_s=3.0)
    assert time.monotonic() - begun < 15
    assert np.isnan(scores.values).tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("status", "reason"),
    [("401", "refuses the key"), ("403", "refuses the key"), ("404", "no model 'UnifiedReward-7b")],
)
def test_what_waiting_does_not_mend_is_a_value_error_at_once(status: str, reason: str) -> None:
    with MisbehavingServer(status, delay_s=0.02) as server:
        with pytest.raises(ValueError, match=reason) as caught:
            ask([server.url], greys(1, 2, 3))
        assert server.url in str(caught.value)
        assert "\n" not in str(caught.value)
        assert len(server.bodies) <= 3
