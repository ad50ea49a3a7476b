"""Reads data sets by sources of other packages, which are registered as entry points."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from image_classifier.access import Reading
from image_classifier.data.content import Batch, Content
from image_classifier.data.decoding import decode_images
from image_classifier.data.findings import Notebook
from image_classifier.data.metadata import Metadata
from image_classifier.data.parts import PARTS
from image_classifier.errors import DataError, ImageError
from image_classifier.plugins import PlugIn, describe, explain, list_registered, load

Image = Path | bytes | NDArray[np.uint8]
"""An image file, the bytes of one, or the pixels of an image [H, W, 3] RGB."""

Result = TypeVar("Result")

logger = logging.getLogger(__name__)


class DataSource(Protocol):
    """What an entry point in `image_classifier.sources` makes, called without arguments."""

    def can_read(self, path: Path) -> bool:
        """Say whether a folder or a file is a data set of this kind; it exists."""

    def list_files(self, path: Path) -> Sequence[Path]:
        """List all files that the data is read from: when one changes, it is read again."""

    def list_classes(self, path: Path) -> Sequence[str]:
        """List the names of the classes, in the order of the labels."""

    def iterate_images(self, path: Path, part: str) -> Iterable[tuple[Image, int]]:
        """Iterate over the images and labels of `train`, `validation` or `test`, in an order that is always the same;
        of a part that there is not, over nothing."""


@dataclass(frozen=True)
class Reader:
    """A source of another package; what goes wrong in it is a DataError."""

    plugin: PlugIn
    source: DataSource

    @property
    def title(self) -> str:
        """What messages call it."""
        return self.plugin.name

    def _ask(self, path: Path, question: Callable[[], Result]) -> Result:
        try:
            return question()
        except DataError:
            raise
        except Exception as error:  # it is somebody's code
            logger.debug("%s fails", self.plugin, exc_info=error)
            raise DataError(f"{path} cannot be read by {self.plugin}: {explain(error)}") from error

    def can_read(self, path: Path) -> bool:
        """Say whether it reads a path."""
        return bool(self._ask(path, lambda: self.source.can_read(path)))

    def list_files(self, path: Path) -> tuple[str, ...]:
        """List the files that it reads, relative to the folder that they lie in.

        Raises:
            DataError: there is none, or one lies elsewhere.
        """
        root = path if path.is_dir() else path.parent
        files = self._ask(path, lambda: [file.relative_to(root).as_posix() for file in self.source.list_files(path)])
        if not files:
            raise DataError(f"{path} cannot be read by {self.plugin}: it lists no files")
        return tuple(files)

    def read(self, path: Path, metadata: Metadata, reading: Reading = Reading()) -> Content:
        """Read a data set.

        Raises:
            DataError: the source fails; `metadata.json` names another number of classes; while the batches are gone
                through, an image that cannot be read, or a label of no class.
        """
        names = self._ask(path, lambda: tuple(map(str, self.source.list_classes(path))))
        classes = metadata.classes or names
        if len(classes) != len(names) or not names:
            raise DataError(f"{path}: metadata.json names {len(classes)} classes, {self.plugin} has {len(names)}")
        notebook = Notebook(reading)
        decode = partial(decode_pixels, side=reading.side, fit=reading.fit, note_size=notebook.note_size)

        def batches(part: str) -> Iterator[Batch]:
            encoded = self._iterate(path, part, len(classes))
            return decode_images(encoded, decode, notebook.left_out if reading.skip_bad else None)

        parts = {part: batches(part) for part in PARTS}
        return Content(metadata.name or path.resolve().stem, classes, parts, notebook, reading.side)

    def _iterate(self, path: Path, part: str, num_classes: int) -> Iterator[tuple[Image, int]]:
        images = self._ask(path, lambda: iter(self.source.iterate_images(path, part)))
        end = object()
        while (found := self._ask(path, lambda: next(images, end))) is not end:
            image, label = self._ask(path, lambda: (found[0], int(found[1])))  # type: ignore[index]  # it may be none
            if not 0 <= label < num_classes:
                raise DataError(f"{path}: {self.plugin} returns the label {label}, but there are {num_classes} classes")
            yield image, label


def load_readers() -> list[Reader]:
    """Load the sources that installed packages register.

    Raises:
        SettingsError: one cannot be imported.
    """
    readers = []
    for name in list_registered("source"):
        plugin = describe("source", name)
        assert plugin is not None  # the package has none of its own among them
        readers.append(Reader(plugin, load("source", name)()))
    return readers


def decode_pixels(image: Image, **options: object) -> NDArray[np.uint8]:
    """Decode what a source gives, with the options of `imaging.decode_image`: uint8 [S, S, 3].

    Raises:
        ImageError: it cannot be read, or is none of the kinds of `Image`.
    """
    from PIL import Image as pillow

    from image_classifier import imaging

    if isinstance(image, Path):
        return imaging.load_image(image, **options)  # type: ignore[arg-type]  # as said above
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ImageError(f"an array of {image.dtype} {list(image.shape)} instead of uint8 [H, W, 3]")
        buffer = io.BytesIO()
        pillow.fromarray(image).save(buffer, "BMP")
        image = buffer.getvalue()
    if not isinstance(image, bytes):
        raise ImageError(f"{type(image).__name__} instead of a path, bytes or an array")
    return imaging.decode_image(image, **options)  # type: ignore[arg-type]
