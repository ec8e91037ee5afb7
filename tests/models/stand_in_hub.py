"""A stand-in for the Hub on loopback: the few answers that huggingface_hub needs to download a repository.

It serves folders as repositories, asks for a token where a repository is gated, can break connections half way and
send slowly, and counts what it sent.
"""

import hashlib
import json
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CHUNK = 16 * 1024


class Hub:
    """Repositories by name; everything may be changed between two requests."""

    def __init__(self) -> None:
        self.repositories: dict[str, Path] = {}
        self.gated: dict[str, str] = {}
        """Repository -> the one token whose account has accepted the licence."""
        self.cut_once: set[str] = set()
        """Files whose first connection ends half way."""
        self.reset_once: set[str] = set()
        """Files whose first connection is reset half way."""
        self.chunk_s = 0.0
        """Seconds to wait after each 16 KiB of a weights file."""
        self.sent: Counter[str] = Counter()
        """File -> times it was sent from its start."""
        self.ranges: list[str] = []
        """Ranges that were asked for."""
        self.tokens: set[str | None] = set()
        self.url = ""


@contextmanager
def stand_in_hub() -> Iterator[Hub]:
    """A running one; `url` is what HF_ENDPOINT must be."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Quiet."""

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        path = self.path.split("?")[0].strip("/")
        self.hub.tokens.add(self.headers.get("Authorization"))
        api = path.startswith("api/models/")
        parts = path.removeprefix("api/models/").split("/")
        name, rest = "/".join(parts[:2]), parts[2:]
        folder = self.hub.repositories.get(name)
        if folder is None:
            return self._refuse(401, "RepoNotFound")
        if rest and rest[0] in ("revision", "resolve", "tree") and rest[1] not in ("main", COMMIT):
            return self._refuse(404, "RevisionNotFound")
        if api:  # a gated repository shows its list of files to everyone
            files = sorted(file for file in folder.rglob("*") if file.is_file())
            tree = [
                {"type": "file", "path": str(f.relative_to(folder)), "size": f.stat().st_size, "oid": _etag(f)}
                for f in files
            ]
            info = {"id": name, "sha": COMMIT, "siblings": [{"rfilename": entry["path"]} for entry in tree]}
            return self._send_json(tree if "tree" in rest else info)
        wanted = self.hub.gated.get(name)
        if wanted is not None and self.headers.get("Authorization") != f"Bearer {wanted}":
            return self._refuse(403 if self.headers.get("Authorization") else 401, "GatedRepo")
        file = folder.joinpath(*rest[2:])
        if not file.is_file():
            return self._refuse(404, "EntryNotFound")
        return self._send_file(file, "/".join(rest[2:]), body=body)

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _send_json(self, data: object) -> None:
        text = json.dumps(data).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def _send_file(self, file: Path, path: str, *, body: bool) -> None:
        data = file.read_bytes()
        size, start = len(data), 0
        if asked := self.headers.get("Range"):
            self.hub.ranges.append(f"{path} {asked}")
            start = int(asked.removeprefix("bytes=").split("-")[0])
        self.send_response(206 if asked else 200)
        self.send_header("ETag", f'"{_etag(file)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(size - start))
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
        self.end_headers()
        if not body:
            return
        if not start:
            self.hub.sent[path] += 1
        end = size
        reset = path in self.hub.reset_once
        if path in self.hub.cut_once | self.hub.reset_once:
            end = size // 2
            self.hub.cut_once.discard(path)
            self.hub.reset_once.discard(path)
        for place in range(start, end, CHUNK):
            self.wfile.write(data[place : min(place + CHUNK, end)])
            if self.hub.chunk_s and path.endswith(".safetensors"):
                time.sleep(self.hub.chunk_s)
        if end < size:
            self.wfile.flush()
            self.close_connection = True
            if reset:  # closing with nothing lingering sends a reset instead of an end
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
            else:
                self.connection.shutdown(socket.SHUT_RDWR)


def _etag(file: Path) -> str:
    """git's own sum of the content, as the Hub says of its small files."""
    content = file.read_bytes()
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
