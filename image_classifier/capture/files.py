"""The format of captures: hourly Parquet files with network inputs and predictions.

Files are named `PLACE/date=YYYY-MM-DD/hour=HH/TIME-DIGEST.parquet`, in UTC. DIGEST is the start of the file's sha256
and reveals any later change. Each row is an image:

| column | type | |
|---|---|---|
| `time` | timestamp[us, UTC] | time of the answer |
| `request_id` | string | id of the request, as in the answer |
| `image_index` | int32 | index of the image in its request, from 0 |
| `caller` | string, or null | name of the API key or token; null without authentication |
| `model_version` | string | as in the answer |
| `batch_size` | int32 | size of the batch in which it was computed |
| `pixels` | binary, S·S·3 bytes | the network's input, uint8 RGB |
| `probabilities` | list of K float32 | probability of each class |

The file's metadata has, with the prefix `image_classifier.`: `format_version`, `image_size` (S), `classes` (JSON),
`model_digest` (sha256 of the ONNX file) and `machine`. All rows of a file come from one model.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import mmap
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from image_classifier.capture.places import Place, open_place
from image_classifier.errors import DataError
from image_classifier.extras import load_extra
from image_classifier.files import parse_json
from image_classifier.image_sizes import is_image_size
from image_classifier.text import one_line

FORMAT_VERSION = 1
MAX_FILE_BYTES = 2**29
"""Size limit for reading; a server writes smaller files."""
MAX_ROWS_BYTES = 2**30
"""Size limit of pixels and probabilities in memory."""

PAGE_IMAGES = 32
"""Images per Parquet write batch."""

_PREFIX = "image_classifier."
_NAME = re.compile(r"(?:.*/)?\d{8}T\d{6}\.\d{6}-([0-9a-f]{16})\.parquet")

logger = logging.getLogger(__name__)


Row = tuple[int, str, int, str | None, str, int, Sequence[float]]
"""An image's values in the order of the columns, without the pixels. Its time is in microseconds since the epoch."""


@dataclass(frozen=True)
class CaptureFacts:
    """What all images of a file have in common.

    Attributes:
        image_size: side S in pixels.
        model_digest: sha256 of the ONNX file.
        machine: description of the ONNX Runtime version and the processor.
    """

    image_size: int
    classes: tuple[str, ...]
    model_digest: str = ""
    machine: str = ""


@dataclass(frozen=True)
class Captured:
    """The images of one file, in the order of their answers.

    Attributes:
        path: of the file, relative to the place.
        times: datetime64[us] [N], UTC.
        image_indices: int32 [N].
        batch_sizes: int32 [N].
        pixels: uint8 [N, S, S, 3].
        probabilities: float32 [N, K].
    """

    path: str
    facts: CaptureFacts
    times: NDArray[np.datetime64]
    request_ids: list[str]
    image_indices: NDArray[np.int32]
    callers: list[str | None]
    model_versions: list[str]
    batch_sizes: NDArray[np.int32]
    pixels: NDArray[np.uint8]
    probabilities: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.times)


class BrokenCapture(NamedTuple):
    """A skipped file, and the reason."""

    path: str
    reason: str


class Captures:
    """Iterates over the files of a place, in the order of their times.

    Attributes:
        broken: skipped files so far.
        num_read: number of files so far.

    Args:
        since: start of the period, inclusive; None for no limit.
        until: end of the period, exclusive; None for no limit.
    """

    def __init__(self, place: Place, since: datetime | None, until: datetime | None) -> None:
        self.broken: list[BrokenCapture] = []
        self.num_read = 0
        self._place = place
        self._since = since or datetime.min.replace(tzinfo=UTC)
        self._until = until or datetime.max.replace(tzinfo=UTC)

    def list_paths(self) -> list[str]:
        """List the files of the hours in the period.

        Raises:
            DataError: the place cannot be read, or has no such file.
        """
        try:
            files = self._place.list_files()
        except OSError as error:
            raise DataError(f"{self._place} cannot be read: {one_line(error)}; name a place with captures") from error
        paths = [path for path in files if self._is_wanted(path)]
        if not paths:
            raise DataError(f"{self._place} has no captures{' in this period' if files else ''}; name another place")
        return paths

    def __iter__(self) -> Iterator[Captured]:
        self.broken, self.num_read = [], 0
        for self.num_read, path in enumerate(self.list_paths(), 1):
            try:
                captured = parse_captured(path, self._place.read(path, MAX_FILE_BYTES))
            except (OSError, ValueError) as error:
                self.broken.append(BrokenCapture(path, one_line(error)))
                logger.warning("%s/%s is broken and is skipped: %s", self._place, path, one_line(error))
            else:
                if len(captured := self._cut(captured)):
                    yield captured

    def _is_wanted(self, path: str) -> bool:
        try:
            hour = datetime.strptime(path[:23], "date=%Y-%m-%d/hour=%H").replace(tzinfo=UTC)
        except ValueError:  # such as hour=77: reading reports it as broken
            return True
        return hour < self._until and self._since - hour < timedelta(hours=1)

    def _cut(self, captured: Captured) -> Captured:
        since, until = (np.datetime64(each.astimezone(UTC).replace(tzinfo=None)) for each in (self._since, self._until))
        is_wanted = (captured.times >= since) & (captured.times < until)
        return captured if is_wanted.all() else select(captured, np.flatnonzero(is_wanted))


