"""The sliding window of restarts."""

from actors.restarts import Restarts


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
