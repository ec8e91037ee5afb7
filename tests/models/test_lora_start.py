"""`model.lora.start`: a policy that begins as an existing LoRA, with its rank, alpha and targets."""

from pathlib import Path

import numpy as np
import pytest
import torch

from nft_ray.config import ExperimentConfig, LoraConfig, ModelConfig, dump, load, parse
from nft_ray.cores.learner import LearnerCore
from nft_ray.cores.publish import verify
from nft_ray.cores.sampler import SamplerCore
from nft_ray.models.base import check_model, load_model
from nft_ray.models.lora import attach, export_lora, random_weights, read_lora
from nft_ray.models.resolve import resolve
from nft_ray.types import Weights
from tests.examples import example_config
from tests.models.tiny import numpy_weights

CPU = torch.device("cpu")
OWN = LoraConfig(rank=6, alpha=9, targets=("attn.to_q", "attn.to_v"))


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random LoRA of rank 6, in diffusers' format."""
    folder = tmp_path_factory.mktemp("start")
    bare = load_model(ModelConfig(), CPU, transformer_only=True)
    shapes = numpy_weights(attach(bare.transformer, OWN, bare.lora_targets, seed=0))
    export_lora(random_weights(shapes, seed=1), ModelConfig(lora=OWN), folder)
    return folder


def starting(start: Path, *overrides: str) -> ExperimentConfig:
    plain = example_config()
    free = {"rank", "alpha"}  # the example gives them
    lora = {name: value for name, value in plain.model.lora.model_dump(exclude_unset=True).items() if name not in free}
    tree = plain.model_dump(mode="json", exclude_unset=True)
    tree["model"]["lora"] = {**lora, "start": str(start), **dict(override.split("=") for override in overrides)}
    return resolve(parse(tree))


def same(a: Weights, b: Weights) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def test_rank_alpha_and_targets_are_its_own(start: Path, tmp_path: Path) -> None:
    config = starting(start)
    assert (config.model.lora.rank, config.model.lora.alpha) == (6, 9)
    assert set(config.model.lora.targets or ()) == {"attn.to_q", "attn.to_v"}
    check_model(config.model)
    (tmp_path / "resolved.yaml").write_text(dump(config))
    start.rename(start.with_name("elsewhere"))
    try:
        again = resolve(load(tmp_path / "resolved.yaml"))
    finally:
        start.with_name("elsewhere").rename(start)
    assert again.model == config.model  # what a run keeps says all of it


def test_policy_old_policy_and_ema_start_there_and_the_reference_does_not(start: Path) -> None:
    config = starting(start)
    weights, _ = read_lora(start)
    learner, sampler = LearnerCore(config), SamplerCore(config)
    assert same(numpy_weights(learner.policy), weights)
    ((adapters, sent),) = learner.adapters()
    assert adapters.version == 0
    assert same(sent.old, weights)
    assert same(sent.ema, weights)
    receipt = sampler.load(adapters, sent)
    verify(adapters, receipt, config.model.dtype)
    assert np.abs(receipt.probe - adapters.probe_base).max() > 0.01  # its effect is there from version 0 on
    base = LearnerCore(example_config())
    assert np.array_equal(base.adapters()[0][0].probe_base, adapters.probe_base)


def test_a_state_goes_on_from_there(start: Path) -> None:
    config = starting(start)
    learner = LearnerCore(config)
    with torch.no_grad():
        for value in learner.policy.values():
            value.add_(1.0)
    other = LearnerCore(config)
    other.restore(learner.state())
    assert same(numpy_weights(other.policy), numpy_weights(learner.policy))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("rank=8",), "model.lora.rank = 8: the LoRA to start from has 6; leave rank out"),
        (("alpha=64",), "model.lora.alpha = 64: the LoRA to start from has 9; leave alpha out"),
    ],
)
def test_a_conflict_is_one_clear_line(overrides: tuple[str, ...], message: str, start: Path, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(dump(example_config()))
    tree = path.read_text().replace("    rank: 4\n    alpha: 8\n    targets: null\n", "")
    path.write_text(tree.replace("    start: null\n", f"    start: {start}\n"))
    resolve(load(path))
    with pytest.raises(ValueError) as caught:
        resolve(load(path, [f"model.lora.{override}" for override in overrides]))
    assert str(caught.value) == message


def test_null_leaves_it_to_the_lora_and_a_configuration_that_was_not_resolved_is_no_other_scale(start: Path) -> None:
    section = {"start": str(start), "rank": None, "alpha": None, "targets": None}
    plain = example_config()
    config = parse(plain.model_dump(mode="json") | {"model": {"lora": section}})
    assert resolve(config).model.lora == starting(start).model.lora
    lora = OWN.model_copy(update={"start": str(start), "alpha": 64})
    with pytest.raises(ValueError, match=r"model\.lora\.alpha = 64: the LoRA to start from has 9"):
        LearnerCore(plain.model_copy(update={"model": ModelConfig(lora=lora)}))


def test_a_start_that_is_not_there_or_not_this_models_is_one_clear_line(start: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file or folder, and no Hub id"):
        starting(tmp_path / "none")
    lora = starting(start).model.lora
    with pytest.raises(ValueError, match="no such file or folder"):
        check_model(ModelConfig(lora=lora.model_copy(update={"start": "/none"})))
    with pytest.raises(ValueError, match=r"model\.lora\.rank = 8: the LoRA to start from has 6"):
        check_model(ModelConfig(lora=lora.model_copy(update={"rank": 8})))
    wrong = example_config().model_copy(
        update={"model": ModelConfig(lora=lora.model_copy(update={"targets": ("attn.to_q",)}))}
    )
    with pytest.raises(ValueError, match=r"model\.lora\.start = .* this model has no LoRA on .*attn\.to_v"):
        LearnerCore(wrong)
