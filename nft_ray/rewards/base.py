"""What a reward is, and how one is found by its file's name.

A reward is ONE module of this package, `nft_ray/rewards/NAME.py`, that defines

    class Config(RewardConfig)             its section `rewards.NAME` of the YAML
    def build(config: Config) -> Reward    loads what it needs and returns a scorer

and, where they apply,

    def files(config: Config) -> tuple[PublishedFile, ...]        the published files that it loads
    def cost(config: Config) -> Cost                                                  what an image takes, for a plan
    def check_line(prompt: str, metadata: Mapping, config: Config | None) -> None     ValueError where it cannot score
                                      such a prompt: asked of every line of the experiment before anything starts; None
                                      where the section is not known, for a reward that is deployed

Nothing registers anywhere: the file's name is the registry. A module is imported when it is named for the first time,
and imports the libraries of its model inside `build`. This file knows neither Ray nor where a reward runs.
"""

import difflib
import importlib
import pkgutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Annotated, Any, Literal, Protocol

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

import nft_ray.rewards
from nft_ray.downloads.published import PublishedFile
from nft_ray.types import Mark

_NOT_REWARDS = {
    "applications",
    "base",
    "combine",
    "monitored",
    "outage",
    "preprocessing",
    "servers",
    "unique",
    "weights",
}

MemoryGib = Annotated[
    float, Field(gt=0, description="Expected host memory per replica, shown by --dry-run."), Mark.PLACEMENT
]
"""What a reward gives another default."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """What a reward says about B images.

    values: f32 (B,), higher is better, finite or NaN = missing; details: name -> the same, measured beside it. Other
    real numbers become float32 on their way (`check_scores`), and what is infinite says nothing of its image: it is
    missing (`combine.assemble`). A reward need not think of that.
    """

    values: np.ndarray
    details: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What scoring one image of 512 x 512 takes; `source` says how that is known.

    parameters: numbers held by the model; flops: of one image; prompt_flops: once per prompt; activation_bytes: of one
    image of a micro-batch, in float32; host_s: seconds of one core besides (reading, resizing, judging).
    """

    source: str
    parameters: int = 0
    flops: float = 0.0
    prompt_flops: float = 0.0
    activation_bytes: int = 0
    host_s: float = 0.0


