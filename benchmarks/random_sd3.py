"""SD3.5-medium's architecture with random weights, in diffusers format: what gpu.py loads with our own loader.

Transformer and VAE have the published configuration; the text encoders are real classes of the right widths (CLIP 768
and 1280, T5 4096), but two layers deep: prompts are encoded once and kept, so their depth is in no figure. `tiny` is
the same in small, for machines without a GPU.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel, T5TokenizerFast

from nft_ray.shapes.pipeline import build_tokenizer

PROMPT = "a photo of a red circle"
CLIP_TOKENS = 77


@dataclass(frozen=True)
class Size:
    """The widths of one pipeline, and the work that is measured with it."""

    transformer: dict[str, Any]
    vae_channels: tuple[int, ...]
    clip_widths: tuple[int, int]
    t5_width: int
    t5_tokens: int
    pixels: int
    images_per_group: int
    groups_per_epoch: int


def _transformer(layers: int, heads: int, head: int, dual: int, context: int, pooled: int) -> dict[str, Any]:
    return {
        "sample_size": 128,
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": layers,
        "num_attention_heads": heads,
        "attention_head_dim": head,
        "caption_projection_dim": heads * head,
        "joint_attention_dim": context,
        "pooled_projection_dim": pooled,
        "pos_embed_max_size": 384,
        "dual_attention_layers": tuple(range(dual)),
        "qk_norm": "rms_norm",
    }


SIZES = {
    "sd35m": Size(
        transformer=_transformer(layers=24, heads=24, head=64, dual=13, context=4096, pooled=2048),
        vae_channels=(128, 256, 512, 512),
        clip_widths=(768, 1280),
        t5_width=4096,
        t5_tokens=128,
        pixels=512,
        images_per_group=24,
        groups_per_epoch=48,
    ),
    "tiny": Size(
        transformer=_transformer(layers=4, heads=4, head=32, dual=2, context=128, pooled=128),
        vae_channels=(16, 16, 32, 32),
        clip_widths=(64, 64),
        t5_width=128,
        t5_tokens=128,
        pixels=64,
        images_per_group=24,
        groups_per_epoch=48,
    ),
}


def save_pipeline(size: Size, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
    """Make the pipeline on the device (random numbers by the billion are its business) and save it."""
    torch.manual_seed(0)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            parts = {
                "transformer": SD3Transformer2DModel(**size.transformer),
                "vae": vae(size),
                "text_encoder": _clip(size.clip_widths[0]),
                "text_encoder_2": _clip(size.clip_widths[1]),
                "text_encoder_3": _t5(size.t5_width),
            }
    finally:
        torch.set_default_dtype(previous)
    StableDiffusion3Pipeline(
        **{name: part.to(dtype) for name, part in parts.items()},
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        tokenizer=_clip_tokenizer(),
        tokenizer_2=_clip_tokenizer(),
        tokenizer_3=_t5_tokenizer(),
    ).save_pretrained(str(folder))


def vae(size: Size) -> AutoencoderKL:
    """SD3's: 16 latent channels, 8 pixels each way."""
    stages = len(size.vae_channels)
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=16,
        block_out_channels=size.vae_channels,
        layers_per_block=2,
        norm_num_groups=min(32, *size.vae_channels) // (1 if size.vae_channels[0] > 32 else 2),
        down_block_types=("DownEncoderBlock2D",) * stages,
        up_block_types=("UpDecoderBlock2D",) * stages,
        use_quant_conv=False,
        use_post_quant_conv=False,
        sample_size=1024,
        scaling_factor=1.5305,
        shift_factor=0.0609,
    )


def _clip(width: int) -> CLIPTextModelWithProjection:
    tokenizer = _clip_tokenizer()
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=width,
            projection_dim=width,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=CLIP_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def _clip_tokenizer() -> Any:
    tokenizer = build_tokenizer(PROMPT.split())
    tokenizer.model_max_length = CLIP_TOKENS
    return tokenizer


def _t5(width: int) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=len(_t5_tokenizer()),
            d_model=width,
            d_kv=16,
            d_ff=width // 4,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            is_encoder_decoder=False,
        )
    )


def _t5_tokenizer() -> T5TokenizerFast:
    pieces = ["<pad>", "</s>", "<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz"]
    return T5TokenizerFast(vocab=[(piece, -float(i)) for i, piece in enumerate(pieces)], extra_ids=0)
