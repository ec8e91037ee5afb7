"""Starts and supervises `python -m sglang.launch_server` for one model. No Ray here: the actor is in sglang_actor.py.

    SglangActor -- thread: watch --> SglangProcess --> sglang and its workers: a ProcessGroup

The environment of its own: sglang pins its own torch, transformers and openai, so `python` is that of another
environment. Of ours the server does not see PYTHON*, VIRTUAL_ENV, RAY_* (the cluster's token is among them),
OMP_NUM_THREADS (Ray's, 1 for most actors) and the variable that holds the key; PATH begins with the folder of
`python`, for the compilers that sglang starts. CUDA_VISIBLE_DEVICES stays: Ray has set it to the actor's GPUs.

The key: sglang reads it from `--api-key` or from the YAML of `--config`, from no environment variable. It goes into a
YAML that only this user can read, which is deleted once the server answers; so it is on no command line. sglang
writes its arguments into its own first log lines, the key among them: it is replaced by *** in every line kept here.
(Source: sglang's server_args.py and server_args_config_parser.py; its issue 37457.)

Failure policy: a first start that fails is the configuration's and is not tried again: one RuntimeError with the last
lines. Once it has answered, a server that exits, or fails `health_failures` checks in a row, is killed with its whole
group and started again on the same port, after a pause that doubles; what was in work there is the client's to send
again. More than `max_restarts` within `restart_window_s` end in the state `failed`, with the last lines; the actor
lives on to say so. Whoever holds this process takes the server along when it dies, SIGKILL included.
"""

import json
import logging
import os
import re
import shlex
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import requests
from pydantic import SecretStr

from deployments.process_group import ProcessGroup
from nft_ray.rewards.servers import SglangConfig

logger = logging.getLogger(__name__)

