"""Seconds of one call, part by part; a sleeping core and a simulated one take the same."""

from nft_ray.planning.calls import rollout_call, rollout_s, score_s, transfer_s, update_s
from nft_ray.prompts.draw import PromptSet, epoch_requests, evaluation_requests
from nft_ray.types import Prompt
from tests.planning.examples import small_config, small_work

WORK = small_work(
    request_s=1.0,
    lend_s=10.0,
    encode_s=2.0,
    draw_s=3.0,
    draw_eval_s=5.0,
    decode_s=0.5,
    velocities_s=0.25,
    score_s={"geneval": 0.5},
    score_request_s={"geneval": 1.0},
    update_s=2.0,
    step_s=4.0,
    transfer_bytes_per_s=8.0,
)
LINES = PromptSet(lines=tuple(Prompt(id=i, text=f"prompt {i}") for i in range(6)))


def test_a_rollout_lends_its_encoders_once_and_encodes_every_prompt():
    train = rollout_call(WORK, images=4, prompts=1, split="train")
    evaluated = rollout_call(WORK, images=4, prompts=4, split="eval")

    assert (train.images, train.total) == (1 + 12 + 12 + 2, 1 + 12 + 12 + 2 + 1)
    assert evaluated.total == evaluated.images == 1 + (10 + 8) + 20 + 2


def test_a_request_of_the_real_program_takes_the_same():
    config = small_config()
    (train, *_) = epoch_requests(LINES, config, epoch=0, policy_version=0)
    (full, rest) = evaluation_requests(LINES, config, epoch=0, policy_version=0, adapter="ema")

    assert rollout_s(WORK, train) == rollout_call(WORK, images=4, prompts=1, split="train").total
    assert rollout_s(WORK, full) == rollout_call(WORK, images=4, prompts=4, split="eval").total
    assert rollout_s(WORK, rest) == 1 + (10 + 4) + 10 + 1


def test_scores_updates_and_transfers():
    assert score_s(WORK, "geneval", 4) == 3.0
    assert update_s(WORK, [3, 1]) == 4 * 2 + 2 * 4
    assert transfer_s(WORK, 16) == 2.0
