"""One rank, and what the ranks of a group make of each other's failures; with processes: test_learners.py."""

import re

import pytest
import torch
from ray.exceptions import ActorDiedError, ObjectLostError

from actors import ranks
from actors.rank import LearnerActor
from tests.fakes import FakeLearnerCore, fake_config


def test_adapters_are_flat_return_values() -> None:
    config = fake_config(run={"max_staleness": 1})
    actor = LearnerActor(FakeLearnerCore, config)
    actor.build(0, 1)
    announced, weights, *rest = actor.adapters(4)
    assert announced is not None
    assert weights is not None
    assert rest == [None, None]


def test_a_rank_says_where_it_is() -> None:
    actor = LearnerActor(lambda *_: asking, fake_config())  # type: ignore[arg-type,return-value]
    said = []

    class Asking:
        def state(self) -> None:
            said.append(actor.doing())

    asking = Asking()
    actor.build(0, 1)
    actor.state()
    assert re.fullmatch(r"in actors/rank.py:\d+, doing", said[0].where)
    assert not said[0].waits
    actor._thread = -1
    assert actor.doing().where == "waits for its samples"


GLOO = "[/gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:42"


@pytest.mark.parametrize(
    ("errors", "rank"),
    [
        ({0: RuntimeError(GLOO), 1: ActorDiedError()}, 1),
        ({0: RuntimeError(GLOO), 1: torch.OutOfMemoryError("CUDA out of memory")}, 1),
        ({0: torch.distributed.DistBackendError("NCCL error"), 1: RuntimeError("CUDA error: ECC")}, 1),
        ({0: ValueError("a bug"), 1: ActorDiedError()}, 1),
        ({0: RuntimeError(GLOO), 1: ObjectLostError("00" * 28, "", "")}, 1),
        ({1: RuntimeError(GLOO)}, 1),
    ],
)
def test_the_cause_is_named_and_not_its_echo(errors: dict[int, BaseException], rank: int) -> None:
    group = ranks.Ranks(fake_config(), None, FakeLearnerCore, 0)  # type: ignore[arg-type]
    with pytest.raises(ranks.GroupError, match=rf"^learner {rank} .*: update of epoch 3 \(\w+") as raised:
        group._fail("update of epoch 3", errors)
    assert raised.value.__cause__ is errors[rank]


def test_a_bug_outweighs_its_echo_and_is_raised_as_itself() -> None:
    group = ranks.Ranks(fake_config(), None, FakeLearnerCore, 0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^a bug$"):
        group._fail("update of epoch 3", {0: RuntimeError(GLOO), 1: ValueError("a bug")})