def read_captures(place: str | Path, *, since: datetime | None = None, until: datetime | None = None) -> Captures:
    """Open captures, to iterate over file by file in the order of their times.

    Broken files are skipped and logged; the attribute `broken` of the result lists them.

    Args:
        place: a folder, or a URL that fsspec supports.
        since: start of the period, inclusive, with a time zone; by default no limit.
        until: end of the period, exclusive, likewise.

    Raises:
        SettingsError: the extra `capture`, or fsspec's library for the URL, is missing.
        DataError: during iteration: the place cannot be read, or has no file in the period.
    """
    load_extra("pyarrow.parquet", "capture")
    return Captures(open_place(place), since, until)


def select(captured: Captured, rows: NDArray[np.int64]) -> Captured:
    """Select rows of a file by index."""
    numbers = rows.tolist()
    return Captured(
        path=captured.path,
        facts=captured.facts,
        times=captured.times[rows],
        request_ids=[captured.request_ids[row] for row in numbers],
        image_indices=captured.image_indices[rows],
        callers=[captured.callers[row] for row in numbers],
        model_versions=[captured.model_versions[row] for row in numbers],
        batch_sizes=captured.batch_sizes[rows],
        pixels=captured.pixels[rows],
        probabilities=captured.probabilities[rows],
    )


@lru_cache(maxsize=8)
def build_schema(facts: CaptureFacts) -> Any:
    """Build the pyarrow schema of a file, with its metadata."""
    pyarrow = load_extra("pyarrow", "capture")
    metadata = {
        "format_version": str(FORMAT_VERSION),
        "image_size": str(facts.image_size),
        "classes": json.dumps(facts.classes),
        "model_digest": facts.model_digest,
        "machine": facts.machine,
    }
    number, text = pyarrow.int32(), pyarrow.string()
    columns = {
        "time": pyarrow.timestamp("us", "UTC"),
        "request_id": text,
        "image_index": number,
        "caller": text,
        "model_version": text,
        "batch_size": number,
        "pixels": pyarrow.binary(3 * facts.image_size**2),
        "probabilities": pyarrow.list_(pyarrow.field("element", pyarrow.float32(), False), len(facts.classes)),
    }
    fields = [pyarrow.field(name, kind, nullable=name == "caller") for name, kind in columns.items()]
    return pyarrow.schema(fields, {_PREFIX + name: value for name, value in metadata.items()})


def build_batch(rows: Sequence[Row], pixels: bytes | memoryview, schema: Any) -> Any:
    """Build a pyarrow record batch of one or more images.

    Args:
        pixels: uint8 [N, S, S, 3] in C order; they are not copied.

    Raises:
        ValueError: the number of pixels does not match, or a value does not fit the schema.
    """
    pyarrow = load_extra("pyarrow", "capture")
    *columns, probabilities = zip(*rows, strict=True)
    kinds = schema.types
    if len(pixels) != len(rows) * kinds[-2].byte_width:
        raise ValueError(f"{len(rows)} images have {len(pixels)} bytes of pixels")
    arrays = [pyarrow.array(column, kind) for column, kind in zip(columns, kinds, strict=False)]
    buffers = [None, pyarrow.py_buffer(pixels)]
    arrays.append(pyarrow.FixedSizeBinaryArray.from_buffers(kinds[-2], len(rows), buffers))
    values = pyarrow.array(np.array(probabilities, np.float32).ravel())
    arrays.append(pyarrow.FixedSizeListArray.from_arrays(values, type=kinds[-1]))
    return pyarrow.record_batch(arrays, schema=schema)


class FileMemory:
    """An in-memory file for pyarrow that computes its digest and pauses after each page. The next file overwrites it.

    The memory is kept: in a virtual machine, touching new memory costs several times as much as writing to it.
    """

    closed = False  # pyarrow asks

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 2**20)

    def begin(self, pause: Callable[[], object]) -> None:
        """Begin a file, and call `pause` after each part of it."""
        self.digest = hashlib.sha256()
        self._num_bytes = 0
        self._pause = pause

    def write(self, data: bytes) -> int:
        """Append to the file."""
        end = self._num_bytes + len(data)
        if end > len(self._memory):
            larger = mmap.mmap(-1, 2 * end)
            larger[: self._num_bytes] = memoryview(self._memory)[: self._num_bytes]
            self._memory = larger
        self._memory[self._num_bytes : end] = data
        self._num_bytes = end
        self.digest.update(data)
        self._pause()
        return len(data)

    def get_content(self) -> memoryview:
        """Get the file's content, valid until the next file begins."""
        return memoryview(self._memory)[: self._num_bytes]

    def flush(self) -> None: ...

    def close(self) -> None: ...


