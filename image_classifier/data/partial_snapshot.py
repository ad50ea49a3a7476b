"""Reads single images of a snapshot, here or elsewhere, and checks them by the data set's digest without the others.

The snapshot is a folder that `export.write_snapshot` wrote: `images.npy`, `labels.npy`, `snapshot.json` and `tree.bin`.
Besides the images, a few nodes of `levels` are read.
"""

from __future__ import annotations

import hashlib
import io
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from image_classifier import files
from image_classifier.data.content import MAX_CLASSES
from image_classifier.data.levels import TREE_FILE, Branches, compute_size, find_changes, find_runs
from image_classifier.data.merkle import build_header, compute_header_digest
from image_classifier.data.parts import PARTS
from image_classifier.data.proof import Proof, ProvedImage
from image_classifier.data.snapshot import FORMAT_VERSION, build_shape
from image_classifier.errors import DataError, SettingsError
from image_classifier.image_sizes import is_image_size
from image_classifier.progress import Task
from image_classifier.remote.ranges import RangeReader
from image_classifier.text import count, is_digest, is_name, list_first, one_line

_RECORD_FILE = "snapshot.json"
_EXPORT = "`image_classifier data export --format snapshot` writes a folder that has it"
MAX_RECORD_BYTES = 2**20
MAX_HEAD_BYTES = 2**12
_MAX_IMAGES = 2**40  # far more than any disk holds
_BYTES_AT_ONCE = 2**23
_NUM_NAMED = 10
_FORM: dict[str, Any] = {"digest": str, "classes": [str], "num_train": int, "num_test": int, "shape": [int]}


@dataclass(frozen=True)
class Entry:
    """What the tree says of an image: its place, its label, and the sha256 of its pixels."""

    part: str
    index: int
    label: int
    image_digest: str


@dataclass(frozen=True)
class Change:
    """An image that another version of the data set does not have at its place.

    Attributes:
        index: in its part.
        was: what there was before; None for an image that was added.
    """

    part: str
    index: int
    was: Entry | None


