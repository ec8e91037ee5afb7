"""What `nft-ray evaluate` is asked for: an experiment, with other prompts, rewards and weights in it.

Where a reward runs, the YAML says. One that it does not name gets a place like this: if it needs a GPU and the
experiment's own rewards have some, all that are asked share those evenly; if only the samplers have GPUs, it is
refused with what to write; without GPUs everything runs on CPUs. What --set says of a reward's place stays.
"""

import math
from collections.abc import Collection, Mapping
from typing import Any

from nft_ray.config import ExperimentConfig, parse
from nft_ray.models.layers import check_layers, check_weights
from nft_ray.prompts.sets import DATASETS, PACKAGED, PUBLISHED
from nft_ray.rewards.base import RewardConfig, TorchRewardConfig, reward_config, reward_files
from nft_ray.runs.lora_source import find_source
from nft_ray.types import Weights

PREFERENCE = ("pickscore", "clipscore", "hpsv2", "aesthetic", "imagereward", "unified_reward")
DATASET_REWARDS = {"geneval": ("geneval",), "ocr": ("ocr",), "pickscore": PREFERENCE, "drawbench": PREFERENCE}
"""The rewards that a data set is scored with; any other prompts: those of the experiment."""
SECTIONS: dict[str, dict[str, Any]] = {"geneval": {"detector": "mask2former"}}
"""Where the experiment says nothing about a reward of a data set and it has a field without a default."""
PLACE = {"num_gpus", "device"}
"""Fields by which a section says where its model runs."""
SHARE = PLACE | {"num_replicas", "autoscaling"}
"""With those by which it says how much of the cards it takes."""
GPU_UNITS = 10_000
"""Ray counts GPUs in units of 1e-4."""


def asked_experiment(
    config: ExperimentConfig,
    *,
    dataset: str | None,
    rewards: Collection[str],
    touched: Mapping[str, Collection[str]],
) -> ExperimentConfig:
    """The experiment of an evaluation, checked as a whole; its rewards are those to ask, each with a weight.

    rewards: their names; none = those of `dataset`, and where it has none, all of the experiment. touched: reward name
    -> the fields that --set says of it. ValueError with one line.
    """
    names = rewards or rewards_of(dataset) or tuple(config.rewards)
    sections = {name: config.rewards.get(name) or SECTIONS.get(name) or {} for name in names}
    wanted = {
        name: _checked(name, section, by_dataset=not rewards and name not in config.rewards)
        for name, section in sections.items()
    }
    places = gpu_places(config, wanted, touched)
    alike = {"weight": 1.0, "eval_only": False}
    tree = config.model_dump() | {"stages": ()}
    tree["rewards"] = {name: {**section, **places.get(name, {}), **alike} for name, section in sections.items()}
    if dataset:
        tree["prompts"] = {**tree["prompts"], "test": dataset}
    return parse(tree)


def rewards_of(dataset: str | None) -> tuple[str, ...]:
    """The rewards of a data set that has a name (`geneval`, `geneval/train`, `small/geneval`); none for a file."""
    if dataset not in (*PACKAGED, *PUBLISHED, *DATASETS):
        return ()
    return next((DATASET_REWARDS[part] for part in dataset.split("/") if part in DATASET_REWARDS), ())


def gpu_places(
    config: ExperimentConfig, wanted: Mapping[str, RewardConfig], touched: Mapping[str, Collection[str]]
) -> dict[str, dict[str, Any]]:
    """Reward name -> what its section lacks of a place; empty where every wanted reward has one, or nothing has a GPU.

    The cards to share are those of the rewards that the YAML says something of, but for what --set gave one by hand.
    ValueError with the --set lines where the experiment's samplers have GPUs and its rewards have none to share.
    """
    own = {
        name: reward
        for name, reward in config.reward_configs.items()
        if name not in touched or reward.model_fields_set - set(touched[name])  # the YAML says something of it, too
    }
    homeless = [name for name, reward in wanted.items() if _needs_gpu(name, reward) and name not in own]
    homeless = [name for name in homeless if not PLACE & set(touched.get(name, ()))]
    by_hand = {name for name in wanted if SHARE & set(touched.get(name, ()))}
    own = {name: reward for name, reward in own.items() if name not in by_hand}
    cards = sum(_num_replicas(reward) * reward.num_gpus for reward in own.values())
    if not homeless or not (cards or config.sampler.num_gpus):
        return {}
    if not cards:
        lines = " ".join(f"--set rewards.{name}.num_gpus=0.2" for name in homeless)
        raise ValueError(
            f"rewards {', '.join(homeless)}: the samplers have GPUs, and the experiment says of these no place, so "
            f"each would run on one CPU core; say it: {lines} (0 = that it is meant)"
        )
    sharing = [*homeless, *(name for name in wanted if name in own and own[name].num_gpus)]
    each = math.floor(round(cards / len(sharing) * GPU_UNITS, 6)) / GPU_UNITS
    place = {"num_gpus": min(each, 1.0), "num_replicas": max(1, math.floor(each)), "autoscaling": None}
    return dict.fromkeys(sharing, place)


def with_policy(config: ExperimentConfig, name: str | None) -> tuple[ExperimentConfig, Weights | None]:
    """What `--lora` names, and the experiment with its rank, alpha and layers in it; None = the base model.

    ValueError with one line where there is none, it changes nothing, or it is for another model.
    """
    if name is None:
        return config, None
    source = find_source(name)
    from nft_ray.models.full import read_full
    from nft_ray.models.lora import read_lora  # bring torch

    weights = read_full(source)
    if weights is not None:  # of a run with model.tuning: full
        check_weights(_shapes(weights), config.model, name)
        return _with_model(config, tuning="full"), weights
    weights, lora = read_lora(source)
    if not any(weights[tensor].any() for tensor in weights if ".lora_B." in tensor):
        raise ValueError(f"--lora {name}: every lora_B is 0: it changes nothing; leave --lora out for the base model")
    check_layers(_shapes(weights), config.model, name)
    return _with_model(config, lora=lora, tuning="lora"), weights


def _shapes(weights: Weights) -> dict[str, tuple[int, ...]]:
    return {name: value.shape for name, value in weights.items()}


def _with_model(config: ExperimentConfig, **changes: Any) -> ExperimentConfig:
    return config.model_copy(update={"model": config.model.model_copy(update=changes)})


def _checked(name: str, section: dict[str, Any], *, by_dataset: bool) -> RewardConfig:
    try:
        return reward_config(name, section)
    except ValueError as error:
        if not by_dataset:
            raise
        raise ValueError(
            f"{error}; the data set asks for {name}: write its section with --set rewards.{name}.KEY=VALUE, or name "
            "the rewards that are wanted with --rewards"
        ) from None


def _needs_gpu(name: str, reward: RewardConfig) -> bool:
    """Has it a torch model, of published files? (GenEval's detector of the embedded world has none.)"""
    return isinstance(reward, TorchRewardConfig) and bool(reward_files(name, reward))


def _num_replicas(reward: RewardConfig) -> int:
    return reward.autoscaling.max_replicas if reward.autoscaling else reward.num_replicas
