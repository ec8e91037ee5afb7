"""The pool of samplers on a real Ray: what a card, a stopped process and a lost object do to it. Cores are fakes."""

import asyncio
import logging
import os
import re
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray
import torch
from ray.exceptions import ActorDiedError, OutOfDiskError, OwnerDiedError

from actors import seats
from actors.samplers import SamplerFactory, SamplerPool, check_card, room, shrunk
from nft_ray.config import ExperimentConfig
from nft_ray.failures import device_failure
from nft_ray.roles import ObjectsLostError
from nft_ray.types import Rollout, RolloutRequest
from tests.actors.stand_ins import until, world_without_ray
from tests.fakes import FakeLearnerCore, FakeSamplerCore, consume, fake_config, fake_request

on_ray = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("local_ray")]


class CardSamplerCore(FakeSamplerCore):
    """A card with room for `fits` images, which breaks once per file `xid*` of the folder."""

    def __init__(self, folder: Path, fits: int, config: ExperimentConfig, worker: str) -> None:
        super().__init__(config, f"{worker} with {config.sampler.micro_batch_size}")
        self.folder, self.fits = folder, fits
        if consume(folder / "xid-at-build"):
            raise torch.AcceleratorError("CUDA error: unknown error")
        (folder / f"pid-{os.getpid()}").touch()

    def rollout(self, request: RolloutRequest) -> Any:
        if consume(self.folder / "xid"):
            raise torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered")
        if self.config.sampler.micro_batch_size > self.fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return super().rollout(request)


class SlowSamplerCore(FakeSamplerCore):
    """Its clean samples take until there is a file `on`."""

    def __init__(self, folder: Path, config: ExperimentConfig, worker: str) -> None:
        super().__init__(config, worker)
        self.folder = folder

    def clean(self) -> Any:
        (self.folder / f"cleans-{os.getpid()}").touch()
        while not (self.folder / "on").exists():
            time.sleep(0.01)
        return super().clean()


@asynccontextmanager
async def serving(
    config: ExperimentConfig, folder: Path, fits: int = 10**6, core: SamplerFactory | None = None
) -> AsyncIterator[SamplerPool]:
    """A pool that has loaded version 0."""
    pool = SamplerPool(config, core or partial(CardSamplerCore, folder, fits))
    try:
        await pool.start()
        ((adapters, weights),) = FakeLearnerCore(config).adapters()
        await pool.load(
            adapters.__class__(**{name: getattr(adapters, name) for name in adapters.__slots__} | {"weights": weights})
        )
        yield pool
    finally:
        pool.close()


async def check(pool: SamplerPool, count: int) -> list[Rollout]:
    """Rollouts that are what they would have been on any worker."""
    requests = [fake_request(0, prompt) for prompt in range(count)]
    drawn = await asyncio.gather(*map(pool.rollout, requests))
    for request, rollout in zip(requests, drawn, strict=True):
        images = await pool.images(rollout)
        assert images[:, 0, 0, 0].tolist() == [seed % 251 for item in request.items for seed in item.seeds]
    return drawn


async def all_serve(pool: SamplerPool, count: int = 2) -> None:
    async with asyncio.timeout(30):
        while pool.size < count:
            await asyncio.sleep(0.05)


def config(**sampler: Any) -> ExperimentConfig:
    """Images of 147 kB: small results are kept by the driver, and never lost."""
    model = {"height": 128, "width": 128}
    return fake_config(run={"name": "cards"}, model=model, sampler={"micro_batch_size": 24, **sampler})


