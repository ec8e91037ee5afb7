"""A model's files on a worker's node, before its model loads: lines of progress reach the driver while they come.

The Hub token goes to the worker as an argument of this one call: not through `runtime_env`, which Ray writes to its
logs and shows in its dashboard, and not through the worker's environment.
"""

import logging
from typing import Any

from actors.answers import answer, waiting
from nft_ray.config import ModelConfig
from nft_ray.downloads.pipelines import REPORT_S, STALL_S, is_remote, token

logger = logging.getLogger(__name__)


async def download(actor: Any, model: ModelConfig, name: str) -> None:
    """Run the worker's `download(token)`, a generator of lines, to its end; nothing to do for a local folder.

    A worker speaks at least every REPORT_S seconds; one that is silent for longer than a stalled download may last
    is DeadlineError. What the Hub refuses is the one-line ValueError of nft_ray/downloads/pipelines.py.
    """
    if not any(name is not None and is_remote(name) for name in (model.path, model.lora.start)):
        return
    lines, silence_s = actor.download.options(num_returns="streaming").remote(token()), STALL_S + 6 * REPORT_S
    while True:
        try:
            ref = await waiting(anext(lines), f"{name}: files of {model.path}", silence_s)
        except StopAsyncIteration:
            return
        if line := await answer(ref, f"{name}: files of {model.path}", silence_s):
            logger.info("%s: %s", name, line)
