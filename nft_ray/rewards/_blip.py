"""ImageReward's network: BLIP's image encoder, its text encoder that looks at the image, and a head.

    pixels --BlipVisionModel--> (B, patches + 1, 1024) ---.
    tokens --BlipTextModel, cross-attention in every layer--> first token (B, 768) --head--> (B,)

The modules are transformers'; the published checkpoint names their weights otherwise, and `load` knows how. It knows
nothing of prompts, of image files or of the scale of a score.
"""

import itertools
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from nft_ray.rewards._clip import check_keys
from nft_ray.rewards.base import one_line

_VISION, _TEXT, _HEAD = "blip.visual_encoder.", "blip.text_encoder.", "mlp.layers."
_UNUSED = {
    "blip.vision_proj.weight",  # the projections of BLIP's contrastive loss
    "blip.vision_proj.bias",
    "blip.text_proj.weight",
    "blip.text_proj.bias",
    "blip.text_encoder.embeddings.position_ids",  # 0, 1, 2, ...: made, not loaded
}
_VISION_NAMES = (
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^norm\.", "post_layernorm."),
    (r"^blocks\.(\d+)\.norm([12])\.", r"encoder.layers.\1.layer_norm\2."),
    (r"^blocks\.(\d+)\.attn\.qkv\.", r"encoder.layers.\1.self_attn.qkv."),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"encoder.layers.\1.self_attn.projection."),
    (r"^blocks\.(\d+)\.mlp\.", r"encoder.layers.\1.mlp."),
)
_HEAD_POSITIONS = (0, 2, 4, 6, 7)  # of the linear layers; dropout stood between them


@dataclass(frozen=True, slots=True, kw_only=True)
class Dimensions:
    """What no published file says: BLIP's ViT-L/16 at 224 pixels, and the head's widths (its input is the text's)."""

    image_size: int = 224
    patch_size: int = 16
    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_layers: int = 24
    num_heads: int = 16
    head: tuple[int, ...] = (1024, 128, 64, 16, 1)


class TextDimensions(BaseModel):
    """The part of the published med_config.json that decides on the text encoder.

    Its `encoder_width` does not: the published code replaces it by the image encoder's width.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    hidden_act: str
    layer_norm_eps: float
    pad_token_id: int

    @classmethod
    def read(cls, path: Path) -> "TextDimensions":
        """ValueError, one line, where the file does not say it all."""
        try:
            return cls.model_validate_json(path.read_bytes())
        except ValidationError as error:
            raise ValueError(one_line(error, str(path))) from None


class ImageRewardNetwork(torch.nn.Module):
    """See the module. The head computes in float32, whatever the encoders do."""

    def __init__(self, text: TextDimensions, dimensions: Dimensions) -> None:
        from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

        super().__init__()
        self.vision = BlipVisionModel(
            BlipVisionConfig(
                image_size=dimensions.image_size,
                patch_size=dimensions.patch_size,
                hidden_size=dimensions.hidden_size,
                intermediate_size=dimensions.intermediate_size,
                num_hidden_layers=dimensions.num_layers,
                num_attention_heads=dimensions.num_heads,
                hidden_act="gelu",
                layer_norm_eps=1e-6,
            )
        )
        # is_decoder gives every layer its cross-attention; the forward below says that it reads in both directions
        self.text = BlipTextModel(
            BlipTextConfig(**text.model_dump(), encoder_hidden_size=dimensions.hidden_size, is_decoder=True),
            add_pooling_layer=False,
        )
        widths = (text.hidden_size, *dimensions.head)
        layers = [torch.nn.Linear(*pair) for pair in itertools.pairwise(widths)]
        self.head = torch.nn.Sequential(*layers)

    def features(self, pixels: torch.Tensor, tokens: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """pixels (B, 3, size, size), tokens and their mask int (B, L) -> f32 (B, D): the prompt's first token."""
        patches = self.vision(pixel_values=pixels).last_hidden_state
        read = self.text(
            input_ids=tokens, attention_mask=attention_mask, encoder_hidden_states=patches, is_decoder=False
        )
        found: torch.Tensor = read.last_hidden_state[:, 0].float()
        return found

    def forward(self, pixels: torch.Tensor, tokens: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """As `features` -> f32 (B,): the score before it is shifted and scaled."""
        found: torch.Tensor = self.head(self.features(pixels, tokens, attention_mask))[:, 0]
        return found


def load(
    path: Path, text: TextDimensions, dimensions: Dimensions, *, device: torch.device, dtype: torch.dtype
) -> ImageRewardNetwork:
    """The network with exactly the weights of the published checkpoint, frozen, without a random initialisation.

    Raises ValueError, one line, where keys or shapes differ.
    """
    published = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    with torch.device("meta"):
        network = ImageRewardNetwork(text, dimensions)
    names = {key: _our_name(key) for key in published if key not in _UNUSED}
    weights = {name: published[key] for key, name in names.items() if name}
    wanted = network.state_dict()
    unknown = {key for key, name in names.items() if name not in wanted}
    misshapen = {name for name in wanted.keys() & weights.keys() if wanted[name].shape != weights[name].shape}
    check_keys(path, wanted.keys() - weights.keys(), unknown, misshapen)
    network.load_state_dict(weights, assign=True)
    _make_buffers(network)
    network.vision.to(device, dtype)
    network.text.to(device, dtype)
    network.head.to(device, torch.float32)
    return network.eval().requires_grad_(False)


def _our_name(key: str) -> str | None:
    """A key of the published checkpoint -> the name of that weight here; None for a key that says nothing to us."""
    if key.startswith(_VISION):
        name = key.removeprefix(_VISION)
        for pattern, ours in _VISION_NAMES:
            if re.match(pattern, name):
                return "vision." + re.sub(pattern, ours, name)
    if key.startswith(_TEXT):
        return "text." + key.removeprefix(_TEXT)
    if key.startswith(_HEAD):
        position, _, kind = key.removeprefix(_HEAD).partition(".")
        if position.isdigit() and int(position) in _HEAD_POSITIONS:
            return f"head.{_HEAD_POSITIONS.index(int(position))}.{kind}"
    return None


def _make_buffers(network: ImageRewardNetwork) -> None:
    """What is no weight and was not loaded: the positions of the tokens."""
    embeddings = network.text.embeddings
    positions = torch.arange(embeddings.position_ids.shape[-1])[None]
    embeddings.register_buffer("position_ids", positions, persistent=False)
    left = [name for name, buffer in network.named_buffers() if buffer.is_meta]
    assert not left, f"buffers that nobody makes: {left}"
