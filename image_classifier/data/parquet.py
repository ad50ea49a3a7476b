"""Read Parquet files with encoded images and labels, in the layout that Hugging Face publishes data sets in.

An `img` or `image` column holds structs with `bytes` (or the bytes themselves), a `label` or `fine_label` column
whole numbers, and the schema's metadata the names of the classes. Canonical order is the order of the files by name
and of the rows in them. This is the only module that imports pyarrow, which the extra `parquet` brings.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from image_classifier.config import Fit, Reading
from image_classifier.data.card import check_sizes, check_stated
from image_classifier.data.content import (
    CIFAR10_CLASSES,
    CIFAR10_PUBLISHED_CLASSES,
    Batch,
    Content,
    Metadata,
    choose_test,
    decode_images,
    is_name,
    one_line,
)
from image_classifier.data.findings import Notebook
from image_classifier.data.parts import PARTS
from image_classifier.errors import DataError, ImageError

IMAGE_COLUMNS = ("img", "image")
LABEL_COLUMNS = ("label", "fine_label", "labels")

_ROWS = 500  # rows that are read at once


def read_files(
    files: Mapping[str, Sequence[Path]], name: str, metadata: Metadata, reading: Reading = Reading()
) -> Content:
    """Read Parquet files; without files to test with, a sixth of the rows of the only file is used for it.

    Args:
        files: of each part, in their order.

    Raises:
        DataError: pyarrow is missing, a file is damaged or lacks a column, the classes have no names, a label is
            outside of them; while the batches are gone through, an image that cannot be read.
    """
    first = files["train"][0]
    found = _find_classes(first)
    is_cifar10 = found == CIFAR10_PUBLISHED_CLASSES
    classes = metadata.classes or (CIFAR10_CLASSES if is_cifar10 else found)
    if classes is None:
        raise DataError(
            f"{first} does not name the classes in its Hugging Face metadata: "
            'name them in a metadata.json beside it, as {"classes": ["first", "second"]}'
        )
    labels = {path: _load_labels(path, len(classes)) for paths in files.values() for path in paths}
    counts = {part: sum(len(labels[path]) for path in paths) for part, paths in files.items()}
    for path in labels:
        check_stated(counts, [_load_info(path)], path)
    check_sizes(counts, (first.parent, first.parent.parent))
    chosen = {part: {path: np.ones(len(labels[path]), np.bool_) for path in paths} for part, paths in files.items()}
    if "test" not in files:
        keys = [b"%d" % row for row in range(len(labels[first]))]
        is_test = choose_test(keys, labels[first].tolist(), metadata.split_seed)
        chosen |= {"train": {first: ~is_test}, "test": {first: is_test}}

    def batches(part: str) -> Iterator[Batch]:
        encoded = (
            ((f"{path} row {row}", content), int(labels[path][row]))
            for path, is_chosen in chosen.get(part, {}).items()
            for row, content in enumerate(_iterate_rows(path, len(labels[path])))
            if is_chosen[row]
        )
        decode = partial(_decode, fit=reading.fit, note_size=notebook.note_size)
        return decode_images(encoded, decode, notebook.left_out if reading.skip_bad else None)

    notebook = Notebook(reading)
    name = metadata.name or ("cifar10" if is_cifar10 else name)
    return Content(name, classes, {part: batches(part) for part in PARTS}, notebook)


def iterate_images(path: Path) -> Iterator[tuple[str | None, bytes | None]]:
    """Iterate over path and encoded image of each row of a Parquet file, in its order; None for what a row lacks.

    Raises:
        DataError: pyarrow is missing, or the file is damaged or has no column of images.
    """
    file, column = _open(path, IMAGE_COLUMNS)
    for values in _iterate_column(path, file, column):
        for value in values.to_pylist():
            struct = value if isinstance(value, dict) else {"bytes": value}
            name, content = struct.get("path"), struct.get("bytes")
            yield name if isinstance(name, str) else None, content if isinstance(content, bytes) else None


def _iterate_rows(path: Path, num_rows: int) -> Iterator[bytes | None]:
    """Iterate over the encoded images of a Parquet file, of which there must be as many as labels."""
    row = -1
    for row, (_, content) in enumerate(iterate_images(path)):
        if row < num_rows:
            yield content
    if row + 1 != num_rows:
        raise DataError(f"{path} is damaged: it has {row + 1:,} images and {num_rows:,} labels; get it again")


def _decode(row: tuple[str, bytes | None], *, fit: Fit, note_size: Callable[[int, int], None]) -> NDArray[np.uint8]:
    from image_classifier.imaging import decode_image  # Pillow, which a run that finds its snapshot does not need

    name, content = row
    try:
        return decode_image(content or b"", fit=fit, note_size=note_size)
    except ImageError as error:
        raise ImageError(f"{name}: {error}") from error


def _load_labels(path: Path, num_classes: int) -> NDArray[np.int64]:
    file, column = _open(path, LABEL_COLUMNS)
    labels: list[Any] = []
    for values in _iterate_column(path, file, column):
        labels += values.to_pylist()
    if len(labels) != file.metadata.num_rows:
        raise DataError(
            f"{path} is damaged: it says that it has {file.metadata.num_rows:,} rows, but {len(labels):,} labels are "
            "there; get it again"
        )
    for row, label in enumerate(labels):
        if type(label) is not int or not 0 <= label < num_classes:
            raise DataError(
                f"{path} has the {column} {ascii(label)[:50]} in row {row}; it must be a whole number from 0 to "
                f"{num_classes - 1}, one for each class: get the file again or correct metadata.json"
            )
    return np.array(labels, np.int64)


def _find_classes(path: Path) -> tuple[str, ...] | None:
    """Find the names of the classes in the schema's Hugging Face metadata."""
    _, column = _open(path, LABEL_COLUMNS)
    try:
        names = _load_info(path)["features"][column]["names"]
    except (KeyError, TypeError):
        return None
    good = isinstance(names, list) and names and all(map(is_name, names)) and len(set(names)) == len(names)
    return tuple(names) if good else None


def _load_info(path: Path) -> dict[str, Any]:
    """Load the Hugging Face metadata in a file's schema; nothing where there is none."""
    file, _ = _open(path, LABEL_COLUMNS)
    try:
        info = json.loads((file.schema_arrow.metadata or {})[b"huggingface"])["info"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return {}
    return info if isinstance(info, dict) else {}


def _open(path: Path, columns: Sequence[str]) -> tuple[Any, str]:
    """Open a Parquet file and find the first of some columns in it."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(
            f"{path} needs pyarrow, which is not installed: pip install image-classifier[parquet]"
        ) from error
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path} is no readable Parquet file: {one_line(error)}; get it again") from error
    names = file.schema_arrow.names
    column = next((name for name in columns if name in names), None)
    if column is None:
        raise DataError(f"{path} needs a column {' or '.join(columns)}, but it has {', '.join(names)}")
    return file, column


def _iterate_column(path: Path, file: Any, column: str) -> Iterator[Any]:
    import pyarrow

    try:
        for batch in file.iter_batches(_ROWS, columns=[column]):
            yield batch.column(0)
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path} is damaged: {one_line(error)}; get it again") from error
