"""Which card a worker gets: as Ray gives them."""

import pytest

from nft_ray.planning.places import Nodes, Seat, default_nodes, num_gpus, seats
from tests.planning.examples import small_config

EIGHT = {
    "cluster": {"placement": "colocated"},
    "sampler": {"num_workers": 7, "num_gpus": 0.5},
    "learner": {"num_workers": 7, "num_gpus": 0.5},
}
THREE = {name: {"num_gpus": share} for name, share in (("pickscore", 0.34), ("hpsv2", 0.33), ("clipscore", 0.33))}


def three_rewards(**sections):
    return small_config(**sections).model_copy(update={"rewards": THREE})


def test_pairs_share_a_card_and_rewards_come_first():
    config = three_rewards(**EIGHT)
    found = seats(config, Nodes(count=1, cards=8))

    assert {seat for places in found.rewards.values() for seat in places} == {Seat(0, 0)}
    assert found.samplers == found.learners == tuple(Seat(0, card) for card in range(1, 8))
    assert num_gpus(config) == 8


def test_serve_spreads_fractions_over_nodes_and_leaves_too_few_whole_cards():
    config = three_rewards(**EIGHT)

    with pytest.raises(
        ValueError, match=r"no room for a sampler with its learner, 7 of 7, with 1 GPUs on 2 x 4 GPUs: 0 whole"
    ):
        seats(config, Nodes(count=2, cards=4))
    packed = seats(config, Nodes(count=2, cards=4), spread=False)
    assert packed.num_nodes == 2
    assert len({seat.card for seat in packed.samplers}) == 7


def test_replicas_go_round_and_bundles_are_packed():
    config = small_config(
        sampler={"num_workers": 2, "num_gpus": 1},
        learner={"num_workers": 3, "num_gpus": 1},
        rewards={"geneval": {"detector": "shapes", "num_gpus": 1, "num_replicas": 3}},
    )
    found = seats(config, Nodes(count=2, cards=4))

    assert [seat.node for seat in found.rewards["geneval"]] == [0, 1, 0]
    assert [seat.node for seat in found.learners] == [1, 1, 1], "the node with the most room"
    assert [seat.node for seat in found.samplers] == [0, 0]
    cards = [seat.card for _, _, seat in found.named()]
    assert len(set(cards)) == len(cards) == 8


def test_without_gpus_everybody_has_a_core():
    found = seats(small_config(sampler={"num_workers": 2}), Nodes(count=1, cards=1))

    cards = [seat.card for _, _, seat in found.named()]
    assert len(set(cards)) == 4
    assert max(cards) < 0


@pytest.mark.parametrize(("gpus", "text"), [(1, "1 GPU"), (8, "8 GPUs"), (32, "4 x 8 GPUs"), (12, "2 x 6 GPUs")])
def test_so_many_gpus_are_on_as_few_equal_nodes_as_there_can_be(gpus: int, text: str):
    nodes = default_nodes(gpus)

    assert nodes.gpus == gpus
    assert str(nodes) == text
