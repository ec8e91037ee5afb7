"""`nft-ray data` against a server of ours, without a network, and the files that it makes."""

import dataclasses
import hashlib
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from nft_ray.cli.main import main
from nft_ray.downloads import transfer
from nft_ray.prompts import sets as prompt_sets
from nft_ray.prompts.draw import load_prompts
from nft_ray.rewards.geneval import Config, check_line

REPO = Path(__file__).parents[2]
CONTENT = b'a poster that says "ONE"\na poster that says "TWO"\n'


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, list[str], list[str]]:
    status = main(["data", *arguments])
    out, err = capsys.readouterr()
    return status, out.splitlines(), err.splitlines()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The data root."""
    monkeypatch.setattr(transfer, "RETRY_S", 0.01)
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("NFT_RAY_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that stands for the published repository; both OCR sets point to it."""
    folder = tmp_path / "site" / "ocr"
    folder.mkdir(parents=True)
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path / "site"))
    monkeypatch.setattr(SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        sums = {
            "ocr/train": {"sha256": None, "git_sha1": hashlib.sha1(b"blob %d\0" % len(CONTENT) + CONTENT).hexdigest()},
            "ocr/test": {"sha256": hashlib.sha256(CONTENT).hexdigest()},
        }
        for name, pinned in sums.items():
            file = prompt_sets.PUBLISHED[name]
            url = f"http://127.0.0.1:{server.server_address[1]}/{file.path}"
            monkeypatch.setitem(prompt_sets.PUBLISHED, name, dataclasses.replace(file, url=url, **pinned))
        yield folder
        server.shutdown()


def test_fetched_sets_can_be_named(capsys: pytest.CaptureFixture[str], site: Path, home: Path) -> None:
    for name in ("train.txt", "test.txt"):
        (site / name).write_bytes(CONTENT)
    status, out, _ = run(capsys, "fetch", "ocr")
    assert status == 0
    assert out[0] == f"2 files, about 4.8 MiB, into {home}"
    assert [line.partition(":")[0] for line in out[1:]] == ["[1/2] ocr/train.txt", "[2/2] ocr/test.txt"]
    assert all(line.endswith("checksum right") for line in out[1:])
    assert len(load_prompts("ocr/train")) == len(load_prompts("ocr")) == 2
    assert run(capsys, "fetch", "ocr")[1][1:] == ["2 of 2 files are there"]


def test_other_content_is_refused(capsys: pytest.CaptureFixture[str], site: Path, home: Path) -> None:
    for name in ("train.txt", "test.txt"):
        (site / name).write_bytes(CONTENT + b"more\n")
    status, _, err = run(capsys, "fetch", "ocr")
    assert status == 1
    assert "its checksum is" in err[-1]
    assert not list(home.rglob("*.txt"))


def test_without_a_network_it_says_what_to_put_where(
    capsys: pytest.CaptureFixture[str], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = prompt_sets.PUBLISHED["drawbench/test"]
    url = "http://127.0.0.1:9/drawbench/test.txt"
    monkeypatch.setitem(prompt_sets.PUBLISHED, "drawbench/test", dataclasses.replace(file, url=url))
    status, _, err = run(capsys, "fetch", "drawbench")
    assert status == 1
    assert len(err) == 1
    assert "127.0.0.1:9 cannot be reached" in err[0]
    assert err[0].endswith(f"download {url} and put it at {home}/drawbench/test.txt")


def test_an_unknown_set_gets_the_nearest(capsys: pytest.CaptureFixture[str], home: Path) -> None:
    status, _, err = run(capsys, "fetch", "pickscor")
    assert (status, len(err)) == (1, 1)
    assert "did you mean pickscore?" in err[0]


def test_made_prompts_parse(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    target = tmp_path / "made.jsonl"
    status, out, _ = run(capsys, "make", "geneval", "--output", str(target), "--seed", "7", "--per-tag", "5")
    assert status == 0
    assert "30 prompts" in out[-1]
    prompts = load_prompts(str(target)).lines
    assert len(prompts) == 30
    for prompt in prompts:
        check_line(prompt.text, prompt.metadata, Config(detector="mask2former"))


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--output", "made.txt"], "must end in .jsonl"),
        (["--output", "made.jsonl", "--per-tag", "0"], "--per-tag 0: must be at least 1"),
        (["--output", "none/made.jsonl"], "there is no folder none"),
        (["--output", "there.jsonl"], "exists; name another file, or add --overwrite"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str], part: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.jsonl").write_text("kept\n")
    status, _, err = run(capsys, "make", "geneval", *arguments)
    assert (status, len(err)) == (1, 1)
    assert part in err[0]
    assert (tmp_path / "there.jsonl").read_text() == "kept\n"


def test_it_needs_neither_torch_nor_ray(tmp_path: Path) -> None:
    script = (
        "import sys; from nft_ray.cli.main import main; "
        f"main(['data', 'make', 'geneval', '--output', {str(tmp_path / 'a.jsonl')!r}]); "
        "assert not {'torch', 'ray', 'huggingface_hub'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], cwd=REPO, check=True, capture_output=True)
