"""The picture of an epoch: that its colours are where the work is."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageColor

from nft_ray.planning.forecast import forecast
from nft_ray.planning.picture import COLOURS, draw
from tests.planning.examples import placed, small_config, small_work


def share(pixels: np.ndarray, what: str) -> float:
    return float((pixels == np.array(ImageColor.getrgb(COLOURS[what]))).all(-1).sum())


def test_every_second_of_work_is_drawn(tmp_path: Path):
    config = small_config()
    work = small_work(velocities_s=0.5, score_s={"geneval": 0.5}, update_s=2.0, load_s=6.0)
    draw(forecast(config, work, placed(config), num_lines=0), "small", tmp_path / "epoch.png")
    pixels = np.asarray(Image.open(tmp_path / "epoch.png").convert("RGB"))

    drawn = {what: share(pixels, what) for what in ("draw", "velocities", "update", "score", "load")}
    assert min(drawn.values()) > 500
    # 12 s of drawing, 6 of velocities, 24 of learning; rows are equally high, and the legend is small beside them
    assert 1.7 < drawn["draw"] / drawn["velocities"] < 2.3
    assert 1.7 < drawn["update"] / drawn["draw"] < 2.3
    assert share(pixels, "publish") == 0, "what takes no time has no place in the legend either"
