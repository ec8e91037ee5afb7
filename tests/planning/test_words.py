"""A plan in words: what a person reads of a forecast that can be added up by hand."""

from dataclasses import replace

import pytest

from nft_ray.config import ExperimentConfig
from nft_ray.planning.layouts import Ground, forecasts
from nft_ray.planning.places import Nodes
from nft_ray.planning.words import Host, duration, in_short, size, table, warnings
from nft_ray.planning.work import Footprint
from tests.planning.examples import small_config, small_work

WORK = small_work(velocities_s=0.5, step_s=3, publish_s=5, load_s=7, draw_eval_s=2.0, adapter_bytes=1000)
FOOTPRINT = Footprint(sampler=30, learner=20, rewards={}, host_sampler=3, host_learner=4)
NOWHERE = Host(what="a node")
ON_CARDS = {"sampler": {"num_gpus": 1}, "learner": {"num_gpus": 1}}


def ground(memory: int = 100, check=lambda _: None, footprint: Footprint = FOOTPRINT, work=WORK) -> Ground:
    return Ground(
        nodes=Nodes(count=1, cards=2),
        memory=memory,
        estimate=lambda _: (work, footprint),
        lines=lambda _: 10,
        check=check,
    )


def warned(config: ExperimentConfig, on: Ground, host: Host = NOWHERE) -> list[str]:
    return warnings(forecasts(config, on), on, host)


def test_two_lines_say_what_a_run_takes():
    found = in_short(forecasts(small_config(**ON_CARDS), ground()), price=3.0, gpus=2)

    # 18 s + 24 + 3 + 5 + 7 = 57 s an epoch, 20 of them, and 3 evaluations of 20 s: 20 min
    assert found == [
        "57.0 s an epoch, 20 min for 20 epochs, 5% of it evaluations, 2 $",
        "learners: 1 learner learns for 32.0 s, then 1 sampler draws for 18.0 s",
    ]


def test_the_table_has_a_row_per_role():
    lines = table(forecasts(small_config(**ON_CARDS), ground()), ["small"], ground(), None)

    assert "an epoch      draw 18.0 s, update 27.0 s, publish and load 12.0 s" in lines
    assert "an evaluation 20.0 s, 3 of them (every 10 epochs, 10 lines)" in lines
    assert [line.split()[:3] for line in lines[-4:]] == [
        ["role", "workers", "on"],
        ["sampler", "1", "1"],
        ["learner", "1", "1"],
        ["geneval", "1", "CPUs"],
    ]


def test_stages_are_told_one_by_one():
    config = small_config(run={"name": "small", "num_epochs": 20})
    data = config.model_dump() | {"stages": [{"name": "a", "num_epochs": 15}, {"name": "b", "num_epochs": 5}]}
    staged = ExperimentConfig.model_validate(data)
    lines = table(forecasts(staged, ground()), ["a", "b"], ground(), None)

    # the base model, after 10, at the end; the base model and at the end
    assert lines[2].startswith("  stage a: 15 epochs of 57.0 s, 3 evaluations of 20.0 s: 15 min; learners:")
    assert lines[3].startswith("  stage b: 5 epochs of 57.0 s, 2 evaluations of 20.0 s: 5 min; learners:")


def test_nothing_is_warned_of_where_all_fits():
    assert warned(small_config(**ON_CARDS), ground()) == []


def test_a_card_that_is_too_small():
    (line,) = warned(small_config(**ON_CARDS), ground(memory=25))

    assert line.startswith("a card has 0.0 MB and sampler need 0.0 MB: lower micro_batch_size")


def test_what_cannot_be_placed():
    def check(_: ExperimentConfig) -> None:
        raise ValueError("no node has room")

    assert warned(small_config(**ON_CARDS), ground(check=check)) == ["Ray may not place it: no node has room"]


def test_host_memory_shm_store_and_disk():
    config = small_config(**ON_CARDS)
    stage = forecasts(config, ground())[0]
    small = Host(what="this machine", memory=stage.store, shm=stage.store - 1, disk=stage.disk - 1)

    told = warned(config, ground(), small)
    assert [line.partition(":")[0].split(" of ")[0] for line in told] == [
        "this machine has 0.0 MB",
        "this machine gives Ray's object store 0.0 MB by default, an epoch needs 0.0 MB",
        "/dev/shm",
        "this machine has 0.0 MB",
    ]
    assert warned(config, ground(), Host(what="this machine", memory=2**40, shm=stage.store, disk=stage.disk)) == []


@pytest.mark.parametrize(
    ("section", "field"),
    [
        ({"sampler": {"timeout_s": 5}}, "sampler.timeout_s = 5 is shorter than a rollout takes, 8.0 s"),
        ({"learner": {"timeout_s": 20}}, "learner.timeout_s = 20 is shorter than an update takes, 27.0 s"),
        ({"scorers": {"timeout_s": 3}}, "scorers.timeout_s = 3 is shorter than a call of geneval takes, 4.0 s"),
    ],
)
def test_a_deadline_that_every_call_would_miss(section: dict, field: str):
    on = ground(work=replace(WORK, score_s={"geneval": 1.0}))

    assert warned(small_config(**section), on) == [f"{field}: raise it"]


def test_units_for_a_person():
    assert [duration(seconds) for seconds in (3.14, 600, 3 * 3600, 100 * 3600)] == ["3.1 s", "10 min", "3.0 h", "100 h"]
    assert [size(count) for count in (2.5e9, 3e6)] == ["2.5 GB", "3.0 MB"]
