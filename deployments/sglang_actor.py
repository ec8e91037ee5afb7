"""The server of a reward's model as a Ray actor: it holds the GPUs, has a name, and outlives the job that made it.

    serve_sglang -> SglangActor -- thread: watch --> SglangProcess (sglang_server.py)

To use servers that run already needs nothing of this: the reward's `urls:` names them.

Failure policy: what befalls the server is mended in sglang_server.py. An actor that dies takes its server along; Ray
makes it again, on another node if its own is lost, and it starts its server there. Replicas ask it where (`access`).
"""

import asyncio
import logging
import secrets
import threading
import time
from typing import Any

import ray
from pydantic import SecretStr

from deployments.claims import NAMESPACE
from deployments.sglang_server import REPORT_S, SglangProcess, SglangStatus, read_api_key
from nft_ray.rewards.servers import SglangConfig

logger = logging.getLogger(__name__)


@ray.remote
class SglangActor:
    """Holds the GPUs and a SglangProcess; see there."""

    def __init__(self, config: SglangConfig, api_key: SecretStr | None) -> None:
        self._key, node_ip = api_key, ray.util.get_node_ip_address()
        self._process = SglangProcess(config, api_key, node_ip)
        if ray.get_runtime_context().was_current_actor_reconstructed:
            logger.warning("%s: its actor was lost; it is started again on %s", config.actor_name, node_ip)
            threading.Thread(target=self._process.start_again, daemon=True).start()

    def start(self) -> str:
        url = self._process.start()
        threading.Thread(target=self._process.watch, daemon=True).start()
        return url

    def url(self) -> str | None:
        return self._process.url

    def access(self) -> tuple[str | None, SecretStr | None]:
        return self._process.url, self._key

    def status(self) -> SglangStatus:
        return self._process.status()

    def stop(self) -> None:
        self._process.stop()


async def serve_sglang(config: SglangConfig) -> Any:
    """Handle of an actor named `config.actor_name` whose server answers; it lives until `ray.kill`: see plane.delete.

    However else it is lost, Ray makes it again. A server that others reach and that no key is named for gets one.
    Logs what it waits for. Raises ValueError (no key, a name that is taken, and as SglangProcess.start) or
    RuntimeError; the actor is gone then.
    """
    actor = SglangActor.options(  # type: ignore[attr-defined]
        name=config.actor_name,
        namespace=NAMESPACE,
        lifetime="detached",
        max_restarts=-1,
        num_cpus=config.num_cpus,
        num_gpus=config.gpus,
        max_concurrency=8,
    ).remote(config, _key(config))
    try:
        await _when_placed(actor, config)
        started = asyncio.ensure_future(_awaited(actor.start.remote()))
        while not (await asyncio.wait({started}, timeout=REPORT_S))[0]:
            logger.info("%s: %s", config.actor_name, (await actor.status.remote()).message)
        await started
    except BaseException:
        ray.kill(actor)
        raise
    return actor


async def _when_placed(actor: Any, config: SglangConfig) -> None:
    """Return when the actor runs; RuntimeError after start_timeout_s without room for it."""
    placed = asyncio.ensure_future(_awaited(actor.status.remote()))
    end = time.monotonic() + config.start_timeout_s
    wanted = f"{config.gpus:g} GPUs and {config.num_cpus:g} CPUs"
    while not (await asyncio.wait({placed}, timeout=min(REPORT_S, config.start_timeout_s)))[0]:
        free = ray.available_resources()
        said = f"waiting for {wanted}, the cluster has {free.get('GPU', 0):g} and {free.get('CPU', 0):g} free"
        if time.monotonic() >= end:
            placed.cancel()
            raise RuntimeError(f"{config.actor_name}: {said}; given up after {config.start_timeout_s:g} s")
        logger.info("%s: %s", config.actor_name, said)
    await placed


async def _awaited(reference: Any) -> Any:
    return await reference


def _key(config: SglangConfig) -> SecretStr | None:
    """The one that is named, or a random one where others reach the server and none is."""
    return read_api_key(config) or (SecretStr(secrets.token_hex(24)) if config.host is None else None)
