"""What an algorithm is, and how one is found by its file's name.

An algorithm is ONE module of this package, `nft_ray/algorithms/NAME.py`, that defines

    class Config(AlgorithmConfig)                  its section `algorithm` of the YAML, where `name` is NAME;
                                                   with TITLE, TAG and PAPER for the card of what it trains;
                                                   KLConfig and AdvantageConfig are fields that several have
    def build(config: Config) -> Algorithm         what the three planes ask it; see the Protocol

Nothing registers anywhere. A sampler asks what it `needs` of the frozen policies, the driver turns an epoch's rewards
into one weight per sample, a learner asks for the loss of each (sample, time) pair. tests/algorithms/test_contract.py
holds whatever file is here to that. Modules import torch inside functions: a YAML is checked without it.

A method that needs more than clean images (trajectories with their log-probabilities, say) asks for it in `Needs`:
that record, `CleanSamples` and `Pairs` are the places that grow.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple, Protocol

import numpy as np
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

import nft_ray.algorithms
from nft_ray.algorithms.schedules import CustomDecay, DecayPreset

if TYPE_CHECKING:
    import torch

_NOT_ALGORITHMS = {"advantages", "base", "batch", "remarks", "schedules", "signal"}

Decay = Annotated[
    Annotated[DecayPreset, Tag("<preset>")] | Annotated[CustomDecay, Tag("<custom>")],
    Discriminator(lambda value: "<preset>" if isinstance(value, str) else "<custom>"),
]
"""Told apart before they are checked, so that an error speaks of the one that was meant."""


class AlgorithmConfig(BaseModel):
    """What the learner and the loop read of any algorithm. Its own Config inherits this and adds fields."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    TITLE: ClassVar[str]
    """What a reader knows it by."""
    TAG: ClassVar[str]
    """What it is found by on the Hub."""
    PAPER: ClassVar[str]
    """Its address."""

    name: str = "nft"
    """File nft_ray/algorithms/NAME.py."""
    old_policy_decay: Decay = "linear"
    """Decay of the old policy by optimizer steps: a preset, or {flat_steps, rate, max}."""
    ema_decay: Annotated[float, Field(ge=0, le=1)] = 0.9
    """Largest decay of the EMA policy, which is evaluated and exported."""


class KLConfig(AlgorithmConfig):
    """Of an algorithm whose loss has a KL term to the reference policy."""

    kl_weight: Annotated[float, Field(ge=0)] = 1e-4
    """Weight of the squared velocity difference to the reference; 0 = v_ref is not even computed."""
    kl_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of a sample's times whose v_ref is computed and sent; the rest is weighted up, so the KL stays unbiased."""

    @property
    def reference(self) -> float:
        """`Needs.reference` of the KL term alone."""
        return self.kl_fraction if self.kl_weight else 0.0


class AdvantageConfig(AlgorithmConfig):
    """Of an algorithm that weighs samples by their advantages (advantages.py), clipped."""

    advantage_clip: Annotated[float, Field(gt=0)] = 5.0
    """Advantages are clipped to +- this."""
    advantage_std: Literal["global", "group"] = "global"
    """Rewards are divided by the standard deviation of all of the epoch, or of their group."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What samplers compute of the frozen policies at a sample's training times."""

    old: bool
    """v_old, of the policy that drew the sample, at every time."""
    reference: float
    """v_ref at this share of the times, in [0, 1]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochRewards:
    """The N samples of an epoch. raw: reward name -> (N,), NaN = missing; weights: of the rewards that train."""

    raw: Mapping[str, np.ndarray]
    weights: Mapping[str, float]
    group_ids: np.ndarray
    combine: Literal["sum", "normalized"]


class SampleWeights(NamedTuple):
    """values: f32 (N,), NaN = the sample is left out; metrics: name -> figure, for the log."""

    values: np.ndarray
    metrics: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs:
    """B (sample, time) pairs on the device, f32: x0, x_t, noise, v_old, v_ref (B, *latent), the others (B,).

    x_t = (1 - t) x0 + t noise, so the velocity that leads to x0 is noise - x0. sample_weight: what `sample_weights`
    gave the sample. v_old and v_ref are None where they were not asked for. ref_scale: times / times with a v_ref where
    the pair has one, else 0 (and v_ref is 0): a mean of ref_scale f(v_ref) is that of f over all times in expectation.
    """

    x0: torch.Tensor
    x_t: torch.Tensor
    noise: torch.Tensor
    t: torch.Tensor
    v_old: torch.Tensor | None
    v_ref: torch.Tensor | None
    ref_scale: torch.Tensor
    sample_weight: torch.Tensor


class PairLoss(NamedTuple):
    """total (B,): what is minimised, of each pair; measured: one (B,) per name in `Algorithm.measures`."""

    total: torch.Tensor
    measured: tuple[torch.Tensor, ...]


class Algorithm(Protocol):
    """One way to learn from scored samples. It holds its Config and nothing else: every call is a pure function."""

    name: str
    """As in the YAML; the group of its metrics."""
    measures: tuple[str, ...]
    """Names of what `loss` measures beside the total; logged as means over pairs, `NAME/measure`."""

    @property
    def needs(self) -> Needs: ...

    def sample_weights(self, rewards: EpochRewards) -> SampleWeights:
        """On the driver, once per epoch. A sample that misses a trained reward is left out."""
        ...

    def loss(self, v: torch.Tensor, pairs: Pairs) -> PairLoss:
        """v (B, *latent) f32: the trained policy's velocity at (x_t, t); the only way by which gradients go."""
        ...


def algorithm_names() -> list[str]:
    """Every algorithm there is, sorted: the modules here but those that they share. Imports none of them."""
    return sorted({module.name for module in pkgutil.iter_modules(nft_ray.algorithms.__path__)} - _NOT_ALGORITHMS)


def config_class(section: Mapping[str, Any]) -> type[AlgorithmConfig]:
    """The Config of the algorithm that a section names; ValueError with the nearest name for an unknown one."""
    found: type[AlgorithmConfig] = _module(section.get("name", AlgorithmConfig.model_fields["name"].default)).Config
    return found


def build_algorithm(config: AlgorithmConfig) -> Algorithm:
    """The algorithm of a checked section."""
    made: Algorithm = _module(config.name).build(config)
    return made


def _module(name: Any) -> ModuleType:
    names = algorithm_names()
    if name not in names:
        close = difflib.get_close_matches(str(name), names, 1)
        hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(names)}"
        raise ValueError(f"algorithm.name = {name!r}: unknown; {hint}")
    return importlib.import_module(f"nft_ray.algorithms.{name}")
