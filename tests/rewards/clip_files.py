"""CLIP checkpoints in the published file format with random weights, of any size, and transformers' own logits."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil


def sizes(vision: tuple[int, int, int], text: tuple[int, int, int], projection: int, **vision_config: Any) -> dict:
    """The published config.json's fields, from (width, layers, heads) of the towers."""
    towers = [
        {
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
        }
        for width, layers, heads in (vision, text)
    ]
    return {
        "architectures": ["CLIPModel"],
        "projection_dim": projection,
        "logit_scale_init_value": 2.6592,
        "vision_config": {**towers[0], "projection_dim": projection, **vision_config},
        # eos_token_id 2, which is no such token, is what both published files say
        "text_config": {**towers[1], "projection_dim": projection, "vocab_size": 49408, "eos_token_id": 2},
    }


SMALL = sizes((32, 2, 4), (24, 2, 4), 16, image_size=28, patch_size=7)
CLIP_L = sizes((1024, 24, 16), (768, 12, 12), 768, image_size=224, patch_size=14)
CLIP_H = sizes((1280, 32, 16), (1024, 24, 16), 1024, image_size=224, patch_size=14)


def random_images(num_images: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    """uint8 (B, H, W, 3): coarse noise, so that it survives being made small."""
    coarse = np.random.default_rng(seed).integers(0, 256, (num_images, 5, 7, 3)).astype(np.uint8)
    return np.stack([np.asarray(Image.fromarray(image).resize((width, height))) for image in coarse])


def write_tokenizer(folder: Path) -> None:
    """tokenizer.json and tokenizer_config.json of a byte-level CLIP tokenizer with two merges and 516 tokens."""
    alphabet = sorted(ByteLevel.alphabet())
    merges = [("a", "t</w>"), ("c", "at</w>")]
    words = [*alphabet, *(letter + "</w>" for letter in alphabet), *("".join(merge) for merge in merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={word: index for index, word in enumerate(words)}, merges=merges)
    tokenizer.save_pretrained(folder)


def write_clip(folder: Path, size: dict = SMALL) -> None:
    """config.json and model.safetensors in float32."""
    folder.mkdir(parents=True, exist_ok=True)
    config = CLIPConfig(**size)
    config.to_json_file(folder / "config.json")
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in CLIPModel(config).state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    state = {}
    for key, shape in shapes.items():
        # large enough that images and prompts differ: the library's own start makes them all alike
        spread = math.sqrt(3 / math.prod(shape[1:])) if len(shape) > 1 else 0.1
        around = 1.0 if "norm" in key and key.endswith("weight") else 0.0
        state[key] = torch.empty(shape).uniform_(around - spread, around + spread, generator=generator)
    state["logit_scale"] = torch.tensor(100.0).log()
    save_state(folder, state)


def save_state(folder: Path, state: dict[str, torch.Tensor]) -> None:
    """model.safetensors with these weights and the two buffers that transformers before 4.31 saved."""
    for tower in ("text_model", "vision_model"):
        num_positions = len(state[f"{tower}.embeddings.position_embedding.weight"])
        state = {**state, f"{tower}.embeddings.position_ids": torch.arange(num_positions)[None]}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def own_model(folder: Path) -> CLIPModel:
    """transformers' model with the weights that were written."""
    model = CLIPModel(CLIPConfig.from_json_file(folder / "config.json"))
    state = load_file(folder / "model.safetensors")
    model.load_state_dict({key: value for key, value in state.items() if "position_ids" not in key})
    return model.eval()


def own_pixels(model: CLIPModel, images: np.ndarray) -> torch.Tensor:
    """transformers' own processing of images."""
    size = model.config.vision_config.image_size
    processor = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    pixels: torch.Tensor = processor(
        images=[Image.fromarray(image) for image in images], return_tensors="pt"
    ).pixel_values
    return pixels


@torch.inference_mode()
def own_logits(model: CLIPModel, tokenizer_folder: Path, images: np.ndarray, prompts: list[str]) -> np.ndarray:
    """logits_per_image of the pairs, f32 (B,)."""
    tokenizer = CLIPTokenizer.from_pretrained(tokenizer_folder)
    tokens = tokenizer(prompts, padding="max_length", truncation=True, max_length=77, return_tensors="pt")
    logits: np.ndarray = model(pixel_values=own_pixels(model, images), **tokens).logits_per_image.diagonal().numpy()
    return logits
