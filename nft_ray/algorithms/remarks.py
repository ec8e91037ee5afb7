"""What a person should be told of an epoch's rewards and images, in one line each. Text only: who says it is not known.

The key of a remark is what it is about: a run says each once, however often it comes, and counts the rest in metrics.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from nft_ray.types import RolloutInfo, RolloutRequest, ScoredGroup

SHOWN = 3
"""Prompts that a line names, at most."""
FLOAT16 = "with model.dtype = float16, bfloat16 has a wider range"


def remarks(
    groups: Sequence[ScoredGroup],
    raw: Mapping[str, np.ndarray],
    finite: np.ndarray,
    constant: Mapping[str, np.ndarray],
) -> dict[str, str]:
    """Of one epoch. raw: trained reward -> (N,), NaN = missing; finite bool (N,): the images that count; constant:
    trained reward -> bool (groups,), those within which it says the same of every image.
    """
    epoch, found = groups[0].request.epoch + 1, {}
    if not finite.all():
        what = not_finite([(group.request, group.info) for group in groups])
        found[f"not finite {epoch}"] = f"epoch {epoch}: {what}; they are left out of the update"
    for name, values in raw.items():
        missing, seen = int((np.isnan(values) & finite).sum()), values[~np.isnan(values)]
        if missing:
            found[f"missing {name}"] = (
                f"epoch {epoch}: reward {name} gave no number, or an infinite one, or one that (with its weight) is "
                f"beyond float32, for {missing} of {finite.sum()} images; they are left out of the update, and further "
                f"ones only counted (reward/missing/{name})"
            )
        if len(seen) and constant[name].all():
            what = f"{seen[0]:g} to every image" if seen.min() == seen.max() else "all images of each prompt the same"
            found[f"constant {name}"] = (
                f"epoch {epoch}: reward {name} gives {what}: nothing is learned from it; further epochs only count it "
                f"(reward/constant/{name})"
            )
    return found


def not_finite(rollouts: Sequence[tuple[RolloutRequest, RolloutInfo]]) -> str:
    """Which images are not finite numbers: how many, of which prompts, and what may help."""
    lost: dict[str, list[int]] = {}
    for request, info in rollouts:
        places = [(item.prompt.text, image) for item in request.items for image in range(item.num_images)]
        for place in info.non_finite:
            text, image = places[place]
            lost.setdefault(text, []).append(image + 1)
    count, total = sum(map(len, lost.values())), sum(request.num_images for request, _ in rollouts)
    shown = [f"{text!r} (image {', '.join(map(str, images))})" for text, images in list(lost.items())[:SHOWN]]
    more = f" and {len(lost) - SHOWN} more prompts" if len(lost) > SHOWN else ""
    return f"{count} of {total} images are not finite numbers: {', '.join(shown)}{more} ({FLOAT16})"
