"""The published HPSv2 package on inputs of ours. Run by the Python of .envs/hpsv2x; needs nothing of nft_ray.

    oracle.py transform SIZE FOLDER    FOLDER/images.npz, uint8 (H, W, 3) -> FOLDER/pixels.npz, f32 (3, SIZE, SIZE)
    oracle.py score FOLDER             the same images, FOLDER/prompts.json and FOLDER/HPS_v2.1_compressed.pt
                                       -> FOLDER/scores.json: of each prompt the scores of all images;
                                       FOLDER/ViT-H-14.json, where it is there, is another size of the model

Only the weights that the package starts from are left out, a download over random ones: its checkpoint, loaded
strictly, overwrites them all.
"""

import json
import sys
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from hpsv2 import img_score
from hpsv2.src.open_clip import factory
from hpsv2.src.open_clip.transform import image_transform
from PIL import Image

RANDOM_STARTS = ("kaiming_uniform_", "normal_", "trunc_normal_", "uniform_", "xavier_uniform_")


def read_images(folder: Path) -> dict[str, Image.Image]:
    with np.load(folder / "images.npz") as images:
        return {name: Image.fromarray(images[name]) for name in images.files}


def transform(size: int, folder: Path) -> None:
    apply = image_transform(size, is_train=False, resize_longest_max=True)
    np.savez(folder / "pixels.npz", **{name: apply(image).numpy() for name, image in read_images(folder).items()})


def score(folder: Path) -> None:
    checkpoint = str(folder / "HPS_v2.1_compressed.pt")
    if (folder / "ViT-H-14.json").is_file():
        factory.add_model_config(folder / "ViT-H-14.json")
    prompts = json.loads((folder / "prompts.json").read_text())
    images = list(read_images(folder).values())
    with ExitStack() as replaced:
        fetch, load = (lambda *_, **__: checkpoint), (lambda *_: None)
        replaced.enter_context(patch.multiple(factory, download_pretrained=fetch, load_checkpoint=load))
        for name in RANDOM_STARTS:
            replaced.enter_context(patch.object(torch.nn.init, name, lambda tensor, *_, **__: tensor))
        scores = [
            [float(found) for found in img_score.score(images, prompt, cp=checkpoint, hps_version="v2.1")]
            for prompt in prompts
        ]
    (folder / "scores.json").write_text(json.dumps(scores))


if __name__ == "__main__":
    if sys.argv[1] == "transform":
        transform(int(sys.argv[2]), Path(sys.argv[3]))
    else:
        score(Path(sys.argv[2]))
