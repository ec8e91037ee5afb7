"""An epoch whose seconds can be added up by hand, and what holds for any."""

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nft_ray.planning.places import Nodes
from nft_ray.planning.simulation import System, simulate
from nft_ray.planning.spans import Run
from tests.planning.examples import placed, played, small_config, small_work

COLOCATED = {
    "cluster": {"placement": "colocated"},
    "sampler": {"num_gpus": 0.5},
    "learner": {"num_gpus": 0.5},
}


def images(run: Run, what: str, epoch: int, role: str | None = None) -> int:
    found = [span for span in run.spans if span.what == what and span.epoch == epoch]
    return sum(span.images for span in found if role in (None, span.role))


def test_one_of_each_is_a_sum():
    work = small_work(
        velocities_s=0.5, score_s={"geneval": 0.25}, score_request_s={"geneval": 1.0}, step_s=3, publish_s=5, load_s=7
    )
    run = played(small_config(), work)

    # 3 x (4 x 1.5) sampled; the last group is scored, for 1 + 4 x 0.25, while its velocities are computed, for 4 x 0.5
    assert run.collected[0] == 18
    assert run.updated[0] == 18 + 12 * 2 + 3 + 5
    assert run.loaded[0] == run.ends[0] == 57
    assert run.ends[1] == 2 * 57


def test_images_that_leave_with_their_samples_are_scored_behind_the_velocities():
    work = small_work(velocities_s=0.5, score_s={"geneval": 0.25}, score_request_s={"geneval": 1.0})
    run = played(small_config(), work, system=System(images_first=False), epochs=1)

    assert run.collected == (20.0,)


def test_one_stale_epoch_hides_the_shorter_half_behind_the_longer():
    config = small_config(run={"name": "small", "max_staleness": 1})
    run = played(config, small_work(update_s=1.0), epochs=5)

    assert run.ends == (24.0, 36.0, 48.0, 60.0, 72.0)


def test_a_load_waits_behind_the_rollouts_that_a_sampler_has():
    config = small_config(run={"name": "small", "max_staleness": 1}, prompts={"groups_per_epoch": 6})
    run = played(config, small_work(update_s=0.25), epochs=2)

    # collected at 24, updated at 30, while the sampler has the second and the third rollout of epoch 2: until 36
    assert run.updated[0] == 30
    assert run.loaded[0] == 36


def test_a_slow_reward_holds_the_epoch_up():
    work = small_work(score_s={"geneval": 2.0})

    def collected(replicas: int) -> float:
        rewards = {"geneval": {"detector": "shapes", "num_replicas": replicas}}
        return played(small_config(rewards=rewards), work, epochs=1).collected[0]

    assert collected(1) == 4 + 3 * 8
    assert collected(2) == 12 + 8
    assert collected(3) == 12 + 8


def test_what_is_left_over_for_the_last_round_is_a_tail():
    config = small_config(sampler={"num_workers": 4}, prompts={"groups_per_epoch": 5})

    assert played(config, small_work(), epochs=1).collected == (8.0,)
    assert played(config, small_work(), epochs=1, system=System(parts=4)).collected == (5.0,)


def test_sides_that_share_a_card_swap_twice():
    work = small_work(swap_s={"sampler": 2.0, "learner": 1.0}, load_s=1.0)
    run = played(small_config(**COLOCATED), work)

    assert run.ends == (12 + 3 + 24 + 3 + 1, 2 * 43)
    assert [span.what for span in run.spans if span.role == "learner" and span.epoch == 1] == [
        "wake",
        "update",
        "park",
    ]


def test_a_reward_on_the_samplers_card_takes_its_time():
    config = small_config(
        **COLOCATED | {"sampler": {"num_gpus": 0.4}, "learner": {"num_gpus": 0.4}},
        rewards={"geneval": {"detector": "shapes", "num_gpus": 0.2}},
    )
    run = played(config, small_work(score_s={"geneval": 0.5}), Nodes(count=1, cards=1), epochs=1)

    assert run.collected == (12 + 6,), "as much work as there is, on one card"


