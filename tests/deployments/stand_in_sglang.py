"""Stands in for `sglang.launch_server`, which needs a GPU: its command line, its log, its HTTP answers. No model.

The tests copy this file to FOLDER/sglang/launch_server.py and put FOLDER on PYTHONPATH, so that the product runs its
real command line, `python -m sglang.launch_server ...`. What it has of the real one (sglang's server_args.py,
server_args_config_parser.py, utils/auth.py and entrypoints/http_server.py): the flags, and an error for any other; a
YAML after `--config` whose values come behind the command line's; `server_args=...` in the log, key and all; no port
while it loads; 503 from /health and /health_generate while it warms up; a key asked for by everything but /health*; a
worker process in the same group.

STAND_IN, an environment variable, is a folder. settings.json in it: load_s, warm_s, exit_at_once (status),
crash_after_s. While a file `hang` is there, /health gets no answer; while `sick` is, it gets 503. Each start adds a
line to started.jsonl.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml

STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--model-path", "--model", required=True)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=30000)
    parser.add_argument("--api-key")
    parser.add_argument("--chat-template")
    parser.add_argument("--mem-fraction-static", type=float)
    parser.add_argument("--max-running-requests", type=int)
    parser.add_argument("--data-parallel-size", "--dp-size", type=int, default=1)
    parser.add_argument("--tensor-parallel-size", "--tp-size", type=int, default=1)
    parser.add_argument("--trust-remote-code", action="store_true")
    parser.add_argument("--config")
    args = parser.parse_args(words)
    if args.config:
        if Path(args.config).suffix not in (".yaml", ".yml"):
            raise ValueError(f"Config file must be YAML format, got: {args.config}")
        from_file = yaml.safe_load(Path(args.config).read_text())
        parser.set_defaults(**{key.replace("-", "_"): value for key, value in from_file.items()})
        args = parser.parse_args(words)
    return args


class Handler(BaseHTTPRequestHandler):
    args: argparse.Namespace
    folder: Path
    ready_at: float

    def do_GET(self) -> None:
        if self.path in ("/health", "/health_generate"):
            while (self.folder / "hang").exists():
                time.sleep(0.1)
            sick = (self.folder / "sick").exists() or time.monotonic() < self.ready_at
            self.answer(503 if sick else 200, None)
        elif self.allowed() and self.path == "/v1/models":
            self.answer(200, {"object": "list", "data": [{"id": self.args.model_path, "object": "model"}]})
        else:
            self.answer(404 if self.allowed() else 401, {"error": "Not Found" if self.allowed() else "Unauthorized"})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.allowed():
            return self.answer(401, {"error": "Unauthorized"})
        if self.path != "/v1/chat/completions":
            return self.answer(404, {"error": "Not Found"})
        message = {"role": "assistant", "content": "Final Score: 4"}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        usage = {"prompt_tokens": 1, "completion_tokens": 4, "total_tokens": 5}
        completion = {"id": "1", "object": "chat.completion", "created": 0, "model": asked["model"]}
        self.answer(200, {**completion, "choices": [choice], "usage": usage})

    def allowed(self) -> bool:
        return self.args.api_key is None or self.headers.get("Authorization") == f"Bearer {self.args.api_key}"

    def answer(self, status: int, body: Any) -> None:
        content = b"" if body is None else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *words: object) -> None:
        pass


def main() -> None:
    args, folder = parse(sys.argv[1:]), Path(os.environ["STAND_IN"])
    settings = json.loads((folder / "settings.json").read_text())
    worker = subprocess.Popen([sys.executable, "-c", STUBBORN], stdout=sys.stdout, stderr=sys.stderr)
    started = {
        "pid": os.getpid(),
        "worker": worker.pid,
        "argv": sys.orig_argv[1:],
        "environ": dict(os.environ),
        "config_mode": oct(os.stat(args.config).st_mode & 0o777) if args.config else None,
    }
    with (folder / "started.jsonl").open("a") as stream:
        stream.write(json.dumps(started) + "\n")
    log(f"server_args=ServerArgs(model_path={args.model_path!r}, port={args.port}, api_key={args.api_key!r})")
    log("Load weight begin.")
    time.sleep(settings.get("load_s", 0.0))
    if "exit_at_once" in settings:
        log("torch.OutOfMemoryError: CUDA out of memory.")
        os._exit(settings["exit_at_once"])  # the worker is left behind, as a crash leaves it
    if "crash_after_s" in settings:
        threading.Timer(settings["crash_after_s"], crash).start()
    Handler.args, Handler.folder = args, folder
    Handler.ready_at = time.monotonic() + settings.get("warm_s", 0.0)
    with ThreadingHTTPServer((args.host, args.port), Handler) as server:
        log("The server is fired up and ready to roll!")
        server.serve_forever()


def crash() -> None:
    log("Scheduler hit an exception: out of luck")
    os.kill(os.getpid(), signal.SIGKILL)


def log(line: str) -> None:
    sys.stdout.write(f"{line}\n")


if __name__ == "__main__":
    main()
