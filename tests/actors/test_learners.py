"""What a learner group checks on the driver; with actors it is tested in tests/test_roles.py."""

import dataclasses

import numpy as np
import pytest

from actors.learners import LearnerActor, LearnerGroup
from nft_ray.types import TrainGroup
from tests.fakes import FakeLearnerCore, FakeSamplerCore, fake_config, fake_request


def test_learners_that_drift_apart_end_the_group() -> None:
    config = fake_config(learner={"num_workers": 1})
    sampler, learner = FakeSamplerCore(config), FakeLearnerCore(config)
    sampler.load(*learner.adapters()[0])
    _, _, samples = sampler.rollout(fake_request())
    assert samples is not None
    group = TrainGroup(group_id=0, samples=None, weight=np.ones(3, np.float32), step=np.zeros(3, np.int32))
    result, _ = learner.update(0, [group], [samples], (3,))
    drifted = dataclasses.replace(result, adapters=dataclasses.replace(result.adapters, checksums={"old": "other"}))
    learners = LearnerGroup(config, None)  # type: ignore[arg-type]  # nobody is placed
    learners._agree([result.adapters, result.adapters])
    with pytest.raises(RuntimeError, match=r"^learner 1 differs from learner 0 at version 1: .*other"):
        learners._agree([result.adapters, drifted.adapters])
    with pytest.raises(RuntimeError, match=r"^learner 1 differs"):
        _ = learners._living


def test_adapters_are_flat_return_values() -> None:
    actor = LearnerActor(FakeLearnerCore, fake_config(run={"max_staleness": 1}), 0, 1)
    actor.build()
    announced, weights, *rest = actor.adapters(4)
    assert announced is not None
    assert weights is not None
    assert rest == [None, None]
