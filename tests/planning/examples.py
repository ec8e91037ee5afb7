"""Work by hand, in numbers that can be added up in the head, and small experiments to go with it."""

from typing import Any

from nft_ray.config import ExperimentConfig, parse
from nft_ray.planning.places import Nodes, Seats, seats
from nft_ray.planning.simulation import simulate
from nft_ray.planning.spans import Run
from nft_ray.planning.work import Work


def small_work(rewards: tuple[str, ...] = ("geneval",), **changed: Any) -> Work:
    """1 s per image drawn, 2 per image learnt; nothing else takes any time unless it is said to."""
    made: dict[str, Any] = {
        "request_s": 0.0,
        "encode_s": 0.0,
        "draw_s": 1.0,
        "draw_eval_s": 1.0,
        "decode_s": 0.0,
        "velocities_s": 0.0,
        "score_s": dict.fromkeys(rewards, 0.0),
        "score_request_s": dict.fromkeys(rewards, 0.0),
        "update_s": 2.0,
        "step_s": 0.0,
        "publish_s": 0.0,
        "load_s": 0.0,
        "image_bytes": 1,
        "sample_bytes": 10,
        "group_bytes": 0,
        "adapter_bytes": 0,
        "transfer_bytes_per_s": 1.0,
    }
    return Work(**(made | changed))


def small_config(**sections: Any) -> ExperimentConfig:
    """One sampler, one learner, one replica; 3 groups of 4 images. `sections`: over it, key by key."""
    made: dict[str, Any] = {
        "run": {"name": "small", "num_epochs": 20},
        "prompts": {"groups_per_epoch": 3, "images_per_group": 4},
        "rewards": {"geneval": {"detector": "shapes"}},
        "evaluation": {"batch_size": 4, "every": 10},
    }
    for name, section in sections.items():
        made[name] = {**made.get(name, {}), **section}
    return parse(made)


def placed(config: ExperimentConfig, nodes: Nodes | None = None) -> Seats:
    return seats(config, nodes or Nodes(count=1, cards=8))


def played(config: ExperimentConfig, work: Work, nodes: Nodes | None = None, **how: Any) -> Run:
    return simulate(config, work, placed(config, nodes), **how)