def test_a_batch_is_scored_together_and_waits_only_so_long():
    rewards = {"geneval": {"detector": "shapes", "batch_size": 2, "batch_wait_s": 0.5}}
    config = small_config(rewards=rewards, sampler={"num_workers": 3})
    run = played(config, small_work(score_request_s={"geneval": 1.0}), epochs=1)

    scored = [(span.start, span.end, span.images) for span in run.spans if span.role == "geneval"]
    assert scored == [(4.0, 5.0, 8), (5.5, 6.5, 4)]


def test_samples_travel_to_a_learner_on_another_node():
    config = small_config(sampler={"num_gpus": 1}, learner={"num_gpus": 1})
    work = small_work(adapter_bytes=5)
    here = played(config, work, Nodes(count=1, cards=2), epochs=1)
    there = played(config, work, Nodes(count=2, cards=1), epochs=1)

    assert here.ends == (36.0,)
    # images: 4 bytes to the scorer is no matter of the learner's; 3 groups x 40 bytes, then 5 of weights
    assert there.updated[0] - there.collected[0] == 24 + 120
    assert there.loaded[0] - there.updated[0] == 5


def test_an_optimizer_step_ends_for_all_ranks_at_once():
    config = small_config(learner={"num_workers": 2, "optimizer_steps": 2}, prompts={"groups_per_epoch": 4})
    run = played(config, small_work(step_s=1.0), epochs=1)

    starts = sorted({span.start for span in run.spans if span.what == "update"})
    ends = [span for span in run.spans if span.what == "step"]
    slowest = [max(span.end - span.start for span in run.spans if span.start == start) for start in starts]
    assert len(ends) == 4
    assert run.updated[0] - run.collected[0] == sum(slowest) + 2
    assert sum(slowest) >= 16, "two ranks learn 16 images at 2 s in no less"


def test_every_line_is_evaluated_once():
    config = small_config(sampler={"num_workers": 2})
    plain = played(config, small_work(draw_eval_s=0.5, encode_s=1.0))
    run = played(config, small_work(draw_eval_s=0.5, encode_s=1.0), evaluate_after={1}, num_lines=10)

    assert images(run, "evaluate", 1) == images(run, "score", 1) - 12 == 10
    # 4 + 4 + 2 lines on two samplers, each line with its own prompt
    assert run.ends[1] - plain.ends[1] == pytest.approx(6 + 3)


def test_what_is_only_measured_is_not_waited_for():
    rewards = {"geneval": {"detector": "shapes"}, "jpeg_compressibility": {"eval_only": True}}
    work = small_work(("geneval", "jpeg_compressibility"), score_s={"geneval": 0.0, "jpeg_compressibility": 100.0})
    run = played(small_config(rewards=rewards), work, epochs=1)

    assert run.collected == (12.0,)
    assert images(run, "score", 1, "jpeg_compressibility") == 12


def test_the_store_holds_samples_until_they_are_learnt_and_not_until_the_next_epoch_is_collected():
    work = small_work(group_bytes=1)
    late = played(small_config(), work, epochs=3, system=System(frees_early=False))
    early = played(small_config(), work, epochs=3)
    epoch = 12 * 10 + 3

    assert max(held for _, held in late.store) == 2 * epoch + 4, "the last group with its images"
    assert max(held for _, held in early.store) == epoch + 4
    assert early.store[-1][1] == 0


shapes = st.fixed_dictionaries(
    {
        "groups": st.integers(1, 9),
        "size": st.integers(2, 6),
        "samplers": st.integers(1, 4),
        "learners": st.integers(1, 3),
        "replicas": st.integers(1, 4),
        "staleness": st.integers(0, 1),
        "in_flight": st.integers(1, 3),
        "batch": st.integers(1, 3),
        "parts": st.integers(1, 3),
        "images_first": st.booleans(),
    }
)
seconds = st.sampled_from([0.0, 0.25, 1.0, 3.0])
costs = st.fixed_dictionaries(
    {name: seconds for name in ("encode_s", "decode_s", "velocities_s", "score", "step_s", "load_s", "publish_s")}
)


