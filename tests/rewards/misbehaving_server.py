"""An OpenAI-compatible chat server on loopback that does what a script says: answers, errors, silence, half answers.

    with MisbehavingServer("500", "hang", "ok") as server: ...      first request, second, all others

It scores an image by its mean grey, so that a score tells which image it belongs to: see `honest_score`. What it saw
(keys, bodies, how many requests at once, how many connections) is kept for the test.
"""

import base64
import contextlib
import io
import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

import numpy as np
from PIL import Image

GARBAGE = {
    "garbage": b"<html>502 Bad Gateway</html>",
    "null": b"null",
    "not_utf8": b"\xff\xfe\x00",
    "empty_choices": b'{"choices": []}',
    "no_message": b'{"choices": [{"message": null}]}',
    "no_content": b'{"choices": [{"message": {"role": "assistant", "content": null}}]}',
}


def honest_score(image: np.ndarray) -> float:
    """Score of a plain image: 1 for black to 5 for white, two decimals; / 5 as the reward gives it."""
    return round(1 + 4 * float(image.mean()) / 255, 2) / 5


class MisbehavingServer:
    """`script`: what is done with the first requests; the last entry holds for all further ones.

    An entry is `ok`, `unscored`, an HTTP status such as `500`, `429 after 0.3` (Retry-After), `hang`, `half` (closed in
    the middle of the body), `drip` (never ends), `echo_key` (401 that quotes the key), `die` (no answer, and from then
    on no server) or a name in GARBAGE. `rules` overrules the script for prompts that contain its key. `delay_s`: how
    long a request takes; `at_once`: none is answered before so many were here together; `port`: 0 = any.
    """

    def __init__(
        self, *script: str, rules: dict[str, str] | None = None, delay_s: float = 0.0, at_once: int = 0, port: int = 0
    ) -> None:
        self.script, self.rules, self.delay_s, self.at_once = list(script) or ["ok"], rules or {}, delay_s, at_once
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.paths: list[str] = []
        self.times: list[float] = []
        self.in_flight = self.most_in_flight = self.num_connections = 0
        self._lock = threading.Condition()
        self._over = threading.Event()
        self._http = _Http(("127.0.0.1", port), _handler(self))
        self.port = int(self._http.server_address[1])
        self.url = f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> "MisbehavingServer":
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Refuse connections from now on, and cut those that are open."""
        if self._over.is_set():
            return
        self._over.set()
        self._http.shutdown()
        self._http.server_close()
        self._http.cut()

    def handle(self, request: BaseHTTPRequestHandler) -> None:
        """One POST, from its own thread."""
        body = json.loads(request.rfile.read(int(request.headers["Content-Length"])))
        with self._lock:
            number = len(self.bodies)
            self.bodies.append(body)
            self.keys.append(request.headers["Authorization"])
            self.paths.append(request.path)
            self.times.append(time.monotonic())
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
            self._lock.notify_all()
            self._lock.wait_for(lambda: self.most_in_flight >= self.at_once, timeout=30)
        try:
            time.sleep(self.delay_s)
            caption = body["messages"][0]["content"][1]["text"]
            ruled = [deed for part, deed in self.rules.items() if part in caption]
            self._do(request, ruled[0] if ruled else self.script[min(number, len(self.script) - 1)], body)
        finally:
            with self._lock:
                self.in_flight -= 1

    def _do(self, request: BaseHTTPRequestHandler, deed: str, body: dict[str, Any]) -> None:
        if deed in ("ok", "unscored"):
            text = "I like it." if deed == "unscored" else f"Well. Final Score: {_score(body):g}"
            _send(request, 200, json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode())
        elif deed in GARBAGE:
            _send(request, 200, GARBAGE[deed])
        elif deed == "hang":
            self._over.wait(60)
            request.close_connection = True
        elif deed == "die":
            request.close_connection = True
            self.stop()
        elif deed == "half":
            _send(request, 200, b'{"choices": [{"mess', claimed=500)
            request.close_connection = True
        elif deed == "drip":  # a byte now and then: no read ever times out
            _send(request, 200, b"", claimed=10_000)
            while not self._over.wait(0.05):
                request.wfile.write(b" ")
        elif deed == "echo_key":
            quoted = json.dumps({"error": {"message": f"wrong key: {request.headers['Authorization']}"}})
            _send(request, 401, quoted.encode())
        else:
            status, _, after = deed.partition(" after ")
            _send(request, int(status), b'{"error": {"message": "no"}}', retry_after=after)


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        super().__init__(address, handler)
        self._connections: list[socket.socket] = []

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        self._connections.append(connection)
        return connection, address

    def cut(self) -> None:
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone is no news."""


def _handler(server: MisbehavingServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # connections are kept
        disable_nagle_algorithm = True

        def setup(self) -> None:
            super().setup()
            server.num_connections += 1

        def do_POST(self) -> None:
            server.handle(self)

        def log_message(self, format: str, *args: object) -> None:
            """Nothing on stderr."""

    return Handler


def _send(
    request: BaseHTTPRequestHandler, status: int, body: bytes, *, claimed: int | None = None, retry_after: str = ""
) -> None:
    request.send_response(status)
    request.send_header("Content-Type", "application/json")
    request.send_header("Content-Length", str(claimed or len(body)))
    if retry_after:
        request.send_header("Retry-After", retry_after)
    request.end_headers()
    request.wfile.write(body)
    request.wfile.flush()


def picture(body: dict[str, Any]) -> Image.Image:
    """The image of a request."""
    url = body["messages"][0]["content"][0]["image_url"]["url"]
    head, _, data = url.partition(",")
    assert head == "data:image/png;base64"
    return Image.open(io.BytesIO(base64.b64decode(data)))


def _score(body: dict[str, Any]) -> float:
    return 5 * honest_score(np.asarray(picture(body)))
