"""What is trained and how ranks share it: all weights or a LoRA, whole on every rank or sharded."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from nft_ray.cores.learner import LearnerCore
from nft_ray.cores.publish import checksum, verify
from nft_ray.cores.sampler import SamplerCore
from nft_ray.types import AdapterWeights, LearnerState, Weights
from tests.examples import example_config
from tests.learning import Rank, example_groups, on_ranks, update

SETTINGS = ("learner.learning_rate=1e-4", "algorithm.kl_weight=0.1", "learner.micro_batch_size=3")
EPOCHS = [example_groups(0), example_groups(1)]


def relative(found: Weights, expected: Weights, start: Weights) -> float:
    """|found - expected| / |expected - start| over all tensors."""
    assert found.keys() == expected.keys()

    def norm(a: Weights, b: Weights) -> float:
        return float(np.sqrt(sum(np.square(a[name] - b[name], dtype=np.float64).sum() for name in a)))

    return norm(found, expected) / norm(expected, start)


def same(a: LearnerState | None, b: LearnerState | None) -> bool:
    assert a is not None
    assert b is not None

    def arrays(state: LearnerState) -> Mapping[str, Weights]:
        versions = {f"{kind} {n}": getattr(v, kind) for n, v in state.versions.items() for kind in ("old", "ema")}
        return {"policy": state.policy, "ema": state.ema, "optimizer": state.optimizer, **versions}

    one, other = arrays(a), arrays(b)
    return one.keys() == other.keys() and all(checksum(one[name]) == checksum(other[name]) for name in one)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_weights_train_and_a_sampler_proves_that_it_has_them(dtype: str) -> None:
    config = example_config("model.tuning=full", f"model.dtype={dtype}", *SETTINGS)
    learner, sampler = LearnerCore(config), SamplerCore(config)
    for adapters, weights in (learner.probe(), *learner.adapters()):
        assert weights is not None
        verify(adapters, sampler.load(adapters, weights), dtype)
    before = learner.state()
    result, weights = update(learner, *EPOCHS[0])
    verify(result.adapters, sampler.load(result.adapters, weights), dtype)
    after = learner.state()
    assert before is not None
    assert after is not None
    assert all(value.dtype == np.float32 for value in after.policy.values())
    still = [name for name in before.policy if (before.policy[name] == after.policy[name]).all()]
    last = "transformer_blocks.3.attn"  # SD3's last block drops its text stream: nothing asks for these
    assert still == [f"{last}.add_q_proj.bias", f"{last}.add_q_proj.weight", f"{last}.norm_added_q.weight"]
    lost = sampler.load(result.adapters, AdapterWeights(old=before.policy, ema=before.ema))
    with pytest.raises(RuntimeError, match="differs"):  # a sampler that has others is found out
        verify(result.adapters, lost, dtype)


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_a_restored_learner_of_either_kind_goes_on_bit_for_bit(tuning: str) -> None:
    config = example_config(f"model.tuning={tuning}", *SETTINGS, "run.max_staleness=1")
    straight, resumed = LearnerCore(config), LearnerCore(config)
    update(straight, *EPOCHS[0])
    state = straight.state()
    assert state is not None
    kept = {name: value.copy() for name, value in state.policy.items()}
    update(straight, *EPOCHS[1])
    assert checksum(kept) == checksum(state.policy)  # a state is a copy: training goes on behind it
    resumed.restore(state)
    update(resumed, *EPOCHS[1])
    assert same(resumed.state(), straight.state())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tuning", "compiled"),
    [("lora", "false"), ("full", "false"), pytest.param("lora", "true", marks=pytest.mark.large)],
)
def test_sharded_learners_are_the_whole_ones(tuning: str, compiled: str, tmp_path: Path) -> None:
    """Two ranks, uneven shares of the pairs: with fsdp each rank must run the model as often as the others."""
    settings = (f"model.tuning={tuning}", *SETTINGS)
    start = LearnerCore(example_config(*settings)).state()
    ddp = on_ranks(2, tmp_path, EPOCHS, *settings)
    fsdp = on_ranks(2, tmp_path, EPOCHS, *settings, "learner.sharding=fsdp", f"learner.compile={compiled}")
    assert start is not None
    check(fsdp, ddp, start)
    assert [rank.num_local for rank in ddp] == 2 * [sum(value.size for value in start.policy.values())]
    assert max(rank.num_local for rank in fsdp) < 0.6 * ddp[0].num_local


def check(fsdp: list[Rank], ddp: list[Rank], start: LearnerState) -> None:
    (first, second), whole = fsdp, ddp[0]
    assert (second.weights, second.state) == (None, None)
    assert first.result.adapters.checksums == second.result.adapters.checksums
    assert first.state is not None
    assert first.weights is not None
    assert whole.state is not None
    assert whole.weights is not None
    assert relative(first.state.policy, whole.state.policy, start.policy) < 1e-5
    assert relative(first.weights.old, whole.weights.old, start.policy) < 1e-5
    assert relative(first.state.ema, whole.state.ema, start.policy) < 1e-5
    assert first.state.optimizer.keys() == whole.state.optimizer.keys()
    for name in ("nft/loss", "nft/kl", "nft/grad_norm", "nft/x0_norm"):
        assert first.result.metrics[name] == pytest.approx(whole.result.metrics[name], rel=1e-5)
    assert first.probe is not None
    assert whole.probe is not None
    for name, value in first.probe.items():
        np.testing.assert_allclose(value, whole.probe[name], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_sharded_learners_go_on_bit_for_bit_and_alone_too(tuning: str, tmp_path: Path) -> None:
    settings = (f"model.tuning={tuning}", *SETTINGS, "learner.sharding=fsdp", "learner.gradient_checkpointing=true")
    straight = on_ranks(2, tmp_path, EPOCHS, *settings)
    stopped = on_ranks(2, tmp_path, EPOCHS[:1], *settings)
    resumed = on_ranks(2, tmp_path, EPOCHS[1:], *settings, state=stopped[0].state)
    assert same(resumed[0].state, straight[0].state)
    alone = LearnerCore(example_config(*settings))  # a checkpoint knows nothing of ranks
    assert stopped[0].state is not None
    alone.restore(stopped[0].state)
    update(alone, *EPOCHS[1])
    found, start = alone.state(), LearnerCore(example_config(*settings)).state()
    assert found is not None
    assert start is not None
    assert straight[0].state is not None
    assert relative(found.policy, straight[0].state.policy, start.policy) < 1e-4
