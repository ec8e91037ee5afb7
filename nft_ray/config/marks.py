"""Reads the marks: what another value of a setting changes. They stand on the fields; see nft_ray.types.Mark.

The mark of a path is that of its last field. A section that is there or not as a whole (`scorers.http`) has its own;
what is free below its field (`runtime_env`) has the field's. A key that nothing is known of is RESULT.
"""

from collections.abc import Collection
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from nft_ray.config.composition import STAGED
from nft_ray.config.experiment import ExperimentConfig
from nft_ray.types import Mark


def field_mark(field: FieldInfo) -> Mark:
    """The mark of one field."""
    return next((mark for mark in field.metadata if isinstance(mark, Mark)), Mark.RESULT)


def mark_of(config: ExperimentConfig, key: str) -> Mark:
    """The mark of a dotted path in the resolved experiment, such as `stages.0.rewards.ocr.num_cpus`."""
    place: Any = config
    path = key.split(".")
    if path[0] == "stages" and len(path) > 2 and path[2] in STAGED:
        number, path = path[1], path[2:]
        if not (number.isdecimal() and int(number) < len(config.stages)):
            return Mark.RESULT
        place = config.stage_configs[int(number)]
    if path[0] == "rewards":
        place, path = place.reward_configs.get(".".join(path[1:2])), path[2:]
    found = Mark.RESULT
    for part in path:
        if not isinstance(place, BaseModel):
            break
        field = type(place).model_fields.get(part)
        if field is None:
            return Mark.RESULT
        found, place = field_mark(field), getattr(place, part)
    return found


def essence(section: BaseModel, *, exclude: Collection[str] = ()) -> dict[str, Any]:
    """A section as plain data without its PLACEMENT, at any depth; `exclude` names fields of its own to leave out."""
    plain, found = section.model_dump(mode="json"), {}
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if name not in exclude and field_mark(field) is not Mark.PLACEMENT:
            found[name] = essence(value) if isinstance(value, BaseModel) else plain[name]
    return found
