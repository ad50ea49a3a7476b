"""`image_classifier predict`: a run's model, or a published one, on images, to CSV."""

from __future__ import annotations

import csv
import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from image_classifier.access import IMAGE_SUFFIXES
from image_classifier.choices import Fit
from image_classifier.cli.arguments import parse_arguments
from image_classifier.cli.command import ExitStatus, build_parser, execute
from image_classifier.cli.model import add_model_arguments, load
from image_classifier.cli.table import format_cell
from image_classifier.errors import DataError, ImageError, StorageError
from image_classifier.image_sizes import scale_batch
from image_classifier.progress import say, track
from image_classifier.storage import DISK, written_beside
from image_classifier.text import make_printable

if TYPE_CHECKING:
    import numpy as np
    from jsonargparse import ArgumentParser
    from numpy.typing import NDArray

BATCH_SIZE = 500
"""Images that are in memory at once, fewer if they are large."""


def main(argv: Sequence[str] | None = None) -> int:
    """Predict as the command line says and return the exit status."""
    return execute(_predict, argv)


def build_predict_parser() -> ArgumentParser:
    """Build the parser of `predict`."""
    parser = build_parser(
        "predict",
        "Classify images with a run's model, or a published one, as CSV: path, class, probability, and the probability "
        "of each class.",
    )
    add_model_arguments(parser)
    # Taken as text, because jsonargparse cannot take names that are no UTF-8 for paths.
    parser.add_argument("images", nargs="+", type=str, help="image files, folders with images, or Parquet files")
    parser.add_argument("--output", type=Path | None, default=None, help="CSV file to write instead of stdout")
    return parser


def _predict(argv: Sequence[str] | None) -> int:
    arguments = parse_arguments(build_predict_parser(), argv)
    model = load(arguments)

    import numpy as np

    num_read, num_unreadable = 0, 0
    with track("predicting", unit="images") as task, _open_output(arguments.output) as file:
        writer = csv.writer(file, lineterminator="\n")
        sources = iterate_sources([Path(image) for image in arguments.images])
        batch_size = scale_batch(BATCH_SIZE, model.image_size)
        while True:
            names, images, num_tried = [], [], 0
            for num_tried, (name, source) in enumerate(itertools.islice(sources, batch_size), start=1):
                try:
                    images.append(load_source(name, source, model.image_size, model.fit))
                    names.append(name)
                except ImageError as error:
                    num_unreadable += 1
                    say(f"unreadable: {make_printable(str(error))}")
            task.advance(num_tried)
            if not num_tried:
                break
            if not images:
                continue
            if num_read == 0:
                writer.writerow(["path", "class", "probability", *map(format_cell, model.classes)])
            num_read += len(images)
            probabilities = model.predict(np.stack(images).transpose(0, 3, 1, 2))
            for name, row in zip(names, probabilities, strict=True):
                best = row.argmax()
                cells = (format_cell(name), format_cell(model.classes[best]))
                writer.writerow([*cells, *(f"{value:.6g}" for value in (row[best], *row))])
        if num_read == 0:
            raise DataError(
                f"none of {num_unreadable:,} images could be read, for the reasons above; nothing was written"
            )
    if num_unreadable:
        print(f"{num_unreadable:,} of {num_read + num_unreadable:,} images could not be read", file=sys.stderr)
        return ExitStatus.DONE_IN_PART
    return ExitStatus.DONE


Source = Path | bytes | ImageError
"""Where an image is: in a file, in bytes, or nowhere, for a reason."""


def iterate_sources(paths: Sequence[Path]) -> Iterator[tuple[str, Source]]:
    """Iterate over the images at paths, by name: files, images below folders by path, rows of Parquet files."""
    for path in paths:
        if path.is_dir():
            files = list_files(path)
            images = [file for file in files if file.lower().endswith(IMAGE_SUFFIXES)]
            if len(images) < len(files):
                endings = ", ".join(IMAGE_SUFFIXES)
                left_out = f"{len(files) - len(images):,} files, whose names end in none of {endings}"
                say(f"note: left out in {make_printable(str(path))}: {left_out}")
            yield from ((file, Path(file)) for file in images)
            if not images:
                yield str(path), ImageError(f"{path}: there is no image in this folder")
        elif path.is_file() and path.suffix == ".parquet":
            yield from _iterate_rows(path)
        elif path.is_file():
            yield str(path), path
        else:
            yield str(path), ImageError(f"{path}: there is no such file")


def _iterate_rows(path: Path) -> Iterator[tuple[str, Source]]:
    from image_classifier.data.parquet import iterate_images

    try:
        for row, (name, content) in enumerate(iterate_images(path)):
            yield name or f"{path}#{row}", content or ImageError(f"{path}#{row}: the row holds no image")
    except DataError as error:
        yield str(path), ImageError(str(error))


def list_files(folder: Path) -> list[str]:
    """List the files below a folder, sorted by the bytes of their paths, without hidden ones and links to folders."""
    files = []
    for here, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = (os.path.join(here, name) for name in names if not name.startswith("."))
        files += [path for path in paths if os.path.isfile(path)]  # a pipe or a device would be read without end
    return sorted(files, key=os.fsencode)


def load_source(name: str, source: Source, side: int, fit: Fit) -> NDArray[np.uint8]:
    """Load an image: uint8 [side, side, 3] RGB.

    Raises:
        ImageError: it cannot be read; the message has its name and the reason.
    """
    from image_classifier.imaging import decode_image, load_image

    if isinstance(source, ImageError):
        raise source
    if isinstance(source, Path):
        return load_image(source, side=side, fit=fit)
    try:
        return decode_image(source, side=side, fit=fit)
    except ImageError as error:
        raise ImageError(f"{name}: {error}") from error


@contextmanager
def _open_output(path: Path | None) -> Iterator[TextIO]:
    """Open a file that appears whole or not at all, or else stdout."""
    if path is None:
        if isinstance(sys.stdout, TextIOWrapper):
            sys.stdout.reconfigure(encoding="utf-8")
        yield sys.stdout
        sys.stdout.flush()  # here, where a reader that has gone is an expected end
        return
    if not path.parent.is_dir():  # better said before the work than after it
        raise StorageError(f"--output: there is no folder {path.parent}; make it, or choose another")
    if path.is_dir():
        raise StorageError(f"--output: {path} is a folder; name a file in it")
    with written_beside(path) as temporary:
        with open(temporary, "x", encoding="utf-8", newline="") as file:
            yield file
        DISK.sync(temporary)


PARSERS = (build_predict_parser,)
