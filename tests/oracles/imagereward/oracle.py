"""The published ImageReward on inputs of ours. Run by the Python of .envs/imagereward; needs nothing of nft_ray.

    oracle.py FOLDER      FOLDER/images.npz, uint8 (H, W, 3), FOLDER/task.json, FOLDER/med_config.json and
                          FOLDER/bert-base-uncased/vocab.txt
                          -> FOLDER/ImageReward.pt, random weights as the published class saves them, and
                          FOLDER/scores.json: of each prompt the scores of all images, and `features`, what the head
                          sees of the first prompt

task.json: {"seed": 0, "prompts": [...], "vision": null or the arguments of a smaller image encoder}. Replaced is only
what cannot be imported here and is not used: the package's __init__, which imports its training code, and fairscale.
"""

import importlib
import importlib.util
import json
import os
import sys
import types
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image


def published() -> Any:
    """The module ImageReward.ImageReward."""
    spec = importlib.util.find_spec("ImageReward")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    root = Path(spec.submodule_search_locations[0])
    for name, folder in {"ImageReward": root, "ImageReward.models": root / "models"}.items():
        package = types.ModuleType(name)
        package.__path__ = [str(folder)]
        sys.modules[name] = package
    fairscale = types.ModuleType("fairscale.nn.checkpoint.checkpoint_activations")
    fairscale.checkpoint_wrapper = None  # type: ignore[attr-defined]
    for parent in ("fairscale", "fairscale.nn", "fairscale.nn.checkpoint"):
        sys.modules[parent] = types.ModuleType(parent)
    sys.modules[fairscale.__name__] = fairscale
    return importlib.import_module("ImageReward.ImageReward")


def build(vision: dict[str, int] | None) -> Any:
    """The published model, its image encoder smaller where `vision` says so; weights as its classes draw them."""
    module = published()
    if vision is None:
        return module.ImageReward(med_config="med_config.json").eval()
    blip = importlib.import_module("ImageReward.models.BLIP.blip_pretrain")
    vit = importlib.import_module("ImageReward.models.BLIP.vit")

    def smaller(*_: Any) -> tuple[Any, int]:
        return vit.VisionTransformer(**vision), vision["embed_dim"]

    hidden_size = json.loads(Path("med_config.json").read_text())["hidden_size"]
    head = module.MLP
    with patch.object(blip, "create_vit", smaller), patch.object(module, "MLP", lambda _: head(hidden_size)):
        model = module.ImageReward(med_config="med_config.json").eval()
    model.preprocess = module._transform(vision["img_size"])
    return model


def enliven(model: Any) -> None:
    """Weights of a size at which no layer loses the signal: drawn by its classes, all prompts would score the same."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)


def main(folder: Path) -> None:
    os.chdir(folder)  # where the tokenizer is found by its name
    task = json.loads(Path("task.json").read_text())
    torch.manual_seed(task["seed"])
    model = build(task["vision"])
    enliven(model)
    torch.save(model.state_dict(), "ImageReward.pt")
    seen: list[torch.Tensor] = []
    model.mlp.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with np.load("images.npz") as images:
        pictures = [Image.fromarray(images[name]) for name in images.files]
    with torch.no_grad():
        scores = [[model.score(prompt, picture) for picture in pictures] for prompt in task["prompts"]]
    features = torch.cat(seen[: len(pictures)]).tolist()
    Path("scores.json").write_text(json.dumps({"scores": scores, "features": features}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