def build_file(
    batches: Sequence[Any], schema: Any, memory: FileMemory, pause: Callable[[], object] = lambda: None
) -> tuple[str, memoryview]:
    """Build a file from record batches of one hour; return its path relative to the place, and its content.

    Args:
        memory: holds the content until the next file is built in it.
        pause: called after each 0.1 ms of work or so.
    """
    pyarrow = load_extra("pyarrow", "capture")
    memory.begin(pause)
    load_extra("pyarrow.parquet", "capture").write_table(
        pyarrow.Table.from_batches(batches, schema),
        memory,
        compression="none",  # pixels hardly compress, and the server needs the cores
        use_dictionary=["caller", "model_version"],
        write_statistics=["time"],
        write_batch_size=PAGE_IMAGES,
        data_page_size=2**16,
    )
    time = datetime(1970, 1, 1) + timedelta(microseconds=batches[0].column(0)[0].value)
    name = f"{time:%Y%m%dT%H%M%S.%f}-{memory.digest.hexdigest()[:16]}"
    return f"date={time:%Y-%m-%d}/hour={time:%H}/{name}.parquet", memory.get_content()


def parse_captured(path: str, content: bytes | memoryview) -> Captured:
    """Parse the content of a file.

    Raises:
        ValueError: it does not match the digest in its name, or has another or a later format.
    """
    pyarrow = load_extra("pyarrow", "capture")
    name = _NAME.fullmatch(path)
    if name is None:
        raise ValueError("its name is not that of a capture file, which contains the digest")
    if hashlib.sha256(content).hexdigest()[:16] != name[1]:
        raise ValueError("its content does not match the digest in its name: it was truncated or changed")
    try:
        file = load_extra("pyarrow.parquet", "capture").ParquetFile(pyarrow.BufferReader(content))
        facts = _parse_facts(file.schema_arrow.metadata or {})
        schema = build_schema(facts)
        if not file.schema_arrow.equals(schema):
            raise ValueError("its columns are not those of the format")
        _check_size(file.metadata, len(content), facts)
        table = file.read(use_threads=False).combine_chunks()
        table.validate(full=True)
    except (OSError, pyarrow.ArrowException) as error:
        raise ValueError(one_line(error)) from error
    if table.num_rows == 0 or any(table.column(each).null_count for each in range(len(schema)) if each != 3):
        raise ValueError("it has no rows, or missing values")
    return _build_captured(path, facts, table)


def _parse_facts(metadata: dict[bytes, bytes]) -> CaptureFacts:
    texts = {key.decode("utf-8", "replace").removeprefix(_PREFIX): value.decode() for key, value in metadata.items()}
    try:
        version, image_size = int(texts["format_version"]), int(texts["image_size"])
        classes = parse_json(texts["classes"])
    except KeyError as error:
        raise ValueError(f"its metadata has no {error}") from None
    if version > FORMAT_VERSION:
        raise ValueError(f"it has the format {version}; this version reads up to {FORMAT_VERSION}: install a later one")
    is_list = isinstance(classes, list) and classes and all(isinstance(name, str) for name in classes)
    if not (is_list and is_image_size(image_size)):
        raise ValueError("its metadata has no valid classes or image size")
    return CaptureFacts(image_size, tuple(classes), texts.get("model_digest", ""), texts.get("machine", ""))


def _check_size(metadata: Any, num_bytes: int, facts: CaptureFacts) -> None:
    """Check the size in memory before reading, against decompression bombs."""
    unpacked = metadata.num_rows * (3 * facts.image_size**2 + 4 * len(facts.classes))
    if unpacked > min(MAX_ROWS_BYTES, num_bytes):  # pixels and probabilities are not compressed
        raise ValueError(f"it claims {metadata.num_rows:,} rows in {num_bytes:,} bytes")


def _build_captured(path: str, facts: CaptureFacts, table: Any) -> Captured:
    num_rows = table.num_rows
    columns = dict(zip(table.column_names, (column.chunk(0) for column in table.columns), strict=True))
    shape = (num_rows, facts.image_size, facts.image_size, 3)
    start = columns["pixels"].offset * 3 * facts.image_size**2
    pixels = np.frombuffer(columns["pixels"].buffers()[1], np.uint8, math.prod(shape), start)
    return Captured(
        path=path,
        facts=facts,
        times=columns["time"].to_numpy(zero_copy_only=False).astype("datetime64[us]"),
        request_ids=columns["request_id"].to_pylist(),
        image_indices=columns["image_index"].to_numpy(),
        callers=columns["caller"].to_pylist(),
        model_versions=columns["model_version"].to_pylist(),
        batch_sizes=columns["batch_size"].to_numpy(),
        pixels=pixels.reshape(shape),
        probabilities=columns["probabilities"].flatten().to_numpy().reshape(num_rows, len(facts.classes)),
    )
