"""A monitor that is down is asked by one call in a while, and told once. The clock is a fake."""

import pytest

from nft_ray.rewards.outage import PAUSE_S, Outage


def test_down_and_up_again(caplog: pytest.LogCaptureFixture) -> None:
    now = 0.0
    outage = Outage("ocr", lambda: now)
    assert outage.ask()
    outage.failed("ConnectionError: away")
    outage.failed("ConnectionError: away")  # another call was under way
    assert not outage.ask()
    now += PAUSE_S
    assert [outage.ask(), outage.ask()] == [True, False]  # one call tries for all
    outage.failed("ConnectionError: away")
    assert not outage.ask()
    now += PAUSE_S
    assert outage.ask()
    outage.answered()
    assert outage.ask()
    assert [record.getMessage() for record in caplog.records] == [
        "reward ocr is down: ConnectionError: away; it only monitors, so training goes on without it, and it is asked "
        "again every 30 s",
        "reward ocr answers again after 60 s; 6 calls miss it",
    ]
