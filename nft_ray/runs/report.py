"""What a finished run shows: pictures before and after, the reward curve, the table, the summary.

Pure: records in, files and text out. It knows no run folder and no tracker.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from nft_ray.config import ExperimentConfig
from nft_ray.runs.checkpoint import package_versions
from nft_ray.types import EvalResult

SHOWN_PX = 160
"""Small images are enlarged by a whole factor to about this."""
THUMBNAIL_PX = 256
WIDTH_PX = 1400
GAP = 12
MARGIN = 24
INK, SOFT, PAPER = (32, 33, 36), (110, 114, 120), (255, 255, 255)
PASSED, FAILED = (30, 142, 62), (217, 48, 37)
HEADING_PX = 20
CAPTION_PX = 16

Verdicts = Mapping[int, tuple[bool | None, bool | None]]


def before_after(
    base: Mapping[int, np.ndarray],
    trained: Mapping[int, np.ndarray],
    prompts: Mapping[int, str],
    path: Path | str,
    *,
    verdicts: Verdicts | None = None,
) -> None:
    """Write a PNG: for every line in both, its prompt, the base's image and below it the trained policy's.

    Images uint8 (H, W, 3); `verdicts`: line -> was (base, trained) right, drawn as a frame and a mark.
    """
    lines = sorted(set(base) & set(trained))
    if not lines:
        raise ValueError("before_after: base and trained have no line in common; see evaluation.picture_lines")
    font = ImageFont.load_default(CAPTION_PX)
    tiles = {line: (enlarged(base[line]), enlarged(trained[line])) for line in lines}
    width = max(tile.width for pair in tiles.values() for tile in pair)
    columns = balanced(len(lines), max(1, (WIDTH_PX - MARGIN) // (width + GAP)))
    captions = {line: wrapped(prompts[line], font, width) for line in lines}
    rows = [lines[start : start + columns] for start in range(0, len(lines), columns)]
    blocks = [_block(row, tiles, captions, verdicts or {}, width) for row in rows]
    sheet = Image.new("RGB", (max(b.width for b in blocks), sum(b.height for b in blocks) + MARGIN), PAPER)
    top = 0
    for block in blocks:
        sheet.paste(block, (0, top))
        top += block.height
    sheet.save(path, optimize=True)


def contact_sheet(images: Mapping[int, np.ndarray]) -> Image.Image:
    """The images of one evaluation, enlarged, in the order of their lines."""
    tiles = [enlarged(images[line]) for line in sorted(images)]
    width, height = max(tile.width for tile in tiles), max(tile.height for tile in tiles)
    columns = balanced(len(tiles), max(1, WIDTH_PX // (width + GAP)))
    rows = math.ceil(len(tiles) / columns)
    sheet = Image.new("RGB", (columns * (width + GAP) - GAP, rows * (height + GAP) - GAP), PAPER)
    for i, tile in enumerate(tiles):
        sheet.paste(tile, ((i % columns) * (width + GAP), (i // columns) * (height + GAP)))
    return sheet


def captioned_sheet(
    images: Mapping[int, np.ndarray],
    captions: Mapping[int, Sequence[str]],
    path: Path | str,
    *,
    right: Mapping[int, bool] | None = None,
) -> None:
    """Write a PNG: every image, at most THUMBNAIL_PX wide and high, below its captions (the prompt, then the score).

    `right`: line -> is it what was asked for, drawn as in `before_after`.
    """
    font = ImageFont.load_default(CAPTION_PX)
    tiles = {line: thumbnail(images[line]) for line in sorted(images)}
    width, height = max(t.width for t in tiles.values()), max(t.height for t in tiles.values())
    columns = balanced(len(tiles), max(1, (WIDTH_PX - 2 * MARGIN) // (width + GAP)))
    texts = {line: [part for text in captions[line] for part in wrapped(text, font, width)] for line in tiles}
    pitch, lines = round(CAPTION_PX * 1.25), list(tiles)
    rows = [lines[start : start + columns] for start in range(0, len(lines), columns)]
    tops = [pitch * max(len(texts[line]) for line in row) + GAP // 2 for row in rows]
    size = (2 * MARGIN + columns * (width + GAP) - GAP, 2 * MARGIN + sum(tops) + len(rows) * (height + GAP) - GAP)
    sheet = Image.new("RGB", size, PAPER)
    draw, y = ImageDraw.Draw(sheet), MARGIN
    for row, top in zip(rows, tops, strict=True):
        for column, line in enumerate(row):
            x, tile = MARGIN + column * (width + GAP), tiles[line]
            first = y + top - GAP // 2 - pitch * len(texts[line])
            for i, text in enumerate(texts[line]):
                draw.text((x + width // 2, first + i * pitch), text, font=font, fill=INK, anchor="ma")
            sheet.paste(tile, (x, y + top))
            box = (x, y + top, x + tile.width - 1, y + top + tile.height - 1)
            _mark(draw, box, (right or {}).get(line))
        y += top + height + GAP
    sheet.save(path, optimize=True)


def thumbnail(image: np.ndarray) -> Image.Image:
    """`enlarged`, or made smaller where it is larger than THUMBNAIL_PX."""
    shown = enlarged(image)
    shown.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    return shown


def enlarged(image: np.ndarray) -> Image.Image:
    """uint8 (H, W, 3), nearest neighbour by the whole factor that comes closest to SHOWN_PX; never smaller."""
    height, width = image.shape[:2]
    factor = max(1, round(SHOWN_PX / max(height, width)))
    return Image.fromarray(image).resize((width * factor, height * factor), Image.Resampling.NEAREST)


def balanced(count: int, most: int) -> int:
    """Columns, at most `most`, that fill the rows evenly: 10 in 8 become 5 + 5, not 8 + 2."""
    return math.ceil(count / math.ceil(count / most))


def wrapped(text: str, font: Any, width: int) -> list[str]:
    """Lines of `text` that fit `width` pixels, broken at spaces; a longer word stands alone."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def _block(
    lines: Sequence[int],
    tiles: Mapping[int, tuple[Image.Image, Image.Image]],
    captions: Mapping[int, list[str]],
    verdicts: Verdicts,
    width: int,
) -> Image.Image:
    """One row of prompts: captions, the base's images, the trained policy's images."""
    caption, heading = ImageFont.load_default(CAPTION_PX), ImageFont.load_default(HEADING_PX)
    pitch = round(CAPTION_PX * 1.25)
    height = max(tile.height for line in lines for tile in tiles[line])
    left = MARGIN + math.ceil(max(heading.getlength(text) for text in ("base", "trained"))) + GAP
    top = MARGIN + pitch * max(len(captions[line]) for line in lines) + GAP // 2
    block = Image.new("RGB", (left + len(lines) * (width + GAP) - GAP + MARGIN, top + 2 * height + GAP), PAPER)
    draw = ImageDraw.Draw(block)
    for row, text in enumerate(("base", "trained")):
        middle = top + row * (height + GAP) + height // 2
        draw.text((left - GAP, middle), text, font=heading, fill=(SOFT, INK)[row], anchor="rm")
    for column, line in enumerate(lines):
        x = left + column * (width + GAP)
        first = top - GAP // 2 - pitch * len(captions[line])
        for i, text in enumerate(captions[line]):
            draw.text((x + width // 2, first + i * pitch), text, font=caption, fill=INK, anchor="ma")
        for row, tile in enumerate(tiles[line]):
            y = top + row * (height + GAP)
            block.paste(tile, (x, y))
            _mark(draw, (x, y, x + tile.width - 1, y + tile.height - 1), verdicts.get(line, (None, None))[row])
    return block


def _mark(draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], right: bool | None) -> None:
    """A hairline, or a frame in the colour of the verdict with a tick or a cross in its corner."""
    if right is None:
        draw.rectangle(box, outline=(218, 220, 224))
        return
    color = PASSED if right else FAILED
    draw.rectangle(box, outline=color, width=3)
    x, y = box[2] - 13, box[3] - 13
    draw.ellipse((x - 10, y - 10, x + 10, y + 10), fill=color)
    if right:
        draw.line([(x - 5, y), (x - 1, y + 4), (x + 5, y - 4)], fill=PAPER, width=3)
    else:
        draw.line([(x - 4, y - 4), (x + 4, y + 4)], fill=PAPER, width=3)
        draw.line([(x - 4, y + 4), (x + 4, y - 4)], fill=PAPER, width=3)


def reward_curve(lines: Sequence[Mapping[str, Any]], path: Path | str) -> None:
    """Write a PNG: the training reward and the held-out figures of metrics.jsonl against the epoch."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # half a second that only a finished run needs
    from matplotlib.figure import Figure

    training, held_out = curve_names(lines)
    figure = Figure(figsize=(8, 4.2), dpi=150, layout="constrained")
    axes = FigureCanvasAgg(figure).figure.subplots()
    axes.plot(*_series(lines, training), color="#9aa0a6", linewidth=1.6, label=f"training: {training}")
    for i, (names, epochs, values) in enumerate(distinct_curves(lines, held_out)):
        color, dashes = curve_style(i)
        label = f"held out: {' = '.join(names)}"
        axes.plot(epochs, values, color=color, linestyle=dashes, marker="o", linewidth=2, label=label)
    axes.set_xlabel("epoch")
    axes.set_ylabel("reward")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="best")
    figure.savefig(path)


def curve_names(lines: Sequence[Mapping[str, Any]]) -> tuple[str, list[str]]:
    """The metrics to draw: the training reward, and its counterparts among the evaluations.

    `geneval` where there is one; else the only reward; else the total, beside every reward's own evaluation.
    """
    names = {name for line in lines for name in line}
    rewards = sorted(n.removeprefix("eval/") for n in names if n.startswith("eval/") and n.count("/") == 1)
    main = "geneval" if "geneval" in rewards else rewards[0] if len(rewards) == 1 else "total"
    if main == "total" or f"reward/{main}" not in names:
        return "reward/total", [f"eval/{name}" for name in rewards]
    return f"reward/{main}", [name for name in (f"eval/{main}", f"eval/{main}/strict") if name in names]


def distinct_curves(
    lines: Sequence[Mapping[str, Any]], names: Sequence[str]
) -> list[tuple[list[str], list[int], list[float]]]:
    """(metrics, epochs, values) of each curve that has a point; metrics of the same values are one curve.

    A reward is often its own `strict` detail: of two lines, one would lie hidden under the other.
    """
    curves: list[tuple[list[str], list[int], list[float]]] = []
    for name in names:
        epochs, values = _series(lines, name)
        same = [curve for curve in curves if curve[1:] == (epochs, values)]
        if same:
            same[0][0].append(name)
        elif epochs:
            curves.append(([name], epochs, values))
    return curves


def curve_style(index: int) -> tuple[str, str]:
    """Colour and dashes of a curve, its own up to 20 of them; dashes show what lies beneath where two meet."""
    colors = ("#1a73e8", "#d93025", "#188038", "#e37400", "#9334e6")
    return colors[index % len(colors)], ("-", "--", "-.", ":")[index % 4]


def _series(lines: Sequence[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    points = sorted((line["epoch"], line[name]) for line in lines if line.get(name) is not None)
    return [epoch for epoch, _ in points], [value for _, value in points]


def table(
    base: Mapping[str, float],
    trained: Mapping[str, float],
    counts: Mapping[str, int],
    *,
    shared_tags: Collection[str] = (),
) -> str:
    """Before, after and change of the overall metrics, then per tag; `*` marks tags that are trained on as well."""
    names = table_rows({*base, *trained})
    marked = [name for name in names if name.rpartition("/")[2] in shared_tags]
    labels = {name: f"{name} *" if name in marked else name for name in names}
    width = max(len(label) for label in [*labels.values(), "held-out metric"])
    shown = [f"{'held-out metric':<{width}}  {'lines':>6}  {'base':>9}  {'trained':>9}  {'change':>9}"]
    shown.append("-" * len(shown[0]))
    for name in names:
        before, after = base.get(name, math.nan), trained.get(name, math.nan)
        count = str(counts[name]) if name in counts else "-"
        cells = f"{_number(before):>9}  {_number(after):>9}  {_number(after - before, sign='+'):>9}"
        shown.append(f"{labels[name]:<{width}}  {count:>6}  {cells}")
    if marked:
        shown.append("* prompts of this tag also occur in training: not held out. The overall figures count them.")
    return "\n".join(shown)


def evaluation_table(summary: Mapping[str, Mapping[str, float | int | None]]) -> str:
    """Mean and 95 % interval of the overall metrics, then per tag; how many lines stand behind each, how many miss.

    Below them GenEval's own overall score, which weighs its tags alike, however many lines each has.
    """
    names = table_rows(summary)
    width = max(len(name) for name in [*names, "metric"])
    missing = any(summary[name]["missing"] for name in names)
    shown = [
        f"{'metric':<{width}}  {'lines':>6}  {'mean':>9}  {'95 % interval':>20}" + ("  missing" if missing else "")
    ]
    shown.append("-" * len(shown[0]))
    for name in names:
        row = summary[name]
        mean, low, high = (math.nan if row[key] is None else float(row[key] or 0) for key in ("mean", "low", "high"))
        cells = f"{row['count']:>6}  {_number(mean):>9}  {f'{_number(low)} to {_number(high)}':>20}"
        shown.append(f"{name:<{width}}  {cells}" + (f"  {row['missing']:>7}" if missing else ""))
    of_tags = [row["mean"] for name, row in summary.items() if name.startswith("geneval/correct/")]
    scores = [float(mean) for mean in of_tags if mean is not None]
    if scores:
        shown.append(f"GenEval's overall score, the mean of {len(scores)} tags' `correct`: {np.mean(scores):.4f}")
    return "\n".join(shown)


def summary(
    config: ExperimentConfig, stages: Mapping[str, tuple[EvalResult, EvalResult]], *, seconds: float, epochs: int
) -> dict[str, Any]:
    """What summary.json holds; its keys are an interface.

    stages: name -> (base, trained) on its test lines, in order; those of the last one are the run's own figures.
    """
    base, trained = list(stages.values())[-1]
    parts = {
        name: {"base": before.metrics, "trained": after.metrics, "counts": after.counts}
        for name, (before, after) in stages.items()
        if name
    }
    return {
        "name": config.run.name,
        "base": base.metrics,
        "trained": trained.metrics,
        "counts": trained.counts,
        **({"stages": parts} if parts else {}),
        "seconds": seconds,
        "epochs": epochs,
        "seed": config.run.seed,
        "versions": package_versions(),
    }


def table_rows(names: Collection[str]) -> list[str]:
    """Overall metrics, then the tags: of a reward's `strict` detail where it has one, else of the reward itself."""
    tags = {name.split("/")[2] for name in names if name.count("/") == 2}
    per_tag = sorted(name for name in names if name.rpartition("/")[2] in tags)
    overall = sorted(set(names) - set(per_tag))
    strict = {name.partition("/")[0] for name in overall if name.endswith("/strict")}
    shown = [
        name
        for name in per_tag
        if name.rpartition("/")[0] == name.partition("/")[0] + ("/strict" if name.partition("/")[0] in strict else "")
    ]
    return [*overall, *shown]


def _number(value: float, sign: str = "") -> str:
    if math.isnan(value):
        return "-"
    return f"{value:{sign}.3f}" if abs(value) < 1000 else f"{value:{sign}.3g}"
