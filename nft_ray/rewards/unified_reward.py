"""UnifiedReward: a vision-language model rates caption and image from 1 to 5, asked over HTTP.

    image --PNG 512x512--> chat completion at one of `urls` --text--> parse_score --> score / 5, in [0.2, 1]

The model, UnifiedReward-7b-v1.5, runs behind any OpenAI-compatible server (sglang). This file knows how to ask, and how
to go on when a server does not answer; who starts the servers is not its business. All images of a call are asked at
once, `max_concurrency` in flight, over connections that are kept: one asyncio loop, in a thread of the reward's own.

Failure policy
- No connection, a broken or senseless answer, HTTP 5xx, 408, 409, 429, or `timeout_s` passed: the URL is put aside and
  the request goes to another one; `_urls.py` says for how long. Where every URL is aside, requests wait.
- An image whose own requests failed `max_attempts` times, or that waits while every URL failed so often in a row, on
  any other 4xx (the server does not like this image), or when `deadline_s` is over, is missing: NaN, never 0. The other
  images keep their scores. One warning per call says how many are missing and why.
- A text without a score is asked for once more: at temperature 0 the same server says nearly always the same (not
  quite: its rounding depends on the batch), so a third time is not worth its seconds.
- 401, 403 and 404 are the user's mistake (key, model, path), which waiting does not mend: a ValueError at once.

The key comes from the environment or a file. It is in no message, no log and no repr; a server's own words are never
repeated, because some quote the key.

Source: `unifiedreward_score_sglang` in flow_grpo/rewards.py of DiffusionNFT; the model: Wang et al. 2025 (arXiv
2503.05236). Different on purpose: a text without a score is missing, not 0; a number that is not from 1 to 5 is no
score (published: 10 counts as 1, 5.5 as 5.5), nor is a range (published: 1-5 counts as 1); the data URL names its type,
image/png.
"""

import asyncio
import base64
import io
import logging
import math
import os
import re
import threading
import time
import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import numpy as np
from PIL import Image
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from nft_ray.rewards._urls import Server, Servers, client_of, parse_retry_after
from nft_ray.rewards.base import Reward, RewardConfig, Scores, check_batch
from nft_ray.rewards.servers import SglangConfig
from nft_ray.types import Mark

logger = logging.getLogger(__name__)

INSTRUCTION = (
    "<image>\nYou are given a text caption and a generated image based on that caption. Your task is to evaluate this "
    "image based on two key criteria:\n1. Alignment with the Caption: Assess how well this image aligns with the "
    "provided caption. Consider the accuracy of depicted objects, their relationships, and attributes as described in "
    "the caption.\n2. Overall Image Quality: Examine the visual quality of this image, including clarity, detail "
    "preservation, color accuracy, and overall aesthetic appeal.\nBased on the above criteria, assign a score from 1 "
    "to 5 after 'Final Score:'.\nYour task is provided as follows:\nText Caption: [{prompt}]"
)
"""The published request, to the letter: the model was trained with this wording."""
IMAGE_SIZE = 512
"""Pixels of both sides of what is sent, whatever the image's own, as published (Pillow's bicubic)."""
WORST_SCORE, BEST_SCORE = 1.0, 5.0
MAX_UNSCORED_ANSWERS = 2
POLL_S = 0.02
CLOSE_S = 5.0

_WHERE = "rewards.unified_reward"
_FINAL_SCORE = re.compile(r"Final Score:\s*(\d+(?:\.\d+)?)(?!\d|\.\d)(?!(?:[-–]| to )\d)")
_TRIED_AGAIN = {408, 409, 429}
_USER_ERRORS = {401, 403, 404}


