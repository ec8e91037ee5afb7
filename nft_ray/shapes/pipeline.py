"""nano-sd3: a real, small StableDiffusion3Pipeline for the world of shapes: 32 x 32 pixels, 8 x 8 x 8 latents.

    prompt --2 CLIP encoders--> text (14, 128), pooled (128,)
                                    |
    noise (8, 8, 8) --SD3Transformer2DModel, 4 layers x 128--> latents --AutoencoderKL, f4--> image (3, 32, 32)

`build` makes it untrained; `pretrain` trains it; `PATH` is the trained one, in diffusers' own format:

    StableDiffusion3Pipeline.from_pretrained(PATH, text_encoder_3=None, tokenizer_3=None)

Call it with `max_sequence_length=0`: for a T5 that is not there diffusers appends as many zero tokens.
"""

import itertools
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from nft_ray.shapes.grammar import words
from nft_ray.shapes.world import IMAGE_SIZE

PATH = Path(__file__).parent / "nano_sd3"
"""The packaged, trained pipeline."""

LATENT_CHANNELS = 8
LATENT_SIZE = 8
MAX_TOKENS = 14
"""Tokens of a prompt with its two marks; the longest prompt has 12. CLIP's 77 would cost three times as much."""
_TEXT_WIDTH = 64
_WIDTH = 128
_START, _END = "<|startoftext|>", "<|endoftext|>"
_WORD_END = "</w>"


def build(seed: int) -> StableDiffusion3Pipeline:
    """The untrained pipeline on the CPU in float32: a function of the seed. Leaves torch's global generator alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = build_tokenizer(words())
        return StableDiffusion3Pipeline(
            transformer=_build_transformer(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
            vae=_build_vae(),
            text_encoder=_build_text_encoder(tokenizer),
            tokenizer=tokenizer,
            text_encoder_2=_build_text_encoder(tokenizer),
            tokenizer_2=build_tokenizer(words()),
            text_encoder_3=None,
            tokenizer_3=None,
        )


def load(path: Path = PATH) -> StableDiffusion3Pipeline:
    """Load it as plain diffusers does; float32 on the CPU."""
    return StableDiffusion3Pipeline.from_pretrained(str(path), text_encoder_3=None, tokenizer_3=None)


def save(pipeline: StableDiffusion3Pipeline, path: Path) -> None:
    """Write a directory in diffusers' format, weights as float32 safetensors.

    transformers 5 writes tokenizers as one tokenizer.json; vocab.json and merges.txt, which CLIP's tokenizer is known
    by elsewhere, are written beside it. safetensors makes files that only their owner may read: they are opened up.
    """
    pipeline.save_pretrained(str(path), safe_serialization=True)
    vocabulary, merges = _vocabulary(words())
    for name in ("tokenizer", "tokenizer_2"):
        (path / name / "vocab.json").write_text(json.dumps(vocabulary) + "\n")
        (path / name / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    for weights in path.rglob("*.safetensors"):
        weights.chmod(0o644)


def build_tokenizer(known: Sequence[str]) -> CLIPTokenizer:
    """CLIP's own tokenizer in which every known word is one token; any other word falls apart into letters."""
    vocabulary, merges = _vocabulary(known)
    return CLIPTokenizer(
        vocab=vocabulary,
        merges=merges,
        bos_token=_START,
        eos_token=_END,
        pad_token=_END,
        unk_token=_END,
        model_max_length=MAX_TOKENS,
    )


def _vocabulary(known: Sequence[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """(token -> id, merges): byte-pair encoding of the words, carried on until each is one token.

    Ids: the printable ASCII characters, the same at a word's end, the merged pairs, last the two marks, as in CLIP.
    So the end mark is never id 2, for which transformers would pool at the highest word id instead.
    """
    characters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    tokens = characters + [character + _WORD_END for character in characters]
    spelled = [[*word[:-1], word[-1] + _WORD_END] for word in sorted(set(known))]
    merges: list[tuple[str, str]] = []
    while any(len(word) > 1 for word in spelled):
        pairs = Counter(pair for word in spelled for pair in itertools.pairwise(word))
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        spelled = [_merge(word, best) for word in spelled]
    tokens += ["".join(pair) for pair in merges] + [_START, _END]
    return {token: index for index, token in enumerate(dict.fromkeys(tokens))}, merges


def _merge(word: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    position = 0
    while position < len(word):
        length = 2 if tuple(word[position : position + 2]) == pair else 1
        merged.append("".join(word[position : position + length]))
        position += length
    return merged


def _build_transformer() -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        sample_size=LATENT_SIZE,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=4,
        num_attention_heads=4,
        attention_head_dim=_WIDTH // 4,
        joint_attention_dim=2 * _TEXT_WIDTH,
        caption_projection_dim=_WIDTH,
        pooled_projection_dim=2 * _TEXT_WIDTH,
        pos_embed_max_size=LATENT_SIZE // 2,
        qk_norm="rms_norm",
    )


def _build_vae() -> AutoencoderKL:
    """Every residual branch starts at zero, without which training needs several times as long."""
    channels = (16, 32, 64)
    vae = AutoencoderKL(
        sample_size=IMAGE_SIZE,
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        scaling_factor=1.0,
        shift_factor=0.0,
    )
    for name, parameter in vae.named_parameters():
        if name.endswith("conv2.weight"):
            torch.nn.init.zeros_(parameter)
    return vae


def _build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    """The pipeline takes its tokens' features from the last layer but one, the pooled ones from the last."""
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=_TEXT_WIDTH,
            intermediate_size=2 * _TEXT_WIDTH,
            projection_dim=_TEXT_WIDTH,
            num_hidden_layers=3,
            num_attention_heads=2,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