def config_of(shape, **changed):
    of = {**shape, **changed}
    return small_config(
        run={"name": "any", "max_staleness": of["staleness"]},
        prompts={"groups_per_epoch": of["groups"], "images_per_group": of["size"]},
        sampler={"num_workers": of["samplers"], "max_in_flight": of["in_flight"]},
        learner={"num_workers": of["learners"]},
        rewards={"geneval": {"detector": "shapes", "num_replicas": of["replicas"], "batch_size": of["batch"]}},
    )


def work_of(cost):
    rest = {name: value for name, value in cost.items() if name != "score"}
    return small_work(score_s={"geneval": cost["score"]}, **rest)


@settings(max_examples=40, deadline=None)
@given(shape=shapes, cost=costs)
def test_every_image_is_drawn_once_scored_once_and_learnt_once(shape, cost):
    config = config_of(shape)
    system = System(parts=min(shape["parts"], shape["size"]), images_first=shape["images_first"])
    run = simulate(config, work_of(cost), placed(config), epochs=3, system=system)

    wanted = shape["groups"] * shape["size"]
    assert len(run.ends) == 3
    for epoch in (1, 2, 3):
        for what in ("draw", "update"):
            assert images(run, what, epoch) == wanted, (what, epoch)
    assert sum(images(run, "score", epoch) for epoch in (1, 2, 3)) == 3 * wanted, "a batch may be of two epochs"
    assert list(run.ends) == sorted(run.ends)
    assert run.store[-1][1] == 0, "what was learnt is freed"


@settings(max_examples=40, deadline=None)
@given(shape=shapes, cost=costs)
def test_a_sampler_draws_one_request_at_a_time_and_nothing_overlaps_on_it(shape, cost):
    config = config_of(shape)
    run = simulate(config, work_of(cost), placed(config), epochs=2)

    for role, worker in Counter((span.role, span.worker) for span in run.spans):
        spans = sorted((span.start, span.end) for span in run.spans if (span.role, span.worker) == (role, worker))
        for (_, end), (start, _) in pairwise(spans):
            assert start >= end - 1e-9, (role, worker)


@settings(max_examples=60, deadline=None)
@given(shape=shapes, cost=costs, role=st.sampled_from(["replicas", "samplers"]))
def test_a_further_worker_never_makes_an_epoch_longer(shape, cost, role):
    shape = shape | {"batch": 1, "staleness": 0}
    config, more = config_of(shape), config_of(shape, **{role: shape[role] + 1})
    work = work_of(cost)

    before = simulate(config, work, placed(config), epochs=1).ends[0]
    assert simulate(more, work, placed(more), epochs=1).ends[0] <= before + 1e-9


@settings(max_examples=40, deadline=None)
@given(shape=shapes, cost=costs, more=st.sampled_from(["encode_s", "velocities_s", "score", "step_s", "load_s"]))
def test_no_epoch_gets_shorter_by_what_takes_longer(shape, cost, more):
    config = config_of(shape | {"staleness": 0, "batch": 1})
    slower = cost | {more: cost[more] + 0.5}

    before = simulate(config, work_of(cost), placed(config), epochs=1).ends[0]
    assert simulate(config, work_of(slower), placed(config), epochs=1).ends[0] >= before - 1e-9


@settings(max_examples=30, deadline=None)
@given(shape=shapes, cost=costs)
def test_an_epoch_is_no_shorter_than_its_work_allows(shape, cost):
    config = config_of(shape)
    run = simulate(config, work_of(cost), placed(config), epochs=4)
    spans = [span for span in run.spans if span.role == "learner" and span.worker == 0 and span.epoch == 4]

    assert run.ends[3] - run.ends[2] >= sum(span.work_s for span in spans) - 1e-9
