"""Reads a Parquet file in a separate process, started by `parquet`, because sizes in an untrusted file may be wrong.

    python -m image_classifier.data.parquet_process labels FILE NUM_CLASSES
    python -m image_classifier.data.parquet_process images FILE MAX_BYTES

sends what the file says of its data set as JSON, names of the classes and sizes of the parts (null where it does not),
and then the labels as int64; or, row by row, what
`pack_row` makes of the path and the bytes of an image. This and `export` are the only modules that import pyarrow.
"""

from __future__ import annotations

import json
import os
import struct
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from image_classifier.confinement import Confinement
from image_classifier.errors import DataError
from image_classifier.files import parse_json
from image_classifier.text import one_line

IMAGE_COLUMNS = ("img", "image")
LABEL_COLUMNS = ("label", "fine_label", "labels")
MAX_ROWS = 10_000_000
"""Of a file: at 3 kB an image, 30 GB."""
MIN_ROW_BYTES = 16
"""Fewer of the file for each row, after the first thousand, are no images but one that comes again and again."""
MAX_RATIO = 100
"""How much larger than the file all of its images may be, after the first 16 MiB: encoded images hardly shrink."""
MAX_PATH_LENGTH = 4096

_LABEL_ROWS = 2**16
_IMAGE_ROWS = 8  # that are in memory at once, of up to 32 MB each
_NO_PATH, _NO_CONTENT = 1, 2
_ROW_HEAD = struct.Struct("<BI")


def pack_row(path: str | None, content: bytes | None) -> bytes:
    """Pack a row for the pipe."""
    flags = (path is None) * _NO_PATH + (content is None) * _NO_CONTENT
    name = (path or "").encode("utf-8", "surrogatepass")
    return _ROW_HEAD.pack(flags, len(name)) + name + (content or b"")


def unpack_row(row: bytes) -> tuple[str | None, bytes | None]:
    """Unpack what `pack_row` packed."""
    flags, size = _ROW_HEAD.unpack_from(row)
    end = _ROW_HEAD.size + size
    path = row[_ROW_HEAD.size : end].decode("utf-8", "surrogatepass")
    return None if flags & _NO_PATH else path, None if flags & _NO_CONTENT else row[end:]


def _send_labels(confinement: Confinement, path: str, num_classes: int) -> None:
    import numpy as np
    import pyarrow

    file, column = _open(path, LABEL_COLUMNS)
    head = _build_head(file, column)
    confinement.send(json.dumps(head).encode())
    num_classes = num_classes or len(head["names"] or ())
    kind = file.schema_arrow.field(column).type
    row = 0
    for values in _iterate_column(file, [column], _LABEL_ROWS):
        labels = values.to_pylist() if pyarrow.types.is_integer(kind) else [str(kind)]
        for row, label in enumerate(labels, row):
            if type(label) is not int or not 0 <= label < num_classes:
                raise DataError(
                    f"has the {column} {ascii(label)[:50]} in row {row}; it must be a whole number from 0 to "
                    f"{num_classes - 1}, one for each class: get the file again or correct metadata.json"
                )
        row += 1
        confinement.send(np.array(labels, np.int64).tobytes())


def _build_head(file: Any, column: str) -> dict[str, Any]:
    """Build what the Hugging Face metadata in the schema says: names of the classes, and sizes of the parts."""
    try:
        info = parse_json((file.schema_arrow.metadata or {})[b"huggingface"])["info"]
        splits = info.get("splits")
        names = info["features"][column]["names"]
    except (KeyError, TypeError, ValueError, AttributeError):
        names = splits = None
    is_good = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return {"names": names if is_good else None, "splits": splits}


def _send_images(confinement: Confinement, path: str, max_bytes: int) -> None:
    file, column = _open(path, IMAGE_COLUMNS)
    most = 2**24 + MAX_RATIO * os.path.getsize(path)
    for values in _iterate_column(file, _find_leaves(file, column), _IMAGE_ROWS):
        for value in values.to_pylist():
            cell = value if isinstance(value, dict) else {"bytes": value}
            name, content = cell.get("path"), cell.get("bytes")
            if len(name or "") > MAX_PATH_LENGTH:
                raise DataError(f"has a path of more than {MAX_PATH_LENGTH:,} characters; get it again")
            most -= len(content or b"")
            if most < 0:
                raise DataError(f"unpacks to more than {MAX_RATIO} times its size, which no images do; remove it")
            confinement.send(pack_row(name, content if content is None else content[: max_bytes + 1]))


def _find_leaves(file: Any, column: str) -> list[str]:
    """Find the columns to read below one of images, whose types are those of bytes and path."""
    import pyarrow

    kind = file.schema_arrow.field(column).type
    fields = list(kind) if pyarrow.types.is_struct(kind) else [pyarrow.field("bytes", kind)]
    wanted = {"bytes": (pyarrow.binary(), pyarrow.large_binary()), "path": (pyarrow.string(), pyarrow.large_string())}
    for field in fields:
        if field.type not in wanted.get(field.name, (field.type,)):
            raise DataError(f"has {field.name} of type {str(field.type)[:50]} in {column}; get it again")
    names = [field.name for field in fields if field.name in wanted]
    return [f"{column}.{name}" for name in names] if pyarrow.types.is_struct(kind) else [column]


def _open(path: str, columns: Sequence[str]) -> tuple[Any, str]:
    """Open a Parquet file and find the first of some columns in it."""
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path, buffer_size=2**20)  # else a whole column of a row group is read
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"is not a readable Parquet file: {one_line(error)}; get it again") from error
    num_rows, num_bytes = file.metadata.num_rows, os.path.getsize(path)
    if num_rows > min(MAX_ROWS, 1000 + num_bytes // MIN_ROW_BYTES):
        raise DataError(f"has {num_rows:,} rows in {num_bytes:,} bytes, which no images have; remove or split it")
    names = file.schema_arrow.names
    column = next((name for name in columns if name in names), None)
    if column is None:
        raise DataError(f"needs a column {' or '.join(columns)}, but it has {', '.join(names)[:200]}")
    return file, column


def _iterate_column(file: Any, columns: list[str], num_rows: int) -> Iterator[Any]:
    import pyarrow

    left = file.metadata.num_rows
    try:
        for batch in file.iter_batches(num_rows, columns=columns, use_threads=False):
            left -= len(batch)
            if left < 0 or batch.num_columns != 1:
                raise DataError("is damaged: its number of rows is wrong; get it again")
            yield batch.column(0)
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"is damaged: {one_line(error)}; get it again") from error
    if left:
        raise DataError(f"is damaged: {left:,} rows are missing; get it again")


def main(words: Sequence[str]) -> None:
    """Send what the words ask for."""
    os.environ["ARROW_DEFAULT_MEMORY_POOL"] = "system"  # others take address space ahead

    import pyarrow.parquet  # noqa: F401  # which takes memory that is no part of what a file may take

    mode, path, number = words
    with Confinement() as confinement:
        {"labels": _send_labels, "images": _send_images}[mode](confinement, path, int(number))


if __name__ == "__main__":
    main(sys.argv[1:])
