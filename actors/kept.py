"""What outlives the node that made it: values held on the driver's node, and which references are lost for good.

    reference ──► pulled in the background, held without a copy ──► value, whatever becomes of its first node

An actor's return value is lost with its node unless another node has a copy; a copy that nobody holds may be evicted.
"""

import asyncio
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import ObjectLostError
from ray.experimental import get_local_object_locations

from actors.answers import DeadlineError, waiting

LOOK_S = 5.0
"""For an object without a known copy to say that it is lost."""


class Kept:
    """A reference and, as soon as it has come, its value: arrays stay in shared memory, read-only."""

    def __init__(self, ref: Any, what: str, timeout_s: float) -> None:
        self.ref = ref
        self._pulled: asyncio.Task[Any] = asyncio.ensure_future(waiting(ref, what, timeout_s))
        self._pulled.add_done_callback(lambda task: task.cancelled() or task.exception())  # told by `value`

    async def value(self) -> Any:
        """The value; raises what became of it instead."""
        return await asyncio.shield(self._pulled)

    def drop(self) -> None:
        """Hold it no longer."""
        self._pulled.cancel()


async def lost(refs: Sequence[Any]) -> list[bool]:
    """Of each object of this process, whether it is gone. A copy on another node is believed, and nothing moves.

    Of an object that is lost, Ray puts the error where its copy would be: on this node.
    """
    places, here = get_local_object_locations(list(refs)), ray.get_runtime_context().get_node_id()

    async def gone(ref: Any) -> bool:
        place = places.get(ref, {})
        if place.get("did_spill") or any(node != here for node in place.get("node_ids") or ()):
            return False
        try:  # small, or a copy that is here; or lost, then it says so
            await waiting(ref, "an object without a place", LOOK_S)
        except ObjectLostError:
            return True
        except DeadlineError:
            return False
        return False

    return list(await asyncio.gather(*map(gone, refs)))
