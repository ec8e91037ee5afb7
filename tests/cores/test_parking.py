"""Parked tensors have no memory, are the same objects, and come back to the last bit."""

import pytest
import torch

from nft_ray.cores.learner import LearnerCore
from nft_ray.cores.parking import Parking, tensors_of
from nft_ray.cores.publish import checksum
from nft_ray.cores.sampler import SamplerCore
from tests.examples import example_config
from tests.fakes import fake_request
from tests.learning import example_groups, update

CPU = torch.device("cpu")
tunings = pytest.mark.parametrize("tuning", ["lora", "full"])


def test_a_parked_module_has_no_memory_and_comes_back_bit_for_bit() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 4))
    module[2].weight = module[0].weight  # tied: one tensor, parked once
    module[1].running_mean.copy_(torch.arange(4.0))
    x = torch.randn(3, 4)
    module.eval()
    expected, parameters = module(x), list(module.parameters())
    bytes_held = sum(tensor.nbytes for tensor in {id(t): t for t in tensors_of([module])}.values())
    parking = Parking(lambda: tensors_of([module]), CPU)
    assert parking.park() == bytes_held
    assert parking.park() == 0
    assert sum(tensor.untyped_storage().nbytes() for tensor in tensors_of([module])) == 0
    parking.wake()
    parking.wake()
    assert [id(a) for a in module.parameters()] == [id(b) for b in parameters]
    torch.testing.assert_close(module(x), expected, rtol=0, atol=0)


def test_channels_last_survives() -> None:
    module = torch.nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last)
    strides = module.weight.stride()
    parking = Parking(lambda: tensors_of([module]), CPU)
    parking.park()
    parking.wake()
    assert module.weight.stride() == strides


@tunings
def test_a_learner_parked_between_updates_is_the_learner_that_was_not(tuning: str) -> None:
    config = example_config(f"model.tuning={tuning}")
    plain, parked = LearnerCore(config), LearnerCore(config)
    update(plain, *example_groups(0))
    update(parked, *example_groups(0))
    parked.park()
    assert sum(tensor.untyped_storage().nbytes() for tensor in parked.model.transformer.parameters()) == 0
    assert all(value.untyped_storage().nbytes() == 0 for value in parked.ema.values())
    moments = [moments["exp_avg"] for moments in parked.optimizer.state.values()]
    assert moments
    assert all(moment.untyped_storage().nbytes() == 0 for moment in moments)
    parked.wake()
    _, expected = update(plain, *example_groups(1))
    _, found = update(parked, *example_groups(1))
    assert checksum(found.old) == checksum(expected.old)
    assert checksum(found.ema) == checksum(expected.ema)


@tunings
def test_a_sampler_parked_between_rollouts_draws_the_same(tuning: str) -> None:
    config = example_config(f"model.tuning={tuning}")
    core, learner = SamplerCore(config), LearnerCore(config)
    core.load(*learner.probe())
    request = fake_request(version=-1)
    _, expected, _ = core.rollout(request)
    core.park()
    modules = core.model.modules()
    assert len(modules) == 4  # transformer, VAE, two text encoders
    assert sum(tensor.untyped_storage().nbytes() for tensor in tensors_of(modules)) == 0
    core.wake()
    _, found, _ = core.rollout(request)
    assert (found == expected).all()
