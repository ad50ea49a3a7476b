"""Reads Parquet files with encoded images and labels, in the layout of Hugging Face.

An `img` or `image` column holds structs with `bytes` (or the bytes themselves), a `label` or `fine_label` column
whole numbers, and the schema's metadata the names of the classes. Canonical order is the order of the files by name
and of the rows in them. `parquet_process` reads them, by pyarrow, which the extra `parquet` brings.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from image_classifier.access import Reading
from image_classifier.choices import Fit
from image_classifier.confinement import ConfinedError, read_confined
from image_classifier.data import parquet_process
from image_classifier.data.card import check_sizes, check_stated
from image_classifier.data.cifar import CIFAR10_CLASSES, CIFAR10_PUBLISHED_CLASSES
from image_classifier.data.content import Batch, Content
from image_classifier.data.decoding import decode_images
from image_classifier.data.findings import Notebook
from image_classifier.data.metadata import Metadata, are_classes
from image_classifier.data.parquet_process import unpack_row
from image_classifier.data.parts import PARTS
from image_classifier.data.split import choose_test
from image_classifier.errors import DataError, ImageError
from image_classifier.files import parse_json


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
    head, labels_of_first = _load_labels(first, metadata.classes)
    found = _get_names(head)
    is_cifar10 = found == CIFAR10_PUBLISHED_CLASSES
    classes = metadata.classes or (CIFAR10_CLASSES if is_cifar10 else found or ())
    heads, labels = {first: head}, {first: labels_of_first}
    for path in chain.from_iterable(files.values()):
        if path != first:
            heads[path], labels[path] = _load_labels(path, classes)
    counts = {part: sum(len(labels[path]) for path in paths) for part, paths in files.items()}
    for path, head in heads.items():
        check_stated(counts, [head], path)
    check_sizes(counts, (first.parent, first.parent.parent))
    chosen = {part: {path: np.ones(len(labels[path]), np.bool_) for path in paths} for part, paths in files.items()}
    if "test" not in files:
        keys = [b"%d" % row for row in range(len(labels[first]))]
        is_test = choose_test(keys, labels[first].tolist(), metadata.split_seed)
        chosen |= {"train": {first: ~is_test}, "test": {first: is_test}}

    def encoded(part: str, start: int) -> Iterator[tuple[tuple[str, bytes | None], int]]:
        for path, is_chosen in chosen.get(part, {}).items():
            num_chosen = int(is_chosen.sum())
            if start < num_chosen:
                images = enumerate(_iterate_all_images(path, len(labels[path])))
                rows = ((row, content) for row, (_, content) in images if is_chosen[row])
                for row, content in islice(rows, start, None):
                    yield (f"{path} row {row}", content), int(labels[path][row])
            start = max(start - num_chosen, 0)

    def batches(part: str, start: int = 0) -> Iterator[Batch]:
        decode = partial(_decode, side=reading.side, fit=reading.fit, note_size=notebook.note_size)
        return decode_images(encoded(part, start), decode, notebook.left_out if reading.skip_bad else None, notebook)

    notebook = Notebook(reading)
    name = metadata.name or ("cifar10" if is_cifar10 else name)
    parts = {part: batches(part) for part in PARTS}
    return Content(name, classes, parts, notebook, reading.side, sum(counts.values()), batches)


def iterate_images(path: Path) -> Iterator[tuple[str | None, bytes | None]]:
    """Iterate over path and encoded image of each row of a Parquet file, in its order; None for what a row lacks.

    Raises:
        DataError: pyarrow is missing, or the file is damaged, beyond a limit, or has no column of images.
    """
    from image_classifier.imaging import MAX_BYTES

    yield from map(unpack_row, _read(path, "images", MAX_BYTES))


def _iterate_all_images(path: Path, num_rows: int) -> Iterator[tuple[str | None, bytes | None]]:
    num_read = 0
    for num_read, row in enumerate(iterate_images(path), start=1):
        if num_read <= num_rows:
            yield row
    if num_read != num_rows:
        raise DataError(f"{path} is damaged: it has {num_rows:,} labels, but {num_read:,} images; get it again")


def _read(path: Path, mode: str, number: int) -> Generator[bytes]:
    if importlib.util.find_spec("pyarrow") is None:
        raise DataError(f"{path} needs pyarrow, which is not installed: pip install image-classifier[parquet]")
    try:
        yield from read_confined(parquet_process.__name__, mode, str(path), str(number))
    except ConfinedError as error:
        raise DataError(f"{path} {error}") from None


def _decode(
    row: tuple[str, bytes | None], *, side: int, fit: Fit, note_size: Callable[[int, int], None]
) -> NDArray[np.uint8]:
    from image_classifier.imaging import decode_image  # Pillow, which a run that finds its snapshot does not need

    name, content = row
    try:
        return decode_image(content or b"", side=side, fit=fit, note_size=note_size)
    except ImageError as error:
        raise ImageError(f"{name}: {error}") from error


def _load_labels(path: Path, classes: tuple[str, ...] | None) -> tuple[dict[str, Any], NDArray[np.int64]]:
    """Load what a file says of its data set, as `dataset_info` has it, and its labels [N].

    Args:
        classes: the names of the classes; None where the file must name them.
    """
    with closing(_read(path, "labels", len(classes or ()))) as frames:
        head = parse_json(next(frames))
        if classes is None and _get_names(head) is None:
            raise DataError(
                f"{path} has no class names in its Hugging Face metadata: "
                'put them into a metadata.json in the same folder, such as {"classes": ["first", "second"]}'
            )
        labels = [np.frombuffer(frame, np.int64) for frame in frames]
    return head, np.concatenate(labels) if labels else np.empty(0, np.int64)


def _get_names(head: dict[str, Any]) -> tuple[str, ...] | None:
    """Get the names of the classes, if they are good ones."""
    names = head["names"]
    return tuple(names) if are_classes(names) else None
