"""The pretraining script, a few steps of it, and how good the shipped weights are."""

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from nft_ray.cli.pretrain import strict
from nft_ray.shapes import grammar, pretrain
from nft_ray.shapes import pipeline as nano
from nft_ray.shapes.grammar import TAGS

LINES = grammar.test_lines()
UNREACHED = {
    "transformer.pos_embed.pos_embed",
    "transformer.transformer_blocks.3.attn.add_q_proj.bias",
    "transformer.transformer_blocks.3.attn.norm_added_q.weight",
}
"""Fixed, or of the text's queries in the last block, whose answers SD3 throws away (its weight only decays)."""


@pytest.fixture(scope="module")
def packaged() -> StableDiffusion3Pipeline:
    torch.set_num_threads(1)
    loaded = nano.load()
    loaded.set_progress_bar_config(disable=True)
    return loaded


def trained_a_little(seed: int) -> tuple[StableDiffusion3Pipeline, list[int]]:
    """Two steps of each stage on sixty scenes, and the steps at which a snapshot was due."""
    pipeline, snapshots = nano.build(seed), list[int]()
    scenes = pretrain.draw_scenes(60, seed)
    pretrain.train_vae(pipeline.vae, scenes, num_steps=2, batch_size=4, seed=seed)
    pretrain.train_flow(
        pipeline,
        scenes,
        num_steps=4,
        stop_after=3,
        batch_size=4,
        seed=seed,
        evaluate_every=2,
        snapshot=snapshots.append,
    )
    return pipeline, snapshots


def weights(pipeline: StableDiffusion3Pipeline) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{key}": value
        for name in ("transformer", "vae", "text_encoder", "text_encoder_2")
        for key, value in getattr(pipeline, name).state_dict().items()
    }


def test_training_moves_every_weight_and_is_a_function_of_the_seed() -> None:
    torch.set_num_threads(1)
    first, snapshots = trained_a_little(0)
    again, _ = trained_a_little(0)
    other, _ = trained_a_little(1)
    assert snapshots == [2, 3]
    assert all(torch.equal(value, weights(again)[key]) for key, value in weights(first).items())
    assert not torch.equal(first.transformer.proj_out.weight, other.transformer.proj_out.weight)
    start = weights(nano.build(0))
    still = {key for key, value in weights(first).items() if torch.equal(value, start[key])}
    assert still == UNREACHED


def test_latents_are_standardised(packaged: StableDiffusion3Pipeline) -> None:
    latents = pretrain.encode(packaged.vae, pretrain.draw_scenes(480, 7))
    assert latents.shape == (480, 8, 8, 8)
    assert abs(latents.mean()) < 0.05
    assert abs(latents.std() - 1) < 0.05


def test_only_train_lines_are_drawn() -> None:
    scenes = pretrain.draw_scenes(2880, 0)
    drawn = {scenes.prompts[number] for number in scenes.prompt_ids.tolist()}
    assert drawn == {line["prompt"] for line in grammar.pretraining_lines()}
    held_out = {line["prompt"] for line in LINES if line["tag"] not in ("single_object", "colors")}
    assert not drawn & held_out


def test_prompts_are_encoded_as_the_pipeline_does(packaged: StableDiffusion3Pipeline) -> None:
    prompts = ["a photo of a circle", "", "a photo of two crosses"]
    embeds, pooled = pretrain.encode_prompts(packaged, prompts, torch.tensor([2, 1, 0, 2]))
    expected, _, expected_pooled, _ = packaged.encode_prompt(
        [prompts[number] for number in (2, 1, 0, 2)],
        None,
        None,
        do_classifier_free_guidance=False,
        max_sequence_length=0,
    )
    torch.testing.assert_close(embeds, expected)
    torch.testing.assert_close(pooled, expected_pooled)


def test_the_base_is_half_good(packaged: StableDiffusion3Pipeline) -> None:
    """A quarter of the lines: four standard errors around the whole file's figure."""
    accuracy = pretrain.strict_accuracy(packaged, LINES[:120], strict, guidance=1.0)
    assert list(accuracy) == ["all", *TAGS]
    assert 0.37 <= accuracy["all"] <= 0.73


@pytest.mark.large
def test_the_base_is_half_good_on_every_line_and_guidance_helps(packaged: StableDiffusion3Pipeline) -> None:
    plain = pretrain.strict_accuracy(packaged, LINES, strict, guidance=1.0)
    guided = pretrain.strict_accuracy(packaged, LINES, strict, guidance=pretrain.GUIDANCE)
    assert 0.45 <= plain["all"] <= 0.65
    assert guided["all"] >= plain["all"] + 0.1
