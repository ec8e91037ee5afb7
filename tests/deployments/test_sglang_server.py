"""The supervisor against a stand-in for sglang's server (stand_in_sglang.py); as an actor: test_sglang_actor.py.

What is killed here is really killed: the server, its worker, the process that supervises it.
"""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import requests
from pydantic import SecretStr, ValidationError

from deployments.sglang_server import SglangProcess, command, environment, read_api_key
from nft_ray.rewards.servers import SglangConfig
from tests.conftest import free_port
from tests.deployments.sglang_folder import StandIn, is_alive, until

KEY = "sk-very.secret"


@pytest.fixture
def run(stand_in: StandIn) -> Iterator[Callable[..., SglangProcess]]:
    """Starts a supervised stand-in; stops it after the test."""
    made: list[SglangProcess] = []

    def run(key: str | None = None, **fields: Any) -> SglangProcess:
        process = SglangProcess(stand_in.config(**fields), None if key is None else SecretStr(key))
        made.append(process)
        process.start()
        threading.Thread(target=process.watch, daemon=True).start()
        return process

    yield run
    for process in made:
        process.stop()


# The command line and the environment


def test_the_command_line_is_sglangs() -> None:
    config = SglangConfig(
        model_path="m",
        python="/env/bin/python",
        host="127.0.0.1",
        chat_template="qwen2-vl",
        mem_fraction_static=0.7,
        max_running_requests=32,
        data_parallel_size=2,
        tensor_parallel_size=4,
        extra_args=("--trust-remote-code",),
    )
    assert " ".join(command(config, 30000, Path("/k.yaml"))) == (
        "/env/bin/python -m sglang.launch_server --model-path m --host 127.0.0.1 --port 30000 --config /k.yaml "
        "--chat-template qwen2-vl --mem-fraction-static 0.7 --max-running-requests 32 --data-parallel-size 2 "
        "--tensor-parallel-size 4 --trust-remote-code"
    )
    assert config.gpus == 8
    assert config.actor_name == "sglang-m"
    bare = command(SglangConfig(model_path="m", python="p"), 1, None)
    assert not {"--config", "--api-key", "--chat-template", "--mem-fraction-static"} & set(bare)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"extra_args": ("--api-key=x",)}, "--api-key: use the field"),
        ({"extra_args": ("--tp", "2")}, "--tp: use the field"),
        ({"host": "0.0.0.0"}, "open to others and there is no key"),
        ({"api_key_env": "A", "api_key_file": "b"}, "not both"),
        ({"api_key": "x"}, "Extra inputs"),
    ],
)
def test_what_a_configuration_must_not_say(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(ValidationError, match=text):
        SglangConfig(model_path="m", python="p", **fields)


def test_the_server_sees_its_own_environment() -> None:
    ours = {
        "PATH": "/usr/bin",
        "HOME": "/root",
        "CUDA_VISIBLE_DEVICES": "3,5",
        "PYTHONPATH": "/work",
        "VIRTUAL_ENV": "/venv",
        "RAY_AUTH_TOKEN": "t",
        "OMP_NUM_THREADS": "1",
        "THE_KEY": KEY,
    }
    config = SglangConfig(model_path="m", python="/env/bin/python", api_key_env="THE_KEY", env={"NCCL_DEBUG": "INFO"})
    assert environment(config, ours) == {
        "PATH": "/env/bin:/usr/bin",
        "HOME": "/root",
        "CUDA_VISIBLE_DEVICES": "3,5",
        "PYTHONUNBUFFERED": "1",
        "NCCL_DEBUG": "INFO",
    }


def test_the_key_comes_from_the_environment_or_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "key"
    for fields in ({"api_key_env": "THE_KEY"}, {"api_key_file": file}):
        monkeypatch.setenv("THE_KEY", KEY)
        file.write_text(f"{KEY}\n")
        key = read_api_key(SglangConfig(model_path="m", python="p", **fields))
        assert key is not None
        assert key.get_secret_value() == KEY
        monkeypatch.setenv("THE_KEY", 'quo"ted key')
        file.write_text("--short")
        with pytest.raises(ValueError, match=r"^api_key_(env THE_KEY|file .*key): holds no key of 8 or more"):
            read_api_key(SglangConfig(model_path="m", python="p", **fields))
    assert read_api_key(SglangConfig(model_path="m", python="p")) is None


# Start and stop


def test_it_starts_answers_and_leaves_nothing(stand_in: StandIn, run: Callable[..., SglangProcess]) -> None:
    stand_in.set(load_s=0.2, warm_s=0.4)
    begin = time.monotonic()
    process = run()
    assert time.monotonic() - begin > 0.6  # not ready while it warms up, although it answers HTTP
    status = process.status()
    assert (status.state, status.num_restarts, status.pid) == ("running", 0, stand_in.starts[0]["pid"])
    client = openai.OpenAI(base_url=status.url, api_key="none", max_retries=0)
    said = client.chat.completions.create(model="some/Model-7B", messages=[{"role": "user", "content": "?"}])
    assert said.choices[0].message.content == "Final Score: 4"
    assert len(stand_in.alive()) == 2
    process.stop()
    assert stand_in.alive() == []  # the worker ignores SIGTERM
    assert process.status().state == "stopped"


def test_the_key_is_on_no_command_line_in_no_log_and_on_no_disk(
    stand_in: StandIn, run: Callable[..., SglangProcess], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("DEBUG", logger="deployments"):  # the command line, run in this process before, made it INFO
        process = run(KEY)
        until(lambda: "api_key='***'" in caplog.text)  # a thread carries the server's lines to the log
    (start,) = stand_in.starts
    assert start["config_mode"] == "0o600"
    assert KEY not in json.dumps([start["argv"], start["environ"]])
    assert not Path(start["argv"][start["argv"].index("--config") + 1]).exists()
    lines = "\n".join(process.status().last_lines)
    assert "api_key='***'" in lines
    assert KEY not in lines + caplog.text + repr(process.status())
    models = f"{process.url}/models"
    assert requests.get(models, timeout=5).status_code == 401
    assert requests.get(models, headers={"Authorization": f"Bearer {KEY}"}, timeout=5).status_code == 200


def test_a_first_start_that_fails_says_why_and_is_not_repeated(stand_in: StandIn) -> None:
    stand_in.set(exit_at_once=3)
    process = SglangProcess(stand_in.config())
    with pytest.raises(RuntimeError) as caught:
        process.start()
    assert re.match(
        r"sglang-Model-7B: it exited with 3 after \d+ s, before it answered; last lines: server", str(caught.value)
    )
    assert str(caught.value).endswith("CUDA out of memory.")
    assert "\n" not in str(caught.value)
    assert len(stand_in.starts) == 1
    assert stand_in.alive() == []
    assert process.status().state == "failed"


def test_an_unknown_flag_is_the_servers_to_refuse(stand_in: StandIn) -> None:
    with pytest.raises(RuntimeError, match=r"exited with 2 .*unrecognized arguments: --no-such-flag"):
        SglangProcess(stand_in.config(extra_args=("--no-such-flag",))).start()


def start_in_thread(process: SglangProcess) -> tuple[threading.Thread, list[str]]:
    """A start that fails, in a thread, and its error once it has."""
    errors: list[str] = []

    def start() -> None:
        with pytest.raises(RuntimeError) as caught:
            process.start()
        errors.append(str(caught.value))

    thread = threading.Thread(target=start)
    thread.start()
    return thread, errors


def test_one_that_never_answers_is_given_up(stand_in: StandIn) -> None:
    stand_in.set(load_s=60)
    process = SglangProcess(stand_in.config(start_timeout_s=1.0))
    thread, errors = start_in_thread(process)
    until(lambda: process.status().message.endswith("s, last line: Load weight begin."))
    assert process.status().message.startswith("loading, ")
    thread.join(10)
    assert "it did not answer within start_timeout_s = 1; last lines" in errors[0]
    assert stand_in.alive() == []


def test_stop_while_it_loads(stand_in: StandIn) -> None:
    stand_in.set(load_s=60)
    process = SglangProcess(stand_in.config())
    thread, errors = start_in_thread(process)
    until(lambda: len(stand_in.alive()) == 2)
    process.stop()
    thread.join(10)
    assert len(errors) == 1
    assert process.status().state == "stopped"
    assert stand_in.alive() == []


@pytest.mark.parametrize(
    ("python", "text"), [("/no/such/python", "cannot be run"), (sys.executable, "has no sglang; install it")]
)
def test_a_python_without_sglang(stand_in: StandIn, python: str, text: str) -> None:
    with pytest.raises(ValueError, match=f"^python = '{python}': {text}"):
        SglangProcess(stand_in.config(python=python, env={})).start()


def test_a_port_in_use_is_not_mistaken_for_the_server(stand_in: StandIn, run: Callable[..., SglangProcess]) -> None:
    port = free_port()
    run(port=port)
    with pytest.raises(ValueError, match=f"port {port}: cannot listen there: Address already in use"):
        SglangProcess(stand_in.config(port=port)).start()


# Restarts


def test_a_killed_server_comes_back_at_the_same_url(stand_in: StandIn, run: Callable[..., SglangProcess]) -> None:
    process = run()
    url, first = process.url, stand_in.starts[0]
    os.kill(first["pid"], signal.SIGKILL)
    until(lambda: len(stand_in.starts) == 2 and process.status().state == "running")
    assert process.url == url
    assert requests.get(f"{url}/models", timeout=5).status_code == 200
    assert process.status().num_restarts == 1
    assert not is_alive(first["worker"])  # it had outlived its leader


@pytest.mark.slow
@pytest.mark.parametrize("how", ["hang", "sick"])
def test_an_unhealthy_server_is_replaced(stand_in: StandIn, run: Callable[..., SglangProcess], how: str) -> None:
    process = run()
    (stand_in.folder / how).touch()
    until(lambda: process.status().state == "restarting")
    (stand_in.folder / how).unlink()
    until(lambda: process.status().state == "running")
    assert len(stand_in.starts) == 2
    assert set(stand_in.alive()) == {stand_in.starts[1]["pid"], stand_in.starts[1]["worker"]}


def test_one_failed_check_is_no_reason(stand_in: StandIn, run: Callable[..., SglangProcess]) -> None:
    process = run(health_failures=50)
    (stand_in.folder / "sick").touch()
    time.sleep(1)
    (stand_in.folder / "sick").unlink()
    time.sleep(0.5)
    assert process.status().state == "running"
    assert len(stand_in.starts) == 1


@pytest.mark.slow
def test_too_many_restarts_are_a_failure_with_the_last_lines(
    stand_in: StandIn, run: Callable[..., SglangProcess]
) -> None:
    stand_in.set(crash_after_s=0.5)
    process = run(max_restarts=2)
    until(lambda: process.status().state == "failed")
    assert len(stand_in.starts) == 3
    assert stand_in.alive() == []
    message = process.status().message
    assert "it exited with -9; 2 restarts within 3600 s did not help; last lines: " in message
    assert message.endswith("Scheduler hit an exception: out of luck")


@pytest.mark.slow
def test_old_restarts_are_forgotten(stand_in: StandIn, run: Callable[..., SglangProcess]) -> None:
    process = run(max_restarts=1, restart_window_s=0.3)
    for number in (1, 2, 3):
        time.sleep(0.4)
        os.kill(stand_in.starts[-1]["pid"], signal.SIGKILL)
        until(lambda: process.status().num_restarts == number and process.status().state == "running")  # noqa: B023
    assert len(stand_in.starts) == 4


def test_a_supervisor_that_is_killed_takes_the_server_along(stand_in: StandIn) -> None:
    script = (
        "import sys, time; from deployments.sglang_server import SglangProcess; "
        "from nft_ray.rewards.servers import SglangConfig; "
        "SglangProcess(SglangConfig.model_validate_json(sys.argv[1])).start(); time.sleep(60)"
    )
    supervisor = subprocess.Popen([sys.executable, "-c", script, stand_in.config().model_dump_json()])
    until(lambda: len(stand_in.alive()) == 2)
    supervisor.kill()
    supervisor.wait()
    until(lambda: not stand_in.alive())
