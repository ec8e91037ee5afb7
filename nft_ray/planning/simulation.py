"""A run as the system plays it, event by event: the same order, queues, barriers and turns as trainer.py and its roles.

    collect(e + staleness) ──► pool of samplers ──► replicas of every reward ──► update(e) ──► load(e + 1) ──► evaluate
       all groups at once      max_in_flight each    max_ongoing, batches         barrier       behind what
                                                                                  per step      is queued

What each call takes comes from a Work. Nothing here is random and nothing is measured: no failures, no first call that
compiles, no checkpoint that is slower than an epoch.
"""

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np

from nft_ray.algorithms.batch import optimizer_steps
from nft_ray.config import ExperimentConfig
from nft_ray.planning.calls import rollout_call, score_s, transfer_s
from nft_ray.planning.events import Card, Clock, Crew, Process, Room, Signal, together
from nft_ray.planning.places import Seat, Seats
from nft_ray.planning.spans import Run, Span
from nft_ray.planning.work import Work
from nft_ray.types import Split


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """How the system plays an epoch, where there is a choice; the defaults are what it does today."""

    images_first: bool = True
    """Images leave a sampler as soon as they exist; else with the velocities, as one answer."""
    parts: int = 1
    """Requests that a group is asked for in."""
    frees_early: bool = True
    """Samples are freed when they are learnt; else when the next epoch is collected."""


def simulate(
    config: ExperimentConfig,
    work: Work,
    seats: Seats,
    *,
    epochs: int = 2,
    evaluate_after: Collection[int] = (),
    num_lines: int = 0,
    system: System | None = None,
) -> Run:
    """The first `epochs` epochs of a run, and an evaluation of `num_lines` lines after those that are named."""
    return _Epochs(config, work, seats, system or System(), epochs, evaluate_after, num_lines).run()


@dataclass(slots=True)
class _Replica:
    card: Card
    node: int
    waiting: deque[tuple[int, int, Signal]] = field(default_factory=deque)
    at_work: bool = False
    full: Signal | None = None  # while it waits for a batch to fill


