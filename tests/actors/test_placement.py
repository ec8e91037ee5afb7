"""What a run needs: the table and the check, without a cluster."""

import subprocess
import sys

import pytest

from actors.packing import Node
from actors.placement import Cluster, check, needs, table
from nft_ray.config import load
from tests.examples import QUICKSTART
from tests.fakes import fake_config


def one_node(num_cpus: float) -> Cluster:
    return Cluster(nodes=(Node(num_cpus=num_cpus),))


def test_the_table_adds_up() -> None:
    lines = table(needs(fake_config(sampler={"num_gpus": 0.5, "memory_gib": 2}))).splitlines()
    assert [line.split() for line in lines[1:]] == [
        ["sampler", "2", "0.5", "1", "4"],
        ["learner", "2", "0.5", "0", "2"],
        ["reward-jpeg_compressibility", "3", "0.75", "0", "0.9"],
        ["total", "7", "1.75", "1", "6.9"],
    ]
    assert len({len(line) for line in lines}) == 1


def test_a_sampler_and_a_learner_that_share_a_card_are_one_row() -> None:
    config = fake_config(cluster={"placement": "colocated"}, sampler={"num_gpus": 0.5}, learner={"num_gpus": 0.4})
    assert [line.split() for line in table(needs(config)).splitlines()[1:3]] == [
        ["sampler", "+", "learner", "2", "1", "1.8", "4"],
        ["reward-jpeg_compressibility", "3", "0.75", "0", "0.9"],
    ]


def test_fractions_fill_a_cluster_exactly() -> None:
    config = fake_config(sampler={"num_cpus": 0.3}, learner={"num_cpus": 0.3}, rewards={"jpeg_compressibility": {}})
    check(config, one_node(2.2))


def test_too_many_cpus_name_both_numbers() -> None:
    with pytest.raises(ValueError, match=r"needs 1\.75 CPUs \(sampler 2 x 0\.25, .*the cluster has 1: lower"):
        check(fake_config(), one_node(1))


def test_an_evaluation_needs_no_learners() -> None:
    config = fake_config(learner={"num_cpus": 8})
    check(config, one_node(1.25), training=False)
    assert [row.role for row in needs(config, training=False)] == ["sampler", "reward-jpeg_compressibility"]


def test_an_evaluations_sampler_keeps_the_share_of_its_learner() -> None:
    config = fake_config(cluster={"placement": "colocated"}, sampler={"num_gpus": 0.5}, learner={"num_gpus": 0.4})
    sampler, _ = needs(config, training=False)
    assert (sampler.role, sampler.num_gpus, sampler.memory_gib) == ("sampler", 0.9, config.sampler.memory_gib)


def test_gpus_that_are_not_there() -> None:
    with pytest.raises(ValueError, match=r"needs 2 GPUs \(learner 2 x 1\), the cluster has 0: .*num_gpus"):
        check(fake_config(learner={"num_gpus": 1}), one_node(2))


def test_a_dry_run_needs_no_ray() -> None:
    code = "import sys, actors.placement; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_quickstart_fits_two_cpus_even_with_three_replicas() -> None:
    config = load(QUICKSTART, ["rewards.geneval.num_replicas=3"])
    check(config, one_node(2))
    with pytest.raises(ValueError, match=r"needs 1\.9 CPUs .* the cluster has 1:"):
        check(config, one_node(1))


def test_a_piece_that_no_node_has_room_for_is_named() -> None:
    config = fake_config(
        sampler={"num_cpus": 0.4}, learner={"num_cpus": 0.4}, rewards={"jpeg_compressibility": {"num_cpus": 0.4}}
    )
    check(config, one_node(2))
    line = (
        r"no node has room for reward-jpeg_compressibility \(0\.4 CPUs\) beside the rest \(sampler 2 x 0\.4, learner "
        r"2 x 0\.4, .* 1 x 0\.4\): the nodes have 2 x 1 CPUs, .*; change num_cpus"
    )
    with pytest.raises(ValueError, match=line):
        check(config, Cluster(nodes=(Node(num_cpus=1), Node(num_cpus=1))))


def test_a_cluster_that_may_grow_is_told_what_it_lacks() -> None:
    config = fake_config(learner={"num_gpus": 1})
    head, gpu = Node(num_cpus=4), Node(num_cpus=1, num_gpus=1, count=2)
    lacks = check(config, Cluster(nodes=(head,), possible=(gpu,)))
    assert lacks is not None
    assert "needs 2 GPUs (learner 2 x 1), the cluster has 0" in lacks
    assert check(config, Cluster(nodes=(head,), possible=None)) == lacks, "nobody says what may come: it is waited for"
    assert check(config, Cluster(nodes=(head, gpu), possible=None)) is None


def test_more_than_an_autoscaler_may_add_is_refused_at_once() -> None:
    config, gpu = fake_config(learner={"num_gpus": 1}), Node(num_cpus=1, num_gpus=1)
    with pytest.raises(ValueError, match=r"needs 2 GPUs .* has 1: .*; what its autoscaler may add is counted \(1 CPUs"):
        check(config, Cluster(nodes=(Node(num_cpus=4),), possible=(gpu,)))


def test_the_samplers_that_may_join_later_need_no_room_yet() -> None:
    config = fake_config(sampler={"num_workers": 8, "min_workers": 2})
    check(config, one_node(2))
    with pytest.raises(ValueError, match=r"sampler 2 x 0\.25"):
        check(config, one_node(1))
