"""The HTTP side of a reward: `POST /NAME`, JSON in, JSON out, nothing of Ray. README, "Rewards over HTTP".

    {"images": ["<base64 of a PNG, JPEG or WebP>", ...], "prompts": ["...", ...], "metadata": [{...}, ...]}
    -> 200 {"reward": "ocr", "scores": [0.8, null], "details": {"exact": [0.0, null]}}        null = missing
    -> 400 | 401 | 403 | 405 | 413 | 415 {"error": "one line: what is wrong and what the rule is"}

`metadata` may be left out. Images of one request may differ in size. A score does not depend on what it is sent with.

No web page can make it score. What a page may send anywhere unasked is a form or plain text, never
`Content-Type: application/json`; and a page whose own name was made to point here (DNS rebinding) sends that name as
`Host`, where only loopback's and `scorers.http.host` are taken. A host of 0.0.0.0 is open, has a token, and any name.
"""

import base64
import binascii
import hmac
import io
import json
import math
from collections.abc import AsyncIterable, Mapping
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nft_ray.config import HttpConfig
from nft_ray.rewards.base import Scores, one_line
from nft_ray.rewards.servers import LOOPBACK

MAX_BODY_BYTES = 64 * 2**20
MAX_IMAGES = 64
MAX_SIDE = 4096
"""Pixels; checked before an image is decoded, like the next."""
MAX_PIXELS = 64 * 1024 * 1024
"""Of all images of a request: 64 of 1024 x 1024. Blank ones of a few kB each would else fill the memory."""
FORMATS = ("PNG", "JPEG", "WEBP")
OPEN = ("0.0.0.0", "::")


class HttpError(Exception):
    """A request that is refused: status 4xx and the reason."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, " ".join(reason.split())  # a key of the request may hold line breaks


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    images: list[str] = Field(min_length=1, max_length=MAX_IMAGES)
    prompts: list[str]
    metadata: list[dict[str, Any]] | None = None


def check_head(method: str, headers: Mapping[str, str], http: HttpConfig) -> None:
    """HttpError before the body is read: no POST, another host, no or a wrong token, no JSON, too large.

    The names of `headers` are in lower case.
    """
    if http.host not in OPEN and (named := _host(headers.get("host", ""))) not in {*LOOPBACK, http.host.lower()}:
        raise HttpError(403, f"the Host header names {named[:100]!r}: only loopback and scorers.http.host are served")
    token = http.token.get_secret_value() if http.token else None
    if method != "POST":
        raise HttpError(405, f"{method} is not served: POST a JSON object with images and prompts")
    if token is not None and not hmac.compare_digest(headers.get("authorization", "").encode(), _bearer(token)):
        raise HttpError(401, "no or a wrong token: send the header `Authorization: Bearer TOKEN`")
    if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise HttpError(415, "the body is no JSON: send the header `Content-Type: application/json`")
    length = headers.get("content-length", "")
    if length.isascii() and length.isdigit():  # a superscript two is a digit, and no number
        check_size(int(length[:20]))


async def read(pieces: AsyncIterable[bytes]) -> bytes:
    """The body, which need not say how long it is; HttpError as soon as it is too large."""
    body = bytearray()
    async for piece in pieces:
        body += piece
        check_size(len(body))
    return bytes(body)


def check_size(num_bytes: int) -> None:
    """HttpError where a body is too large."""
    if num_bytes > MAX_BODY_BYTES:
        raise HttpError(413, f"the body has {num_bytes} bytes; at most {MAX_BODY_BYTES} are read: send fewer images")


def parse(body: bytes) -> list[tuple[list[int], np.ndarray, list[str], list[dict[str, Any]]]]:
    """The request as batches of equally large images: (positions, images uint8 (B, H, W, 3), prompts, metadata).

    Raises HttpError 400 or 413 naming the field, the rule and the position.
    """
    check_size(len(body))
    try:
        data = _Body.model_validate(json.loads(body))
    except ValidationError as error:
        raise HttpError(400, one_line(error, "body", known=list(_Body.model_fields))[:500]) from None
    except (ValueError, RecursionError) as error:  # no JSON, no Unicode, a number of 5000 digits, brackets without end
        raise HttpError(400, f"the body is no JSON: {error}") from None
    metadata = data.metadata if data.metadata is not None else [{} for _ in data.images]
    if not len(data.images) == len(data.prompts) == len(metadata):
        raise HttpError(
            400,
            f"{len(data.images)} images need as many prompts and metadata, not {len(data.prompts)} and {len(metadata)}",
        )
    for index, prompt in enumerate(data.prompts):
        if not prompt.isascii() and any("\ud800" <= character <= "\udfff" for character in prompt):
            raise HttpError(400, f"body.prompts.{index}: half a surrogate pair is no character")
    images = _decoded(data.images)
    by_size: dict[tuple[int, ...], list[int]] = {}
    for index, image in enumerate(images):
        by_size.setdefault(image.shape, []).append(index)
    return [
        (rows, np.stack([images[i] for i in rows]), [data.prompts[i] for i in rows], [metadata[i] for i in rows])
        for rows in by_size.values()
    ]


def answer(name: str, num_images: int, parts: list[tuple[list[int], Scores]]) -> dict[str, Any]:
    """The JSON of the answer, in the order of the request; NaN is null, which JSON has."""
    details = sorted({detail for _, scores in parts for detail in scores.details})
    values: list[float | None] = [None] * num_images
    columns: dict[str, list[float | None]] = {detail: [None] * num_images for detail in details}
    for rows, scores in parts:
        for position, row in enumerate(rows):
            values[row] = _number(scores.values[position])
            for detail, column in scores.details.items():
                columns[detail][row] = _number(column[position])
    return {"reward": name, "scores": values, "details": columns}


def _decoded(texts: list[str]) -> list[np.ndarray]:
    images: list[np.ndarray] = []
    for index, text in enumerate(texts):
        images.append(_decode(index, text, MAX_PIXELS - sum(image.shape[0] * image.shape[1] for image in images)))
    return images


def _decode(index: int, text: str, room: int) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=FORMATS) as image:
            if max(image.size) > MAX_SIDE:
                raise HttpError(
                    413, f"images.{index} has {image.width} x {image.height} pixels; at most {MAX_SIDE} a side"
                )
            if image.width * image.height > room:
                raise HttpError(413, f"images.{index}: with it there are more than {MAX_PIXELS} pixels; send fewer")
            return np.asarray(image.convert("RGB"))
    except binascii.Error:
        raise HttpError(400, f"images.{index} is not base64") from None
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError):
        raise HttpError(400, f"images.{index} is no whole {', '.join(FORMATS)} image") from None


def _number(value: Any) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None


def _host(header: str) -> str:
    """Without its port, and the brackets of an IPv6 address."""
    name = header.strip().lower()
    if name.startswith("["):
        return name[1:].partition("]")[0]
    return name.partition(":")[0]


def _bearer(token: str) -> bytes:
    return f"Bearer {token}".encode()
