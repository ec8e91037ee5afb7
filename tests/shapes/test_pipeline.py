"""nano-sd3: its parts, its tokenizer, and the packaged directory in plain diffusers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from transformers import CLIPTokenizer

from nft_ray.shapes import pipeline as nano
from nft_ray.shapes.grammar import words


@pytest.fixture(scope="module")
def packaged() -> StableDiffusion3Pipeline:
    torch.set_num_threads(1)
    loaded = StableDiffusion3Pipeline.from_pretrained(nano.PATH, text_encoder_3=None, tokenizer_3=None)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def generate(pipeline: StableDiffusion3Pipeline, prompt: str, guidance: float = 1.0) -> np.ndarray:
    images: np.ndarray = pipeline(
        prompt,
        num_inference_steps=10,
        guidance_scale=guidance,
        max_sequence_length=0,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).images
    return images


def test_the_package_is_small_and_readable() -> None:
    files = [file for file in nano.PATH.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 16 * 2**20
    assert not [file for file in files if file.suffix in (".bin", ".pt", ".pkl")]
    assert all(file.stat().st_mode & 0o044 == 0o044 for file in files)


def test_is_an_sd35_in_float32(packaged: StableDiffusion3Pipeline) -> None:
    assert packaged.transformer.dtype == packaged.vae.dtype == packaged.text_encoder.dtype == torch.float32
    assert packaged.transformer.config.qk_norm == "rms_norm"
    assert packaged.scheduler.config.shift == 1.0
    assert packaged.text_encoder_3 is packaged.tokenizer_3 is None
    for encoder, tokenizer in (
        (packaged.text_encoder, packaged.tokenizer),
        (packaged.text_encoder_2, packaged.tokenizer_2),
    ):
        assert encoder.config.eos_token_id == tokenizer.eos_token_id != 2


def test_the_packaged_weights_are_trained(packaged: StableDiffusion3Pipeline) -> None:
    untrained = nano.build(0)
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        trained = getattr(packaged, name).state_dict()
        assert trained.keys() == getattr(untrained, name).state_dict().keys()
        assert all(torch.isfinite(value).all() for value in trained.values())
        assert any(not torch.equal(value, trained[key]) for key, value in getattr(untrained, name).state_dict().items())
    assert packaged.vae.config.scaling_factor != 1.0


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_draws_an_image(packaged: StableDiffusion3Pipeline, guidance: float) -> None:
    images = generate(packaged, "a photo of a red circle", guidance)
    assert images.shape == (1, 32, 32, 3)
    assert images.std() > 0.05
    assert np.array_equal(images, generate(packaged, "a photo of a red circle", guidance))


def test_the_prompt_matters(packaged: StableDiffusion3Pipeline) -> None:
    assert np.abs(generate(packaged, "a photo of a red circle") - generate(packaged, "a photo of a square")).max() > 0.1


def test_every_word_is_one_token(packaged: StableDiffusion3Pipeline) -> None:
    for tokenizer in (packaged.tokenizer, packaged.tokenizer_2):
        assert isinstance(tokenizer, CLIPTokenizer)
        ids = {tuple(tokenizer(word, add_special_tokens=False).input_ids) for word in words()}
        assert {len(tokens) for tokens in ids} == {1}
        assert len(ids) == len(words())
        assert tokenizer.model_max_length == nano.MAX_TOKENS


def test_an_unknown_word_falls_apart_into_letters(packaged: StableDiffusion3Pipeline) -> None:
    tokens = packaged.tokenizer.tokenize("a red zebra!")
    assert tokens == ["a</w>", "red</w>", "z", "e", "b", "r", "a</w>", "!</w>"]
    assert packaged.tokenizer.unk_token_id not in packaged.tokenizer.convert_tokens_to_ids(tokens)


def test_a_round_trip_changes_nothing(tmp_path: Path) -> None:
    built = nano.build(3)
    nano.save(built, tmp_path)
    loaded = nano.load(tmp_path)
    for pipeline in (built, loaded):
        pipeline.set_progress_bar_config(disable=True)
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        weights = getattr(loaded, name).state_dict()
        assert all(torch.equal(value, weights[key]) for key, value in getattr(built, name).state_dict().items())
    # Not to the last bit: loaded weights lie elsewhere in memory (8 mod 64), and oneDNN's kernels depend on that.
    prompt = "a photo of two crosses"
    np.testing.assert_allclose(generate(built, prompt), generate(loaded, prompt), atol=1e-5)
    assert loaded.tokenizer("a photo of two crosses").input_ids == built.tokenizer("a photo of two crosses").input_ids


def test_the_tokenizer_loads_from_vocab_and_merges_alone(packaged: StableDiffusion3Pipeline, tmp_path: Path) -> None:
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_text((nano.PATH / "tokenizer" / name).read_text())
    prompt = "a photo of a red circle left of a square"
    assert CLIPTokenizer.from_pretrained(tmp_path)(prompt).input_ids == packaged.tokenizer(prompt).input_ids


def test_build_is_a_function_of_the_seed_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first, second, other = nano.build(1), nano.build(1), nano.build(2)
    assert torch.equal(torch.get_rng_state(), before)
    weights = [pipeline.transformer.proj_out.weight for pipeline in (first, second, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
