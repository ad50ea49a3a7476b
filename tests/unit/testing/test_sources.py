"""The suite for data sources: a good one passes, and each bad one fails with its reason."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from image_classifier.data.plugged import Image
from image_classifier.testing.sources import check_source


class Good:
    """A file of pixels, a sixth of which is the test part."""

    def can_read(self, path: Path) -> bool:
        return path.suffix == ".npy"

    def list_files(self, path: Path) -> Sequence[Path]:
        return [path]

    def list_classes(self, path: Path) -> Sequence[str]:
        return ["a", "b"]

    def iterate_images(self, path: Path, part: str) -> Iterator[tuple[Image, int]]:
        images = np.load(path)
        for number in {"train": range(10), "test": range(10, 12)}.get(part, range(0)):
            yield images[number], number % 2


class Greedy(Good):
    def can_read(self, path: Path) -> bool:
        return True


class Blind(Good):
    def can_read(self, path: Path) -> bool:
        return False


class Unlisted(Good):
    def list_files(self, path: Path) -> Sequence[Path]:
        return []


class Missing(Good):
    def list_files(self, path: Path) -> Sequence[Path]:
        return [path, path.with_name("none")]


class Untested(Good):
    def iterate_images(self, path: Path, part: str) -> Iterator[tuple[Image, int]]:
        return super().iterate_images(path, part if part == "train" else "none")


class Restless(Good):
    num_calls = 0

    def iterate_images(self, path: Path, part: str) -> Iterator[tuple[Image, int]]:
        self.num_calls += 1
        for image, label in super().iterate_images(path, part):
            yield image, (label + self.num_calls) % 2


class OtherLabels(Good):
    def iterate_images(self, path: Path, part: str) -> Iterator[tuple[Image, int]]:
        for image, label in super().iterate_images(path, part):
            yield image, label + 1


class OtherArrays(Good):
    def iterate_images(self, path: Path, part: str) -> Iterator[tuple[Image, int]]:
        for image, label in super().iterate_images(path, part):
            assert isinstance(image, np.ndarray)
            yield image.astype(np.float32), label


class Failing(Good):
    def list_classes(self, path: Path) -> Sequence[str]:
        raise KeyError("names")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (12, 20, 30, 3), dtype=np.uint8)
    np.save(tmp_path / "data.npy", pixels)
    return tmp_path / "data.npy"


def test_a_good_source_passes(data: Path) -> None:
    check_source(Good(), data)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (Greedy(), "says that it reads a folder in which nothing is"),
        (Blind(), "the source does not read"),
        (Unlisted(), "it lists no files"),
        (Missing(), "lists none, which is no file"),
        (Untested(), "gives no images of the part test"),
        (Restless(), "other images or labels of the part train when it is read again"),
        (OtherLabels(), "the source returns the label 2, but there are 2 classes"),
        (OtherArrays(), r"an array of float32 \[20, 30, 3\] instead of uint8 \[H, W, 3\]"),
        (Failing(), "cannot be read by the source: KeyError: 'names'"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Good) else "",
)
def test_a_bad_source_fails_with_its_reason(source: Good, reason: str, data: Path) -> None:
    with pytest.raises(AssertionError, match=reason):
        check_source(source, data)
