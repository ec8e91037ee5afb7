"""`python -m nft_ray.cli.pretrain`: nft_ray/shapes/pretrain.py with strict GenEval as its judge."""

from nft_ray.rewards.geneval import evaluate, select
from nft_ray.shapes.detector import Detections
from nft_ray.shapes.grammar import Metadata
from nft_ray.shapes.pretrain import main


def strict(found: Detections, line: Metadata) -> bool:
    """Whether what was found is exactly what the line asks for."""
    return evaluate(select(found.objects, line["tag"]), line, found.colors_of).strict


if __name__ == "__main__":
    main(strict)
