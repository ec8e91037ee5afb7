"""Nodes go and come: killed, cut off from the network, away for a while."""

import random
from collections.abc import Iterator
from itertools import count

import pytest

from tests.chaos.cluster import LEARNER, SAMPLER, Cluster, Node
from tests.chaos.conftest import Calm, Scenarios
from tests.chaos.network import network, possible

NUMBERS = count(1)


def other_node(cluster: Cluster, title: str) -> str:
    """A node without the head that holds such a worker, or ''."""
    holders = {cluster.node_of(pid) for pid in cluster.ready(title)}
    return next((name for name in sorted(holders) if name != "head"), "")


@pytest.fixture
def small_head() -> Iterator[Cluster]:
    """A head with room for the replica and a little more: the run's workers are on two nodes beside it."""
    one = Cluster(cpus=1)
    try:
        one.add("n0", 2)
        yield one
    finally:
        one.end()


@pytest.mark.full
def test_a_node_is_lost_with_its_workers_and_objects(small_head: Cluster, scenarios: Scenarios, calm: Calm) -> None:
    """Its samples go with it: they are drawn again. A new node takes its place."""
    small_head.add("n00", 2)
    settings = ("sampler.num_workers=4", "sampler.num_cpus=0.5", "learner.num_cpus=0.5", "learner.max_restarts=10")
    run = scenarios.run("node", small_head, *settings, "run.num_epochs=500", mlflow=True).start()
    run.reach(1)

    def lose(name: str) -> None:
        small_head.lose(name)
        small_head.start_node(f"n{next(NUMBERS)}", 2)

    for title in (SAMPLER, LEARNER, SAMPLER, LEARNER, LEARNER):
        run.hit("a node is lost, another comes", lose, lambda title=title: other_node(small_head, title))
    run.once_in_mlflow(run.stopped_as(calm.run), "RUNNING")
    small_head.nothing_left()


@pytest.mark.full
def test_a_sampler_node_that_is_away_gets_its_seats_back(small_head: Cluster, scenarios: Scenarios, calm: Calm) -> None:
    """With room for some samplers only, the run goes on with those, says so, and fills the seats when there is room."""
    settings = ("sampler.num_workers=4", "sampler.num_cpus=0.5", "cluster.wait_s=15", "learner.num_cpus=0.4")
    run = scenarios.run("away", small_head, *settings, "run.num_epochs=500").start()
    run.reach(1)
    away = other_node(small_head, SAMPLER)
    before = len(small_head.ready(SAMPLER))
    run.hit("a sampler node is away", small_head.lose, lambda: away)
    run.until("it says how many serve", lambda: run.line(r"\d of 4 samplers serve"))
    run.reach(run.epoch + 3)
    small_head.add("back", 2)
    run.until("the seats are taken again", lambda: len(small_head.ready(SAMPLER)) == before, 60)
    run.stopped_as(calm.run)
    small_head.nothing_left()


@pytest.fixture
def apart() -> Iterator[Cluster]:
    """A head on a bridge and two nodes in network namespaces of their own."""
    if not possible():
        pytest.skip("needs root and `ip netns`: nodes get network namespaces of their own")
    with network() as bridge:
        one = Cluster(cpus=1, network=bridge)
        try:
            one.add("far0", 2, apart=True)
            one.add("far1", 2, apart=True)
            yield one
        finally:
            one.end()


@pytest.mark.full
def test_a_node_is_cut_off_from_the_network(apart: Cluster, scenarios: Scenarios, calm: Calm) -> None:
    """No connection is closed: packets no longer arrive. Ray's health check gives the node up, the run goes on."""
    chosen = random.Random(5)
    settings = ("sampler.num_workers=4", "sampler.num_cpus=0.5", "sampler.timeout_s=30", "scorers.timeout_s=15")
    learner = ("learner.num_cpus=0.5", "learner.timeout_s=30", "learner.max_restarts=10")
    run = scenarios.run("apart", apart, *settings, *learner, "run.num_epochs=500", mlflow=True).start()
    run.reach(1)

    def cut(node: Node) -> None:
        apart.unplug(node.name)

    for _ in range(5):
        run.hit("a node is cut off from the network", cut, lambda: chosen.choice(apart.far()), timeout_s=150)
        for name in [node.name for node in apart.far() if not apart.plugged(node.name)]:
            apart.replug(name)
        run.reach(run.epoch + 1)
    run.once_in_mlflow(run.stopped_as(calm.run), "RUNNING")
    apart.nothing_left()
