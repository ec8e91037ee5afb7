"""Tiny random pipelines of the real classes, saved in the real format: what every family is tested with.

    config = tiny_model("flux", folder)      # writes the pipeline, gives a ModelConfig that loads it with our loader
    python -m tests.models.tiny flux FOLDER  # the same by hand

Widths are a few dozen, text encoders have 2 layers; tokenizers know every letter. An image is 32 x 32 pixels, made in
milliseconds. Weights are random but not small: prompts and LoRAs change the image visibly.
"""

import os
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from nft_ray.config import ModelConfig
from nft_ray.shapes.pipeline import build_tokenizer
from nft_ray.types import Weights

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;!?'\"-()>"
WORDS = ("a", "photo", "of", "two", "red", "blue", "circle", "circles", "square", "dog")
TOKENS = 12


def numpy_weights(parameters: Mapping[str, torch.Tensor]) -> Weights:
    """A float32 copy on the host, by wire name."""
    return {name: value.detach().float().cpu().numpy().copy() for name, value in parameters.items()}


def tiny_model(kind: str, folder: Path, **changes: Any) -> ModelConfig:
    """Save the pipeline `kind` under `folder`, unless it is there, and say how to load it."""
    make, family = KINDS[kind]
    path = folder / kind
    if not (path / "model_index.json").is_file():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            _save(make(), path)
    settings = {"height": 32, "width": 32, "max_sequence_length": 0 if kind == "sd3_without_t5" else TOKENS}
    return ModelConfig(family=family, path=str(path), **(settings | changes))


def _save(pipeline: Any, path: Path) -> None:
    """Whole or not at all: two test processes may want it at once, and make the same."""
    unfinished = path.with_name(f"{path.name}-{os.getpid()}")
    pipeline.save_pretrained(str(unfinished))
    try:
        unfinished.rename(path)
    except OSError:  # the other process was faster
        shutil.rmtree(unfinished)


def _sd3(*, dual_attention: int = 0, qk_norm: str | None = None, t5: bool = True) -> StableDiffusion3Pipeline:
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=3,
            num_attention_heads=2,
            attention_head_dim=16,
            joint_attention_dim=64,
            caption_projection_dim=32,
            pooled_projection_dim=64,
            pos_embed_max_size=8,
            qk_norm=qk_norm,
            dual_attention_layers=tuple(range(dual_attention)),
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_vae(scaling_factor=1.5305, shift_factor=0.0609),
        text_encoder=CLIPTextModelWithProjection(_clip()),
        tokenizer=build_tokenizer(WORDS),
        text_encoder_2=CLIPTextModelWithProjection(_clip()),
        tokenizer_2=build_tokenizer(WORDS),
        text_encoder_3=_t5(width=64) if t5 else None,
        tokenizer_3=_t5_tokenizer() if t5 else None,
    )


def _flux(*, guidance_embeds: bool) -> FluxPipeline:
    return FluxPipeline(
        transformer=FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            guidance_embeds=guidance_embeds,
            axes_dims_rope=(4, 6, 6),
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(
            shift=3.0,
            use_dynamic_shifting=guidance_embeds,
            base_shift=0.5,
            max_shift=1.15,
            base_image_seq_len=256,
            max_image_seq_len=4096,
        ),
        vae=_vae(scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=CLIPTextModel(_clip()),
        tokenizer=build_tokenizer(WORDS),
        text_encoder_2=_t5(width=32),
        tokenizer_2=_t5_tokenizer(),
    )


def _sana() -> SanaPipeline:
    return SanaPipeline(
        transformer=SanaTransformer2DModel(
            patch_size=1,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=16,
            num_cross_attention_heads=2,
            cross_attention_head_dim=16,
            cross_attention_dim=32,
            caption_channels=32,
            sample_size=16,
        ),
        scheduler=DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, solver_order=2
        ),
        vae=AutoencoderDC(
            in_channels=3,
            latent_channels=4,
            attention_head_dim=2,
            encoder_block_types=("ResBlock", "EfficientViTBlock", "EfficientViTBlock"),
            decoder_block_types=("ResBlock", "EfficientViTBlock", "EfficientViTBlock"),
            encoder_block_out_channels=(8, 8, 16),
            decoder_block_out_channels=(8, 8, 16),
            encoder_layers_per_block=(1, 1, 1),
            decoder_layers_per_block=(1, 1, 1),
            encoder_qkv_multiscales=((), (), (5,)),
            decoder_qkv_multiscales=((), (), (5,)),
            downsample_block_type="conv",
            upsample_block_type="interpolate",
            decoder_norm_types="rms_norm",
            decoder_act_fns="silu",
            scaling_factor=0.41407,
        ),
        text_encoder=Gemma2Model(
            Gemma2Config(
                vocab_size=len(LETTERS) + 6,
                hidden_size=32,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=2,
                head_dim=16,
                max_position_embeddings=4096,
                sliding_window=4096,
            )
        ),
        tokenizer=_gemma_tokenizer(),
    )


def _vae(*, scaling_factor: float, shift_factor: float) -> AutoencoderKL:
    return AutoencoderKL(
        sample_size=32,
        block_out_channels=(8, 8, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=scaling_factor,
        shift_factor=shift_factor,
    )


def _clip() -> CLIPTextConfig:
    tokenizer = build_tokenizer(WORDS)
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        projection_dim=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _t5(width: int) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=len(_t5_tokenizer()),
            d_model=width,
            d_kv=16,
            d_ff=32,
            num_layers=2,
            num_heads=2,
            feed_forward_proj="gated-gelu",
            is_encoder_decoder=False,
        )
    )


def _t5_tokenizer() -> T5TokenizerFast:
    pieces = ["<pad>", "</s>", "<unk>", "▁", *LETTERS]
    return T5TokenizerFast(vocab=[(piece, -float(i)) for i, piece in enumerate(pieces)], extra_ids=0)


def _gemma_tokenizer() -> GemmaTokenizer:
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *LETTERS]
    return GemmaTokenizer(vocab={piece: i for i, piece in enumerate(pieces)})


KINDS: dict[str, tuple[Callable[[], Any], str]] = {
    "sd3": (_sd3, "sd3"),
    "sd3_without_t5": (lambda: _sd3(t5=False, qk_norm="rms_norm"), "sd3"),
    "sd35_medium": (lambda: _sd3(dual_attention=2, qk_norm="rms_norm"), "sd3"),
    "sd35_large": (lambda: _sd3(qk_norm="rms_norm"), "sd3"),
    "flux_dev": (lambda: _flux(guidance_embeds=True), "flux"),
    "flux_schnell": (lambda: _flux(guidance_embeds=False), "flux"),
    "sana": (_sana, "sana"),
}
"""Kind -> how it is made, and its family."""
OF_EACH_FAMILY = ("sd35_medium", "flux_dev", "sana")
"""The kinds that stand for their families where one of each is enough."""

if __name__ == "__main__":
    print(tiny_model(sys.argv[1], Path(sys.argv[2])).path)  # noqa: T201
