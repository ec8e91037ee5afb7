"""What a run takes, from epochs that can be added up by hand."""

import pytest

from nft_ray.planning.forecast import Forecast, card_bytes, evaluations, forecast, host_bytes, phases
from nft_ray.planning.places import Nodes
from nft_ray.planning.work import Footprint, Work
from tests.planning.examples import placed, played, small_config, small_work

COLOCATED = {"cluster": {"placement": "colocated"}, "sampler": {"num_gpus": 0.5}, "learner": {"num_gpus": 0.5}}
SLOW = small_work(
    velocities_s=0.5,
    score_s={"geneval": 0.25},
    score_request_s={"geneval": 1.0},
    step_s=3,
    publish_s=5,
    load_s=7,
    draw_eval_s=2.0,
    adapter_bytes=1000,
)


def forecast_of(work: Work, *, num_lines: int = 10, nodes: Nodes | None = None, **sections: object) -> Forecast:
    config = small_config(**sections)
    return forecast(config, work, placed(config, nodes), num_lines=num_lines)


def test_a_run_is_its_epochs_and_its_evaluations():
    found = forecast_of(SLOW)

    assert found.epoch_s == 57
    # 4 + 4 + 2 lines, 2 s each, one after the other; the last two are scored for 1.5 s
    assert found.evaluation_s == 20 + 1.5
    assert found.epochs == 20
    assert found.evaluations == 3, "the base, after 10, after 20"
    assert found.seconds == 20 * 57 + 3 * 21.5


def test_where_the_time_of_an_epoch_goes():
    found = forecast_of(SLOW)

    assert found.phases == {"draw": 18, "last scores": 0, "swap": 0, "update": 27, "publish and load": 12}
    assert found.busy == pytest.approx({"sampler": (18 + 7) / 57, "learner": 32 / 57, "geneval": 6 / 57})


def test_swaps_are_a_part_of_their_own():
    work = small_work(swap_s={"sampler": 2.0, "learner": 1.0}, load_s=1.0)
    found = phases(played(small_config(**COLOCATED), work), 1)

    assert found == {"draw": 12, "last scores": 0, "swap": 6, "update": 24, "publish and load": 1}
    assert sum(found.values()) == 43


@pytest.mark.parametrize(
    ("first", "last", "every", "count"), [(0, 1000, 10, 101), (0, 5, 10, 2), (800, 1100, 10, 31), (0, 25, 10, 4)]
)
def test_evaluations_of_a_stage(first: int, last: int, every: int, count: int):
    config = small_config(run={"name": "small", "num_epochs": last}, evaluation={"every": every})

    assert evaluations(config, first) == count


def test_overlapped_epochs_are_those_that_are_alike():
    found = forecast_of(small_work(update_s=1.0), run={"name": "small", "max_staleness": 1})

    assert found.epoch_s == 12
    assert found.bound.text.startswith("samplers and learners are even")
    assert found.busy["sampler"] == found.busy["learner"] == 1.0


def test_a_learner_that_cannot_keep_up():
    found = forecast_of(small_work(), run={"name": "small", "max_staleness": 1})

    assert found.bound.role == "learners"
    assert found.bound.text == (
        "learners: 1 learner is 2.0x too slow: 1 learner learns for 24.0 s, 1 sampler draws for 12.0 s"
    )


def test_a_reward_that_is_too_slow_is_named_with_what_would_do():
    found = forecast_of(small_work(score_s={"geneval": 1.4}))

    assert found.bound.role == "geneval"
    assert found.bound.factor == pytest.approx(1.4)
    assert found.bound.text == (
        "reward geneval: 1 replica is 1.4x too slow: scoring takes 16.8 s, 1 sampler draws for 12.0 s; 2 would do"
    )


def test_rewards_on_one_card_are_too_slow_together():
    shares = {"geneval": {"detector": "shapes", "num_gpus": 0.5}, "jpeg_compressibility": {"num_gpus": 0.5}}
    names = ("geneval", "jpeg_compressibility")
    found = forecast_of(small_work(names, score_s=dict.fromkeys(names, 1.0)), rewards=shares)

    assert found.bound.text == (
        "rewards geneval, jpeg_compressibility: 2 replicas on 1 card are 2.0x too slow: scoring takes 24.0 s, "
        "1 sampler draws for 12.0 s; 2 cards would do"
    )


def test_a_tail_says_how_the_groups_divide():
    found = forecast_of(small_work(), sampler={"num_workers": 2})

    assert found.bound.text == (
        "learners: 1 learner learns for 24.0 s, then 2 samplers draw for 6.0 s; 2.0 s more are waited for the last "
        "ones (3 groups on 2 samplers are 2 rounds, the last of 1)"
    )


def test_what_is_held():
    found = forecast_of(SLOW)

    state = 1000 // 2 * (4 + 2)
    assert found.checkpoint == state
    assert found.store == 12 * 10 + 4 + 1000 + state
    assert found.disk == 4 * state


def test_a_card_holds_one_side_of_a_pair_and_its_rewards():
    footprint = Footprint(sampler=30, learner=20, rewards={"geneval": 5}, host_sampler=3, host_learner=4)
    reward = {"geneval": {"detector": "shapes", "num_gpus": 0.2, "memory_gib": 1}}
    shared = small_config(
        cluster={"placement": "colocated"}, sampler={"num_gpus": 0.4}, learner={"num_gpus": 0.4}, rewards=reward
    )
    apart = small_config(sampler={"num_gpus": 1}, learner={"num_gpus": 1}, rewards=reward)

    assert {card: held for card, (held, _) in card_bytes(shared, footprint, placed(shared)).items()} == {0: 35}
    assert card_bytes(shared, footprint, placed(shared), runtime=7)[0][0] == 42, "the process that is parked"
    cards = card_bytes(apart, footprint, placed(apart))
    assert cards == {0: (5, ("geneval",)), 1: (20, ("learner",)), 2: (30, ("sampler",))}
    assert host_bytes(apart, footprint, placed(apart), store=10) == {0: 10 + 3 + 4 + 2**30}


def test_host_memory_is_counted_by_node():
    footprint = Footprint(sampler=0, learner=0, rewards={}, host_sampler=3, host_learner=4)
    config = small_config(sampler={"num_gpus": 1}, learner={"num_gpus": 1}, rewards={"geneval": {"detector": "shapes"}})
    found = host_bytes(config, footprint, placed(config, Nodes(count=2, cards=1)), store=10)

    reward = int(config.reward_configs["geneval"].memory_gib * 2**30)
    assert found == {0: 5 + 4 + reward, 1: 5 + 3}


def test_what_is_scored_on_the_samplers_card_is_their_time():
    found = forecast_of(
        small_work(score_s={"geneval": 0.5}, update_s=1.0),
        nodes=Nodes(count=1, cards=1),
        cluster={"placement": "colocated"},
        sampler={"num_gpus": 0.4},
        learner={"num_gpus": 0.4},
        rewards={"geneval": {"detector": "shapes", "num_gpus": 0.2}},
    )

    assert found.bound.text == (
        "samplers: 1 sampler draws for 18.0 s (6.0 s of it scoring), then 1 learner learns for 12.0 s"
    )
