"""Downloads from a Hub of ours, a site that names versions and sums as the Hub does; and without any."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import requests

from nft_ray.downloads import transfer as module
from nft_ray.downloads.fetch import fetch
from nft_ray.downloads.published import PublishedFile
from nft_ray.downloads.transfer import PIECE_BYTES
from tests.conftest import free_port
from tests.downloads.misbehaving_site import CONTENT, SHA256, Handler, Site, git_sha1, no_leftovers, serving

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORY = "owner/model"


@pytest.fixture
def hub(site: Site, monkeypatch: pytest.MonkeyPatch) -> Site:
    """The same server as a Hub: large files lie at another host, as at a CDN; small ones are sent at once."""
    from huggingface_hub import constants

    set_endpoint(monkeypatch, site.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return site


def set_endpoint(patch: pytest.MonkeyPatch, url: str) -> None:
    """What HF_ENDPOINT does when huggingface_hub is imported."""
    from huggingface_hub import constants

    patch.setattr(constants, "ENDPOINT", url)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")


def publish(hub: Site, name: str, content: bytes, *, large: bool) -> None:
    cdn = f"http://localhost:{hub.url.rsplit(':', 1)[1]}"
    tag = hashlib.sha256(content).hexdigest() if large else git_sha1(content)
    for revision in ("main", COMMIT):
        path = f"/{REPOSITORY}/resolve/{revision}/{name}"
        hub.headers[path] = {"X-Repo-Commit": COMMIT, "ETag": f'"{tag}"'}
        if large:
            hub.headers[path] |= {"X-Linked-Etag": f'"{tag}"', "X-Linked-Size": str(len(content))}
            hub.redirects[path] = f"{cdn}/cdn/{name}"
            hub.files[f"/cdn/{name}"] = content
        else:
            hub.files[path] = content


def test_large_and_small_files_of_the_hub(hub: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    publish(hub, "model.safetensors", CONTENT, large=True)
    publish(hub, "sub/config.json", b'{"a": 1}', large=False)
    files = [PublishedFile(path=f"{REPOSITORY}/{name}") for name in ("model.safetensors", "sub/config.json")]
    hub.cut_after = [4 * PIECE_BYTES]
    said: list[str] = []
    fetch(files, tmp_path, said.append)
    assert (tmp_path / files[0].path).read_bytes() == CONTENT
    assert (tmp_path / files[1].path).read_bytes() == b'{"a": 1}'
    gets = [asked for asked in hub.asked if asked[0] == "GET"]
    assert [(path, wanted) for _, path, wanted, _, _ in gets] == [
        (f"/{REPOSITORY}/resolve/{COMMIT}/model.safetensors", None),
        ("/cdn/model.safetensors", None),
        (f"/{REPOSITORY}/resolve/{COMMIT}/model.safetensors", f"bytes={4 * PIECE_BYTES}-"),
        ("/cdn/model.safetensors", f"bytes={4 * PIECE_BYTES}-"),
        (f"/{REPOSITORY}/resolve/{COMMIT}/sub/config.json", None),
    ]
    tokens = {path.startswith("/cdn"): authorization for _, path, _, _, authorization in hub.asked}
    assert tokens == {True: None, False: "Bearer hf_secret"}
    assert hub.sent == len(CONTENT) + 8
    assert no_leftovers(tmp_path)
    hub.asked.clear()
    fetch(files, tmp_path, said.append)
    assert hub.asked == []


@pytest.mark.parametrize("large", [True, False])
def test_the_hubs_own_record_is_the_checksum(hub: Site, tmp_path: Path, large: bool) -> None:
    publish(hub, "file", CONTENT, large=large)
    for path in hub.files:
        hub.files[path] = CONTENT[::-1]
    expected = SHA256 if large else git_sha1(CONTENT)
    found = hashlib.sha256(CONTENT[::-1]).hexdigest() if large else git_sha1(CONTENT[::-1])
    with pytest.raises(ValueError, match=f"checksum is {found}, published is {expected}"):
        fetch([PublishedFile(path=f"{REPOSITORY}/file")], tmp_path, lambda _: None)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_pinned_sum_that_the_hub_no_longer_holds_is_not_downloaded(hub: Site, tmp_path: Path) -> None:
    publish(hub, "file", CONTENT, large=True)
    with pytest.raises(ValueError, match=f"its checksum is {SHA256} by now, wanted is {'0' * 64}"):
        fetch([PublishedFile(path=f"{REPOSITORY}/file", sha256="0" * 64)], tmp_path, lambda _: None)
    assert [asked[0] for asked in hub.asked] == ["HEAD"]


def test_a_new_version_at_the_hub_does_not_mix_into_an_old_part(hub: Site, tmp_path: Path) -> None:
    file = PublishedFile(path=f"{REPOSITORY}/file")
    publish(hub, "file", CONTENT, large=True)
    hub.cut_after = [4 * PIECE_BYTES] + [0] * (module.ATTEMPTS - 1)
    with pytest.raises(ValueError):
        fetch([file], tmp_path, lambda _: None)
    publish(hub, "file", CONTENT[::-1], large=True)
    hub.asked.clear()
    fetch([file], tmp_path, lambda _: None)
    assert [asked[2] for asked in hub.asked if asked[0] == "GET"] == [None, None]
    assert (tmp_path / file.path).read_bytes() == CONTENT[::-1]


def test_a_copied_hub_file_is_compared_with_the_hubs_record(hub: Site, tmp_path: Path) -> None:
    publish(hub, "file", CONTENT, large=False)
    file, said = PublishedFile(path=f"{REPOSITORY}/file"), []
    (tmp_path / REPOSITORY).mkdir(parents=True)
    (tmp_path / file.path).write_bytes(CONTENT)
    fetch([file], tmp_path, said.append)
    assert said == [f"[1/1] {file.path}: was there, and is what is published"]
    assert {asked[0] for asked in hub.asked} == {"HEAD"}


@pytest.mark.parametrize(
    ("status", "code", "text"),
    [
        (403, "GatedRepo", f"accept its licence at https://huggingface.co/{REPOSITORY} and set HF_TOKEN"),
        (404, "", "404"),
    ],
)
def test_what_the_hub_refuses(hub: Site, tmp_path: Path, status: int, code: str, text: str) -> None:
    class Refusing(Handler):
        def answer(self, *, body: bool) -> None:
            self.head(status, {"Content-Length": "0", "X-Error-Code": code})

    with serving(hub, Refusing) as url, pytest.MonkeyPatch.context() as patch:
        set_endpoint(patch, url)
        with pytest.raises(ValueError, match=text) as caught:
            fetch([PublishedFile(path=f"{REPOSITORY}/file")], tmp_path, lambda _: None)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("declared", [True, False])
def test_no_hub(hub: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, declared: bool) -> None:
    """HF_HUB_OFFLINE, or nobody at the other end; a file that was copied there is left alone."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", declared)
    set_endpoint(monkeypatch, f"http://127.0.0.1:{free_port()}")
    there, missing = (PublishedFile(path=f"{REPOSITORY}/{name}") for name in ("there", "missing"))
    (tmp_path / REPOSITORY).mkdir(parents=True)
    (tmp_path / there.path).write_bytes(b"as it is")
    said: list[str] = []
    with pytest.raises(ValueError) as caught:
        fetch([there, missing], tmp_path, said.append)
    origin = f"https://huggingface.co/{REPOSITORY}/resolve/main/missing"
    assert f"download {origin} and put it at {tmp_path}/{missing.path}" in str(caught.value)
    assert ("HF_HUB_OFFLINE is set" in str(caught.value)) == declared
    assert "is there but not checked" in said[0]
    assert (tmp_path / there.path).read_bytes() == b"as it is"
    assert hub.asked == []


def test_hf_endpoint_and_hf_token_of_the_environment(hub: Site, tmp_path: Path) -> None:
    publish(hub, "file", CONTENT, large=True)
    script = (
        "import sys; from pathlib import Path; from nft_ray.downloads.fetch import fetch; "
        "from nft_ray.downloads.published import PublishedFile; "
        f"fetch([PublishedFile(path='{REPOSITORY}/file')], Path(sys.argv[1]), print)"
    )
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_other"}
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.endswith("file: 1.0 MiB, checksum right\n")
    assert (tmp_path / REPOSITORY / "file").read_bytes() == CONTENT
    assert {asked[4] for asked in hub.asked if asked[1].startswith(f"/{REPOSITORY}")} == {"Bearer hf_other"}


def test_requests_drops_the_token_at_another_host() -> None:
    """What the CDN test above rests on: 127.0.0.1 and localhost are two hosts to requests."""
    assert requests.Session().should_strip_auth("http://127.0.0.1:1/a", "http://localhost:1/a")
