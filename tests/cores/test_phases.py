"""Two sides of one device: never both awake, changed only when the other one's calls have returned."""

import asyncio
from typing import Any

import pytest

from nft_ray.cores.phases import alternate


class Side:
    """Samplers or learners that write down what happens, and refuse work while parked."""

    size = 1

    def __init__(self, name: str, log: list[str], awake: bool) -> None:
        self.name, self.log, self.awake = name, log, awake
        self.gate = asyncio.Event()
        self.gate.set()
        self.broken = False

    async def park(self) -> None:
        await asyncio.sleep(0)
        self.awake = False
        self.log.append(f"{self.name} park")

    async def wake(self) -> None:
        await asyncio.sleep(0)
        if self.broken:
            raise RuntimeError(f"{self.name} does not wake")
        self.awake = True
        self.log.append(f"{self.name} wake")

    async def work(self, what: Any, *_: Any) -> Any:
        assert self.awake, f"{self.name} was asked while parked"
        await self.gate.wait()
        self.log.append(f"{self.name} {what}")
        return what

    rollout = load = update = restore = images = work

    async def state(self) -> Any:
        return await self.work("state")


def pair() -> tuple[Side, Side, Any, Any, list[str]]:
    log: list[str] = []
    samplers, learners = Side("samplers", log, awake=True), Side("learners", log, awake=False)
    samplers_role, learners_role = alternate(samplers, learners)  # type: ignore[arg-type]  # they keep what they get
    return samplers, learners, samplers_role, learners_role, log


def test_an_epoch_changes_sides_twice() -> None:
    async def run() -> list[str]:
        _, _, samplers, learners, log = pair()
        await asyncio.gather(samplers.rollout("a"), samplers.rollout("b"))
        await learners.update("u")
        await samplers.load("v")
        await samplers.rollout("c")
        return log

    assert asyncio.run(run()) == [
        *["samplers a", "samplers b", "samplers park", "learners wake", "learners u"],
        *["learners park", "samplers wake", "samplers v", "samplers c"],
    ]


def test_a_change_waits_for_the_calls_under_way() -> None:
    async def run() -> list[str]:
        samplers_side, _, samplers, learners, log = pair()
        samplers_side.gate.clear()
        first, second = (asyncio.ensure_future(samplers.rollout(name)) for name in "ab")
        state = asyncio.ensure_future(learners.state())
        await asyncio.sleep(0.02)
        assert not log  # nobody has parked anybody
        first.cancel()  # a call that is given up counts no more
        samplers_side.gate.set()
        await asyncio.gather(second, state)
        return log

    assert asyncio.run(run()) == ["samplers b", "samplers park", "learners wake", "learners state"]


def test_a_side_that_does_not_wake_fails_the_call_and_the_other_comes_back() -> None:
    async def run() -> list[str]:
        _, learners_side, samplers, learners, log = pair()
        learners_side.broken = True
        with pytest.raises(RuntimeError, match="learners does not wake"):
            await learners.update("u")
        await samplers.rollout("a")
        return log

    assert asyncio.run(run())[-2:] == ["samplers wake", "samplers a"]


def test_neither_awake_either_side_can_be_woken_and_the_other_is_parked_again() -> None:
    async def run() -> list[str]:
        _, learners_side, samplers, learners, log = pair()
        for next_call, repaired in ((learners.state, True), (lambda: samplers.rollout("a"), False)):
            learners_side.broken = True
            with pytest.raises(RuntimeError, match="learners does not wake"):
                await learners.update("u")
            learners_side.broken = not repaired
            await next_call()
            await samplers.rollout("b")
        return log

    log = asyncio.run(run())
    assert log[:4] == ["samplers park", "samplers park", "learners wake", "learners state"]
    assert log[-4:] == ["learners park", "samplers wake", "samplers a", "samplers b"]


def test_pictures_need_no_device() -> None:
    async def run() -> list[str]:
        samplers_side, _, samplers, learners, log = pair()
        await learners.state()
        samplers_side.awake = True  # host memory can be read in either phase
        await samplers.images("rollout")
        return log

    assert asyncio.run(run())[-1] == "samplers rollout"
