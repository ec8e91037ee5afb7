"""Downloads against a server of ours: ranges, cut connections, changed files, wrong sums, a Hub, no network."""

import dataclasses
import hashlib
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import requests

from nft_ray.downloads import transfer as module
from nft_ray.downloads.fetch import fetch
from nft_ray.downloads.published import PublishedFile
from nft_ray.downloads.transfer import PIECE_BYTES
from tests.conftest import free_port

CONTENT = bytes(range(256)) * 4096  # 1 MiB
SHA256 = hashlib.sha256(CONTENT).hexdigest()
COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORY = "owner/model"


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


@dataclass
class Site:
    """What a server holds, how it misbehaves, and what it was asked for."""

    files: dict[str, bytes] = field(default_factory=dict)
    headers: dict[str, dict[str, str]] = field(default_factory=dict)
    """More headers by path, of every answer; `Status` is the status."""
    redirects: dict[str, str] = field(default_factory=dict)
    cut_after: list[int] = field(default_factory=list)
    """The next GETs break after so many bytes each."""
    statuses: list[int] = field(default_factory=list)
    """The next GETs are answered by these."""
    asked: list[tuple[str, str, str | None, str | None, str | None]] = field(default_factory=list)
    """(method, path, Range, If-Range, Authorization)."""
    sent: int = 0
    url: str = ""


class Handler(BaseHTTPRequestHandler):
    site: Site

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        if self.path.startswith("/api/"):  # huggingface_hub asks for a list of its own, now and then
            return self.head(404, {"Content-Length": "0"})
        site, wanted = self.site, self.headers.get("Range")
        authorization, condition = self.headers.get("Authorization"), self.headers.get("If-Range")
        site.asked.append((self.command, self.path, wanted, condition, authorization))
        assert self.headers.get("Accept-Encoding") == "identity"
        more = site.headers.get(self.path, {})
        if body and site.statuses:
            return self.head(site.statuses.pop(0), {"Content-Length": "0"})
        if self.path in site.redirects:
            return self.head(302, {**more, "Location": site.redirects[self.path], "Content-Length": "0"})
        if self.path not in site.files:
            return self.head(404, {"Content-Length": "0", "X-Error-Code": "EntryNotFound"})
        content = site.files[self.path]
        start = 0
        if wanted and condition in (None, more.get("ETag"), more.get("Last-Modified")):
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            if start >= len(content):
                return self.head(416, {"Content-Range": f"bytes */{len(content)}", "Content-Length": "0"})
            more = {**more, "Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
        piece = content[start:]
        self.head(206 if start else 200, {**more, "Content-Length": str(len(piece))})
        if body:
            cut = site.cut_after.pop(0) if site.cut_after else len(piece)
            self.wfile.write(piece[:cut])
            site.sent += min(cut, len(piece))
            if cut < len(piece):
                self.wfile.flush()
                self.connection.shutdown(socket.SHUT_RDWR)

    def head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def site() -> Iterator[Site]:
    site = Site()
    handler = type("OurHandler", (Handler,), {"site": site})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        site.url = f"http://127.0.0.1:{server.server_address[1]}"
        yield site
        server.shutdown()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RETRY_S", 0.01)
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "*")


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


def direct(site: Site, sha256: str | None = SHA256, etag: str | None = '"one"') -> PublishedFile:
    site.files["/weights.pt"] = CONTENT
    site.headers["/weights.pt"] = {"ETag": etag} if etag else {}
    return PublishedFile(path="direct/weights.pt", url=f"{site.url}/weights.pt", sha256=sha256, mib=1)


def no_leftovers(root: Path) -> bool:
    return not [path for path in root.rglob("*") if ".part" in path.name]


# Direct URLs


def test_a_file_is_downloaded_once_and_its_sum_lies_beside_it(site: Site, tmp_path: Path) -> None:
    said: list[str] = []
    file = direct(site)
    fetch([file], tmp_path, said.append)
    assert (tmp_path / file.path).read_bytes() == CONTENT
    assert (tmp_path / "direct/weights.pt.sha256").read_text().startswith(f"{SHA256}  weights.pt\n")
    assert no_leftovers(tmp_path)
    assert said == ["[1/1] direct/weights.pt: 1.0 MiB, checksum right"]
    fetch([file], tmp_path, said.append)
    assert len(site.asked) == 1
    assert said[1:] == ["1 of 1 files are there"]