class Config(RewardConfig):
    """Section `rewards.unified_reward`."""

    urls: Annotated[tuple[str, ...], Mark.PLACEMENT, Field(examples=[["http://127.0.0.1:17140/v1"]])] = ()
    """Base URLs of OpenAI-compatible servers that run already, such as http://10.0.0.7:17140/v1; asked in turn."""
    server: SglangConfig | None = None
    """Start an sglang server instead, which lives as long as the reward is deployed. It says which model scores."""
    model: str = "UnifiedReward-7b-v1.5"
    """Name of the model at those servers."""
    max_concurrency: Annotated[int, Mark.PLACEMENT] = Field(default=32, ge=1)
    """Requests of one replica in flight."""
    timeout_s: Annotated[float, Mark.PLACEMENT] = Field(default=60.0, gt=0)
    """Deadline of one request, from when it is sent."""
    max_attempts: Annotated[int, Mark.PLACEMENT] = Field(default=6, ge=1)
    """Failures of one image before it is missing; the default pauses bridge half a minute without any server."""
    backoff_s: Annotated[float, Mark.PLACEMENT] = Field(default=1.0, gt=0)
    """Pause of a URL after its first failure, in seconds."""
    deadline_s: Annotated[float, Mark.PLACEMENT] = Field(default=110.0, gt=0)
    """Deadline of a whole call. Above scorers.timeout_s, what has been scored until then would be lost as well."""
    api_key_env: Annotated[str, Mark.PLACEMENT] = "UNIFIED_REWARD_API_KEY"
    """Environment variable with the key. Without it, and without a file, servers are asked without a key."""
    api_key_file: Annotated[str | None, Mark.PLACEMENT] = None
    """File with the key, instead. Read once, at load."""

    @field_validator("urls")
    @classmethod
    def _are_base_urls(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        for url in urls:
            parts = urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
                raise ValueError("each must be http(s)://host:port/v1")
        return tuple(url.rstrip("/") for url in urls)

    @model_validator(mode="after")
    def _across_fields(self) -> "Config":
        if bool(self.urls) == (self.server is not None):
            raise ValueError("give either urls, of servers that run, or server, which is started")
        if self.timeout_s >= self.deadline_s:
            raise ValueError(f"timeout_s {self.timeout_s:g} must be below deadline_s {self.deadline_s:g}")
        return self


def parse_score(text: str) -> float | None:
    """The first number from 1 to 5 that follows "Final Score:", / 5; None where there is none. Case matters.

    A range, "1-5" or "1 to 5", is the instruction repeated, not a score.
    """
    numbers = (float(number) for number in _FINAL_SCORE.findall(text))
    return next((number / BEST_SCORE for number in numbers if WORST_SCORE <= number <= BEST_SCORE), None)


def build(config: Config) -> Reward:
    """Read the key and start the loop; no server is asked yet. Raises ValueError where key or URLs cannot be used."""
    if config.server is not None:
        raise ValueError(f"{_WHERE}.server: is started where the reward is deployed; in one process, give urls")
    if any(urlsplit(url).username or urlsplit(url).password for url in config.urls):
        raise ValueError(f"{_WHERE}.urls: no user or password in a url: the key comes from the environment or a file")
    requests = logging.getLogger("httpx2")
    if requests.level == logging.NOTSET:
        requests.setLevel(logging.WARNING)  # it has a line for every request
    return UnifiedReward(config, read_key(config))


def read_key(config: Config) -> str | None:
    """The key of the servers, or None. Raises ValueError where its file cannot be read, or no header can carry it."""
    if config.api_key_file is None:
        key = os.environ.get(config.api_key_env, "").strip()
        if not key:
            return None
    else:
        try:
            key = Path(config.api_key_file).expanduser().read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(
                f"{_WHERE}.api_key_file: cannot read {config.api_key_file}: {type(error).__name__}"
            ) from None
    if not key or not all("!" <= character <= "~" for character in key):
        raise ValueError(f"{_key_source(config)} holds no key, or one with characters that no HTTP header can carry")
    return key


class UnifiedReward:
    """The reward: `values` in [0.2, 1] or NaN; the detail `answered` is 1 where a server sent a text, scored or not."""

    def __init__(self, config: Config, key: str | None) -> None:
        self._config, self._has_key = config, key is not None
        self._loop = asyncio.new_event_loop()
        clients = [client_of(url, key, config.timeout_s) for url in config.urls]
        servers = [Server(_WHERE, url, client) for url, client in zip(config.urls, clients, strict=True)]
        self._servers = Servers(servers)
        self._room = asyncio.Semaphore(config.max_concurrency)
        self._thread = threading.Thread(target=_run, args=(self._loop,), name="unified_reward", daemon=True)
        self._thread.start()
        self._finalizer = weakref.finalize(self, _stop, self._loop, clients)

    def score(self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Scores:
        """See Reward.score. Returns within `deadline_s`; ValueError where a server refuses the key or the model."""
        check_batch(images, prompts, metadata)
        answers = asyncio.run_coroutine_threadsafe(self._score(images, prompts), self._loop).result()
        _warn(answers)
        values = [math.nan if answer.score is None else answer.score for answer in answers]
        answered = [answer.answered for answer in answers]
        return Scores(
            values=np.array(values, dtype=np.float32), details={"answered": np.array(answered, dtype=np.float32)}
        )

    def close(self) -> None:
        """Close the connections and end the thread; it is done at exit as well."""
        self._finalizer()
        self._thread.join(CLOSE_S)

    async def _score(self, images: np.ndarray, prompts: Sequence[str]) -> list["_Answer"]:
        late = f"not answered within deadline_s = {self._config.deadline_s:g}"
        answers = [_Answer(missing=late) for _ in prompts]
        if not answers:
            return answers
        self._servers.forgive()
        tasks = [asyncio.create_task(self._fill(*one)) for one in zip(answers, images, prompts, strict=True)]
        try:
            done, _ = await asyncio.wait(tasks, timeout=self._config.deadline_s, return_when=asyncio.FIRST_EXCEPTION)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        for task in done:
            task.result()  # raises a ValueError, the only exception that leaves `_fill`
        return answers

    async def _fill(self, answer: "_Answer", image: np.ndarray, prompt: str) -> None:
        """Ask until there is a score, or no more sense in asking; `answer` always says what is known so far."""
        messages = await asyncio.to_thread(_messages, image, prompt)
        num_failed = num_unscored = 0
        while num_failed < self._config.max_attempts and num_unscored < MAX_UNSCORED_ANSWERS:
            async with self._room:
                server = self._servers.take()
                try:
                    text = await self._ask(server, messages) if server else None
                except _FailedError as error:
                    answer.missing = str(error)
                    num_failed += 1
                    continue
                except _RefusedError as error:
                    answer.missing = str(error)
                    return
            if text is not None:
                answer.read(text)
                if answer.score is not None:
                    return
                num_unscored += 1
            elif self._servers.num_rounds_failed >= self._config.max_attempts:
                answer.missing = self._servers.trouble
                return
            else:
                await asyncio.sleep(POLL_S)

    async def _ask(self, server: Server, messages: list[dict[str, Any]]) -> str:
        """One request: what the server says. Raises _FailedError, _RefusedError, or ValueError (the user's mistake)."""
        import openai

        sent_at = time.monotonic()
        retry_after_s = None
        try:
            async with asyncio.timeout(self._config.timeout_s):
                response = await server.client.chat.completions.with_raw_response.create(
                    model=self._config.model,
                    messages=messages,  # type: ignore[arg-type]
                    temperature=0,
                )
            text = _Completion.model_validate_json(response.http_response.content).choices[0].message.content
            server.succeeded()
            return text
        except openai.APIStatusError as error:
            status, failure = error.status_code, f"HTTP {error.status_code}"
            if status < 500 and status not in _TRIED_AGAIN:
                server.succeeded()  # it works, it only does not like this
                raise self._objection(server, status) from None
            if status == 429:
                retry_after_s = parse_retry_after(error.response.headers.get("retry-after"))
        except (TimeoutError, openai.APITimeoutError):
            failure = f"nothing within {self._config.timeout_s:g} s"
        except openai.APIConnectionError as error:
            failure = f"{type(error.__cause__).__name__}"
        except ValidationError:
            failure = "a senseless answer"
        finally:
            if server.tried_by is asyncio.current_task():
                server.tried_by = None
        server.failed(sent_at, failure, self._config.backoff_s, retry_after_s)
        raise _FailedError(f"{server.url}: {failure}") from None

    def _objection(self, server: Server, status: int) -> Exception:
        """What to raise for a 4xx that another attempt does not mend; without the server's words, see above."""
        if status == 404:
            return ValueError(
                f"{server.url} has no chat or no model {self._config.model!r} (HTTP 404): check urls, model"
            )
        if status in _USER_ERRORS:
            advice = "check" if self._has_key else "no key was found; set"
            return ValueError(f"{server.url} refuses the key (HTTP {status}): {advice} {_key_source(self._config)}")
        return _RefusedError(f"{server.url}: refused with HTTP {status}")


class _FailedError(Exception):
    """A request that another one may mend."""


class _RefusedError(Exception):
    """A request that no other one will mend."""


class _Message(BaseModel):
    content: str


class _Choice(BaseModel):
    message: _Message


class _Completion(BaseModel):
    """The part of a chat completion that is read."""

    choices: list[_Choice] = Field(min_length=1)


@dataclass(slots=True)
class _Answer:
    """What is known of one image. missing: why there is no score, while there is none."""

    missing: str
    answered: bool = False
    score: float | None = None

    def read(self, text: str) -> None:
        self.answered, self.score = True, parse_score(text)
        self.missing = "an answer without a score"


def _messages(image: np.ndarray, prompt: str) -> list[dict[str, Any]]:
    """The published request: the image, 512x512, as a PNG, then the instruction with the caption."""
    buffer = io.BytesIO()
    Image.fromarray(image).resize((IMAGE_SIZE, IMAGE_SIZE)).save(buffer, format="PNG")
    url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    text = INSTRUCTION.replace("{prompt}", prompt)
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
    return [{"role": "user", "content": content}]


def _run(loop: asyncio.AbstractEventLoop) -> None:
    loop.run_forever()
    loop.close()


def _stop(loop: asyncio.AbstractEventLoop, clients: Sequence[Any]) -> None:
    async def close() -> None:
        await asyncio.gather(*(client.close() for client in clients), return_exceptions=True)
        loop.stop()

    asyncio.run_coroutine_threadsafe(close(), loop)


def _key_source(config: Config) -> str:
    if config.api_key_file is not None:
        return f"the file {config.api_key_file}"
    return f"the environment variable {config.api_key_env}"


def _warn(answers: Sequence[_Answer]) -> None:
    causes = Counter(answer.missing for answer in answers if answer.score is None)
    if causes:
        listed = ", ".join(f"{count} x {cause}" for cause, count in causes.most_common())
        logger.warning("%s: %d of %d images have no score: %s", _WHERE, causes.total(), len(answers), listed)
