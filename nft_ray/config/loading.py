"""A YAML in, an experiment out, and back. Reading a YAML reads that file and nothing else.

file ──► its profile, --set (composition.py) ──► plain mapping ──► ExperimentConfig ──► YAML again (`dump`)
"""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError
from yaml import YAMLError

from nft_ray.config.composition import compose
from nft_ray.config.errors import explained
from nft_ray.config.experiment import ExperimentConfig
from nft_ray.config.secrets import masked


def load(path: str | Path, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """The experiment in a YAML file, its profile and `a.b=c` overrides; ValueError with one line for what is wrong."""
    try:
        tree: Any = OmegaConf.load(path)
        if not OmegaConf.is_dict(tree):
            raise ValueError(f"config {path}: holds no mapping at the top; start with `run:`")
        tree = compose(tree, overrides)
        data: Any = OmegaConf.to_container(tree, resolve=True)
    except FileNotFoundError:
        raise ValueError(f"config {path}: no such file{_nearest_file(Path(path))}") from None
    except IsADirectoryError:
        raise ValueError(f"config {path}: is a folder; name a .yaml file") from None
    except AssertionError:  # OmegaConf's own of a text or a number alone
        raise ValueError(f"config {path}: holds no mapping at the top; start with `run:`") from None
    except (OmegaConfBaseException, YAMLError, UnicodeDecodeError, RecursionError, OSError) as error:
        raise ValueError(f"config {path}: {' '.join(str(error).split())}") from None
    return parse(data)


def profiles(path: str | Path) -> tuple[str, ...]:
    """Names of the profiles in a YAML file: what `cluster=NAME` may pick."""
    tree: Any = OmegaConf.load(path)
    found: Any = tree.get("profiles") if OmegaConf.is_dict(tree) else None
    return tuple(map(str, found)) if OmegaConf.is_dict(found) else ()


def parse(data: Mapping[str, Any]) -> ExperimentConfig:
    """The experiment in a plain mapping; ValueError with one line naming path, value, rule and the nearest key."""
    try:
        return ExperimentConfig.model_validate(data)
    except ValidationError as error:
        raise ValueError(explained(ExperimentConfig, error)) from None


def dump(config: ExperimentConfig) -> str:
    """The resolved experiment as YAML, defaults included."""
    return OmegaConf.to_yaml(OmegaConf.create(resolved(config)))


def resolved(config: ExperimentConfig) -> dict[str, Any]:
    """The resolved experiment as plain data, for people and files: every default is there, every secret masked."""
    data = config.model_dump(mode="json")
    data["rewards"] = {name: section.model_dump(mode="json") for name, section in config.reward_configs.items()}
    found: dict[str, Any] = masked(data)
    return found


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys at which two resolved experiments differ; in a list of sections, such as stages, `stages.N.key`."""
    keys: list[str] = []
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(a, list) and isinstance(b, list) and len(a) == len(b) and _are_sections([*a, *b]):
            a, b = _numbered(a), _numbered(b)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            keys += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            keys.append(f"{prefix}{key}")
    return keys


def changes(old: Mapping[str, Any], new: Mapping[str, Any], keys: Sequence[str], *, most: int) -> str:
    """What a user is told of the dotted `keys`, the first `most` of them: "a.b = 1 there, 2 here; ..."."""
    shown = [f"{key} = {_at(old, key)!r} there, {_at(new, key)!r} here" for key in keys[:most]]
    return "; ".join([*shown, *(["..."] if len(keys) > most else [])])


def _are_sections(values: Sequence[Any]) -> bool:
    return all(isinstance(value, Mapping) for value in values)


def _numbered(sections: Sequence[Any]) -> dict[str, Any]:
    return {str(number): section for number, section in enumerate(sections)}


def _at(tree: Mapping[str, Any], dotted: str) -> Any:
    value: Any = tree
    for part in dotted.split("."):
        value = _numbered(value) if isinstance(value, list) else value
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _nearest_file(path: Path) -> str:
    folder = path.parent if path.parent.is_dir() else Path()
    known = [str(file) for place in (folder, Path("configs")) for file in sorted(place.glob("*.yaml"))]
    close = difflib.get_close_matches(str(path), known, 1)
    return f"; did you mean {close[0]}?" if close else ""
