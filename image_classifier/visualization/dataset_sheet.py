"""A sheet that shows a data set: sample images and the number of images of each class."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from image_classifier.data.snapshot import Snapshot
from image_classifier.progress import track
from image_classifier.visualization.figures import (
    LIGHT,
    Theme,
    apply_style,
    build_figure,
    count_more_letters,
    render_png,
    shorten,
)

_MAX_ROWS = 25  # in one column; more classes are laid out in several
_MAX_COLUMNS = 8
_GAP = 2  # pixels between two images
_SHOWN = 64
"""Side of a tile in pixels: smaller images are magnified, larger ones subsampled."""
_BARS = {
    "train": ("training images", "bar"),
    "validation": ("validation images", "validation"),
    "test": ("test images", "test"),
}
"""By part, its name in the legend and the colour of its bars in the theme."""


@track("drawing the sheet")
def draw_dataset_sheet(snapshot: Snapshot, theme: Theme = LIGHT) -> bytes:
    """Draw training images of each class, evenly spaced, with the class balance beside them; PNG."""
    num_classes = len(snapshot.classes)
    num_rows = min(num_classes, max(_MAX_ROWS, math.ceil(num_classes / _MAX_COLUMNS)))
    num_columns = math.ceil(num_classes / num_rows)
    num_samples, tile = (12, 0.44) if num_columns == 1 else (6, 0.36)  # inches
    counts = snapshot.count_classes()
    with apply_style(theme):
        names = 1.2 + 0.085 * count_more_letters(snapshot.classes)
        figure = build_figure(num_columns * (tile * 1.75 * num_samples + names), 1.1 + tile * num_rows)
        for column, axes in enumerate(figure.subplots(1, num_columns, squeeze=False).flat):
            classes = range(column * num_rows, min((column + 1) * num_rows, num_classes))
            _draw_images(axes, snapshot, classes, num_samples, theme)
            _draw_balance(axes, counts, classes, num_samples, theme)
            # Length is in images, so that a row of them and its bar share an axis.
            axes.set_xlim(0, 1.75 * num_samples)
            axes.set_ylim(num_rows - 0.5, -0.7)
            axes.set_aspect("equal", anchor="NW")
            axes.set_xticks([])
            axes.set_yticks(range(len(classes)), [shorten(snapshot.classes[label]) for label in classes])
            axes.tick_params(length=0, labelcolor=theme.text)
            axes.spines[:].set_visible(False)
            axes.grid(False)
        sizes = " + ".join(f"{numbers.sum():,}" for numbers in counts.values())
        title = f"{shorten(snapshot.name, 60)}: {num_classes:,} classes, {sizes} images"
        figure.suptitle(title, x=0.015, ha="left", size=13, weight="bold", parse_math=False)
        figure.supxlabel(f"sha256 {snapshot.digest}", x=0.015, ha="left", size=8, color=theme.muted, family="monospace")
        figure.legend(loc="upper right", ncols=len(counts), title_fontsize=9, handlelength=1.2)
        return render_png(figure)


def _draw_images(axes: Axes, snapshot: Snapshot, classes: range, num_samples: int, theme: Theme) -> None:
    images, labels = snapshot.train
    zoom, step = max(1, _SHOWN // snapshot.image_size), max(1, snapshot.image_size // _SHOWN)
    side = len(range(0, snapshot.image_size, step))
    pitch = side + _GAP
    paper = tuple(int(theme.background[digit : digit + 2], 16) for digit in (1, 3, 5))
    mosaic: NDArray[np.uint8] = np.full((len(classes) * pitch, num_samples * pitch, 3), paper, np.uint8)
    for row, label in enumerate(classes):
        members = np.flatnonzero(labels == label)
        places = sorted({len(members) * number // num_samples for number in range(num_samples)}) if len(members) else []
        for column, place in enumerate(places):
            top, left = row * pitch + _GAP // 2, column * pitch
            mosaic[top : top + side, left : left + side] = images[members[place], :, ::step, ::step].transpose(1, 2, 0)
    axes.imshow(mosaic.repeat(zoom, axis=0).repeat(zoom, axis=1), extent=(0, num_samples, len(classes) - 0.5, -0.5))


def _draw_balance(
    axes: Axes, counts: Mapping[str, NDArray[np.int64]], classes: range, num_samples: int, theme: Theme
) -> None:
    """Draw the class balance as stacked bars, one part after the other."""
    rows = np.arange(len(classes))
    numbers = np.stack([part[classes.start : classes.stop] for part in counts.values()])  # [parts, rows]
    scale = 0.42 * num_samples / np.sum(list(counts.values()), axis=0).max()
    left = np.full(len(rows), num_samples + 0.3)
    for part, lengths in zip(counts, numbers * scale, strict=True):
        label, color = _BARS[part]
        axes.barh(
            rows, lengths, left=left, height=0.6, color=getattr(theme, color), label=label if classes.start == 0 else ""
        )
        left = left + lengths
    for row in rows:
        axes.text(
            float(left[row] + 0.15),
            float(row),
            " + ".join(f"{number:,}" for number in numbers[:, row]),
            va="center",
            size=8 if num_samples > 6 else 6.5,
            color=theme.muted,
        )
