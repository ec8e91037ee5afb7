"""What must not be shown or stored of an experiment: passwords in addresses, tokens, the values of env_vars.

Masked is what leaves the process as text (`resolved`, `dump`, errors); the experiment itself keeps the values. Pure.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import SecretStr

MASK = "**********"
"""As pydantic writes a SecretStr."""
_USERINFO = re.compile(r"(?<=://)[^/@\s?#'\"]+(?=@)")
_USERINFO_OF_URI = re.compile(r"(?<=://).+(?=@)")
"""Where the whole text is an address: a password may hold a slash there."""
_PARAMETER = re.compile(r"(?i)([?&][\w.-]*(?:password|passwd|pwd|token|secret|key|signature)[\w.-]*=)[^&\s'\"]+")


def masked_text(text: str) -> str:
    """A text without the user and password of any URL in it, and without parameters that are named as secrets."""
    return _PARAMETER.sub(rf"\g<1>{MASK}", _USERINFO.sub(MASK, text))


def masked_uri(uri: str) -> str:
    """An address, such as `tracking.uri`, without user, password and secret parameters."""
    return masked_text(_USERINFO_OF_URI.sub(MASK, uri))


def without_userinfo(text: str, uri: str) -> str:
    """A text in which the user and password of this address may stand, without them."""
    found = _USERINFO_OF_URI.search(uri)
    return text.replace(found[0], MASK) if found else text


def masked(value: Any, name: str = "") -> Any:
    """Plain data with every secret in it replaced, wherever it stands; `name`: the key that it stands under."""
    if isinstance(value, Mapping):
        if name == "env_vars":
            return dict.fromkeys(value, MASK)
        return {key: masked(part, str(key)) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [masked(part) for part in value]
    if name == "token" and value is not None:
        return MASK
    if not isinstance(value, str):
        return value
    return masked_uri(value) if name == "uri" else masked_text(value)


def lost(value: Any, prefix: str = "") -> Iterator[str]:
    """Dotted keys at which an experiment holds a mask: it was read from where it had been stored."""
    if isinstance(value, SecretStr):
        value = value.get_secret_value()
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from lost(part, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, list | tuple):
        for number, part in enumerate(value):
            yield from lost(part, f"{prefix}.{number}")
    elif isinstance(value, str) and MASK in value:
        yield prefix
