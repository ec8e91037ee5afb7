"""What every reward promises, run over every file in nft_ray/rewards: a new one is picked up by its name.

Asked as runs ask it, through `Unique`: it checks what goes in and makes float32 of what comes out. Its memory is off.
"""

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from nft_ray.rewards.base import Reward, RewardConfig, Scores, reward_config, reward_names
from nft_ray.rewards.unique import Unique
from tests.oracles import make_env
from tests.rewards.small_rewards import SECTIONS, small_reward

PROMPT = 'a sign that says "red circle"'
LINE = {"tag": "colors", "include": [{"class": "circle", "count": 1, "color": "red"}], "prompt": PROMPT}
ROUNDING = 2e-6
"""What the size of a batch does to float32 sums. Another image's score would be further off."""


class Newcomers:
    """The least that must pass: no thought of dtypes or of what it is given."""

    def score(self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Scores:
        """The mean brightness, as a float64."""
        return Scores(values=np.array([float(image.mean()) for image in images]))


@pytest.fixture(scope="module", params=[*reward_names(), "newcomers"])
def reward(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reward]:
    if request.param == "newcomers":
        yield Unique(request.param, Newcomers(), capacity=0)
        return
    with small_reward(request.param, tmp_path_factory.mktemp("weights")) as found:
        yield Unique(request.param, found, capacity=0)


def images(num_images: int, height: int, width: int) -> np.ndarray:
    """Noise, noise of less contrast, ... down to a plain image: different scores for whatever is measured."""
    rng = np.random.default_rng(height * width)
    contrast = np.linspace(1, 0, num_images).reshape(-1, 1, 1, 1)
    return (128 + contrast * rng.integers(-128, 128, (num_images, height, width, 3))).astype(np.uint8)


def same(a: Scores, b: Scores) -> None:
    np.testing.assert_allclose(a.values, b.values, rtol=ROUNDING, atol=ROUNDING)
    assert a.details.keys() == b.details.keys()
    for name, values in a.details.items():
        np.testing.assert_allclose(values, b.details[name], rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (64, 48), (17, 5), (1, 1)])
def test_shapes_and_dtypes_for_any_image_size(reward: Reward, height: int, width: int) -> None:
    scores = reward.score(images(3, height, width), [PROMPT] * 3, [LINE] * 3)
    for array in (scores.values, *scores.details.values()):
        assert array.shape == (3,)
        assert array.dtype == np.float32
        assert np.isfinite(array).all()


def test_a_batch_is_its_images_one_by_one_in_their_order(reward: Reward) -> None:
    batch = images(4, 32, 32)
    batch.setflags(write=False)  # as an array from the object store is
    whole = reward.score(batch, [PROMPT] * 4, [LINE] * 4)
    order = [2, 0, 3, 1]
    shuffled = reward.score(batch[order], [PROMPT] * 4, [LINE] * 4)
    alone = [reward.score(one[None], [PROMPT], [LINE]) for one in batch]
    names = whole.details.keys()
    joined = {name: np.concatenate([one.details[name] for one in alone]) for name in names}
    same(whole, Scores(values=np.concatenate([one.values for one in alone]), details=joined))
    reordered = {name: values[order] for name, values in whole.details.items()}
    same(shuffled, Scores(values=whole.values[order], details=reordered))


def test_an_empty_batch(reward: Reward) -> None:
    assert reward.score(images(1, 8, 8)[:0], [], []).values.shape == (0,)


@pytest.mark.parametrize("name", reward_names())
def test_a_section_is_checked_by_the_rewards_own_config(name: str) -> None:
    config = reward_config(name, SECTIONS.get(name, {}) | {"weight": 0.5, "num_replicas": 3, "num_cpus": 0.25})
    assert isinstance(config, RewardConfig)
    assert type(config) is not RewardConfig
    assert (config.weight, config.num_replicas, config.num_cpus, config.eval_only) == (0.5, 3, 0.25, False)
    with pytest.raises(ValueError, match=rf"rewards\.{name}\.wieght: unknown key; did you mean 'weight'\?"):
        reward_config(name, SECTIONS.get(name, {}) | {"wieght": 1.0})


@pytest.mark.large
@pytest.mark.skipif(importlib.util.find_spec("open_clip") is not None, reason="this is that environment")
def test_rewards_that_need_open_clip_keep_the_contract_where_it_is() -> None:
    said = make_env.run_tests("openclip", "tests/rewards/test_contract.py", "-k", "hpsv2")
    assert "skipped" not in said