def test_a_file_may_be_pinned_by_the_sum_that_git_gives_it(site: Site, tmp_path: Path) -> None:
    said: list[str] = []
    right, wrong = (
        dataclasses.replace(direct(site, sha256=None), git_sha1=git_sha1(content)) for content in (CONTENT, b"other")
    )
    fetch([right], tmp_path, said.append)
    assert said == ["[1/1] direct/weights.pt: 1.0 MiB, checksum right"]
    (tmp_path / "direct/weights.pt.sha256").unlink()  # somebody brought the file by hand
    fetch([right], tmp_path, said.append)
    assert said[1:] == ["1 of 1 files are there"]
    (tmp_path / "direct/weights.pt.sha256").unlink()
    with pytest.raises(ValueError, match=r"its checksum is [0-9a-f]{40}, published is [0-9a-f]{40}; deleted"):
        fetch([wrong], tmp_path, said.append)


def test_a_cut_connection_is_resumed_where_it_was_cut(site: Site, tmp_path: Path) -> None:
    site.cut_after = [4 * PIECE_BYTES, 3 * PIECE_BYTES]
    fetch([direct(site, sha256=None)], tmp_path, lambda _: None)
    assert (tmp_path / "direct/weights.pt").read_bytes() == CONTENT
    assert [(asked[2], asked[3]) for asked in site.asked] == [
        (None, None),
        (f"bytes={4 * PIECE_BYTES}-", '"one"'),
        (f"bytes={7 * PIECE_BYTES}-", '"one"'),
    ]
    assert site.sent == len(CONTENT)


def test_a_later_fetch_goes_on_with_what_came_before(site: Site, tmp_path: Path) -> None:
    said: list[str] = []
    file = direct(site)
    site.cut_after = [6 * PIECE_BYTES] + [0] * (module.ATTEMPTS - 1)
    with pytest.raises(ValueError, match=r"^127.0.0.1:\d+ cannot be reached"):
        fetch([file], tmp_path, said.append)
    assert (tmp_path / "direct/weights.pt.part").stat().st_size == 6 * PIECE_BYTES
    assert not (tmp_path / file.path).exists()
    site.asked.clear()
    fetch([file], tmp_path, said.append)
    assert [asked[2] for asked in site.asked] == [f"bytes={6 * PIECE_BYTES}-"]
    assert site.sent == len(CONTENT)
    assert (tmp_path / file.path).read_bytes() == CONTENT


def test_a_file_that_changed_in_between_starts_again(site: Site, tmp_path: Path) -> None:
    file = direct(site, sha256=None)
    site.cut_after = [6 * PIECE_BYTES] + [0] * (module.ATTEMPTS - 1)
    with pytest.raises(ValueError):
        fetch([file], tmp_path, lambda _: None)
    site.files["/weights.pt"], site.headers["/weights.pt"] = CONTENT[::-1], {"ETag": '"two"'}
    fetch([file], tmp_path, lambda _: None)
    assert site.asked[-1][2:4] == (f"bytes={6 * PIECE_BYTES}-", '"one"')
    assert (tmp_path / file.path).read_bytes() == CONTENT[::-1]


def test_without_a_name_of_the_version_nothing_is_resumed(site: Site, tmp_path: Path) -> None:
    site.cut_after = [6 * PIECE_BYTES]
    fetch([direct(site, sha256=None, etag='W/"weak"')], tmp_path, lambda _: None)
    assert [asked[2] for asked in site.asked] == [None, None]
    assert (tmp_path / "direct/weights.pt").read_bytes() == CONTENT


@pytest.mark.parametrize("excess", [0, 7])
def test_a_part_that_is_whole_or_too_long(site: Site, tmp_path: Path, excess: int) -> None:
    file = direct(site)
    part = tmp_path / "direct/weights.pt.part"
    part.parent.mkdir()
    part.write_bytes(CONTENT + b"?" * excess)
    (tmp_path / "direct/weights.pt.part.tag").write_text(SHA256)
    fetch([file], tmp_path, lambda _: None)
    assert (tmp_path / file.path).read_bytes() == CONTENT
    assert site.sent == (len(CONTENT) if excess else 0)
    assert no_leftovers(tmp_path)


def test_a_wrong_checksum_deletes_the_file_and_says_both(site: Site, tmp_path: Path) -> None:
    file = direct(site)
    site.files["/weights.pt"] = CONTENT[::-1]
    other = hashlib.sha256(CONTENT[::-1]).hexdigest()
    with pytest.raises(ValueError, match=f"its checksum is {other}, published is {SHA256}"):
        fetch([file], tmp_path, lambda _: None)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_busy_server_is_asked_again(site: Site, tmp_path: Path) -> None:
    site.statuses = [503, 429]
    fetch([direct(site)], tmp_path, lambda _: None)
    assert len(site.asked) == 3
    assert (tmp_path / "direct/weights.pt").read_bytes() == CONTENT


