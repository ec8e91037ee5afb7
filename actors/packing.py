"""Do the pieces of a run fit the nodes of a cluster? Pure: no Ray, no cluster.

A piece (a worker, or a bundle that a sampler and a learner share) is of one node, and a part of a GPU of one card: two
nodes with 1 CPU each have room for four pieces of 0.5 and for four of 0.4, not for five of 0.4. First fit, the largest
first, finds a place nearly always; where it does not, every other way is tried, so that "no" is the truth, and past
`MOST_STEPS` the answer is "perhaps". Ray places in an order of its own and may still not find what is there.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

UNIT = 10_000
"""Ray counts in units of 1e-4."""
MOST_STEPS, MOST_PIECES = 20_000, 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """What has to be on one node."""

    role: str
    num_cpus: float
    num_gpus: float

    def __str__(self) -> str:
        parts = [f"{amount:g} {kind}" for amount, kind in ((self.num_cpus, "CPUs"), (self.num_gpus, "GPUs")) if amount]
        return f"{self.role} ({' and '.join(parts) or 'nothing'})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A node, or `count` of a kind that an autoscaler may add. memory_gib: of the host; None = not known."""

    num_cpus: float
    num_gpus: float = 0.0
    memory_gib: float | None = None
    count: int = 1

    def __str__(self) -> str:
        gpus = f" and {self.num_gpus:g} GPUs" if self.num_gpus else ""
        return f"{f'{self.count} x ' if self.count > 1 else ''}{self.num_cpus:g} CPUs{gpus}"


_Room = tuple[int, tuple[int, ...]]
"""What is free on a node, in units: CPUs, and each card."""
_Want = tuple[int, int]


def without_room(pieces: Sequence[Piece], nodes: Sequence[Node]) -> Piece | None:
    """A piece for which there is no room when the others have theirs; None where all fit, or nobody can say."""
    ordered = sorted(pieces, key=lambda piece: (-piece.num_gpus, -piece.num_cpus))
    wants = [(round(piece.num_cpus * UNIT), round(piece.num_gpus * UNIT)) for piece in ordered]
    rooms = [_room(node) for node in nodes for _ in range(min(node.count, len(pieces)))]
    for piece, want in zip(ordered, wants, strict=True):
        if not any(True for room in set(rooms) for _ in _placed(room, want)):
            return piece  # not even on an empty node
    failed = _first_fit(wants, rooms)
    if failed is None or len(pieces) > MOST_PIECES or _Search(wants).fits(rooms) is not False:
        return None
    return ordered[failed]


def _room(node: Node) -> _Room:
    return round(node.num_cpus * UNIT), (UNIT,) * int(node.num_gpus + 1e-4)


def _placed(room: _Room, want: _Want) -> Iterator[_Room]:
    """The room that is left, for each way to take this from it: a part of a GPU may be of any card."""
    (cpus, cards), (num_cpus, num_gpus) = room, want
    if num_cpus > cpus:
        return
    if num_gpus % UNIT:
        for card in sorted({card for card in cards if card >= num_gpus}):  # the fullest first, as Ray does
            rest = list(cards)
            rest.remove(card)
            yield cpus - num_cpus, tuple(sorted([*rest, card - num_gpus], reverse=True))
    elif (whole := cards.count(UNIT)) * UNIT >= num_gpus:
        left = [UNIT] * (whole - num_gpus // UNIT) + [card for card in cards if card < UNIT]
        yield cpus - num_cpus, (*left, *(0,) * (num_gpus // UNIT))


def _first_fit(wants: Sequence[_Want], rooms: Sequence[_Room]) -> int | None:
    """The number of the first piece without a place."""
    left = list(rooms)
    for number, want in enumerate(wants):
        for index, room in enumerate(left):
            placed = next(_placed(room, want), None)
            if placed is not None:
                left[index] = placed
                break
        else:
            return number
    return None


class _Search:
    """Every way to place the pieces, until one is found, or too many were tried."""

    def __init__(self, wants: Sequence[_Want]) -> None:
        self._wants, self._steps = wants, 0
        self._failed: set[tuple[int, tuple[_Room, ...]]] = set()

    def fits(self, rooms: Sequence[_Room], number: int = 0) -> bool | None:
        """None: not known."""
        if number == len(self._wants):
            return True
        state = (number, tuple(sorted(rooms)))
        if state in self._failed:
            return False
        self._steps += 1
        if self._steps > MOST_STEPS:
            return None
        for room in sorted(set(rooms)):  # nodes that are alike are one choice
            for placed in _placed(room, self._wants[number]):
                rest = list(rooms)
                rest.remove(room)
                found = self.fits([*rest, placed], number + 1)
                if found is not False:
                    return found
        self._failed.add(state)
        return False
