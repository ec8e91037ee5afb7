"""How fast the old policy and the EMA policy follow the trained one, by optimizer steps done (1 after the first).

    old <- eta old + (1 - eta) policy,   eta = old_policy_decay(step, preset), after each epoch's updates

eta 0 is on-policy: the next epoch samples with the very policy just trained. A larger eta keeps the data behind it.
"""

import difflib
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError


class CustomDecay(BaseModel):
    """eta = min(max(step - flat_steps, 0) * rate, max): 0 for a while, then a ramp up to a ceiling."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    flat_steps: int = Field(ge=0)
    """Optimizer steps during which eta stays 0."""
    rate: float = Field(ge=0, allow_inf_nan=False)
    """Rise of eta per optimizer step after that."""
    max: float = Field(ge=0, le=1)
    """Where the rise ends."""


DecayPreset = Literal["on_policy", "linear", "delayed"]
PRESETS: dict[str, CustomDecay] = {
    "on_policy": CustomDecay(flat_steps=0, rate=0.0, max=0.0),
    "linear": CustomDecay(flat_steps=0, rate=0.001, max=0.5),
    "delayed": CustomDecay(flat_steps=75, rate=0.0075, max=0.999),
}


def old_policy_decay(step: int, preset: DecayPreset | CustomDecay | Mapping[str, Any]) -> float:
    """eta, the decay of the old policy after `step` optimizer steps, in [0, 1].

    preset: on_policy, linear, delayed (0, 1, 2 in the published code), a CustomDecay, or a mapping
    {flat_steps, rate, max}. Raises ValueError for an unknown preset, a malformed mapping or a negative step.
    """
    if step < 0:
        raise ValueError(f"step = {step}: optimizer steps are counted from 0")
    decay = _resolve(preset)
    return min(max(step - decay.flat_steps, 0) * decay.rate, decay.max)


def ema_decay(step: int, max_decay: float = 0.9) -> float:
    """Decay of the EMA policy after `step` optimizer steps: min((1 + step) / (10 + step), max_decay).

    Young averages forget fast. Source: the published code, as in TensorFlow's ExponentialMovingAverage.
    Raises ValueError for a negative step or a max_decay outside [0, 1].
    """
    if step < 0:
        raise ValueError(f"step = {step}: optimizer steps are counted from 0")
    if not 0 <= max_decay <= 1:
        raise ValueError(f"max_decay = {max_decay}: must lie in [0, 1]")
    return min((1 + step) / (10 + step), max_decay)


def _resolve(preset: DecayPreset | CustomDecay | Mapping[str, Any]) -> CustomDecay:
    if isinstance(preset, CustomDecay):
        return preset
    if isinstance(preset, Mapping):
        try:
            return CustomDecay.model_validate(dict(preset))
        except ValidationError as error:
            problems = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
            raise ValueError(f"custom decay {dict(preset)} must be {{flat_steps, rate, max}}: {problems}") from None
    if preset not in PRESETS:
        close = difflib.get_close_matches(str(preset), list(PRESETS), n=1, cutoff=0.0)[0]
        raise ValueError(
            f"unknown old-policy decay {preset!r}: use {', '.join(PRESETS)} or {{flat_steps, rate, max}}; "
            f"nearest: {close!r}"
        )
    return PRESETS[preset]
