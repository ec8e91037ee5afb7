"""The published scores, request and batches, the key, the section; and, slow, a real server.

Servers that fail: test_unified_reward_failures.py.
"""

import json
import logging
import os
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nft_ray.rewards.base import load_reward, reward_config
from nft_ray.rewards.unified_reward import (
    INSTRUCTION,
    UnifiedReward,
    build,
    parse_score,
)
from tests.conftest import free_port
from tests.rewards.misbehaving_server import MisbehavingServer, picture
from tests.rewards.unified_asking import QUICK, ask, expected, greys

KEY = "sk-very-secret-0123456789"


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UNIFIED_REWARD_API_KEY", raising=False)


# --- what is asked and what is read ---


def test_the_published_scores_where_there_is_one_and_none_elsewhere(goldens: Path) -> None:
    cases = json.loads((goldens / "unified.json").read_text())
    assert len(cases) == 9
    for case in cases:
        assert parse_score(case["text"]) == (case["score"] or None), case


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("Final Score: 10", None),
        ("Final Score: 5.5", None),
        ("Final Score: 0.5\nFinal Score: 3", 0.6),
        ("Final Score: 1-5", None),
        ("Final Score: 3.5–4", None),
        ("after 'Final Score: 1 to 5'. Final Score: 4", 0.8),
        ("Final Score: 4 - 2 of the dogs are missing", 0.8),
        ("", None),
    ],
)
def test_what_is_not_from_1_to_5_is_no_score(text: str, score: float | None) -> None:
    assert parse_score(text) == score


def test_the_request_is_the_published_one() -> None:
    image = np.random.default_rng(0).integers(0, 256, (1, 40, 30, 3), dtype=np.uint8)
    with MisbehavingServer() as server:
        ask([server.url + "/"], image, ["a {prompt} in “quotes”"], model="some-model")
    (body,) = server.bodies
    assert server.paths == ["/v1/chat/completions"]
    assert (body["model"], body["temperature"], set(body)) == ("some-model", 0, {"model", "messages", "temperature"})
    assert len(body["messages"]) == 1
    first, second = body["messages"][0]["content"]
    assert (body["messages"][0]["role"], first["type"], second["type"]) == ("user", "image_url", "text")
    assert second["text"] == INSTRUCTION.replace("[{prompt}]", "[a {prompt} in “quotes”]")
    sent = np.asarray(picture(body))
    np.testing.assert_array_equal(sent, np.asarray(Image.fromarray(image[0]).resize((512, 512))))


@pytest.mark.parametrize("size", [(1, 1), (512, 512), (17, 900)])
def test_any_image_size(size: tuple[int, int]) -> None:
    images = greys(0, 128, size=size)
    with MisbehavingServer() as server:
        assert ask([server.url], images).values.tolist() == expected(images)


# --- a batch ---


def test_a_batch_is_its_images_in_their_order_within_the_bound_over_kept_connections() -> None:
    images = greys(*range(0, 240, 10))
    with MisbehavingServer(delay_s=0.01, at_once=4) as server:
        reward = load_reward("unified_reward", {"urls": [server.url], "max_concurrency": 4})
        assert isinstance(reward, UnifiedReward)
        scores = reward.score(images, ["p"] * 24, [{}] * 24)
        assert scores.values.tolist() == expected(images)
        assert scores.details["answered"].tolist() == [1] * 24
        assert scores.values.dtype == scores.details["answered"].dtype == np.float32
        assert server.most_in_flight == 4
        order = np.random.default_rng(0).permutation(24)
        assert reward.score(images[order], ["p"] * 24, [{}] * 24).values.tolist() == expected(images[order])
        assert reward.score(images[3:4], ["p"], [{}]).values.tolist() == expected(images[3:4])
        assert reward.score(images[:0], [], []).values.shape == (0,)
        assert len(server.bodies) == 49
        assert server.num_connections == 4  # of the second and the third call, too
        reward.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "unified_reward"]


