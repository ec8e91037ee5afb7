"""A sampler and a learner on one card, in turns: placed together, and a sampler that dies changes nothing."""

import asyncio
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nft_ray.config import ExperimentConfig
from nft_ray.cores.phases import AlternatingSamplers
from tests.conftest import LocalRay
from tests.fakes import FakeLearnerCore, FakeSamplerCore, MortalSamplerCore, fake_config, fake_load_reward, fake_request

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def two_cards(local_ray: LocalRay) -> Iterator[None]:
    """A Ray that believes in two GPUs: what it assigns is all that is looked at."""
    from deployments.build import deploy
    from deployments.plane import delete

    names = asyncio.run(deploy(fake_config(), fake_load_reward))
    yield
    delete(list(names.values()))


def card() -> float:
    """The card that Ray gave this worker."""
    import ray

    (found,) = ray.get_gpu_ids()
    return float(found)


class CardLearner(FakeLearnerCore):
    """Rank r says its card."""

    def park(self) -> None:
        (Path(self.config.run.root) / f"learner-{self.rank}").write_text(str(card()))


def config_on_cards(folder: Path, num_workers: int) -> ExperimentConfig:
    return fake_config(
        run={"root": str(folder)},
        cluster={"placement": "colocated"},
        sampler={"num_workers": num_workers, "num_gpus": 0.4},
        learner={"num_workers": num_workers, "num_gpus": 0.4},
    )


class CardFileSampler(FakeSamplerCore):
    """Writes its card when it is built."""

    def __init__(self, config: ExperimentConfig, worker: str = "local") -> None:
        super().__init__(config, worker)
        seat = worker.rsplit("-", 1)[1]
        (Path(config.run.root) / f"sampler-{seat}").write_text(str(card()))


def test_each_pair_shares_a_card(two_cards: None, tmp_path: Path) -> None:
    from actors.roles import ray_roles

    async def run() -> None:
        async with ray_roles(config_on_cards(tmp_path, 2), CardFileSampler, CardLearner) as roles:
            assert isinstance(roles.samplers, AlternatingSamplers)

    asyncio.run(run())
    cards = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert len(cards) == 4
    for index in range(2):
        assert cards[f"sampler-{index}"] == cards[f"learner-{index}"]
    assert len(set(cards.values())) == 2


def test_an_evaluations_samplers_have_a_card_each(two_cards: None, tmp_path: Path) -> None:
    from actors.roles import ray_evaluation_roles

    async def run() -> None:
        async with ray_evaluation_roles(config_on_cards(tmp_path, 2), CardFileSampler):
            pass

    asyncio.run(run())
    assert sorted(path.read_text() for path in tmp_path.iterdir()) == ["0.0", "1.0"]


def test_a_sampler_that_dies_is_replaced_and_serves_the_next_phase(two_cards: None, tmp_path: Path) -> None:
    from actors.roles import ray_roles

    marker = tmp_path / "die-sampler"
    marker.touch()
    config = config_on_cards(tmp_path, 1)

    async def run() -> list[Any]:
        images = []
        async with ray_roles(config, functools.partial(MortalSamplerCore, tmp_path), FakeLearnerCore) as roles:
            for adapters in await roles.learners.adapters():
                await roles.samplers.load(adapters)
            for prompt in range(2):
                rollout = await roles.samplers.rollout(fake_request(prompt=prompt))
                images.append(await roles.samplers.images(rollout))
                await roles.learners.state()  # the other phase
        return images

    first, second = asyncio.run(run())
    assert not marker.exists()
    assert np.unique(first).tolist() == [0, 1, 2]
    assert np.unique(second).tolist() == [10, 11, 12]