class Reward(Protocol):
    """Scores images, each one on its own: a batch gives the same scores as its images one by one, in the same order.

    It is always asked through `unique.Unique`, which checks what goes in and what comes out.
    """

    def score(self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Scores:
        """images uint8 (B, H, W, 3); prompts and metadata: one per image.

        Raises ValueError where the metadata lacks what this reward needs.
        """
        ...


class Autoscaling(BaseModel):
    """Serve adds and removes replicas between two numbers, so that each has about so many requests to work on."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    min_replicas: Annotated[int, Mark.PLACEMENT] = Field(default=1, ge=0)
    """Replicas at rest."""
    max_replicas: Annotated[int, Mark.PLACEMENT] = Field(ge=1)
    """Replicas at most."""
    target_ongoing_requests: Annotated[float, Mark.PLACEMENT] = Field(default=2.0, gt=0)
    """Requests in work or waiting per replica that are aimed at."""

    @model_validator(mode="after")
    def _ordered(self) -> "Autoscaling":
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas {self.min_replicas} is above max_replicas {self.max_replicas}")
        return self


class RewardUse(BaseModel):
    """What a run makes of a reward's scores. It is the run's own: no score depends on it, and no replica knows it."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    weight: float = Field(default=1.0, allow_inf_nan=False)
    """Factor of this reward in the combined one; may be negative."""
    eval_only: bool = False
    """Only measured: it has no part in training, and where it is missing no sample is dropped."""


class RewardConfig(RewardUse):
    """What every section `rewards.NAME` may say. A reward's own Config inherits this and adds its fields.

    Its fields are marked as those of the experiment: see nft_ray.types.Mark.
    """

    num_replicas: Annotated[int, Mark.PLACEMENT] = Field(default=1, ge=1)
    """Processes that score at the same time; `nft-ray rewards scale` changes their number while a run goes on."""
    autoscaling: Annotated[Autoscaling | None, Mark.PLACEMENT] = None
    """Let Serve choose the number of replicas instead."""
    num_cpus: Annotated[float, Mark.PLACEMENT] = Field(default=1.0, ge=0)
    """Logical CPUs of one replica."""
    num_gpus: Annotated[float, Mark.PLACEMENT] = Field(default=0.0, ge=0)
    """GPUs of one replica."""
    memory_gib: MemoryGib = 0.3
    batch_size: Annotated[int, Mark.PLACEMENT] = Field(default=1, ge=1)
    """Requests (a request is one group of images) that a replica scores together, at most."""
    batch_wait_s: Annotated[float, Mark.PLACEMENT] = Field(default=0.01, ge=0)
    """Seconds that a request waits for others to fill a batch."""
    runtime_env: Annotated[dict[str, Any] | None, Mark.PLACEMENT] = None
    """Ray runtime environment of the replicas, such as {pip: [paddleocr]}. Its env_vars are set before the reward is
    loaded and kept from Ray, whose logs would hold them; not so what a process reads as it starts (LD_*, OMP_*)."""
    py_executable: Annotated[str | None, Mark.PLACEMENT] = None
    """Python of another environment for the replicas. It must hold nft_ray, and the same Ray as here."""


class TorchRewardConfig(RewardConfig):
    """What the section of a reward with a torch model says besides."""

    device: Annotated[str | None, Mark.PLACEMENT] = Field(default=None, pattern=r"^(cpu|cuda(:\d+)?)$")
    """`cpu` or `cuda`; null = cuda where the replica has been given a GPU."""
    dtype: Annotated[Literal["float32", "bfloat16"], Mark.ROUNDING] = "float32"
    """Data type of the weights and of the forward."""
    micro_batch_size: Annotated[int, Mark.PLACEMENT] = Field(default=64, ge=1)
    """Images of one forward."""
    weights: Annotated[str | None, Mark.PLACEMENT] = None
    """Folder of the published files; null = NFT_RAY_WEIGHTS, or the Hub's cache (HF_HOME)."""


def reward_names() -> list[str]:
    """Every reward there is, sorted: the public modules here but `base` and `combine`. Imports none of them."""
    names = {module.name for module in pkgutil.iter_modules(nft_ray.rewards.__path__)}
    return sorted(name for name in names - _NOT_REWARDS if not name.startswith("_"))


def reward_class(name: str) -> type[RewardConfig]:
    """The Config of a reward. ValueError for an unknown name."""
    config_class: type[RewardConfig] = _module(name).Config
    return config_class


def reward_config(name: str, section: Mapping[str, Any]) -> RewardConfig:
    """The section `rewards.NAME` of an experiment, checked by that reward's own Config.

    Raises ValueError, on one line, for an unknown name, an unknown key (with the nearest known one) or a bad value.
    """
    config_class = reward_class(name)
    try:
        return config_class.model_validate(section)
    except ValidationError as error:
        raise ValueError(one_line(error, f"rewards.{name}", known=list(config_class.model_fields))) from None


def load_reward(name: str, section: Mapping[str, Any]) -> Reward:
    """Check the section and load the reward, its model included. Raises as `reward_config`, and as its `build` does."""
    config = reward_config(name, section)
    reward: Reward = _module(name).build(config)
    return reward


def reward_files(name: str, config: RewardConfig) -> tuple[PublishedFile, ...]:
    """The published files that this reward loads; none for one that needs no weights."""
    module = _module(name)
    found: tuple[PublishedFile, ...] = module.files(config) if hasattr(module, "files") else ()
    return found


def reward_cost(name: str, config: RewardConfig) -> Cost | None:
    """What an image takes; None where the reward does not say."""
    module = _module(name)
    found: Cost | None = module.cost(config) if hasattr(module, "cost") else None
    return found


def check_lines(name: str, lines: Iterable[tuple[str, Mapping[str, Any]]], config: RewardConfig | None) -> None:
    """ValueError for the first (prompt, metadata) that this reward cannot score, naming the reward and the prompt."""
    module = _module(name)
    for prompt, metadata in lines if hasattr(module, "check_line") else ():
        try:
            module.check_line(prompt, metadata, config)
        except ValueError as error:
            raise ValueError(f"rewards.{name}: prompt {prompt!r}: {error}") from None


def check_batch(images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> None:
    """Raise a ValueError unless images are uint8 (B, H, W, 3) with one prompt and one metadata each."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or 0 in images.shape[1:3]:
        raise ValueError(f"images must be uint8 (B, H, W, 3), not {images.dtype} {images.shape}")
    if not len(images) == len(prompts) == len(metadata):
        raise ValueError(
            f"{len(images)} images need one prompt and one metadata each, not {len(prompts)} and {len(metadata)}"
        )


def check_scores(scores: Scores, num_images: int) -> Scores:
    """What a reward returned as float32 (B,) arrays; other real numbers are converted: NumPy makes float64 of a float.

    One beyond float32 becomes infinite, and a detail that is becomes NaN. ValueError, without the reward's name, where
    there is not one number per image.
    """
    if not isinstance(scores, Scores):
        raise ValueError(f"returned a {type(scores).__name__}; return nft_ray.rewards.base.Scores")
    rule = "return a dict: name (str) -> float32 (B,)"
    if not isinstance(scores.details, dict):
        raise ValueError(f"returned details as a {type(scores.details).__name__}; {rule}")
    for name in scores.details:
        if not isinstance(name, str):
            raise ValueError(f"returned a detail named {name!r}; {rule}")
    details = {
        name: _column(f"values of the detail {name!r}", array, num_images) for name, array in scores.details.items()
    }
    return Scores(
        values=_column("values", scores.values, num_images),
        details={name: without_infinite(array) for name, array in details.items()},
    )


def without_infinite(array: np.ndarray) -> np.ndarray:
    """NaN in place of what is infinite."""
    infinite = np.isinf(array)
    return np.where(infinite, np.float32(np.nan), array) if infinite.any() else array


def _column(what: str, array: np.ndarray, num_images: int) -> np.ndarray:
    rule = f"for {num_images} images; return float32 ({num_images},)"
    if not isinstance(array, np.ndarray):
        raise ValueError(f"returned {what} as a {type(array).__name__} {rule}")
    if array.shape != (num_images,) or not np.can_cast(array.dtype, np.float32, "same_kind"):
        raise ValueError(f"returned {what} as {array.dtype} {array.shape} {rule}")
    with np.errstate(over="ignore"):
        return array.astype(np.float32, copy=False)


def one_line(error: ValidationError, where: str, *, known: Sequence[str] = ()) -> str:
    """A pydantic error as one line: path, rule and value; the nearest of the `known` keys for an unknown one."""
    problems = []
    for problem in error.errors(include_url=False):
        path = ".".join([where, *map(str, problem["loc"])])
        if problem["type"] == "extra_forbidden":
            problems.append(f"{path}: unknown key{_nearest(str(problem['loc'][-1]), known)}")
        elif problem["type"] == "missing":
            problems.append(f"{path}: missing")
        elif problem["type"] == "value_error" and isinstance(problem["input"], dict):  # not the whole section
            problems.append(f"{path}: {problem['msg'].removeprefix('Value error, ')}")
        else:
            problems.append(f"{path} = {problem['input']!r}: {problem['msg'].removeprefix('Value error, ')}")
    return "; ".join(problems)


def _module(name: str) -> ModuleType:
    names = reward_names()
    if name not in names:
        raise ValueError(f"unknown reward {name!r}{_nearest(name, names)}; known: {', '.join(names)}")
    return importlib.import_module(f"nft_ray.rewards.{name}")


def _nearest(word: str, known: Sequence[str]) -> str:
    match = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {match[0]!r}?" if match else ""