class _Epochs:
    def __init__(
        self,
        config: ExperimentConfig,
        work: Work,
        seats: Seats,
        system: System,
        epochs: int,
        evaluate_after: Collection[int],
        num_lines: int,
    ) -> None:
        self.config, self.work, self.seats, self.system = config, work, seats, system
        self.epochs, self.evaluate_after, self.num_lines = epochs, evaluate_after, num_lines
        self.clock = Clock()
        cards: dict[Seat, Card] = {}
        self.cards = {(role, number): cards.setdefault(seat, Card(self.clock)) for role, number, seat in seats.named()}
        samplers = len(seats.samplers)
        self.pool = Crew(samplers, config.sampler.max_in_flight)
        self.turns = [Room(1) for _ in range(samplers)]
        self.sections = config.reward_configs
        self.trained = config.trained_weights.keys()
        self.rewards = {
            name: [_Replica(self.cards[name, number], seat.node) for number, seat in enumerate(places)]
            for name, places in seats.rewards.items()
        }
        self.crews = {
            name: Crew(len(found), 2 * self.sections[name].batch_size) for name, found in self.rewards.items()
        }
        self.asked = {name: Room(config.scorers.max_in_flight) for name in self.rewards}
        self.spans: list[Span] = []
        self.collected: list[float] = []
        self.updated: list[float] = []
        self.loaded: list[float] = []
        self.ends: list[float] = []
        self.store: list[tuple[float, int]] = [(0.0, 0)]
        self.awake = "sampler"
        self.kept: deque[int] = deque()  # samples that are learnt and not freed

    def run(self) -> Run:
        self.clock.start(self.train())
        self.clock.run()
        return Run(
            spans=tuple(self.spans),
            collected=tuple(self.collected),
            updated=tuple(self.updated),
            loaded=tuple(self.loaded),
            ends=tuple(self.ends),
            store=tuple(self.store),
        )

    def train(self) -> Process:
        """Trainer.train, verb by verb."""
        rollouts: deque[Signal] = deque()
        next_epoch = 0
        for epoch in range(self.epochs):
            while next_epoch < self.epochs and len(rollouts) <= self.config.run.max_staleness:
                rollouts.append(self.clock.start(self.collect(next_epoch)))
                next_epoch += 1
            nodes = yield rollouts.popleft()
            while self.kept:
                self.hold(-self.kept.popleft())
            self.collected.append(self.clock.now)
            yield self.clock.start(self.update(epoch, nodes))
            self.updated.append(self.clock.now)
            yield self.clock.start(self.load(epoch))
            self.loaded.append(self.clock.now)
            if epoch + 1 in self.evaluate_after:
                yield self.clock.start(self.evaluate(epoch))
            self.ends.append(self.clock.now)

    def collect(self, epoch: int) -> Process:
        """Every group, sampled and scored; gives the node of each group's samples."""
        prompts, parts = self.config.prompts, self.system.parts
        sizes = [len(part) for part in np.array_split(np.arange(prompts.images_per_group), parts)]
        groups = [
            [self.clock.start(self.roll_out_and_score(epoch, size, 1, "train")) for size in sizes if size]
            for _ in range(prompts.groups_per_epoch)
        ]
        found: list[list[int]] = []
        for group in groups:
            found.append((yield together(group)))
        return [nodes[0] for nodes in found]

    def evaluate(self, epoch: int) -> Process:
        """Every line once, so many requests at a time that all are busy (evaluator.pipeline_depth)."""
        size, sampler = self.config.evaluation.batch_size, self.config.sampler
        depth = (sampler.max_workers or sampler.num_workers) * sampler.max_in_flight + self.config.scorers.max_in_flight
        room = Room(depth)

        def one(images: int) -> Process:
            yield room.taken()
            yield self.clock.start(self.roll_out_and_score(epoch, images, images, "eval"))
            room.give_back()

        lines = [min(size, self.num_lines - start) for start in range(0, self.num_lines, size)]
        yield together([self.clock.start(one(images)) for images in lines])

    def roll_out_and_score(self, epoch: int, images: int, prompts: int, split: Split) -> Process:
        """One request: its images, then the scores of every reward that is waited for. Gives the sampler's node."""
        worker = yield self.pool.taken()
        drawn = Signal()
        done = self.clock.start(self.roll_out(epoch, worker, images, prompts, split, drawn))
        yield drawn if self.system.images_first else done
        node = self.seats.samplers[worker].node
        asked = {name: self.clock.start(self.score(epoch, name, images, node)) for name in self.rewards}
        waits = [asked[name] for name in asked if split == "eval" or name in self.trained]
        together(asked.values()).then(lambda _: self.hold(-images * self.work.image_bytes))
        yield together([*waits, done])
        return node

    def roll_out(self, epoch: int, worker: int, images: int, prompts: int, split: Split, drawn: Signal) -> Process:
        """SamplerActor.draw, then `clean`: one call at a time."""
        turn, card = self.turns[worker], self.cards["sampler", worker]
        yield turn.taken()
        call = rollout_call(self.work, images=images, prompts=prompts, split=split)
        yield self.clock.wait(call.request)
        for what, seconds in (("encode", call.encode), ("draw", call.draw), ("decode", call.decode)):
            name = "evaluate" if split == "eval" and what == "draw" else what
            count = images if what == "draw" else 0
            yield from self.on_card("sampler", worker, card, name, seconds, epoch, count)
        self.hold(images * self.work.image_bytes)
        drawn.fire()
        if split == "train":
            yield from self.on_card("sampler", worker, card, "velocities", call.velocities, epoch)
            self.hold(self.sample_bytes(images))
        turn.give_back()
        self.pool.give_back(worker)

    def score(self, epoch: int, name: str, images: int, node: int) -> Process:
        """One call of one reward: room at the driver, a replica that takes it, its images there, a batch."""
        yield self.asked[name].taken()
        number = yield self.crews[name].taken()
        replica = self.rewards[name][number]
        if replica.node != node:
            yield self.clock.wait(transfer_s(self.work, images * self.work.image_bytes))
        scored = Signal()
        replica.waiting.append((epoch, images, scored))
        if replica.full is not None and len(replica.waiting) >= self.sections[name].batch_size:
            full, replica.full = replica.full, None
            full.fire()
        elif not replica.at_work:
            replica.at_work = True
            self.clock.start(self.batches(name, number, replica))
        yield scored
        self.crews[name].give_back(number)
        self.asked[name].give_back()

    def batches(self, name: str, number: int, replica: _Replica) -> Process:
        """serve.batch: one batch after the other while requests wait."""
        section = self.sections[name]
        while replica.waiting:
            if len(replica.waiting) < section.batch_size:
                full = replica.full = Signal()
                self.clock.after(section.batch_wait_s, lambda full=full: None if full.fired else full.fire())  # type: ignore[misc]
                yield full
                replica.full = None
            batch = [replica.waiting.popleft() for _ in range(min(section.batch_size, len(replica.waiting)))]
            images = sum(count for _, count, _ in batch)
            seconds = score_s(self.work, name, images)
            yield from self.on_card(name, number, replica.card, "score", seconds, batch[0][0], images)
            for *_, scored in batch:
                scored.fire()
        replica.at_work = False

    def update(self, epoch: int, nodes: list[int]) -> Process:
        """LearnerGroup.update: samples travel, every optimizer step ends for all ranks at once, rank 0 publishes."""
        yield from self.turn_to("learner", epoch)
        counts, shards = samples_per_rank(self.config, epoch, len(self.seats.learners))
        arrivals = self.arrivals(nodes, shards)
        yield together([self.clock.wait(seconds) for seconds in arrivals])
        for step in counts:
            yield together(
                [
                    self.clock.start(self.rank(epoch, rank, "update", images * self.work.update_s, images))
                    for rank, images in enumerate(step)
                ]
            )
            ranks = range(len(step))
            yield together([self.clock.start(self.rank(epoch, rank, "step", self.work.step_s)) for rank in ranks])
        yield self.clock.start(self.rank(epoch, 0, "publish", self.work.publish_s))
        learnt = self.sample_bytes(self.config.prompts.images_per_group) * self.config.prompts.groups_per_epoch
        if self.system.frees_early:
            self.hold(-learnt)
        else:
            self.kept.append(learnt)
        if epoch <= self.config.run.max_staleness:
            self.hold(self.work.adapter_bytes)  # so many versions are kept

    def rank(self, epoch: int, rank: int, what: str, seconds: float, images: int = 0) -> Process:
        yield from self.on_card("learner", rank, self.cards["learner", rank], what, seconds, epoch, images)

    def load(self, epoch: int) -> Process:
        """SamplerPool.load: a call of every sampler, behind those that it has."""
        yield from self.turn_to("sampler", epoch)
        home = self.seats.learners[0].node
        away = len({seat.node for seat in self.seats.samplers} - {home})

        def one(worker: int) -> Process:
            self.pool.add(worker)
            yield self.turns[worker].taken()
            if self.seats.samplers[worker].node != home:  # all nodes draw from one
                yield self.clock.wait(transfer_s(self.work, away * self.work.adapter_bytes))
            card = self.cards["sampler", worker]
            yield from self.on_card("sampler", worker, card, "load", self.work.load_s, epoch)
            self.turns[worker].give_back()
            self.pool.give_back(worker)

        yield together([self.clock.start(one(worker)) for worker in range(len(self.turns))])

    def turn_to(self, side: str, epoch: int) -> Process:
        """phases.py: colocated, the other side parks and this one wakes.

        Asked by `update` and `load` only: they begin when every call of the other side has returned, and rollouts come
        after a load.
        """
        if self.config.cluster.placement != "colocated" or self.awake == side:
            return
        other, self.awake = self.awake, side
        yield from self.swap(other, "park", epoch)
        yield from self.swap(side, "wake", epoch)

    def swap(self, side: str, what: str, epoch: int) -> Process:
        seats = self.seats.samplers if side == "sampler" else self.seats.learners
        seconds = self.work.swap_s.get(side, 0.0)

        def one(worker: int) -> Process:
            yield from self.on_card(side, worker, self.cards[side, worker], what, seconds, epoch)

        yield together([self.clock.start(one(worker)) for worker in range(len(seats))])

    def arrivals(self, nodes: list[int], shards: list[int]) -> list[float]:
        """Seconds until each rank has its samples; what comes to a node from others comes at its bandwidth."""
        size = self.sample_bytes(self.config.prompts.images_per_group)
        to = [self.seats.learners[rank].node for rank in shards]
        incoming: dict[int, float] = {}
        for here, there in zip(nodes, to, strict=True):
            incoming[there] = incoming.get(there, 0.0) + (size if here != there else 0)
        return [transfer_s(self.work, incoming.get(seat.node, 0.0)) for seat in self.seats.learners]

    def sample_bytes(self, images: int) -> int:
        """Of one group, or a part of it."""
        return images * self.work.sample_bytes + self.work.group_bytes

    def hold(self, num_bytes: int) -> None:
        """So many more in the object store from now on."""
        self.store.append((self.clock.now, self.store[-1][1] + num_bytes))

    def on_card(
        self, role: str, worker: int, card: Card, what: str, seconds: float, epoch: int, images: int = 0
    ) -> Process:
        start = self.clock.now
        yield card.work(seconds)
        if seconds or images:
            self.spans.append(
                Span(
                    role=role,
                    worker=worker,
                    what=what,
                    start=start,
                    end=self.clock.now,
                    work_s=seconds,
                    epoch=epoch + 1,
                    images=images,
                )
            )


def samples_per_rank(config: ExperimentConfig, epoch: int, ranks: int) -> tuple[list[list[int]], list[int]]:
    """(images of every rank in each optimizer step, the rank of each group): batch.shard and batch.optimizer_steps.

    No sample is dropped.
    """
    groups, size = config.prompts.groups_per_epoch, config.prompts.images_per_group
    step = optimizer_steps(
        np.ones(groups * size, dtype=bool), config.learner.optimizer_steps, config.run.seed, epoch
    ).reshape(groups, size)
    load, shards = [0] * ranks, []
    for _ in range(groups):
        rank = load.index(min(load))
        shards.append(rank)
        load[rank] += size
    counts = [
        [int((step[[g for g, of in enumerate(shards) if of == rank]] == s).sum()) for rank in range(ranks)]
        for s in range(int(step.max()) + 1)
    ]
    return counts, shards
