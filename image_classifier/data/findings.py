"""Findings while image files are read: resized images and skipped images."""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from image_classifier.access import Reading
from image_classifier.choices import Fit
from image_classifier.files import check_form
from image_classifier.image_sizes import DEFAULT_IMAGE_SIZE

_NUM_SIZES = 10  # that are recorded, the most frequent first
_NUM_NAMED = 3  # of these, in a sentence
_FORM = {"num_fitted": int, "sizes": {str: int}, "largest_ratio": float, "left_out": [str], "image_size": int}


@dataclass(frozen=True)
class Findings:
    """What was found.

    Attributes:
        fit: how images of another size were fitted.
        num_fitted: how many there were of another size.
        sizes: the most frequent of their sizes, as "300 x 200", with the number of images of each.
        largest_ratio: of the longer to the shorter side, of all images that were fitted; 1 for squares.
        left_out: each image that could not be read and was left out, with the reason.
        image_size: side in pixels that images were fitted to.
    """

    fit: Fit = "squeeze"
    num_fitted: int = 0
    sizes: Mapping[str, int] = field(default_factory=dict)
    largest_ratio: float = 1.0
    left_out: tuple[str, ...] = ()
    image_size: int = DEFAULT_IMAGE_SIZE

    def describe(self) -> list[str]:
        """Describe it for people, in sentences of a line each; nothing where there is nothing to say."""
        lines = []
        if self.num_fitted:
            named = dict(itertools.islice(self.sizes.items(), _NUM_NAMED))
            listed = ", ".join(size if len(self.sizes) == 1 else f"{size} ({n:,})" for size, n in named.items())
            more = "" if sum(named.values()) == self.num_fitted else " and others"
            counted = _count(self.num_fitted)
            fitted = f"{self.image_size} x {self.image_size}"
            lines.append(f"{counted} resized to {fitted}, from {listed}{more}{self._describe_fit()}")
        if self.left_out:
            alone = len(self.left_out) == 1
            reason = "it could not be read: " if alone else "they could not be read, such as "
            lines.append(f"{_count(len(self.left_out))} left out because {reason}{self.left_out[0]}")
        return lines

    def _describe_fit(self) -> str:
        ratio = self.largest_ratio
        if ratio == 1:
            return ""
        if self.fit == "crop":
            return f"; up to {1 - 1 / ratio:.0%} of one was cut off"
        if self.fit == "pad":
            return f"; up to {1 - 1 / ratio:.0%} of one is a black border"
        return f"; aspect ratios of up to {ratio:.2f} became 1 (--fit crop or --fit pad keeps them)"

    def to_json(self) -> dict[str, Any]:
        """Give it as JSON has it."""
        return asdict(self) | {"sizes": dict(self.sizes), "left_out": list(self.left_out)}


def _count(num_images: int) -> str:
    return "1 image was" if num_images == 1 else f"{num_images:,} images were"


def restore_findings(recorded: Mapping[str, Any]) -> Findings:
    """Make findings again out of their JSON.

    Raises:
        TypeError, ValueError: it is none.
    """
    content = {"image_size": DEFAULT_IMAGE_SIZE, **recorded}
    check_form(content, _FORM)
    return Findings(**{**content, "left_out": tuple(content["left_out"])})


class Notebook:
    """Takes notes while images are read, from any thread."""

    def __init__(self, reading: Reading) -> None:
        self.left_out: list[str] = []
        self._reading = reading
        self._sizes: Counter[tuple[int, int]] = Counter()
        self._lock = threading.Lock()
        self._thread = threading.local()

    def note_size(self, width: int, height: int) -> None:
        """Note the size of an image that is fitted."""
        apart: list[tuple[int, int]] | None = getattr(self._thread, "apart", None)
        if apart is None:
            self.add_sizes([(width, height)])
        else:
            apart.append((width, height))

    @contextmanager
    def apart(self) -> Iterator[list[tuple[int, int]]]:
        """Collect the sizes that this thread notes in the block, for `add_sizes` when it is their images' turn."""
        self._thread.apart = []
        try:
            yield self._thread.apart
        finally:
            self._thread.apart = None

    def add_sizes(self, sizes: Iterable[tuple[int, int]]) -> None:
        """Count the sizes of images that were fitted."""
        with self._lock:
            self._sizes.update(sizes)

    def to_json(self) -> dict[str, Any]:
        """Give all notes as JSON has them, for `restore`."""
        return {"left_out": self.left_out, "sizes": [[*size, count] for size, count in sorted(self._sizes.items())]}

    def restore(self, notes: Mapping[str, Any]) -> None:
        """Take the notes of `to_json` instead of those that were taken so far.

        Raises:
            TypeError, ValueError: they are none.
        """
        check_form(notes, {"left_out": [str], "sizes": [[int]]})
        self._sizes = Counter({(width, height): count for width, height, count in notes["sizes"]})
        self.left_out[:] = notes["left_out"]

    def summarize(self) -> Findings:
        """Summarize the notes."""
        frequent = sorted(self._sizes.items(), key=lambda item: (-item[1], item[0]))[:_NUM_SIZES]
        return Findings(
            fit=self._reading.fit,
            num_fitted=self._sizes.total(),
            sizes={f"{width} x {height}": count for (width, height), count in frequent},
            largest_ratio=max((max(size) / min(size) for size in self._sizes), default=1.0),
            left_out=tuple(self.left_out),
            image_size=self._reading.side,
        )
