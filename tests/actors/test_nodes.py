"""What a connected Ray is asked: nodes, files on them, room behind its store; and what `ray up` says of its own."""

import asyncio
import json
import logging
from typing import Any

import pytest
from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply

from actors import nodes
from actors.footprint import Footprint
from actors.nodes import check_weights, cluster_now, described, room_for, spill_room, store_lines, working_kinds
from actors.packing import Node
from actors.placement import Cluster
from nft_ray.cli import cluster as connected
from nft_ray.cli.cluster import check_connected
from nft_ray.config import ExperimentConfig
from nft_ray.roles import TryAgainError
from tests.conftest import LocalRay
from tests.examples import example_config
from tests.fakes import fake_config

GIB = 2**30


@pytest.mark.ray
def test_the_nodes_that_are_there(local_ray: LocalRay) -> None:
    (node,) = cluster_now().nodes
    assert (node.num_cpus, node.num_gpus) == (2, 2)
    assert cluster_now().possible == (), "it has no autoscaler"


@pytest.mark.ray
def test_a_cluster_that_fits_is_not_waited_for(local_ray: LocalRay) -> None:
    asyncio.run(room_for(fake_config()))
    with pytest.raises(ValueError, match=r"needs 16\.75 CPUs"):
        asyncio.run(room_for(fake_config(learner={"num_cpus": 8}, sampler={"num_cpus": 0})))


@pytest.mark.ray
def test_one_that_does_not_grow_in_time_says_so(
    local_ray: LocalRay, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = fake_config(learner={"num_gpus": 2}, cluster={"wait_s": 0.5})
    grows = Cluster(nodes=cluster_now().nodes, possible=None)
    monkeypatch.setattr(nodes, "cluster_now", lambda: grows)
    line = r"did not grow within cluster\.wait_s = 0\.5 s: the run needs 4 GPUs \(learner 2 x 2\), the cluster has 2"
    with caplog.at_level(logging.INFO), pytest.raises(TryAgainError, match=line):
        asyncio.run(room_for(config))
    assert "the cluster has to grow, for up to 0.5 s" in caplog.text


@pytest.mark.ray
def test_files_that_no_node_has_are_told_before_anything_is_deployed(
    local_ray: LocalRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = fake_config(rewards={"pickscore": {"num_cpus": 0.1, "weights": "/nowhere"}})
    with pytest.raises(
        ValueError, match=r"rewards\.pickscore: /nowhere/.* is missing .* \(looked for on .*, all nodes"
    ):
        check_weights(config)
    grows = Cluster(nodes=cluster_now().nodes, possible=None)
    monkeypatch.setattr(nodes, "cluster_now", lambda: grows)
    check_weights(config)  # a node that comes may have them


@pytest.mark.ray
def test_an_epoch_beside_the_store_that_is_there(local_ray: LocalRay, monkeypatch: pytest.MonkeyPatch) -> None:
    plans = iter([GIB, 10**6 * GIB])
    monkeypatch.setattr(
        nodes, "footprint", lambda config: Footprint(group=1, images=1, epoch=next(plans), checkpoint=GIB)
    )
    assert spill_room() > 0
    (line,) = store_lines(fake_config(), joined=True)
    assert "the cluster's object store has 200.0 MiB: the rest is spilled" in line
    with pytest.raises(ValueError, match=r"the disk that it spills to .* free: lower prompts\.groups_per_epoch"):
        store_lines(fake_config(), joined=False)


def test_an_autoscaler_is_known_by_the_kinds_that_it_names() -> None:
    """As Ray 2.60 reports them: a head without an autoscaler has a monitor, too, of either version."""
    mapping = {"autoscaler_report": {"node_type_mapping": {"id": "node_175e"}}}
    assert not working_kinds(b"", json.dumps(mapping).encode())
    mapping["autoscaler_report"]["node_type_mapping"] = {"a": "headgroup", "b": "gpu", "c": "gpu"}
    assert working_kinds(b"", json.dumps(mapping).encode()) == {"headgroup": 1, "gpu": 2}
    second = GetClusterStatusReply()
    second.autoscaling_state.autoscaler_state_version = 2
    second.cluster_resource_state.node_states.add()
    assert not working_kinds(second.SerializeToString(), None)
    second.cluster_resource_state.node_states.add().ray_node_type_name = "gpu"
    assert working_kinds(second.SerializeToString(), None) == {"gpu": 1}
    assert not working_kinds(b"", None)


def test_what_ray_up_says_of_its_nodes() -> None:
    kinds: dict[str, Any] = {
        "head": {"resources": {"CPU": 8}, "max_workers": 0},
        "gpu": {"resources": {"CPU": 8, "GPU": 1}, "max_workers": 100},
        "cpu": {"resources": {"CPU": 4}},
    }
    told = described({"max_workers": 6, "head_node_type": "head", "available_node_types": kinds})
    assert told == {"gpu": ({"CPU": 8, "GPU": 1}, 6), "cpu": ({"CPU": 4}, 6)}


@pytest.mark.parametrize(
    ("stage", "line"),
    [
        ({"num_cpus": 64}, r"needs .* CPUs \(.*reward-jpeg_compressibility 1 x 64\), the cluster has 4"),
        ({"py_executable": "/no/python"}, r"rewards\.jpeg_compressibility\.py_executable = '/no/python': "),
    ],
)
def test_what_a_later_stage_lacks_is_told_right_after_connecting(
    stage: dict[str, Any], line: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(connected, "cluster_now", lambda: Cluster(nodes=(Node(num_cpus=4),)))
    monkeypatch.setattr(connected, "store_lines", lambda *args, **kwargs: ["the same"])
    config = staged(stage)
    check_connected(config.stage_configs[:1] * 2, None)
    assert caplog.text.count("the same") == 1
    if "py_executable" in stage:
        monkeypatch.setattr(
            "deployments.interpreter.os.path.exists", lambda path: True
        )  # so that it is looked at here, not on a cluster
    with pytest.raises(ValueError, match=line):
        check_connected(config.stage_configs, None)


def staged(second: dict[str, Any]) -> ExperimentConfig:
    """Two stages of one epoch; the second has another reward."""
    config = example_config().model_dump()
    config["run"].pop("num_epochs")
    config["stages"] = [
        {"name": "first", "num_epochs": 1},
        {"name": "second", "num_epochs": 1, "rewards": {"jpeg_compressibility": second}},
    ]
    return ExperimentConfig.model_validate(config)
