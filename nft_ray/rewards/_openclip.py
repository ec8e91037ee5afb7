"""open_clip, which is an extra, and its models with weights of ours to load: built without a random initialisation."""

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from nft_ray.rewards._clip import check_keys, device_of, dtype_of
from nft_ray.rewards.base import TorchRewardConfig


def open_clip() -> ModuleType:
    """The package, or a ValueError that names the extra."""
    try:
        import open_clip as module
    except ImportError as error:
        raise ValueError(
            f"this reward needs open_clip ({error}): pip install 'nft_ray[openclip]' where its replicas run"
        ) from None
    found: ModuleType = module
    return found


def load_model(architecture: str, weights: Mapping[str, torch.Tensor], path: Path, config: TorchRewardConfig) -> Any:
    """The architecture with exactly these weights, on the device of the config, frozen.

    Raises ValueError, naming `path`, where keys or shapes differ.
    """
    device, dtype = device_of(config), dtype_of(config)
    with torch.device("meta"):
        model = open_clip().create_model(architecture, device="meta", load_weights=False)
    persistent = set(model.state_dict())
    check_keys(path, sorted(persistent - weights.keys()), sorted(weights.keys() - persistent))
    wrong = [key for key, value in model.state_dict().items() if value.shape != weights[key].shape]
    if wrong:
        raise ValueError(f"{path}: is not the published checkpoint: another shape of {', '.join(wrong[:3])}")
    buffers = {name for name, _ in model.named_buffers()} - persistent  # such as the causal mask: made, not loaded
    model.load_state_dict({key: value.to(device, dtype) for key, value in weights.items()}, assign=True)
    if buffers:
        fresh = model.build_attention_mask() if hasattr(model, "build_attention_mask") else None
        for name in buffers:
            if fresh is None or name != "attn_mask":
                raise ValueError(f"open_clip's {architecture} has a buffer {name} that is not known here")
            model.register_buffer(name, fresh.to(device, dtype), persistent=False)
    return model.eval().requires_grad_(False)
