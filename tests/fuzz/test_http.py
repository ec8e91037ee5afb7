"""The HTTP endpoint's pure part: any body and any headers are scored or refused with a status and one line."""

import base64
import io
import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from deployments.http_api import MAX_SIDE, HttpError, check_head, parse
from nft_ray.config import HttpConfig
from tests.fuzz.strategies import TREES, changed, damaged, refused

pytestmark = pytest.mark.slow


def png(width: int = 4, height: int = 3) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (1, 2, 3)).save(buffer, format="PNG")
    return buffer.getvalue()


def encoded(image: bytes) -> str:
    return base64.b64encode(image).decode()


BODY = {"images": [encoded(png()), encoded(png(5))], "prompts": ["a", "b"], "metadata": [{"x": 1}, {}]}
HEADERS = {
    "content-type": "application/json",
    "host": "127.0.0.1:8000",
    "content-length": "12",
    "authorization": "Bearer t",
}


def parses_or_says_why(body: bytes) -> None:
    try:
        parts = parse(body)
    except HttpError as error:
        refused(error)
    else:
        rows = sorted(row for part in parts for row in part[0])
        assert rows == list(range(len(rows)))
        for positions, images, prompts, metadata in parts:
            assert len(positions) == len(images) == len(prompts) == len(metadata)
            assert max(images.shape[1:3]) <= MAX_SIDE
            assert images.shape[3] == 3


@given(
    st.binary(max_size=64)
    | changed(BODY).map(lambda tree: json.dumps(tree).encode())
    | damaged(json.dumps(BODY).encode())
)
@example(b"[" * 100_000)
@example(b"1" * 10_000)
@example(b'{"images": ["\\ud800"], "prompts": ["a"]}')
@example(b'{"images": [1e999], "prompts": ["a"]}')
def test_any_body(body: bytes) -> None:
    parses_or_says_why(body)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "TIFF"])
def test_any_image(format: str) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (1, 2, 3)).save(buffer, format=format)

    @given(damaged(buffer.getvalue()))
    def check(image: bytes) -> None:
        parses_or_says_why(json.dumps({"images": [encoded(image)], "prompts": ["a"]}).encode())

    check()


LATIN = st.text(st.characters(max_codepoint=255), max_size=20)
"""What a server makes of the bytes of a header."""


@given(
    st.sampled_from(["POST", "GET", "", "post", "OPTIONS"]) | st.text(max_size=5),
    st.dictionaries(st.sampled_from(sorted(HEADERS)), LATIN | st.sampled_from(sorted(HEADERS.values()))),
    st.none() | st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
    st.sampled_from(["127.0.0.1", "0.0.0.0", "rewards.example", "::1"]),
)
@example("POST", HEADERS | {"content-length": "9" * 5000}, None, "127.0.0.1")
@example("POST", HEADERS | {"content-length": "\u00b2"}, None, "127.0.0.1")
@example("POST", HEADERS | {"host": "[::1"}, None, "127.0.0.1")
@example("POST", HEADERS | {"host": "\u00e9:x:y"}, None, "127.0.0.1")
def test_any_head(method: str, headers: dict[str, str], token: str | None, host: str) -> None:
    try:
        http = HttpConfig(host=host, token=token)
    except ValueError:
        return  # open to others without a token
    try:
        check_head(method, headers, http)
    except HttpError as error:
        refused(error)
    else:
        assert method == "POST"
        assert headers["content-type"] == "application/json"


@given(TREES)
def test_any_json(tree: object) -> None:
    parses_or_says_why(json.dumps(tree).encode())
