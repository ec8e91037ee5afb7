"""The page of every field of the YAML, docs/configuration.md, made from the fields themselves.

    python -m nft_ray.config.reference > docs/configuration.md

A test compares that file with what this makes.
"""

import json
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from nft_ray.algorithms.base import AlgorithmConfig, algorithm_names, config_class
from nft_ray.config.experiment import ExperimentConfig
from nft_ray.config.marks import field_mark
from nft_ray.rewards.base import RewardConfig, TorchRewardConfig, reward_class, reward_names
from nft_ray.types import Mark

HEAD = """# Every setting

Made by `python -m nft_ray.config.reference > docs/configuration.md` from the fields themselves; not edited by hand.

What a run may go on with, when it was stopped, is marked: another value of `placement` is nothing; of `rounding` a
warning, for the last bits change; of `result` an error, for it is another experiment
([decision 11](decisions/0011-what-a-setting-may-change.md)). A setting without a default must be given.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One field. `default` is JSON, empty where there is none; `text` the field's docstring on one line."""

    key: str
    default: str
    mark: Mark
    text: str


def reference() -> str:
    """The whole page, as Markdown."""
    tables = [HEAD]
    for name, field in ExperimentConfig.model_fields.items():
        section = _section(field)
        if name == "algorithm":
            common = list(rows(AlgorithmConfig))
            tables.append(_table(name, common))
            classes = {f"{name}, where name is {one}": config_class({"name": one}) for one in algorithm_names()}
            tables += _own(classes, common)
        elif name == "rewards":
            common, torch = list(rows(RewardConfig)), list(rows(TorchRewardConfig))
            tables.append(_table("rewards.NAME", common))
            tables.append(_table("rewards.NAME with a torch model", [row for row in torch if row not in common]))
            tables += _own({f"rewards.{one}": reward_class(one) for one in reward_names()}, torch)
        elif section is not None:
            tables.append(_table(f"{name}.N" if name == "stages" else name, rows(section)))
    return "\n".join(tables)


def rows(section: type[BaseModel], prefix: str = "") -> Iterator[Row]:
    """Its fields, and those of the sections in it as `section.key`. A section that is always there is no row itself."""
    for name, field in section.model_fields.items():
        inner = _section(field)
        if inner is None or not isinstance(field.default, BaseModel):
            default = "" if field.is_required() else json.dumps(field.get_default())
            text = " ".join((field.description or "").split())
            yield Row(key=f"{prefix}{name}", default=default, mark=field_mark(field), text=text)
        if inner is not None:
            yield from rows(inner, f"{prefix}{name}.")


def _own(classes: Mapping[str, type[BaseModel]], common: Collection[Row]) -> Iterator[str]:
    """A table for each class with a setting of its own, or another default than the common one."""
    for title, section in classes.items():
        own = [row for row in rows(section) if row not in common]
        if own:
            yield _table(title, own)


def _section(field: FieldInfo) -> type[BaseModel] | None:
    """The section that a field is, may be, or holds a list of."""
    kinds: list[Any] = [field.annotation]
    while kinds:
        kind = kinds.pop()
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
        kinds += get_args(kind)
    return None


def _table(title: str, found: Iterable[Row]) -> str:
    lines = [f"## {title}", "", "| setting | default | mark | |", "|---|---|---|---|"]
    for row in found:
        default = f"`{row.default}`" if row.default else ""
        lines.append(f"| `{row.key}` | {default} | {row.mark} | {row.text.replace('|', chr(92) + '|')} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    sys.stdout.write(reference())