def test_the_bound_holds_for_all_threads_together() -> None:
    with MisbehavingServer(delay_s=0.05, at_once=3) as server:
        reward = load_reward("unified_reward", {"urls": [server.url], "max_concurrency": 3})
        threads = [
            threading.Thread(target=reward.score, args=(greys(1, 2, 3, 4), ["p"] * 4, [{}] * 4)) for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (len(server.bodies), server.most_in_flight) == (12, 3)


# --- the key ---


def test_the_key_of_the_environment_is_sent_and_appears_nowhere_else(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MY_KEY", f" {KEY}\n")
    monkeypatch.setenv("OPENAI_API_KEY", "another-key")
    for name in ("httpx2", "httpcore2", "openai", "asyncio"):
        monkeypatch.setattr(logging.getLogger(name), "level", logging.DEBUG)
    caplog.set_level(logging.DEBUG)
    with MisbehavingServer("ok", "500", "garbage", "429", "ok", "echo_key") as server:
        config = reward_config("unified_reward", {"urls": [server.url], "api_key_env": "MY_KEY", **QUICK})
        reward = build(config)  # type: ignore[arg-type]
        assert np.isfinite(reward.score(greys(1, 2), ["p"] * 2, [{}] * 2).values).all()
        with pytest.raises(
            ValueError, match=r"refuses the key \(HTTP 401\): check the environment variable MY_KEY"
        ) as caught:
            reward.score(greys(1), ["p"], [{}])
    assert set(server.keys) == {f"Bearer {KEY}"}
    assert len(caplog.records) > 5
    chain = f"{caught.value!r} {caught.value.__cause__!r} {caught.value.__suppress_context__}"
    assert chain.endswith("None True")
    for text in (caplog.text, chain, repr(config), repr(reward), str(vars(reward)), config.model_dump_json()):
        assert KEY not in text


def test_the_key_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNIFIED_REWARD_API_KEY", "of-the-environment")
    (tmp_path / "key").write_text(KEY + "\n")
    with MisbehavingServer() as server:
        ask([server.url], greys(1), api_key_file=str(tmp_path / "key"))
        assert server.keys == [f"Bearer {KEY}"]


def test_without_a_key_no_other_one_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with MisbehavingServer("ok", "401") as server:
        ask([server.url], greys(1))
        assert KEY not in str(server.keys)
        with pytest.raises(ValueError, match="no key was found; set the environment variable UNIFIED_REWARD_API_KEY"):
            ask([server.url], greys(1))


@pytest.mark.parametrize("key", ["two words", "zwölf", "a\nb", "\x00"])
def test_a_key_that_no_header_can_carry_is_refused_without_being_shown(tmp_path: Path, key: str) -> None:
    (tmp_path / "key").write_text(key, encoding="utf-8")
    section = {"urls": ["http://h/v1"], "api_key_file": str(tmp_path / "key")}
    with pytest.raises(ValueError, match=r"the file .*key holds no key, or one with characters") as caught:
        load_reward("unified_reward", section)
    assert key not in str(caught.value)
    with pytest.raises(ValueError, match=r"api_key_file: cannot read /nowhere/key: FileNotFoundError"):
        load_reward("unified_reward", section | {"api_key_file": "/nowhere/key"})


# --- the section ---


@pytest.mark.parametrize(
    ("section", "reason"),
    [
        ({}, "^rewards.unified_reward: give either urls"),
        ({"urls": []}, "^rewards.unified_reward: give either urls"),
        ({"urls": ["10.0.0.1:17140/v1"]}, r"urls = .*each must be http\(s\)://host:port/v1"),
        ({"urls": ["http://h/v1?key=1"]}, r"urls = .*each must be http\(s\)://host:port/v1"),
        ({"urls": ["http://h/v1"], "timeout_s": 200}, "timeout_s 200 must be below deadline_s 110"),
        ({"urls": ["http://h/v1"], "api_key": "x"}, "api_key: unknown key; did you mean 'api_key_env'"),
    ],
)
def test_a_wrong_section_is_one_line(section: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        load_reward("unified_reward", section)
    assert "\n" not in str(caught.value)


def test_a_password_in_a_url_is_refused_without_being_shown() -> None:
    with pytest.raises(ValueError, match="no user or password in a url") as caught:
        load_reward("unified_reward", {"urls": ["http://me:hunter2@h/v1"]})
    assert "hunter2" not in str(caught.value)


# --- a real server ---


@pytest.fixture(scope="module")
def real_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """(url, model) of `transformers serve` with a tiny vision-language model that has learnt three answers."""
    from tests.rewards.tiny_vlm import save_tiny_vlm

    model = tmp_path_factory.mktemp("tiny_vlm")
    question = INSTRUCTION.replace("{prompt}", "a plain wall")
    lessons = {255: "Final Score: 4.5", 0: "Final Score: 2", 128: "I cannot tell."}
    save_tiny_vlm(
        model, [(Image.new("RGB", (512, 512), (grey,) * 3), question, answer) for grey, answer in lessons.items()]
    )
    port = free_port()
    command = [Path(sys.executable).parent / "transformers", "serve", model, "--device", "cpu"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    with (model / "log").open("w") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=os.environ | {"HF_HUB_OFFLINE": "1"}
        )
    try:
        _wait_until_up(f"http://127.0.0.1:{port}/health", process, model / "log")
        yield f"http://127.0.0.1:{port}/v1", str(model)
    finally:
        process.terminate()
        process.wait(10)


def _wait_until_up(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except OSError:
            time.sleep(0.2)
    raise AssertionError(f"transformers serve is not up: {log.read_text()[-2000:]}")


@pytest.mark.slow
def test_a_real_server_sees_the_image_and_its_words_become_scores(real_server: tuple[str, str]) -> None:
    url, model = real_server
    images = greys(255, 0, 128, 0, 255, size=(300, 200))
    scores = ask([url], images, ["a plain wall"] * 5, model=model, timeout_s=19.0)
    np.testing.assert_allclose(scores.values, np.array([0.9, 0.4, np.nan, 0.4, 0.9], np.float32))
    assert scores.details["answered"].tolist() == [1] * 5  # "I cannot tell." is an answer, and no score


@pytest.mark.slow
def test_a_real_server_beside_a_dead_one_scores_everything(real_server: tuple[str, str]) -> None:
    url, model = real_server
    dead = f"http://127.0.0.1:{free_port()}/v1"
    scores = ask([dead, url], greys(255, 0, 255, 0), ["a plain wall"] * 4, model=model, timeout_s=19.0)
    np.testing.assert_allclose(scores.values, np.array([0.9, 0.4, 0.9, 0.4], np.float32))