class TestOnRay:
    pytestmark = on_ray

    def test_images_are_there_before_the_samples(self, tmp_path: Path) -> None:
        async def main() -> None:
            async with serving(config(), tmp_path, core=partial(SlowSamplerCore, tmp_path)) as pool:
                images: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
                request = fake_request(0, 3)
                rollout = asyncio.create_task(pool.rollout(request, images.set_result))
                early = await (await images)
                assert not rollout.done()
                (tmp_path / "on").touch()
                np.testing.assert_array_equal(early, await pool.images(await rollout))
                assert early[:, 0, 0, 0].tolist() == list(request.items[0].seeds)

        asyncio.run(main())

    def test_a_worker_killed_between_images_and_samples_is_replaced_and_both_are_the_replacements(
        self, tmp_path: Path
    ) -> None:
        async def main() -> None:
            async with serving(config(num_workers=1), tmp_path, core=partial(SlowSamplerCore, tmp_path)) as pool:
                seen: list[Any] = []
                request = fake_request(0, 3)
                rolling = asyncio.create_task(pool.rollout(request, seen.append))
                await until(lambda: bool(list(tmp_path.glob("cleans-*"))))
                (at_work,) = tmp_path.glob("cleans-*")
                os.kill(int(at_work.name.removeprefix("cleans-")), signal.SIGKILL)
                (tmp_path / "on").touch()
                rollout = await rolling
                assert rollout.images is seen[-1]
                images = await pool.images(rollout)
                assert images[:, 0, 0, 0].tolist() == list(request.items[0].seeds)
                assert (await rollout.samples).x0[:, 0, 0, 0].tolist() == list(request.items[0].seeds)

        asyncio.run(main())

    def test_a_card_that_is_too_small_gets_smaller_pieces(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """24 images do not fit, 12 do not, 6 do: more failures than `max_attempts`, and every rollout is right."""

        async def main() -> None:
            async with serving(config(max_attempts=1), tmp_path, fits=6) as pool:
                await check(pool, 8)
                await all_serve(pool)
                drawn = await check(pool, 8)
                assert {rollout.info.worker.partition(" with ")[2] for rollout in drawn} <= {"6", "12"}

        with caplog.at_level(logging.INFO):
            asyncio.run(main())
        told = [line for line in caplog.messages if line.startswith("out of GPU memory")]
        assert told == [
            "out of GPU memory: samplers that start from now on work with sampler.micro_batch_size = 12; set that (was "
            "sampler.micro_batch_size = 24)",
            "out of GPU memory: samplers that start from now on work with sampler.micro_batch_size = 6; set that (was "
            "sampler.micro_batch_size = 12)",
        ]

    def test_a_card_that_is_too_small_for_one_image_ends_the_run_with_the_field_to_lower(self, tmp_path: Path) -> None:
        async def main() -> None:
            small = config(num_workers=1, micro_batch_size=1, decode_batch_size=1, max_attempts=2)
            async with serving(small, tmp_path, fits=0) as pool:
                await check(pool, 1)

        line = (
            r"cards/sampler: rollout of epoch 1, prompt 0 failed on 2 workers; last: OutOfMemoryError: CUDA out of "
            r"memory\. Tried .*; lower sampler\.micro_batch_size = 1, sampler\.decode_batch_size = 1"
        )
        with pytest.raises(RuntimeError, match=f"^{line}$"):
            asyncio.run(main())

    def test_a_broken_card_and_a_replacement_on_a_broken_card_lose_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr(seats, "PAUSE_S", 0.1)

        async def main() -> None:
            async with serving(config(), tmp_path) as pool:
                (tmp_path / "xid").touch()
                (tmp_path / "xid-at-build").touch()
                await check(pool, 8)
                await all_serve(pool)
                await check(pool, 8)

        with caplog.at_level(logging.INFO):
            asyncio.run(main())
        lines = "\n".join(caplog.messages)
        assert re.search(
            r"cards/sampler-\d failed and is replaced; 1 of 2 samplers serve: AcceleratorError: .*ECC", lines
        )
        assert re.search(r"cards/sampler-\d did not come up: AcceleratorError: CUDA error: unknown error", lines)
        assert re.search(r"cards/sampler-\d\.2 serves; 2 of 2 samplers serve", lines)

    def test_a_stopped_worker_is_replaced_and_ended(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        async def main() -> None:
            async with serving(config(), tmp_path) as pool:
                monkeypatch.setattr(pool._pool, "_timeout_s", 1.0)
                pid = int(min(tmp_path.glob("pid-*")).name.partition("-")[2])
                os.kill(pid, signal.SIGSTOP)
                started = time.monotonic()
                await check(pool, 8)
                assert 1.0 <= time.monotonic() - started < 5.0  # one deadline, not one per queued request
                await all_serve(pool)
                await check(pool, 8)
                async with asyncio.timeout(20):
                    while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text():
                        await asyncio.sleep(0.1)

        asyncio.run(main())


class Mortal:
    """An actor that is ready and built at once; `park` kills it where it is the first."""

    def __init__(self, dies: bool) -> None:
        self.__ray_ready__ = self.build = self.wake = SimpleNamespace(remote=lambda: answered(None))
        self.park = SimpleNamespace(remote=lambda: answered(ActorDiedError() if dies else None))


async def answered(value: Exception | None) -> None:
    if value is not None:
        raise value


def test_parked_again_with_a_replacement_under_way_it_returns_and_wakes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Phases ask that of who is parked, where the learners did not wake: the replacement can come only afterwards."""
    world_without_ray(monkeypatch)
    monkeypatch.setattr("actors.samplers.download", lambda *_: answered(None))
    config, spawned = fake_config(sampler={"num_workers": 1}), list[Mortal]()

    def spawn(name: str, seat: int) -> Mortal:
        spawned.append(Mortal(dies=not spawned))
        return spawned[-1]

    async def main() -> None:
        pool = SamplerPool(config, FakeSamplerCore)
        monkeypatch.setattr(pool._pool._seats, "_spawn", spawn)
        await pool.start()
        async with asyncio.timeout(5):
            await pool.park()
            await until(lambda: len(pool._pool._seats._preparing) == 1)
            await pool.park()
            assert pool.size == 0
            await pool.wake()
            await until(lambda: pool.size == 1)
        pool.close()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("failure", "kind", "line"),
    [
        (OwnerDiedError("ab", None, ""), ObjectsLostError, "^the images of a rollout are lost with their node: Owner"),
        (
            OutOfDiskError("full"),
            RuntimeError,
            "^the images of a rollout: OutOfDiskError: .*; give Ray more obj",
        ),
    ],
)
def test_images_that_cannot_be_had_are_one_line(failure: Exception, kind: type[Exception], line: str) -> None:
    async def gone() -> None:
        raise failure

    async def main() -> None:
        await SamplerPool(config(), FakeSamplerCore).images(Rollout(info=None, images=gone(), samples=None))  # type: ignore[arg-type]

    with pytest.raises(kind, match=line) as told:
        asyncio.run(main())
    assert "\n" not in str(told.value)


def test_pieces_are_halved_down_to_one() -> None:
    sampler = config(decode_batch_size=3).sampler
    sizes = []
    while (smaller := shrunk(sampler)) != sampler:
        sampler = smaller
        sizes.append((sampler.micro_batch_size, sampler.decode_batch_size))
    assert sizes == [(12, 1), (6, 1), (3, 1), (1, 1)]
    assert shrunk(config().sampler).decode_batch_size is None


def test_room_is_what_is_free_in_whole_samplers_on_each_node() -> None:
    sampler = config(num_cpus=0.3, num_gpus=1, max_workers=9).sampler
    assert room([{"CPU": 0.9, "GPU": 2.0}], sampler) == 2
    assert room([{"CPU": 0.9, "GPU": 8.0}], sampler) == 3
    assert room([{"CPU": 0.2, "GPU": 1.0}, {"CPU": 8.0}, {}, {"CPU": 0.5, "GPU": 1.0}], sampler) == 1
    assert room([{"CPU": 99.0, "GPU": 99.0}], sampler) == 9
    assert room([{}], config(num_cpus=0, max_workers=5).sampler) == 5


def test_a_worker_whose_card_is_gone_does_not_work_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "10.0.0.7")
    driver = tmp_path / "version"
    check_card(True, driver)  # a Ray that believes in cards, on a machine without any
    driver.touch()
    check_card(False, driver)
    with pytest.raises(RuntimeError, match=r"^No CUDA GPUs are available on 10\.0\.0\.7, which") as failure:
        check_card(True, driver)
    assert device_failure(failure.value)
