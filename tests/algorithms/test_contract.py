"""What every algorithm promises, run over every file in nft_ray/algorithms: a new one is picked up by its name."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from nft_ray.algorithms.base import (
    Algorithm,
    EpochRewards,
    KLConfig,
    Pairs,
    algorithm_names,
    build_algorithm,
    config_class,
)
from nft_ray.config import parse
from nft_ray.cores.learner import LearnerCore
from nft_ray.cores.sampler import SamplerCore
from nft_ray.types import Prompt, RolloutItem, RolloutRequest, TrainGroup
from tests.examples import example_config

SHAPE = (6, 4, 5, 5)
NAMES = algorithm_names()


def sections(name: str) -> list[dict[str, Any]]:
    """What is tried of it: its defaults, or, where it has a KL term to the reference, without and with that."""
    own: list[dict[str, Any]] = [{}]
    if issubclass(config_class({"name": name}), KLConfig):
        own = [{"kl_weight": 0.0}, {"kl_weight": 0.1, "kl_fraction": 0.5}]
    return [{"name": name, **fields} for fields in own]


SECTIONS = [section for name in NAMES for section in sections(name)]
each_section = pytest.mark.parametrize("section", SECTIONS, ids=lambda section: "-".join(map(str, section.values())))


def made(section: dict[str, Any]) -> Algorithm:
    return build_algorithm(config_class(section).model_validate(section))


def pairs(algorithm: Algorithm, weights: list[float] | None = None, seed: int = 0) -> tuple[torch.Tensor, Pairs]:
    """(v, pairs) with exactly what the algorithm needs; v is v_old where there is one."""
    g = torch.Generator().manual_seed(seed)
    x0, noise, v, v_ref = (torch.randn(SHAPE, generator=g) for _ in range(4))
    t = torch.rand(6, generator=g) * 0.8 + 0.1
    at = t.reshape(-1, 1, 1, 1)
    found = Pairs(
        x0=x0,
        x_t=(1 - at) * x0 + at * noise,
        noise=noise,
        t=t,
        v_old=v.clone() if algorithm.needs.old else None,
        v_ref=v_ref if algorithm.needs.reference else None,
        ref_scale=torch.full((6,), 1.0 if algorithm.needs.reference else 0.0),
        sample_weight=torch.tensor(weights) if weights else torch.rand(6, generator=g),
    )
    return v.requires_grad_(), found


def rewards(values: list[list[float]]) -> EpochRewards:
    """One trained reward, a row per group."""
    ids = np.repeat(np.arange(len(values)), [len(row) for row in values])
    raw = {"a": np.concatenate([np.array(row, np.float32) for row in values])}
    return EpochRewards(raw=raw, weights={"a": 1.0}, group_ids=ids, combine="sum")


@pytest.mark.parametrize("name", NAMES)
def test_its_section_is_checked_by_its_own_config(name: str) -> None:
    section = {"name": name}
    assert config_class(section)().name == name == made(section).name
    assert example_config(algorithm=section).algorithm.name == name
    with pytest.raises(ValueError, match=r"algorithm\.ema_deccay: unknown key; did you mean ema_decay\?"):
        example_config(algorithm={**section, "ema_deccay": 1})
    for field in {"ema_decay", "kl_weight", "advantage_clip"} & config_class(section).model_fields.keys():
        with pytest.raises(ValueError, match=rf"algorithm\.{field} = -1: "):
            example_config(algorithm={**section, field: -1})


def test_it_has_a_title_a_tag_and_a_paper_of_its_own() -> None:
    said = [(of.TITLE, of.TAG, of.PAPER) for of in (config_class({"name": name}) for name in NAMES)]
    assert all(len(set(column)) == len(NAMES) for column in zip(*said, strict=True))
    assert all(tag == tag.lower().replace(" ", "-") and paper.startswith("https://") for _, tag, paper in said)


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"algorithm\.name = 'nfd': unknown; did you mean nft\?"):
        example_config(algorithm={"name": "nfd"})


@pytest.mark.parametrize("name", NAMES)
def test_a_stage_may_choose_another(name: str) -> None:
    base = example_config().model_dump(exclude={"stages"})
    del base["run"]["num_epochs"]
    stages = [{"name": "first", "num_epochs": 1}, {"name": "then", "num_epochs": 1, "algorithm": {"name": name}}]
    first, then = parse({**base, "stages": stages}).stage_configs
    assert first.algorithm.name == "nft"
    assert then.algorithm.name == name


@each_section
def test_the_reference_is_needed_where_its_kl_counts(section: dict[str, Any]) -> None:
    needs = made(section).needs
    assert 0 <= needs.reference <= 1
    if "kl_weight" in section:
        assert needs.reference == section.get("kl_fraction", 0.0)


@each_section
def test_the_loss_is_one_number_per_pair_whatever_their_neighbours(section: dict[str, Any]) -> None:
    algorithm = made(section)
    v, batch = pairs(algorithm)
    found = algorithm.loss(v, batch)
    assert len(found.measured) == len(algorithm.measures)
    assert all(values.shape == (6,) and values.isfinite().all() for values in (found.total, *found.measured))
    for i in range(6):
        one = {
            field.name: None if (value := getattr(batch, field.name)) is None else value[i : i + 1]
            for field in dataclasses.fields(batch)
        }
        torch.testing.assert_close(algorithm.loss(v[i : i + 1], Pairs(**one)).total, found.total[i : i + 1])


@each_section
def test_gradients_go_to_v_and_to_no_frozen_policy(section: dict[str, Any]) -> None:
    algorithm = made(section)
    v, batch = pairs(algorithm)
    frozen = [value for value in (batch.v_old, batch.v_ref) if value is not None]
    for value in frozen:
        value.requires_grad_()
    algorithm.loss(v, batch).total.sum().backward()
    assert v.grad is not None
    assert v.grad.abs().sum() > 0
    assert all(value.grad is None for value in frozen)


@pytest.mark.parametrize("name", NAMES)
def test_a_better_sample_weighs_more_and_a_missing_one_is_left_out(name: str) -> None:
    algorithm = made({"name": name})
    nan = float("nan")
    found = algorithm.sample_weights(rewards([[0.0, 1.0, nan, 0.5], [3.0, 3.0, 3.0, 3.0]]))
    assert found.values.dtype == np.float32
    assert found.values.shape == (8,)
    worst, best, missing, middle = found.values[:4]
    assert worst < middle < best
    assert np.isnan(missing)
    assert len(set(found.values[4:].tolist())) == 1
    assert all(np.isfinite(value) for value in found.metrics.values())
    again = algorithm.sample_weights(rewards([[0.0, 1.0, nan, 0.5], [3.0, 3.0, 3.0, 3.0]]))
    np.testing.assert_array_equal(found.values, again.values)


@pytest.mark.parametrize("name", NAMES)
def test_a_step_goes_towards_a_good_image_and_away_from_a_bad_one(name: str) -> None:
    """From v = v_old: descent on the best sample's loss brings v closer to noise - x0, on the worst one's away."""
    algorithm = made(sections(name)[0])
    values = algorithm.sample_weights(rewards([[0.0, 1.0]])).values.tolist()
    v, batch = pairs(algorithm, [values[0]] * 3 + [values[1]] * 3)
    algorithm.loss(v, batch).total.sum().backward()
    assert v.grad is not None
    towards = (v.grad * (v.detach() - (batch.noise - batch.x0))).flatten(1).sum(1)
    assert (towards[:3] < 0).all()
    assert (towards[3:] > 0).all()


@each_section
def test_sampler_and_learner_do_what_it_asks(section: dict[str, Any]) -> None:
    """One group of the real model: what is not needed is not sent, and an update moves the policy."""
    config = example_config(algorithm=section)
    algorithm = build_algorithm(config.algorithm)
    sampler, learner = SamplerCore(config), LearnerCore(config)
    sampler.load(*next((announced, weights) for announced, weights in learner.adapters() if weights))
    items = (RolloutItem(group_id=0, prompt=Prompt(id=0, text="a red circle"), seeds=(1, 2, 3, 4)),)
    request = RolloutRequest(epoch=0, items=items, adapter="old", policy_version=0, split="train")
    _, _, samples = sampler.rollout(request)
    assert samples is not None
    assert (samples.v_old is not None) == algorithm.needs.old
    assert (samples.v_ref is not None) == (algorithm.needs.reference > 0)
    weight = algorithm.sample_weights(rewards([[0.0, 1.0, 0.0, 1.0]])).values
    group = TrainGroup(group_id=0, samples=None, weight=weight, step=np.zeros(4, np.int32))
    before = learner.state()
    result, _ = learner.update(0, [group], [samples], (4,))
    after = learner.state()
    assert before is not None
    assert after is not None
    assert any((after.policy[key] != before.policy[key]).any() for key in before.policy)
    expected = ("loss", "grad_norm", *algorithm.measures)
    assert {f"{algorithm.name}/{metric}" for metric in expected} <= result.metrics.keys()
    assert all(np.isfinite(value) for value in result.metrics.values())
