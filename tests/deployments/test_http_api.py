"""What is refused over HTTP, with which status and words, and that an answer keeps the order of its request."""

import asyncio
import base64
import io
import json
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import SecretStr

from deployments.http_api import MAX_BODY_BYTES, MAX_IMAGES, MAX_SIDE, HttpError, answer, check_head, parse, read
from nft_ray.config import HttpConfig
from nft_ray.rewards.base import Scores


def encoded(height: int, width: int, value: int = 0, image_format: str = "PNG") -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (value, value, value)).save(buffer, format=image_format)
    return base64.b64encode(buffer.getvalue()).decode()


BLANK = encoded(4096, 4096)
"""50 MB in 63 kB."""


def body(**fields: Any) -> bytes:
    return json.dumps({"images": [encoded(4, 6)], "prompts": ["p"]} | fields).encode()


def test_images_are_sorted_by_size_with_their_prompts() -> None:
    pictures = [encoded(4, 6, 1), encoded(8, 8, 2), encoded(4, 6, 3)]
    metadata = [{"n": 0}, {"n": 1}, {"n": 2}]
    parts = parse(body(images=pictures, prompts=["a", "b", "c"], metadata=metadata))
    assert [(rows, images.shape, prompts) for rows, images, prompts, _ in parts] == [
        ([0, 2], (2, 4, 6, 3), ["a", "c"]),
        ([1], (1, 8, 8, 3), ["b"]),
    ]
    assert parts[0][1][:, 0, 0, 0].tolist() == [1, 3]
    assert [line["n"] for line in parts[0][3]] == [0, 2]


def test_metadata_may_be_left_out() -> None:
    assert parse(body())[0][3] == [{}]


def test_an_answer_is_in_the_order_of_the_request_and_missing_is_null() -> None:
    first = Scores(values=np.array([1, np.nan], np.float32), details={"x": np.array([5, 6], np.float32)})
    second = Scores(values=np.array([3], np.float32))
    found = answer("ocr", 3, [([0, 2], first), ([1], second)])
    assert found == {"reward": "ocr", "scores": [1.0, 3.0, None], "details": {"x": [5.0, None, 6.0]}}
    assert json.loads(json.dumps(found, allow_nan=False)) == found


@pytest.mark.parametrize(
    ("data", "status", "reason"),
    [
        (b"{", 400, "the body is no JSON"),
        (b"\xff", 400, "the body is no JSON"),
        (b"[]", 400, "body"),
        (body(images=[]), 400, r"body\.images = \[\]"),
        (body(images=[encoded(4, 6)] * (MAX_IMAGES + 1)), 400, r"body\.images"),
        (body(image="x"), 400, r"body\.image: unknown key; did you mean 'images'\?"),
        (body(prompts=["p", "q"]), 400, "1 images need as many prompts and metadata, not 2 and 1"),
        (body(metadata=[]), 400, "1 images need as many prompts and metadata, not 1 and 0"),
        (body(images=["not base64!"]), 400, r"images\.0 is not base64"),
        (body(images=[base64.b64encode(b"no image").decode()]), 400, r"images\.0 is no whole PNG, JPEG, WEBP image"),
        (body(images=[encoded(64, 64, 9)[:80]]), 400, r"images\.0 is no whole"),
        (body(images=[encoded(4, 6, image_format="GIF")]), 400, r"images\.0 is no whole"),
        (
            body(images=[encoded(1, MAX_SIDE + 1)]),
            413,
            rf"images\.0 has {MAX_SIDE + 1} x 1 pixels; at most 4096 a side",
        ),
        (body(images=[BLANK] * 5, prompts=["p"] * 5), 413, r"images\.4: with it there are more than 67108864 pixels"),
        (b"[" * 100_000, 400, "the body is no JSON"),
        (body(metadata=[{"n": 1}]).replace(b"1", b"1" * 5000), 400, "the body is no JSON"),
        (body(prompts=["\ud800"]), 400, r"body\.prompts\.0: half a surrogate pair"),
    ],
)
def test_a_bad_body_is_refused_with_its_reason(data: bytes, status: int, reason: str) -> None:
    with pytest.raises(HttpError, match=f"^{reason}") as refused:
        parse(data)
    assert refused.value.status == status
    assert "\n" not in refused.value.reason
    assert len(refused.value.reason) < 600


HEAD = {"host": "localhost:8000", "content-type": "application/json"}


@pytest.mark.parametrize(
    ("method", "headers", "http", "status"),
    [
        ("GET", {}, {}, 405),
        ("OPTIONS", {}, {}, 405),  # what a browser asks before a page may send JSON elsewhere
        ("POST", {"content-length": str(MAX_BODY_BYTES + 1)}, {}, 413),
        ("POST", {}, {"token": "secret"}, 401),
        ("POST", {"authorization": "Bearer wrong"}, {"token": "secret"}, 401),
        ("POST", {"authorization": "secret"}, {"token": "secret"}, 401),
        ("POST", {"content-type": "text/plain"}, {}, 415),
        ("POST", {"content-type": "application/x-www-form-urlencoded"}, {}, 415),
        ("POST", {"content-type": ""}, {}, 415),
        ("POST", {"host": "evil.example:8000"}, {}, 403),
        ("POST", {"host": "127.0.0.1.evil.example"}, {}, 403),
        ("POST", {"host": ""}, {}, 403),
        ("POST", {"host": "evil.example", "authorization": "Bearer secret"}, {"token": "secret"}, 403),
        ("POST", {"host": "evil.example", "authorization": "no"}, {"token": "secret", "host": "0.0.0.0"}, 401),
    ],
)
def test_a_bad_head_is_refused_before_the_body_is_read(
    method: str, headers: dict[str, str], http: dict[str, Any], status: int
) -> None:
    with pytest.raises(HttpError) as refused:
        check_head(method, HEAD | headers, HttpConfig(**http))
    assert refused.value.status == status
    assert "secret" not in refused.value.reason
    assert "\n" not in refused.value.reason


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:8000", "[::1]:8000", "LOCALHOST:80", "10.0.0.7:8000"])
def test_a_good_head_passes(host: str) -> None:
    token = {"authorization": "Bearer secret", "content-length": "100"}
    check_head("POST", HEAD | token | {"host": host}, HttpConfig(host="10.0.0.7", token=SecretStr("secret")))
    if host != "10.0.0.7:8000":
        check_head("POST", {"host": host, "content-type": "Application/JSON; charset=utf-8"}, HttpConfig())


def test_a_host_that_is_open_is_asked_by_any_name() -> None:
    http = HttpConfig(host="0.0.0.0", token=SecretStr("secret"))
    check_head("POST", HEAD | {"host": "gpu.example:8000", "authorization": "Bearer secret"}, http)


def test_a_body_that_does_not_say_its_size_is_not_read_to_its_end() -> None:
    sent = []

    async def pieces() -> AsyncIterator[bytes]:
        for number in range(2 * MAX_BODY_BYTES // 2**20):
            sent.append(number)
            yield b" " * 2**20

    with pytest.raises(HttpError) as refused:
        asyncio.run(read(pieces()))
    assert refused.value.status == 413
    assert len(sent) == MAX_BODY_BYTES // 2**20 + 1


def test_a_body_comes_in_pieces() -> None:
    async def pieces() -> AsyncIterator[bytes]:
        yield b"{"
        yield b"}"

    assert asyncio.run(read(pieces())) == b"{}"
