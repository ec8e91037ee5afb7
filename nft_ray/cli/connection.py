"""A Ray that runs already. Light: commands that only look at a cluster import nothing of training."""

import logging
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from nft_ray.roles import TryAgainError
from nft_ray.runs.root import in_submitted_job

CONNECT_S = 10.0


@contextmanager
def joined(address: str | None) -> Iterator[str | None]:
    """A Ray that runs already, for a command that looks at it; gives its dashboard's host:port."""
    import ray  # seconds that `--help` and `--local` need not wait

    check_reachable(address)
    try:
        context = ray.init(address=address or "auto", log_to_driver=False, logging_level=logging.WARNING)
    except ConnectionError:
        raise no_cluster(address) from None
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    try:
        yield context.dashboard_url or None
    finally:
        ray.shutdown()


@contextmanager
def dashboard_of(address: str | None) -> Iterator[Any]:
    """A connected Ray and its `deployments.plane.Dashboard`, which Serve is asked through."""
    from deployments.plane import Dashboard

    with joined(address) as url:
        if url is None:
            raise RuntimeError("this Ray cluster runs without its dashboard, which Serve is asked through")
        yield Dashboard(url)


def check_reachable(address: str | None) -> None:
    """TryAgainError, one line, where nobody listens at the host:port of a cluster: ray.init tries it for minutes."""
    address = address or os.environ.get("RAY_ADDRESS")
    if not address or not (found := re.fullmatch(r"\[?([^/]+?)\]?:(\d{1,5})", address)):
        return
    try:
        socket.create_connection((found[1], int(found[2])), timeout=CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise TryAgainError(
            f"no Ray cluster at {address} ({error}): start one with `ray start --head`, or give another --address"
        ) from None


def no_cluster(address: str | None) -> TryAgainError:
    """What is said where Ray finds none."""
    return TryAgainError(
        f"no Ray cluster at {address or 'this machine'}: start one with `ray start --head`, or give --address"
    )


def joins(address: str | None) -> bool:
    """Is a cluster that runs already meant: by --address, RAY_ADDRESS, or because this is a submitted job?"""
    return bool(address or os.environ.get("RAY_ADDRESS") or in_submitted_job(os.environ))
