"""What is lost with a node is made again: every image follows from its request, so it is the same, bit for bit."""

import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

from nft_ray.roles import ObjectsLostError

logger = logging.getLogger(__name__)
T = TypeVar("T")


async def while_lost(work: Callable[[], Awaitable[T]], max_attempts: int) -> T:
    """What `work` gives, asked for again where what it was about is lost; the last loss is raised."""
    for attempt in range(1, max_attempts):
        try:
            return await work()
        except ObjectsLostError as lost:
            logger.warning("%s; made again (attempt %d of %d)", lost, attempt + 1, max_attempts)
    return await work()