def test_what_is_missing_is_fetched_although_another_fails(site: Site, tmp_path: Path) -> None:
    file, said = direct(site), []
    gone = [PublishedFile(path=f"direct/{name}", url=f"{site.url}/{name}") for name in ("gone.pt", "lost.pt")]
    with pytest.raises(ValueError, match=r"^[^\n]*/gone.pt: the server answers 404; .*\(and 1 more, said above\)$"):
        fetch([gone[0], file, gone[1]], tmp_path, said.append)
    assert (tmp_path / file.path).read_bytes() == CONTENT
    assert "lost.pt: the server answers 404" in said[-1]
    assert no_leftovers(tmp_path)


def test_without_a_network_it_says_which_file_goes_where(tmp_path: Path) -> None:
    port = free_port()
    files = [PublishedFile(path=f"direct/{i}.pt", url=f"http://127.0.0.1:{port}/{i}.pt", sha256=SHA256) for i in (1, 2)]
    said: list[str] = []
    with pytest.raises(ValueError) as caught:
        fetch(files, tmp_path, said.append)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"127.0.0.1:{port} cannot be reached (")
    assert "refused" in message
    assert f"download http://127.0.0.1:{port}/1.pt and put it at {tmp_path}/direct/1.pt" in message
    assert f"download http://127.0.0.1:{port}/2.pt and put it at {tmp_path}/direct/2.pt" in said[-1]
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


# Files that are there already


def test_a_copied_file_is_checked_once_and_needs_no_network(tmp_path: Path) -> None:
    file = PublishedFile(path="direct/weights.pt", url="http://127.0.0.1:9/weights.pt", sha256=SHA256)
    (tmp_path / "direct").mkdir()
    (tmp_path / file.path).write_bytes(CONTENT)
    fetch([file], tmp_path, lambda _: None)
    assert SHA256 in (tmp_path / "direct/weights.pt.sha256").read_text()


def test_a_damaged_file_is_downloaded_again(site: Site, tmp_path: Path) -> None:
    file = direct(site)
    fetch([file], tmp_path, lambda _: None)
    target, said = tmp_path / file.path, []
    target.write_bytes(CONTENT[:-1])
    fetch([file], tmp_path, said.append)
    assert target.read_bytes() == CONTENT
    target.write_bytes(b"?" + CONTENT[1:])  # the same size, but written after it was checked
    later = target.with_name("weights.pt.sha256").stat().st_mtime_ns + 10**9
    os.utime(target, ns=(later, later))
    fetch([file], tmp_path, said.append)
    assert target.read_bytes() == CONTENT
    assert sum("is not what is published" in line for line in said) == 2


def test_too_little_disk_is_said_before_anything_is_asked(site: Site, tmp_path: Path) -> None:
    file = direct(site)
    huge = PublishedFile(path=file.path, url=file.url, sha256=SHA256, mib=1e12)
    with pytest.raises(ValueError, match=r"GiB are to come and [\d.]+ GiB are free; make room, or choose"):
        fetch([huge], tmp_path / "new", lambda _: None)
    assert site.asked == []


def test_two_fetches_do_not_write_one_file(site: Site, tmp_path: Path) -> None:
    file = direct(site)
    with module.locked(tmp_path / "direct/weights.pt.part"), pytest.raises(ValueError, match="another fetch"):
        fetch([file], tmp_path, lambda _: None)


def test_progress_is_a_line_now_and_then(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EVERY_S", 0.0)
    monkeypatch.setattr(module, "PIECE_BYTES", 2**18)
    said: list[str] = []
    fetch([direct(site)], tmp_path, said.append)
    assert [line.split(",")[0] for line in said if "MiB/s" in line] == [
        f"[1/1] direct/weights.pt: {done} of 1 MiB" for done in (0, 0, 1, 1)
    ]


# The Hub


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
        site = hub

        def answer(self, *, body: bool) -> None:
            self.head(status, {"Content-Length": "0", "X-Error-Code": code})

    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server, pytest.MonkeyPatch.context() as patch:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        set_endpoint(patch, f"http://127.0.0.1:{server.server_address[1]}")
        with pytest.raises(ValueError, match=text) as caught:
            fetch([PublishedFile(path=f"{REPOSITORY}/file")], tmp_path, lambda _: None)
        assert "\n" not in str(caught.value)
        server.shutdown()


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
