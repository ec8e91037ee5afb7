"""The search over layouts: every one fits, has a place, and is said in lines that the loader takes."""

from itertools import pairwise
from pathlib import Path

import pytest

from nft_ray.config import ExperimentConfig, load, resolved
from nft_ray.planning.candidates import beside
from nft_ray.planning.forecast import card_bytes
from nft_ray.planning.layouts import Ground, best, changed, forecasts, set_lines, too_full
from nft_ray.planning.places import default_nodes, num_gpus, seats
from nft_ray.planning.work import Footprint, Work
from tests.planning.examples import small_config, small_work

CONFIGS = Path(__file__).parents[2] / "configs"
PRESETS = [path.stem for path in sorted(CONFIGS.glob("*.yaml")) if path.stem not in ("rewards", "nano_awm")]
QUICK = {("sd3_geneval", 8), ("sd3_ocr", 8), ("quickstart", 1)}


def costs(config: ExperimentConfig) -> tuple[Work, Footprint]:
    """As an SD3.5-medium might have: 40 MB per image of a forward, 2 GB per pair of a backward."""
    slow = {"ocr": 0.3, "geneval": 0.05}
    work = small_work(
        tuple(config.rewards),
        draw_s=0.1,
        velocities_s=0.1,
        update_s=0.15,
        draw_eval_s=0.2,
        score_s={name: slow.get(name, 0.02) for name in config.rewards},
        swap_s={"sampler": 0.5, "learner": 0.5} if config.cluster.placement == "colocated" else {},
        transfer_bytes_per_s=1e9,
    )
    pair = 1e9 if config.learner.gradient_checkpointing else 2e9
    gpu = {name: int(2e9) for name, reward in config.reward_configs.items() if reward.num_gpus}
    held = Footprint(
        sampler=int(18e9 + 4e7 * config.sampler.micro_batch_size),
        learner=int(6e9 + pair * config.learner.micro_batch_size),
        rewards=gpu,
        host_sampler=0,
        host_learner=0,
    )
    return work, held


def ground(gpus: int, memory: float = 80e9) -> Ground:
    return Ground(
        nodes=default_nodes(gpus), memory=int(memory), estimate=costs, lines=lambda _: 100, check=lambda _: None
    )


@pytest.mark.parametrize(
    ("name", "gpus"),
    [
        pytest.param(name, gpus, marks=[] if (name, gpus) in QUICK else [pytest.mark.slow])
        for name in PRESETS
        for gpus in (1, 8, 32)
    ],
)
def test_of_every_preset_the_best_layouts_are_real(name: str, gpus: int):
    config, on = load(CONFIGS / f"{name}.yaml"), ground(gpus)
    found = best(config, on)

    assert found
    assert all(a.epoch_s <= 1.005 * b.epoch_s for a, b in pairwise(found)), (
        "what takes equally long stands by its cards"
    )
    for layout in found:
        made = load(CONFIGS / f"{name}.yaml", layout.lines)
        assert resolved(made) == resolved(layout.config)
        assert num_gpus(made) <= gpus + 1e-4
        for stage in made.stage_configs:
            places = seats(stage, on.nodes)
            assert max(held for held, _ in card_bytes(stage, costs(stage)[1], places).values()) <= on.memory


def test_the_best_is_not_worse_than_the_preset():
    config, on = load(CONFIGS / "sd3_geneval.yaml"), ground(8)
    configured = forecasts(config, on)[0].epoch_s

    assert best(config, on)[0].epoch_s <= configured


def test_what_does_not_fit_is_cut_smaller():
    config = load(CONFIGS / "sd3_geneval.yaml")
    found = best(config, ground(8, memory=24e9), 1)[0]

    assert not too_full(found.config.stage_configs, ground(8, memory=24e9))
    assert found.config.learner.micro_batch_size < config.learner.micro_batch_size
    assert any(line.startswith("learner.micro_batch_size=") for line in found.lines)
    assert best(config, ground(8, memory=10e9)) == [], "no sampler is that small"


def test_what_cannot_be_placed_is_left_out():
    config = load(CONFIGS / "sd3_geneval.yaml")

    def check(made: ExperimentConfig) -> None:
        if made.cluster.placement == "colocated":
            raise ValueError("somebody says no")

    on = ground(8)
    picky = Ground(nodes=on.nodes, memory=on.memory, estimate=costs, lines=on.lines, check=check)
    assert {layout.config.cluster.placement for layout in best(config, picky)} == {"disaggregated"}


def test_overlapping_runs_have_cards_of_their_own():
    config = changed(load(CONFIGS / "sd3_geneval.yaml"), {"cluster.placement": "disaggregated", "run.max_staleness": 1})
    for layout in best(config, ground(8), configured=False):
        assert layout.config.cluster.placement == "disaggregated"
        assert layout.config.sampler.num_workers + layout.config.learner.num_workers <= 8


def test_shares_of_a_card_let_no_two_of_a_kind_onto_it():
    names = ("a", "b", "c", "d")
    for count in (1, 2, 3, 4):
        shares, left = beside(names[:count])
        free = 1.0
        for share in shares.values():
            assert share <= free < 2 * share
            free = round(free - share, 2)
        assert left == free > 0


def test_only_what_is_different_is_said():
    config = small_config()
    changes = {"sampler.num_workers": 1, "learner.num_workers": 2, "learner.gradient_checkpointing": True}

    assert set_lines(config, changes) == ("learner.num_workers=2", "learner.gradient_checkpointing=true")
    assert changed(config, changes).learner.num_workers == 2


def test_fewer_cards_are_named_where_more_are_no_quicker():
    config = small_config(prompts={"groups_per_epoch": 4, "images_per_group": 24})
    found = best(config, ground(7), 1)[0]

    assert (found.config.cluster.placement, found.config.sampler.num_workers) == ("colocated", 4)
    assert found.gpus == 4


def test_shares_that_place_the_same_workers_are_one_layout():
    config = load(CONFIGS / "sd3_geneval.yaml", ["cluster=one_gpu"])
    found = best(config, ground(1))

    assert [layout.about for layout in found] == ["the layout of the YAML"]
