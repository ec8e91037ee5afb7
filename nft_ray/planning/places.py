"""Which worker is on which card of which node: as Ray places them, without Ray.

Rewards come first, for they are deployed first: Serve gives replica after replica to the next node that has room. Then
the bundles of the learners (colocated: of a sampler with its learner), packed onto as few nodes as they fit; then the
samplers. A part of a GPU is of one card, the fullest that has room for it. A worker without a GPU has a core to itself.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from nft_ray.config import ExperimentConfig
from nft_ray.rewards.base import RewardConfig

UNIT = 10_000
"""Ray counts in units of 1e-4."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Nodes:
    """`count` nodes that are alike, with so many cards each."""

    count: int
    cards: int

    @property
    def gpus(self) -> int:
        return self.count * self.cards

    def __str__(self) -> str:
        return f"{self.count} x {self.cards} GPUs" if self.count > 1 else f"{self.cards} GPU{'s' * (self.cards != 1)}"


@dataclass(frozen=True, slots=True, order=True)
class Seat:
    """A place for one worker. card: its first one, numbered over all nodes; below 0 = a core of its own, on no card."""

    node: int
    card: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Seats:
    """Of every worker; colocated, sampler i and learner i have the same."""

    samplers: tuple[Seat, ...]
    learners: tuple[Seat, ...]
    rewards: Mapping[str, tuple[Seat, ...]]

    def named(self) -> Iterator[tuple[str, int, Seat]]:
        """(role, number of the worker, its seat): rewards by their names."""
        for role, seats in (("sampler", self.samplers), ("learner", self.learners), *self.rewards.items()):
            for number, seat in enumerate(seats):
                yield role, number, seat

    @property
    def num_nodes(self) -> int:
        return 1 + max(seat.node for _, _, seat in self.named())


def default_nodes(gpus: int, each: int = 8) -> Nodes:
    """So many GPUs on nodes of at most `each`."""
    count = next(count for count in range(-(-gpus // each), gpus + 1) if gpus % count == 0)
    return Nodes(count=count, cards=gpus // count)


def num_gpus(config: ExperimentConfig) -> float:
    """Cards, and parts of cards, that the run reserves."""
    workers = (
        config.sampler.num_workers * config.sampler.num_gpus + config.learner.num_workers * config.learner.num_gpus
    )
    return round(workers + sum(replicas(one) * one.num_gpus for one in config.reward_configs.values()), 4)


def replicas(reward: RewardConfig) -> int:
    """How many there are when there is work for all."""
    return reward.autoscaling.max_replicas if reward.autoscaling else reward.num_replicas


def seats(config: ExperimentConfig, nodes: Nodes, *, spread: bool = True) -> Seats:
    """ValueError, one line, where a worker finds no room. `spread` false: replicas are packed, too."""
    room, turn = _Room(nodes), 0
    rewards: dict[str, tuple[Seat, ...]] = {}
    for name, reward in config.reward_configs.items():
        found = []
        for _ in range(replicas(reward)):
            order = [(turn + step) % nodes.count for step in range(nodes.count)] if spread else range(nodes.count)
            found.append(room.take(f"reward {name}", reward.num_gpus, order))
            turn = found[-1].node + 1
        rewards[name] = tuple(found)
    sampler, learner = config.sampler, config.learner
    if config.cluster.placement == "colocated":
        both = sampler.num_gpus + learner.num_gpus
        pairs = tuple(room.packed("a sampler with its learner", both, learner.num_workers))
        return Seats(samplers=pairs, learners=pairs, rewards=rewards)
    learners = tuple(room.packed("a learner", learner.num_gpus, learner.num_workers))
    samplers = tuple(room.packed("a sampler", sampler.num_gpus, sampler.num_workers))
    return Seats(samplers=samplers, learners=learners, rewards=rewards)


class _Room:
    """What is free, in units, of each card of each node."""

    def __init__(self, nodes: Nodes) -> None:
        self._nodes, self._cores = nodes, 0
        self._free = [[UNIT] * nodes.cards for _ in range(nodes.count)]

    def take(self, who: str, gpus: float, order: Sequence[int]) -> Seat:
        wanted = round(gpus * UNIT)
        for node in order:
            free = self._free[node]
            if not wanted:
                self._cores += 1
                return Seat(node, -self._cores)
            if wanted % UNIT:
                fits = [(left, card) for card, left in enumerate(free) if left >= wanted]
                if fits and wanted < UNIT:
                    _, card = min(fits)
                    free[card] -= wanted
                    return Seat(node, node * self._nodes.cards + card)
            elif free.count(UNIT) * UNIT >= wanted:
                cards = [card for card, left in enumerate(free) if left == UNIT][: wanted // UNIT]
                for card in cards:
                    free[card] = 0
                return Seat(node, node * self._nodes.cards + cards[0])
        whole = sum(free.count(UNIT) for free in self._free)
        raise ValueError(f"no room for {who} with {gpus:g} GPUs on {self._nodes}: {whole} whole cards are left")

    def packed(self, who: str, gpus: float, count: int) -> Iterator[Seat]:
        """As few nodes as it takes: the one with the most room first, and as long as it lasts."""
        order: list[int] = []
        for number in range(count):
            one = f"{who}, {number + 1} of {count},"
            if not round(gpus * UNIT):
                yield self.take(one, gpus, [number % self._nodes.count])
                continue
            if not order or not self._fits(order[0], gpus):
                order = sorted(range(self._nodes.count), key=lambda node: (-sum(self._free[node]), node))
            yield (seat := self.take(one, gpus, order))
            order = [seat.node, *(node for node in order if node != seat.node)]

    def _fits(self, node: int, gpus: float) -> bool:
        return sum(self._free[node]) >= gpus * UNIT
