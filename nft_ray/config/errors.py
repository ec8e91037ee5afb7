"""What pydantic found wrong, as one line that names path, value, rule and the nearest known key."""

import difflib
from collections.abc import Sequence
from typing import Any, get_args, get_type_hints

from pydantic import BaseModel, ValidationError

from nft_ray.config.secrets import masked


def explained(model: type[BaseModel], error: ValidationError, section: str = "") -> str:
    """The first three problems, on one line; `section`: where the model stands in the experiment."""
    return "; ".join(one_line(model, detail, section) for detail in error.errors()[:3])


def one_line(model: type[BaseModel], detail: Any, section: str = "") -> str:
    """One problem of pydantic's list."""
    path = [part for part in detail["loc"] if not str(part).startswith("<")] or list(detail["loc"])
    where = ".".join(str(part) for part in ([section, *path] if section else path))
    if detail["type"] == "extra_forbidden":
        known = _keys_at(model, path[:-1])
        close = difflib.get_close_matches(str(path[-1]), known, 1)
        hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"
        return f"{where}: unknown key; {hint}"
    message = str(detail["msg"]).removeprefix("Value error, ")
    if not where or message.startswith(f"{where}."):  # a section that was checked by a model of its own has said it
        return message
    if detail["type"] == "missing" or (detail["input"] and isinstance(detail["input"], dict)):  # not a whole section
        return f"{where}: {message}"
    name = "env_vars" if "env_vars" in path else str(path[-1])
    return f"{where} = {masked(detail['input'], name)!r}: {message}"


def _keys_at(model: type[BaseModel], path: Sequence[Any]) -> list[str]:
    for part in path:
        hint = get_type_hints(model).get(str(part))
        nested = [kind for kind in (hint, *get_args(hint)) if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if not nested:
            break
        model = nested[0]
    return list(model.model_fields)
