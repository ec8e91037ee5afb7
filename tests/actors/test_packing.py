"""Pieces in nodes: what fits is let through, what does not is named, and what nobody can say is let through."""

import itertools
import random
import time

import pytest

from actors.packing import Node, Piece, without_room


def cpus(*amounts: float) -> list[Piece]:
    return [Piece(role=f"{amount:g}", num_cpus=amount, num_gpus=0) for amount in amounts]


def gpus(*amounts: float) -> list[Piece]:
    return [Piece(role=f"{amount:g}", num_cpus=0, num_gpus=amount) for amount in amounts]


def nodes(*amounts: float) -> list[Node]:
    return [Node(num_cpus=amount) for amount in amounts]


FITS = [
    (cpus(0.5, 0.5, 0.5, 0.5), nodes(1, 1)),
    (cpus(*[0.1] * 20), nodes(1, 1)),  # ten times 0.1 is 1
    (cpus(3, 3, 2, 2, 2), nodes(6, 6)),  # first fit fails: 3 + 3, then 2 + 2 + 2; the largest first does not
    (cpus(0.4, 0.4, 0.3, 0.3, 0.3, 0.3), nodes(1, 1)),  # first fit fails: .4 + .4, .3 + .3 + .3 and one left
    (cpus(0, 0, 1), nodes(1)),
    (gpus(0.6, 0.4, 0.6, 0.4), [Node(num_cpus=0, num_gpus=2)]),
    (gpus(2, 1, 0.5, 0.5), [Node(num_cpus=0, num_gpus=4)]),
    (gpus(1, 1, 1), [Node(num_cpus=0, num_gpus=1, count=3)]),
    (cpus(*[1.0] * 7), [Node(num_cpus=4), Node(num_cpus=1, count=10**6)]),
]
FITS_NOT = [
    (cpus(0.5, 0.5, 0.4, 0.3, 0.3), nodes(0.9, 1.0), "0.3"),
    (cpus(0.4, 0.4, 0.4, 0.4, 0.4), nodes(1, 1), "0.4"),  # 2.0 asked of 2.0
    (cpus(2), nodes(1, 1), "2"),
    (gpus(0.6, 0.6, 0.6), [Node(num_cpus=0, num_gpus=2)], "0.6"),  # 1.8 of 2 cards
    (gpus(2), [Node(num_cpus=8, num_gpus=1, count=2)], "2"),
    (gpus(0.5, 1), [Node(num_cpus=0, num_gpus=1)], "0.5"),
    (gpus(1), nodes(64), "1"),
]


@pytest.mark.parametrize(("pieces", "have"), FITS)
def test_what_fits(pieces: list[Piece], have: list[Node]) -> None:
    assert without_room(pieces, have) is None


@pytest.mark.parametrize(("pieces", "have", "role"), FITS_NOT)
def test_what_does_not_fit_is_named(pieces: list[Piece], have: list[Node], role: str) -> None:
    found = without_room(pieces, have)
    assert found is not None
    assert found.role == role


def test_no_is_said_only_where_every_other_way_fails() -> None:
    """Against all assignments of up to 5 pieces to 2 nodes."""
    draw, refused = random.Random(0), 0
    for _ in range(300):
        sizes = [draw.randint(1, 9) / 10 for _ in range(draw.randint(2, 5))]
        fits = any(
            all(
                sum(size for size, place in zip(sizes, places, strict=True) if place == node) <= 1 + 1e-9
                for node in (0, 1)
            )
            for places in itertools.product((0, 1), repeat=len(sizes))
        )
        refused += not fits
        assert (without_room(cpus(*sizes), nodes(1, 1)) is None) == fits, sizes
    assert 50 < refused < 250


def test_what_nobody_can_say_is_let_through_in_time() -> None:
    draw = random.Random(1)
    hard = cpus(*[draw.randint(300, 400) / 1000 for _ in range(100)])
    started = time.process_time()
    assert without_room(hard, nodes(*[1.0] * 34)) is None
    assert time.process_time() - started < 2


def test_many_pieces_are_quick() -> None:
    started = time.process_time()
    assert without_room(gpus(*[1.0] * 2000), [Node(num_cpus=8, num_gpus=8)] * 250) is None
    assert time.process_time() - started < 5
