"""`nft-ray rewards` where no cluster is needed: one picture in this process, and what is refused."""

import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nft_ray.cli.main import main
from nft_ray.shapes.world import COLORS


@pytest.fixture
def picture(tmp_path: Path) -> str:
    path = tmp_path / "picture.png"
    noise = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    return str(path)


def chunk(data: bytes) -> bytes:
    """Of a PNG: type and content, with length and checksum."""
    return struct.pack(">I", len(data) - 4) + data + struct.pack(">I", zlib.crc32(data))


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, list[str], list[str]]:
    status = main(["rewards", *arguments])
    out, err = capsys.readouterr()
    return status, out.splitlines(), err.splitlines()


def test_one_picture_ends_with_one_line_of_json(capsys: pytest.CaptureFixture[str], picture: str) -> None:
    status, out, _ = run(capsys, "score", "--reward", "jpeg_incompressibility", picture)
    found = json.loads(out[-1])
    assert status == 0
    assert found.keys() == {"reward", "score", "details"}
    assert found["reward"] == "jpeg_incompressibility"
    assert 1 < found["score"] < 10


def test_a_section_and_metadata_can_be_given(capsys: pytest.CaptureFixture[str], picture: str) -> None:
    line = {"tag": "colors", "include": [{"class": "circle", "count": 1, "color": next(iter(COLORS))}]}
    arguments = ["score", "--reward", "geneval", "--set", "detector=shapes", "--metadata", json.dumps(line), picture]
    status, out, _ = run(capsys, *arguments)
    assert status == 0
    assert set(json.loads(out[-1])["details"]) == {"soft", "strict", "correct"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["score", "--reward", "jpeg_compresibility", "PICTURE"], "did you mean 'jpeg_compressibility'"),
        (["score", "--reward", "jpeg_compressibility", "/nowhere.png"], "/nowhere.png: no such file"),
        (["score", "--reward", "jpeg_compressibility", __file__], "is no image that Pillow can read"),
        (["score", "--reward", "jpeg_compressibility", "--metadata", "[1]", "PICTURE"], "must be a JSON object"),
        (["score", "--reward", "jpeg_compressibility", "--metadata", "{", "PICTURE"], "is no JSON"),
        (["score", "--reward", "jpeg_compressibility", "--set", "wieght=1", "PICTURE"], "did you mean 'weight'"),
        (["scale", "geneval"], "give either --replicas N, or --max B"),
        (["scale", "geneval", "--replicas", "2", "--max", "3"], "give either --replicas N, or --max B"),
        (
            ["score", "--reward", "jpeg_compressibility", "BOMB"],
            "cannot be read: Image size (200000000 pixels) exceeds",
        ),
        (["score", "--reward", "jpeg_compressibility", "CUT"], "cannot be read: image file is truncated"),
        (["status", "--address", "127.0.0.1:1"], "no Ray cluster at 127.0.0.1:1 ([Errno 111] Connection refused)"),
        (["fetch", "pickscor"], "did you mean 'pickscore'"),
    ],
)
def test_a_mistake_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, picture: str, arguments: list[str], message: str
) -> None:
    cut, bomb = tmp_path / "cut.png", tmp_path / "bomb.png"
    cut.write_bytes(Path(picture).read_bytes()[:1000])
    width_and_height = struct.pack(">II", 20_000, 10_000)
    bomb.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR" + width_and_height + bytes([8, 0, 0, 0, 0])) + chunk(b"IDAT"))
    files = {"PICTURE": picture, "CUT": str(cut), "BOMB": str(bomb)}
    status, out, err = run(capsys, *[files.get(word, word) for word in arguments])
    assert status == (75 if "no Ray cluster" in message else 1)
    assert not out
    assert len(err) == 1
    assert message in err[0]
