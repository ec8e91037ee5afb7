"""How a YAML becomes the plain experiment that runs: its profile, the overrides, its stage. Knows no field but these.

    the file  <-  profiles.NAME  <-  --set  <-  stages.N         each lies over what stands to its left

A profile is the same experiment on other hardware: `cluster: NAME` in the file picks it, `--set cluster=NAME` another.
What comes out holds neither the profiles nor the name, so the resolved YAML of a run shows what was run.

A stage is a part of a run in which something is different. It is merged key by key; only `rewards` is a choice: a
stage that has it uses exactly the rewards that it names, each with the experiment's own section under what the stage
says of it. So is `algorithm` where the stage names another one: fields of one mean nothing to another. What belongs to
the whole run is not in `STAGED`, or among `WORKERS`.
"""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

STAGED = ("prompts", "sampler", "learner", "algorithm", "rewards", "scorers", "evaluation")
"""Sections that a stage may override."""
WORKERS = ("num_workers", "min_workers", "max_workers", "num_cpus", "num_gpus")
"""Keys of sampler and learner that it may not: the run has one placement."""


def compose(tree: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """The tree of a YAML with its profile and the `key=value` overrides over it.

    `stages.0.key=value` reaches into a list. Raises ValueError for an override that is none and an unknown profile.
    """
    profiles = tree.pop("profiles", None)
    names = [tree.pop("cluster")] if isinstance(tree.get("cluster"), str) else []
    others = []
    for override in overrides:
        key, value = _parsed(override)
        if key == "cluster" and isinstance(value, str):
            names.append(value)
        else:
            others.append((override, key, value))
    if names:
        tree.merge_with(_profile(profiles, names[-1]))
    for override, key, value in others:
        if key.startswith("stages."):
            _override_stage(tree, key, value)
        else:
            tree.merge_with(OmegaConf.from_dotlist([override]))
    return tree


def stage_data(experiment: Mapping[str, Any], number: int) -> dict[str, Any]:
    """The experiment that stage `number` runs, without stages; its `run.num_epochs` is the epoch at which it ends."""
    stages = experiment["stages"]
    stage = {section: stages[number][section] for section in STAGED if stages[number].get(section) is not None}
    chosen = stage.pop("rewards", None)
    named = stage.get("algorithm", {}).get("name")
    if named is not None and named != experiment["algorithm"]["name"]:
        experiment = {**experiment, "algorithm": {}}
    made = _merged({key: value for key, value in experiment.items() if key != "stages"}, stage)
    if chosen is not None:
        known = experiment["rewards"]
        made["rewards"] = {name: _merged(known.get(name) or {}, section) for name, section in chosen.items()}
    end = sum(one["num_epochs"] for one in stages[: number + 1])
    return made | {"run": {**experiment["run"], "num_epochs": end}}


def _parsed(override: str) -> tuple[str, Any]:
    """(key, value read as YAML)."""
    key, sign, value = override.partition("=")
    if not (key and sign):
        raise ValueError(f"--set {override}: write key=value, such as --set run.seed=1")
    return key, OmegaConf.from_dotlist([f"value={value}"])["value"]


def _override_stage(tree: DictConfig, key: str, value: Any) -> None:
    stages = tree.get("stages")
    num_stages = len(stages) if OmegaConf.is_list(stages) else 0
    _, index, *inner = key.split(".", 2)
    if not (index.isdigit() and int(index) < num_stages and inner):
        raise ValueError(f"--set {key}: there are {num_stages} stages; write stages.N.key with N from 0")
    OmegaConf.update(stages[int(index)], inner[0], value, merge=True)


def _profile(profiles: Any, name: str) -> DictConfig:
    if profiles is None:
        raise ValueError(f"cluster = {name!r}: this file has no profiles; write a mapping, such as cluster.num_cpus=2")
    if not OmegaConf.is_dict(profiles) or not all(OmegaConf.is_dict(profile) for profile in profiles.values()):
        raise ValueError("profiles: must be a mapping of names, each with what it changes of the experiment")
    if name not in profiles:
        close = difflib.get_close_matches(name, list(profiles), 1)
        hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(profiles)}"
        raise ValueError(f"cluster = {name!r}: no such profile; {hint}")
    chosen: DictConfig = profiles[name]
    return chosen


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`above` over `below`, key by key down to what is no mapping."""
    made = dict(below)
    for key, value in above.items():
        known = made.get(key)
        made[key] = _merged(known, value) if isinstance(known, Mapping) and isinstance(value, Mapping) else value
    return made
