"""Reads the marks: what another value of a setting changes. They stand on the fields; see nft_ray.types.Mark.

The mark of a path is that of its last field. A section that is there or not as a whole (`scorers.http`) has its own;
what is free below its field (`runtime_env`) has the field's. A key that nothing is known of is RESULT.
"""

from collections.abc import Collection, Mapping
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from nft_ray.config.composition import STAGED
from nft_ray.config.experiment import ExperimentConfig
from nft_ray.config.loading import resolved
from nft_ray.types import Mark


def field_mark(field: FieldInfo) -> Mark:
    """The mark of one field."""
    return next((mark for mark in field.metadata if isinstance(mark, Mark)), Mark.RESULT)


def mark_of(config: ExperimentConfig, key: str) -> Mark:
    """The mark of a dotted path in the resolved experiment, such as `stages.0.rewards.ocr.num_cpus`."""
    field = field_of(config, key)
    return Mark.RESULT if field is None else field_mark(field)


def field_of(config: ExperimentConfig, key: str) -> FieldInfo | None:
    """The last field on a dotted path; None where nothing is known of it."""
    place: Any = config
    path = key.split(".")
    if path[0] == "stages" and len(path) > 2 and path[2] in STAGED:
        number, path = path[1], path[2:]
        if not (number.isdecimal() and int(number) < len(config.stages)):
            return None
        place = config.stage_configs[int(number)]
    if path[0] == "rewards":
        place, path = place.reward_configs.get(".".join(path[1:2])), path[2:]
    found = None
    for part in path:
        if not isinstance(place, BaseModel):
            break
        field = type(place).model_fields.get(part)
        if field is None:
            return None
        found, place = field, getattr(place, part)
    return found


def essence(section: BaseModel, *, exclude: Collection[str] = ()) -> dict[str, Any]:
    """A section as plain data without its PLACEMENT, at any depth; `exclude` names fields of its own to leave out."""
    plain, found = section.model_dump(mode="json"), {}
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if name not in exclude and field_mark(field) is not Mark.PLACEMENT:
            found[name] = essence(value) if isinstance(value, BaseModel) else plain[name]
    return found


def shared(config: ExperimentConfig) -> dict[str, Any]:
    """The resolved experiment without its PLACEMENT, for other machines; it can be parsed.

    What must be given stays, as does `run.num_epochs`. A field that its section may not do without says an example.
    """
    return _shared(config, resolved(config), "")


def _shared(config: ExperimentConfig, data: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in data.items():
        key = f"{prefix}{name}"
        field = field_of(config, key)
        if field is not None and field_mark(field) is Mark.PLACEMENT:
            if field.examples:
                found[name] = field.examples[0] if value else value
            elif field.is_required() or key == "run.num_epochs":
                found[name] = value
        elif isinstance(value, Mapping):
            found[name] = _shared(config, value, f"{key}.")
        elif key == "stages":
            found[name] = [_shared(config, stage, f"{key}.{number}.") for number, stage in enumerate(value)]
        else:
            found[name] = value
    return found