class PartialSnapshot:
    """A snapshot of which single images are read; all that is given out is checked by the digest.

    Args:
        folder: the snapshot.
        digest: that it must have; None takes the one that it says it has.

    Attributes:
        digest: of the data set.
        header: that the digest is of.
        counts: number of images of each part.
        num_bytes: of all of its files.

    Raises:
        DataError: it is no such snapshot, is of another format, or does not lead to the digest.
        RemoteError: it cannot be reached, or refuses.
    """

    def __init__(self, folder: RangeReader, digest: str | None = None) -> None:
        self.folder = folder
        try:
            record = self._load_record()
            self.classes: tuple[str, ...] = tuple(record["classes"])
            self.shape = tuple(record["shape"])
            self.counts: dict[str, int] = {part: record[f"num_{part}"] for part in PARTS if record.get(f"num_{part}")}
            self._heads = self._check_sizes()
        except ValueError as error:
            raise DataError(
                f"{folder} is not a snapshot whose images can be checked alone: {one_line(error)}"
            ) from error
        start, self._branches = 0, {}
        for part, number in self.counts.items():
            self._branches[part] = Branches(partial(folder.read, TREE_FILE), start, number)
            start += compute_size(number)
        self.header = build_header(self.classes, self._branches, self.shape)
        self.digest = record["digest"]
        if digest is not None and digest != self.digest:
            raise DataError(f"{folder} holds data of the digest {self.digest[:12]}, not {digest[:12]}; name its folder")
        if compute_header_digest(self.header) != self.digest:
            raise self._tree_error(f"{_RECORD_FILE} and the roots are not what it is of")

    @property
    def num_bytes(self) -> int:
        """Size of all files."""
        return sum(self._sizes.values())

    def _load_record(self) -> Mapping[str, Any]:
        sizes = {name: self.folder.find_size(name) for name in (_RECORD_FILE, "images.npy", "labels.npy", TREE_FILE)}
        self._sizes = {name: size for name, size in sizes.items() if size is not None}
        missing = [name for name in sizes if name not in self._sizes]
        if missing:
            correct = "correct the path, for there is none of its files" if len(missing) == len(sizes) else _EXPORT
            raise ValueError(f"there is no {missing[0]}; {correct}")
        if self._sizes[_RECORD_FILE] > MAX_RECORD_BYTES:
            raise ValueError(f"{_RECORD_FILE} has more than the {MAX_RECORD_BYTES:,} bytes that are read")
        record = files.parse_json(self.folder.read(_RECORD_FILE, 0, self._sizes[_RECORD_FILE]))
        files.check_form(record, {"format_version": int})
        if record["format_version"] != FORMAT_VERSION:
            raise ValueError(f"it has format_version {record['format_version']} instead of {FORMAT_VERSION}; {_EXPORT}")
        files.check_form(record, _FORM | ({"num_validation": int} if "num_validation" in record else {}))
        side = record["shape"][-1] if record["shape"] else 0
        if not is_image_size(side) or record["shape"] != list(build_shape(side)):
            raise ValueError(f"{_RECORD_FILE} has images of another shape")
        counts = [record.get(f"num_{part}", 0) for part in PARTS]
        if min(counts) < 0 or sum(counts) > _MAX_IMAGES or not record["num_train"] or not record["num_test"]:
            raise ValueError(f"{_RECORD_FILE} has parts of an impossible size")
        is_named = all(map(is_name, record["classes"])) and len(record["classes"]) <= MAX_CLASSES
        if not is_named or not is_digest(record["digest"]):
            raise ValueError(f"{_RECORD_FILE} has classes or a digest in another form")
        return dict(record)

    def _check_sizes(self) -> dict[str, int]:
        """Check that each file has the bytes that its content takes; find where the arrays begin in theirs."""
        num_images = sum(self.counts.values())
        if self._sizes[TREE_FILE] != sum(map(compute_size, self.counts.values())):
            raise ValueError(f"{TREE_FILE} is not the tree of {count(num_images, 'image')}")
        arrays = {"images.npy": (np.uint8, (num_images, *self.shape)), "labels.npy": (np.int64, (num_images,))}
        return {name: self._check_head(name, np.dtype(kind), shape) for name, (kind, shape) in arrays.items()}

    def _check_head(self, name: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> int:
        start = self.folder.read(name, 0, min(10, self._sizes[name]))
        size = 10 + int.from_bytes(start[8:], "little")
        if start[:8] != b"\x93NUMPY\1\0" or size > min(MAX_HEAD_BYTES, self._sizes[name]):
            raise ValueError(f"{name} is no array of NumPy")
        head = io.BytesIO(start[8:] + self.folder.read(name, 10, size - 10))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                found = np.lib.format.read_array_header_1_0(head)
        except Exception as error:  # what numpy raises for a damaged head is of many types: TokenError, ...
            raise ValueError(f"{name} is no array of NumPy: {one_line(error)}") from error
        num_bytes = self._sizes[name] - size
        if found != (shape, False, dtype) or num_bytes != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{name} is not the array of {count(shape[0], 'image')} that {_RECORD_FILE} speaks of")
        return size

    def _tree_error(self, reason: object) -> DataError:
        return DataError(
            f"{self.folder} does not lead to the digest {self.digest[:12]}: {one_line(reason)}; get {TREE_FILE} and "
            f"{_RECORD_FILE} again"
        )

    def find_indices(self, part: str, start: int, stop: int) -> range:
        """Find the images of a range of a part, and see that all are there.

        Raises:
            SettingsError: they are not.
        """
        if part not in self.counts:
            raise SettingsError(f"--part: {self.folder} has no {part} part; it has {', '.join(self.counts)}")
        if not 0 <= start < stop <= self.counts[part]:
            raise SettingsError(
                f"--images: the {part} part of {self.folder} has images 0 to {self.counts[part] - 1}, and STOP is one "
                f"more than the last; got: {start}:{stop}"
            )
        return range(start, stop)

    def get_number(self, entry: Entry) -> int:
        """Get the number of an image in the data set, the training images first."""
        parts = list(self.counts)
        return entry.index + sum(self.counts[part] for part in parts[: parts.index(entry.part)])

    def find_changes(self, old: PartialSnapshot) -> list[Change]:
        """Find the images that an older version does not have at their place, with the same label and pixels.

        Raises:
            DataError: a tree does not lead to its digest, or the images are of other sizes.
        """
        if self.shape != old.shape or self.classes != old.classes:
            raise DataError(
                f"{self.folder} has images of another size or other classes than {old.folder}: compare "
                "versions of one data set"
            )
        changes = []
        for part, branches in self._branches.items():
            before = old._branches.get(part)
            if before is None:
                changes += [Change(part, index, None) for index in range(branches.num_entries)]
                continue
            try:
                indices = find_changes(before, branches)
            except ValueError as error:
                raise DataError(
                    f"{self.folder} or {old.folder} does not lead to its digest: {one_line(error)} of the {part} part; "
                    f"get {TREE_FILE} again"
                ) from error
            is_there = [index for index in indices if index < before.num_entries]
            was = {entry.index: entry for entry in old.list_entries({part: is_there})}
            changes += [Change(part, index, was.get(index)) for index in indices]
        return changes

    def list_entries(self, places: Mapping[str, Sequence[int]]) -> list[Entry]:
        """List what the tree says of images, after it was checked.

        Args:
            places: indices in each part, ascending.

        Raises:
            DataError: the tree does not lead to the digest.
        """
        entries = []
        for part, branches in self._branches.items():
            try:
                branches.open_entries(places.get(part, ()))
            except ValueError as error:
                raise self._tree_error(f"{error} of the {part} part") from error
            entries += [Entry(part, index, *_split(branches.get_node(0, index))) for index in places.get(part, ())]
        if not all(0 <= entry.label < len(self.classes) for entry in entries):
            raise DataError(f"{self.folder} has an image of a class that the data set does not have")
        return entries

    def prove(self, entries: Sequence[Entry]) -> Proof:
        """Prove that images are in the data set, which were listed before."""
        paths = [self._branches[entry.part].find_path(entry.index) for entry in entries]
        pairs = zip(entries, paths, strict=True)
        return Proof(self.header, [ProvedImage(**asdict(entry), path=path) for entry, path in pairs])

    def iterate(self, entries: Sequence[Entry], task: Task) -> Iterator[tuple[Entry, NDArray[np.uint8]]]:
        """Read images that were listed before, a few at a time: yield each with its pixels [3, S, S].

        Raises:
            DataError: after the last of them, if pixels or labels are not those of the digest; it names the images.
        """
        wrong: dict[str, list[str]] = {}
        numbers = [self.get_number(entry) for entry in entries]
        places = dict(zip(numbers, entries, strict=True))
        for run in find_runs(numbers):
            for number, pixels, label in self._read_run(run):
                task.advance()
                entry = places[number]
                is_right = hashlib.sha256(pixels).hexdigest() == entry.image_digest
                for what, fits in (("pixels", is_right), ("labels", label == entry.label)):
                    if not fits:
                        wrong.setdefault(f"the {what} in the {entry.part} part of image", []).append(str(entry.index))
                if is_right and label == entry.label:
                    yield entry, np.frombuffer(pixels, np.uint8).reshape(self.shape)
        if wrong:
            damaged = [f"{what} {list_first(named, _NUM_NAMED)}" for what, named in wrong.items()]
            raise DataError(
                f"{self.folder} is damaged: {'; '.join(damaged)} differ from data {self.digest[:12]}; get these again, "
                "or from elsewhere"
            )

    def _read_run(self, run: range) -> Iterator[tuple[int, bytes, int]]:
        """Read images that follow each other: yield number, pixels and label, which nothing has checked."""
        size = math.prod(self.shape)
        step = max(1, _BYTES_AT_ONCE // size)
        for start in range(run.start, run.stop, step):
            numbers = range(start, min(start + step, run.stop))
            pixels, labels = (
                self.folder.read(name, self._heads[name] + start * width, len(numbers) * width)
                for name, width in (("images.npy", size), ("labels.npy", 8))
            )
            for place, number in enumerate(numbers):
                label = int.from_bytes(labels[place * 8 : (place + 1) * 8], "little", signed=True)
                yield number, pixels[place * size : (place + 1) * size], label


def _split(entry: bytes) -> tuple[int, str]:
    """Split an entry into the label, and the sha256 of the pixels."""
    return int.from_bytes(entry[:8], "little", signed=True), entry[8:].hex()