POLL_S = 0.2
REPORT_S = 10.0
MAX_PAUSE_S = 60.0
PROBE_S = 60.0
LAST_LINES = 50
SHOWN_LINES = 5
LINE_CHARS = 300
State = Literal["new", "starting", "running", "restarting", "failed", "stopped"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SglangStatus:
    """What a server is at; `url` is the base URL of its OpenAI API once the port is known, `pid` that of its leader."""

    state: State
    url: str | None
    pid: int | None
    num_restarts: int
    message: str
    last_lines: tuple[str, ...]


def read_api_key(config: SglangConfig) -> SecretStr | None:
    """The key, or None where the configuration names none; ValueError where it is not there or has odd characters."""
    if config.api_key_env is not None:
        where, key = f"api_key_env {config.api_key_env}", os.environ.get(config.api_key_env, "")
    elif config.api_key_file is not None:
        where = f"api_key_file {config.api_key_file}"
        key = config.api_key_file.read_text().strip() if config.api_key_file.is_file() else ""
    else:
        return None
    if not re.fullmatch(r"[A-Za-z0-9._~+/=][A-Za-z0-9._~+/=-]{7,}", key):
        raise ValueError(f"{where}: holds no key of 8 or more letters, digits and ._~+/=-")
    return SecretStr(key)


def command(config: SglangConfig, port: int, key_file: Path | None) -> list[str]:
    """The command line; it holds the name of the file with the key, never the key."""
    flags = {
        "--model-path": config.model_path,
        "--host": config.host,
        "--port": port,
        "--config": key_file,
        "--chat-template": config.chat_template,
        "--mem-fraction-static": config.mem_fraction_static,
        "--max-running-requests": config.max_running_requests,
        "--data-parallel-size": config.data_parallel_size,
        "--tensor-parallel-size": config.tensor_parallel_size,
    }
    given = [word for flag, value in flags.items() if value is not None for word in (flag, str(value))]
    return [config.python, "-m", "sglang.launch_server", *given, *config.extra_args]


def environment(config: SglangConfig, inherited: Mapping[str, str]) -> dict[str, str]:
    """What the server sees of our environment variables; see the module docstring."""
    hidden = {"VIRTUAL_ENV", "OMP_NUM_THREADS", config.api_key_env}
    kept = {k: v for k, v in inherited.items() if k not in hidden and not k.startswith(("PYTHON", "RAY_"))}
    folder = os.path.dirname(shutil.which(config.python) or config.python)
    path = os.pathsep.join(part for part in (folder, kept.get("PATH", os.defpath)) if part)
    return {**kept, "PATH": path, "PYTHONUNBUFFERED": "1", **config.env}


class SglangProcess:
    """One supervised server. `start` and `watch` block; `status` and `stop` may be called from other threads."""

    def __init__(self, config: SglangConfig, api_key: SecretStr | None = None, node_ip: str = "127.0.0.1") -> None:
        config = config.model_copy(update={"host": config.host or node_ip})
        self._config, self._api_key, self._node_ip = config, api_key, node_ip
        self._name, self._port = config.actor_name, config.port
        self._group: ProcessGroup | None = None
        self._key_folder: tempfile.TemporaryDirectory[str] | None = None
        self._lines: deque[str] = deque(maxlen=LAST_LINES)
        self._restarts: list[float] = []
        self._num_restarts = 0
        self._state: State = "new"
        self._message, self._launched = "", 0.0
        self._stopping = threading.Event()
        self._lock = threading.Lock()

    @property
    def url(self) -> str | None:
        """Base URL for OpenAI clients; None before `start`."""
        return None if self._port is None else f"{_address(str(self._config.host), self._node_ip, self._port)}/v1"

    def status(self) -> SglangStatus:
        """What it is at now."""
        group, lines = self._group, tuple(self._lines)
        state: State = "stopped" if self._stopping.is_set() else self._state
        message = "" if state == "stopped" else self._message
        if group is not None and state in ("starting", "restarting"):
            waited = time.monotonic() - self._launched
            message = f"{message}loading, {waited:.0f} s, last line: {lines[-1] if lines else 'none yet'}"
        return SglangStatus(
            state=state,
            url=self.url,
            pid=None if group is None else group.pid,
            num_restarts=self._num_restarts,
            message=message,
            last_lines=lines,
        )

    def start(self) -> str:
        """Launch it and wait until it generates; gives `url`. Once only.

        Raises ValueError for a python without sglang or a port in use, RuntimeError where it exits or does not answer.
        """
        assert self._state == "new", "a server is started once"
        _check_python(self._config)
        self._port = _bindable(str(self._config.host), self._config.port)
        self._state = "starting"
        try:
            self._launch_and_wait()
        except RuntimeError as error:
            self._end()
            self._state, self._message = "failed", f"{error}{self._tail()}"
            raise RuntimeError(f"{self._name}: {self._message}") from None
        return str(self.url)

    def start_again(self) -> None:
        """As `start` and `watch`, where an actor before this one was lost: what fails is tried again as in `watch`."""
        self._state, self._message = "restarting", "its actor was lost; "
        end = time.monotonic() + self._config.start_timeout_s
        while self._port is None and not self._stopping.wait(POLL_S):
            try:
                self._port = _bindable(str(self._config.host), self._config.port)
            except ValueError as error:  # the server that was lost, on its way out
                if time.monotonic() > end:
                    self._state, self._message = "failed", str(error)
                    return
        try:
            self._launch_and_wait()
        except RuntimeError as error:
            if not self._restart(str(error)):
                return
        self.watch()

    def watch(self) -> None:
        """Keep it alive until `stop`, or until it has failed for good."""
        failures, due = 0, time.monotonic() + self._config.health_interval_s
        while not self._stopping.wait(POLL_S):
            group = self._group
            if group is not None and (code := group.poll()) is not None:
                reason = f"it exited with {code}"
            elif time.monotonic() < due:
                continue
            else:
                failures = 0 if self._answers("/health", self._config.health_timeout_s) else failures + 1
                due = time.monotonic() + self._config.health_interval_s
                if failures < self._config.health_failures:
                    continue
                reason = f"it failed {failures} health checks in a row"
            if not self._restart(reason):
                return
            failures, due = 0, time.monotonic() + self._config.health_interval_s

    def stop(self) -> None:
        """End the server and all its processes; returns when they are gone."""
        self._stopping.set()
        self._end()

    def _restart(self, reason: str) -> bool:
        """Whether it runs again."""
        config = self._config
        while not self._stopping.is_set():
            self._state, self._message = "restarting", f"{reason}; "
            logger.warning("%s: %s%s", self._name, reason, self._tail())
            self._end()
            now = time.monotonic()
            self._restarts = [then for then in self._restarts if now - then < config.restart_window_s]
            if (tried := len(self._restarts)) >= config.max_restarts:
                within = f"{tried} restarts within {config.restart_window_s:g} s did not help"
                self._state, self._message = "failed", f"{reason}; {within}{self._tail()}"
                logger.error("%s: %s", self._name, self._message)
                return False
            if self._stopping.wait(min(MAX_PAUSE_S, config.backoff_s * 2**tried)):
                return False
            self._restarts.append(now)
            self._num_restarts += 1
            try:
                self._launch_and_wait()
                return True
            except RuntimeError as error:
                reason = str(error)
        return False

    def _launch_and_wait(self) -> None:
        """RuntimeError where it exits, does not answer in time, or is stopped meanwhile."""
        group, timeout_s = self._launch(), self._config.start_timeout_s
        end, report = self._launched + timeout_s, self._launched + REPORT_S
        while not self._answers("/health_generate", min(self._config.health_timeout_s, timeout_s)):
            now = time.monotonic()
            if (code := group.poll()) is not None:
                raise RuntimeError(f"it exited with {code} after {now - self._launched:.0f} s, before it answered")
            if now > end:
                raise RuntimeError(f"it did not answer within start_timeout_s = {timeout_s:g}")
            if now > report:
                logger.info("%s: %s", self._name, self.status().message)
                report = now + REPORT_S
            if self._stopping.wait(POLL_S):
                raise RuntimeError("it was stopped while it was loading")
        self._forget_key()
        self._state, self._message = "running", ""
        logger.info("%s: answers at %s after %.0f s", self._name, self.url, time.monotonic() - self._launched)

    def _launch(self) -> ProcessGroup:
        with self._lock:
            if self._stopping.is_set():
                raise RuntimeError("it was stopped")
            assert self._port
            words = command(self._config, self._port, self._write_key())
            logger.info("%s: %s", self._name, shlex.join(words))
            self._lines.clear()
            self._launched = time.monotonic()
            self._group = ProcessGroup(words, environment(self._config, os.environ), self._config.stop_timeout_s)
            threading.Thread(target=self._keep_lines, args=(self._group,), daemon=True).start()
            return self._group

    def _end(self) -> None:
        with self._lock:
            self._forget_key()
            if self._group is not None:
                self._group.end()
            self._group = None

    def _answers(self, path: str, timeout_s: float) -> bool:
        assert self._port
        url = f"{_address(str(self._config.host), 'localhost', self._port)}{path}"
        try:
            with requests.Session() as session:
                session.trust_env = False  # no proxy, no netrc
                return session.get(url, timeout=timeout_s).status_code == 200
        except requests.RequestException:
            return False

    def _keep_lines(self, group: ProcessGroup) -> None:
        for line in group.lines():
            if self._api_key is not None:
                line = line.replace(self._api_key.get_secret_value(), "***")
            self._lines.append(line.rstrip()[:LINE_CHARS])
            logger.debug("%s: %s", self._name, line.rstrip())

    def _tail(self) -> str:
        lines = list(self._lines)[-SHOWN_LINES:]
        return f"; last lines: {' | '.join(lines)}" if lines else "; it wrote nothing"

    def _write_key(self) -> Path | None:
        """The file for `--config`; sglang wants its name to end in .yaml."""
        if self._api_key is None:
            return None
        self._key_folder = tempfile.TemporaryDirectory(prefix="nft_ray-")  # of mode 0700
        file = Path(self._key_folder.name) / "key.yaml"
        file.touch(mode=0o600)
        file.write_text(f"api-key: {json.dumps(self._api_key.get_secret_value())}\n")
        return file

    def _forget_key(self) -> None:
        if self._key_folder is not None:
            self._key_folder.cleanup()
            self._key_folder = None


def _address(host: str, instead_of_any: str, port: int) -> str:
    host = instead_of_any if host in ("0.0.0.0", "::") else host
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _bindable(host: str, port: int | None) -> int:
    """The port, or one that is free; ValueError where another listens: its answers would be taken for the server's."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port or 0))
        except OSError as error:
            raise ValueError(f"host {host}, port {port or 'any'}: cannot listen there: {error.strerror}") from None
        return int(probe.getsockname()[1])


def _check_python(config: SglangConfig) -> None:
    """ValueError where `python` cannot be run or has no sglang; nothing of it is imported."""
    code = "import importlib.util, sys; sys.exit(importlib.util.find_spec('sglang') is None)"
    env = environment(config, os.environ)
    try:
        done = subprocess.run([config.python, "-c", code], env=env, capture_output=True, timeout=PROBE_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ValueError(f"python = {config.python!r}: cannot be run: {error}") from None
    if done.returncode:
        raise ValueError(f"python = {config.python!r}: has no sglang; install it into that environment")
