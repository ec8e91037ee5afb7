"""A detector's published files with random weights, images for it, and its post-processing in plain loops."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

from nft_ray.rewards._mask2former import Instance

SMALL_SWIN = {"image_size": 64, "embed_dim": 12, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 3, 3], "window_size": 4}
SMALL = {
    "feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "encoder_feedforward_dim": 32, "encoder_layers": 1,
    "decoder_layers": 2, "num_attention_heads": 2, "dim_feedforward": 32, "num_queries": 12,
}  # fmt: skip
PUBLISHED_SWIN = {"embed_dim": 96, "depths": [2, 2, 18, 2], "num_heads": [3, 6, 12, 24], "window_size": 7}
PREPROCESSOR = {
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "ignore_index": 255,
    "image_mean": [0.48500001430511475, 0.4560000002384186, 0.4059999883174896],
    "image_processor_type": "Mask2FormerImageProcessor",
    "image_std": [0.2290000021457672, 0.2239999920129776, 0.22499999403953552],
    "num_labels": 80,
    "reduce_labels": False,
    "resample": 2,
    "rescale_factor": 0.00392156862745098,
    "size": {"height": 384, "width": 384},
    "size_divisor": 32,
}


def write_model(folder: Path, swin: dict[str, Any], sizes: dict[str, Any], side: int, num_labels: int = 80) -> None:
    """config.json, preprocessor_config.json and model.safetensors with random weights, sure of some classes.

    As published: names of the classes that are not GenEval's, and the buffers that older transformers saved.
    """
    torch.manual_seed(0)
    backbone = SwinConfig(**swin, out_features=["stage1", "stage2", "stage3", "stage4"])
    names = {index: f"label {index}" for index in range(num_labels)}
    config = Mask2FormerConfig(backbone_config=backbone, id2label=names, **sizes)
    model = Mask2FormerForUniversalSegmentation(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "encoder" in name:
                parameter.normal_(std=parameter[0].numel() ** -0.5)  # the library's own makes all images alike
        model.class_predictor.weight.mul_(40)
    model.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    for name in [name for name in weights if name.endswith("relative_position_bias_table")]:
        indices = torch.zeros(swin["window_size"] ** 2, swin["window_size"] ** 2, dtype=torch.int64)
        weights[name.replace("relative_position_bias_table", "relative_position_index")] = indices
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    preprocessor = PREPROCESSOR | {"size": {"height": side, "width": side}}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))


def random_images(num_images: int, height: int, width: int) -> np.ndarray:
    coarse = np.random.default_rng(height).integers(0, 256, (num_images, 6, 6, 3)).astype(np.uint8)
    found = np.stack([np.asarray(Image.fromarray(image).resize((width, height))) for image in coarse])
    found.setflags(write=False)  # as an array from the object store is
    return found


def plainly(labels: torch.Tensor, masks: torch.Tensor, size: tuple[int, int]) -> list[Instance]:
    """The rule of mmdet's instance head in loops over queries, classes and pixels."""
    pairs = []
    for query, row in enumerate(labels.softmax(-1)):
        pairs += [(float(probability), query, label) for label, probability in enumerate(row[:-1])]
    found = []
    for probability, query, label in sorted(pairs, reverse=True)[:100]:
        large = torch.nn.functional.interpolate(masks[query][None, None], size, mode="bilinear", align_corners=False)
        mask = large[0, 0].numpy() > 0
        if not mask.any():
            continue
        rows, columns = np.nonzero(mask)
        inside = 1 / (1 + np.exp(-large[0, 0].numpy()[mask].astype(np.float64)))
        x0, x1, y0, y1 = columns.min(), columns.max() + 1, rows.min(), rows.max() + 1
        box = (float(x0), float(y0), float(x1), float(y1))
        confidence = probability * float(inside.mean())
        found.append(Instance(label=label, confidence=confidence, box=box, mask=mask[y0:y1, x0:x1]))
    return sorted(found, key=lambda one: -one.confidence)
