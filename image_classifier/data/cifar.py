"""Read CIFAR-10 and CIFAR-100 in the python and the binary layout, from a folder or from the published archive.

The layouts are those of https://www.cs.toronto.edu/~kriz/cifar.html. Canonical order is the order of the files and
of the images in them; CIFAR-100 is read with its fine labels. An archive is read in place, member by member:
nothing is unpacked to the disk, so no name in it can matter.
"""

from __future__ import annotations

import re
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from image_classifier.data.content import Batch, Content
from image_classifier.data.metadata import Metadata, are_classes
from image_classifier.data.pickles import load_pickle
from image_classifier.errors import DataError
from image_classifier.files import read_file
from image_classifier.text import one_line

CIFAR10_CLASSES = ("plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
"""The names that this package gives to CIFAR-10's classes, in the order of the labels."""
CIFAR10_PUBLISHED_CLASSES = ("airplane", "automobile", *CIFAR10_CLASSES[2:])
"""The names that CIFAR-10 is published with; where a source has exactly these, it is CIFAR-10."""

MAX_FILE_BYTES = 2**28
"""Largest file that is read; the largest published one, CIFAR-100's training set, has 155 million bytes."""
MAX_ARCHIVE_BYTES = 2**28
"""Most that an archive may unpack to; the published ones unpack to 186 million bytes."""
MAX_MEMBERS = 1000
"""Of an archive; the published ones have 8 files."""
MAX_NAME_BYTES = 2**14
"""Of a long name in an archive, with all else that extends a head."""

_KINDS = (
    *(tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE),
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
)

_SIDE = 32
_SHAPE = (3, _SIDE, _SIDE)
_NUM_PIXELS = 3 * _SIDE**2


@dataclass(frozen=True)
class Layout:
    """One of the published layouts.

    Attributes:
        title: what people call it.
        name: name of the data set.
        folder: the folder that the published archive unpacks to.
        archive: name of the published archive.
        train: the files of the training set, in canonical order.
        test: the file of the test set.
        meta: the file that names the classes.
        num_classes: how many classes the data set has.
        pickled: python layout, else binary.
        label: key of the labels in the python layout, their column in the binary one.
    """

    title: str
    name: str
    folder: str
    archive: str
    train: tuple[str, ...]
    test: str
    meta: str
    num_classes: int
    pickled: bool
    label: str | int

    @property
    def files(self) -> tuple[str, ...]:
        """The files that must be there."""
        return *self.train, self.test


LAYOUTS = (
    Layout(
        title="CIFAR-10 in the python layout",
        name="cifar10",
        folder="cifar-10-batches-py",
        archive="cifar-10-python.tar.gz",
        train=tuple(f"data_batch_{number}" for number in range(1, 6)),
        test="test_batch",
        meta="batches.meta",
        num_classes=10,
        pickled=True,
        label="labels",
    ),
    Layout(
        title="CIFAR-10 in the binary layout",
        name="cifar10",
        folder="cifar-10-batches-bin",
        archive="cifar-10-binary.tar.gz",
        train=tuple(f"data_batch_{number}.bin" for number in range(1, 6)),
        test="test_batch.bin",
        meta="batches.meta.txt",
        num_classes=10,
        pickled=False,
        label=0,
    ),
    Layout(
        title="CIFAR-100 in the python layout",
        name="cifar100",
        folder="cifar-100-python",
        archive="cifar-100-python.tar.gz",
        train=("train",),
        test="test",
        meta="meta",
        num_classes=100,
        pickled=True,
        label="fine_labels",
    ),
    Layout(
        title="CIFAR-100 in the binary layout",
        name="cifar100",
        folder="cifar-100-binary",
        archive="cifar-100-binary.tar.gz",
        train=("train.bin",),
        test="test.bin",
        meta="fine_label_names.txt",
        num_classes=100,
        pickled=False,
        label=1,
    ),
)


def find_layouts(names: Set[str]) -> list[Layout]:
    """Find the layouts of which at least one file of images is among the names."""
    return [layout for layout in LAYOUTS if not names.isdisjoint(layout.files)]


def read_folder(folder: Path, layout: Layout, metadata: Metadata) -> Content:
    """Read a folder that holds one of the layouts; each file is read when its batch is asked for.

    Raises:
        DataError: a file is missing, damaged or hostile; also while the batches are gone through.
    """
    names = {path.name for path in folder.iterdir()}
    _require(layout, names, folder)
    return _build_content(layout, metadata, str(folder), names, lambda name: _read_file(folder / name))


def read_archive(path: Path, metadata: Metadata, *, max_bytes: int = MAX_ARCHIVE_BYTES) -> Content:
    """Read a `.tar.gz` with one of the layouts in it into memory, if it unpacks to no more than max_bytes.

    Raises:
        DataError: the archive is damaged, too large, or without a data set; also while the batches are gone through.
    """
    members = _read_members(path, max_bytes)
    layouts = find_layouts(members.keys())
    if len(layouts) != 1:
        found = " and ".join(layout.title for layout in layouts) or "no CIFAR data set"
        raise DataError(f"{path} must contain one data set, but contains {found}; choose another archive")
    _require(layouts[0], members.keys(), path)
    return _build_content(layouts[0], metadata, str(path), members.keys(), members.__getitem__)


def _require(layout: Layout, names: Set[str], where: Path) -> None:
    missing = [name for name in layout.files if name not in names]
    if missing:
        raise DataError(f"{where} has {layout.title} without {', '.join(missing)}; get the complete data set again")


def _build_content(
    layout: Layout, metadata: Metadata, where: str, names: Set[str], read: Callable[[str], bytes]
) -> Content:
    def name_of(file: str) -> str:
        return str(PurePosixPath(where) / file)

    found, num_stated = None, None
    if layout.meta in names:
        found, num_stated = _parse_meta(layout, read(layout.meta), name_of(layout.meta))
    is_published = found is None or found == CIFAR10_PUBLISHED_CLASSES or layout.name == "cifar100"
    if layout.name == "cifar10" and is_published:
        found = CIFAR10_CLASSES
    classes = metadata.classes or found
    if classes is None:
        raise DataError(f"{where} has no file {layout.meta} that names the classes; name them in metadata.json")

    def batches(files: Iterable[str]) -> Iterator[Batch]:
        parse = _parse_pickle if layout.pickled else _parse_records
        for file in files:
            images, labels = parse(layout, read(file), name_of(file))
            if num_stated not in (None, len(images)):
                raise DataError(
                    f"{name_of(file)} has {len(images):,} images, but {layout.meta} says that each batch has "
                    f"{num_stated:,}; get the data set again, or remove {layout.meta} where a part of it is meant"
                )
            outside = np.flatnonzero((labels < 0) | (labels >= len(classes)))
            if outside.size:
                raise DataError(
                    f"{name_of(file)} has the label {labels[outside[0]]} at image {outside[0]}, but there are "
                    f"{len(classes)} classes, 0 to {len(classes) - 1}; get the data set again, or correct metadata.json"
                )
            yield images, labels

    name = metadata.name or (layout.name if is_published else Path(where).name)
    parts = {"train": batches(layout.train), "validation": (), "test": batches((layout.test,))}
    return Content(name, classes, parts, image_size=_SIDE)


def _parse_pickle(layout: Layout, content: bytes, name: str) -> Batch:
    batch = load_pickle(content, name)
    _check_label(batch.get("batch_label"), name)
    images, labels = batch.get("data"), batch.get(str(layout.label))
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.shape[1:] != (_NUM_PIXELS,):
        got = f"{images.dtype} {list(images.shape)}" if isinstance(images, np.ndarray) else type(images).__name__
        raise DataError(f"{name}: data must be uint8 [N, {_NUM_PIXELS}], got: {got}; get the data set again")
    return images.reshape(-1, *_SHAPE), _parse_labels(labels, len(images), f"{name}: {layout.label}")


def _check_label(label: object, name: str) -> None:
    """Check that a batch is the one that its file's name says, where it says of itself which one it is."""
    text = label.decode("latin-1") if isinstance(label, bytes) else str(label)
    match = re.fullmatch("(training|testing) batch ([0-9]{1,9}) of [0-9]{1,9}", text)
    if match is not None:
        named = f"data_batch_{int(match[2])}" if match[1] == "training" else "test_batch"
        if PurePosixPath(name).name != named:
            raise DataError(f"{name} has the name {text!r}, which is {named}; get the data set again")


def _parse_labels(labels: Any, num_images: int, where: str) -> NDArray[np.int64]:
    if isinstance(labels, list) and all(type(label) is int and abs(label) < 2**31 for label in labels):
        labels = np.array(labels, np.int64)
    if not isinstance(labels, np.ndarray) or labels.shape != (num_images,):
        raise DataError(f"{where} must be {num_images:,} integers, one per image; get the data set again")
    return labels.astype(np.int64)


def _parse_records(layout: Layout, content: bytes, name: str) -> Batch:
    num_labels = 1 if layout.name == "cifar10" else 2  # CIFAR-100 has the coarse label before the fine one
    width = num_labels + _NUM_PIXELS
    if not content or len(content) % width:
        raise DataError(
            f"{name} has {len(content):,} bytes, which is not a multiple of the record size of {width} bytes: "
            "it is truncated or of another layout; get the data set again"
        )
    records = np.frombuffer(content, np.uint8).reshape(-1, width)
    return records[:, num_labels:].reshape(-1, *_SHAPE), records[:, int(layout.label)].astype(np.int64)


def _parse_meta(layout: Layout, content: bytes, name: str) -> tuple[tuple[str, ...], int | None]:
    """Parse the names of the classes, and how many images each batch has where that is said."""
    num_images = None
    if layout.pickled:
        meta = load_pickle(content, name)
        values = meta.get("label_names" if layout.name == "cifar10" else "fine_label_names")
        if type(meta.get("num_cases_per_batch")) is int:
            num_images = meta["num_cases_per_batch"]
    else:
        values = content.split()
    if not isinstance(values, list):
        raise DataError(f"{name} has no list of class names; get the data set again")
    classes = [value.decode("utf-8", "replace") if isinstance(value, bytes) else value for value in values]
    if not are_classes(classes):
        raise DataError(f"{name} must have different class names of one line each; get the data set again")
    return tuple(classes), num_images


def _read_file(path: Path) -> bytes:
    try:
        return read_file(path, MAX_FILE_BYTES)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {one_line(error)}; get it again") from error


class _Unpacker:
    """Unpacks a gzip stream up to a number of bytes: what unpacks to more is a bomb."""

    def __init__(self, file: BinaryIO, limit: int) -> None:
        self._file = file
        self._limit = self._left = limit
        self._stream = zlib.decompressobj(wbits=31)  # gzip's head and checksum

    def read(self, size: int, *, keep: bool = True) -> bytes:
        """Read so many bytes, and return them if they are to be kept.

        Raises:
            EOFError: there are fewer.
        """
        self._left -= size
        if self._left < 0:
            raise DataError(f"unpacks to more than {self._limit:,} bytes, which no CIFAR archive does; remove it")
        parts = []
        while size:
            part = self._unpack(min(size, 2**20))
            if not part:
                raise EOFError("it ends within a file")
            size -= len(part)
            parts += [part] if keep else []
        return b"".join(parts)

    def finish(self) -> None:
        """Go on to the checksum at the end, which tells of damage in between."""
        while part := self._unpack(2**16):
            if any(part):
                raise DataError("has data after the end of the archive; choose another archive")
        if not self._stream.eof:
            raise EOFError("it has no end")
        if any(self._stream.unused_data) or any(self._file.read(2**16)):
            raise DataError("has more than one gzip stream, which no CIFAR archive has; choose another archive")

    def _unpack(self, size: int) -> bytes:
        while not self._stream.eof:
            packed = self._stream.unconsumed_tail or self._file.read(2**16)
            part = self._stream.decompress(packed, size)
            if part or not packed:
                return part
        return b""


def _read_members(path: Path, max_bytes: int) -> Mapping[str, bytes]:
    """Read an archive's files by their last name, as far as a layout knows it.

    Head by head, since tarfile itself takes what long names and other extensions of a head ask for.
    """
    wanted = {name for layout in LAYOUTS for name in (*layout.files, layout.meta)}
    members: dict[str, bytes] = {}
    try:
        with open(path, "rb") as file:
            unpacker = _Unpacker(file, max_bytes)
            long_name = ""
            for _ in range(MAX_MEMBERS):
                try:
                    head = tarfile.TarInfo.frombuf(unpacker.read(tarfile.BLOCKSIZE), "utf-8", "surrogateescape")
                except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # an empty block is the end
                    unpacker.finish()
                    return members
                name = PurePosixPath(long_name or head.name).name
                is_name = head.type in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME)
                is_wanted = head.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and name in wanted
                _check_head(head, name, MAX_NAME_BYTES if is_name else MAX_FILE_BYTES)
                if is_wanted and name in members:
                    raise DataError(f"contains {name} twice; choose another archive")
                content = unpacker.read(head.size, keep=is_name or is_wanted)
                unpacker.read(-head.size % tarfile.BLOCKSIZE)
                long_name = _parse_name(content, head.type) if is_name else ""
                if is_wanted:
                    members[name] = content
        raise DataError(f"contains more than {MAX_MEMBERS:,} files, which no CIFAR archive does; remove it")
    except DataError as error:
        raise DataError(f"{path} {error}") from None
    except (OSError, EOFError, ValueError, zlib.error, tarfile.TarError) as error:
        raise DataError(f"{path} is not a complete .tar.gz archive: {one_line(error)}; get it again") from error


def _check_head(head: tarfile.TarInfo, name: str, max_bytes: int) -> None:
    if head.type not in _KINDS:
        raise DataError(f"contains {ascii(name)[:100]}, which is not a regular file; remove it")
    if not 0 <= head.size <= max_bytes:
        raise DataError(f"contains {ascii(name)[:100]} with {head.size:,} bytes, too many for a CIFAR file; remove it")


def _parse_name(content: bytes, kind: bytes) -> str:
    """Parse the long name of the member that comes next, GNU's or that of an extended head; "" where there is none."""
    if kind == tarfile.XHDTYPE:
        while content:  # records such as `16 path=a/b/c\n`
            size = content.partition(b" ")[0]
            record, content = content[: int(size)], content[int(size) :]
            key, _, value = record[len(size) + 1 : -1].partition(b"=")
            if key == b"path":
                return value.decode("utf-8", "surrogateescape")
            if not key:
                raise tarfile.ReadError("an extended header belongs to no member")
        return ""
    return content.rstrip(b"\0").decode("utf-8", "surrogateescape") if kind == tarfile.GNUTYPE_LONGNAME else ""
