"""A server of files on loopback: ranges, cut connections, statuses, redirects, and what it was asked for."""

import hashlib
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

CONTENT = bytes(range(256)) * 4096  # 1 MiB
SHA256 = hashlib.sha256(CONTENT).hexdigest()


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


@contextmanager
def serving(site: Site, kind: type[Handler] = Handler) -> Iterator[str]:
    """The URL of a server of the site on loopback."""
    handler = type("OurHandler", (kind,), {"site": site})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def no_leftovers(root: Path) -> bool:
    return not [path for path in root.rglob("*") if ".part" in path.name]
