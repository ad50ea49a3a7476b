"""A sheet that shows what changed between two data sets: images added, removed and relabelled."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from image_classifier.data.diff import Difference
from image_classifier.data.snapshot import Snapshot
from image_classifier.progress import track
from image_classifier.visualization.figures import LIGHT, Theme, apply_style, build_figure, render_png, shorten

_NUM_COLUMNS = 12
_MAX_ROWS = 4  # of one kind; what does not fit is counted in the heading
_TILE = 0.78  # inches
_HEADING = 0.42
_MARGIN = 0.6


@dataclass(frozen=True)
class _Part:
    """The images of one kind of change, with their captions."""

    heading: str
    images: Sequence[NDArray[np.uint8]]
    captions: Sequence[str]

    @property
    def num_rows(self) -> int:
        return max(1, math.ceil(len(self.images) / _NUM_COLUMNS))


@track("drawing the sheet")
def draw_difference_sheet(
    old: Snapshot, new: Snapshot, difference: Difference, title: str, theme: Theme = LIGHT
) -> bytes:
    """Draw the first images that were relabelled, added and removed, with their classes; PNG."""
    most = _NUM_COLUMNS * _MAX_ROWS
    relabelled = difference.relabelled[:most]
    parts = [
        _Part(
            _describe("relabelled", len(difference.relabelled)),
            [new.images[pair.new] for pair in relabelled],
            [
                f"{shorten(old.classes[pair.old_label], 9)}\n→ {shorten(new.classes[pair.new_label], 9)}"
                for pair in relabelled
            ],
        ),
        _build_part("added", new, difference.added),
        _build_part("removed", old, difference.removed),
    ]
    heights = [part.num_rows * _TILE * 1.35 + _HEADING for part in parts]
    with apply_style(theme):
        figure = build_figure(_NUM_COLUMNS * _TILE + 0.4, sum(heights) + _MARGIN)
        for axes, part in zip(figure.subplots(3, 1, height_ratios=heights), parts, strict=True):
            _draw_part(axes, part, theme)
        figure.suptitle(shorten(title, 90), x=0.015, ha="left", size=13, weight="bold", parse_math=False)
        return render_png(figure)


def _build_part(kind: str, snapshot: Snapshot, numbers: Sequence[int]) -> _Part:
    shown = numbers[: _NUM_COLUMNS * _MAX_ROWS]
    captions = [shorten(snapshot.classes[snapshot.labels[number]], 10) for number in shown]
    return _Part(_describe(kind, len(numbers)), [snapshot.images[number] for number in shown], captions)


def _describe(kind: str, count: int) -> str:
    most = _NUM_COLUMNS * _MAX_ROWS
    return f"{count:,} {kind}" + (f", the first {most}" if count > most else "")


def _draw_part(axes: Axes, part: _Part, theme: Theme) -> None:
    axes.set_title(part.heading)
    axes.set_xlim(0, _NUM_COLUMNS)
    axes.set_ylim(1.35 * part.num_rows, 0)
    axes.set_axis_off()
    for number, (image, caption) in enumerate(zip(part.images, part.captions, strict=True)):
        row, column = divmod(number, _NUM_COLUMNS)
        left, top = column + 0.04, 1.35 * row
        axes.imshow(image.transpose(1, 2, 0), extent=(left, left + 0.92, top + 0.92, top), interpolation="nearest")
        axes.text(left, top + 0.97, caption, va="top", size=7.5, color=theme.muted, linespacing=1.0)
    axes.set_xlim(0, _NUM_COLUMNS)
    axes.set_ylim(1.35 * part.num_rows, 0)
    axes.set_aspect("equal", anchor="NW")
