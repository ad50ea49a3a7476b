"""The snapshot: an immutable data set on disk, named by its digest and memory-mapped by every run that uses it.

It lies in a store: `<dataset_folder>/.snapshots/`, or the user's cache where that cannot be written::

    <digest>/images.npy       uint8 [N, 3, S, S]
    <digest>/labels.npy       int64 [N]
    <digest>/snapshot.json    format_version, digest, classes, num_train, num_validation, num_test, shape
    <digest>/tree.bin         the Merkle tree, as `levels` has it; snapshots of before have none
    index/<fingerprint>.json  which snapshot the files of a source were frozen into, the data set's name, and what was
                              found while they were read
    unfinished-<fingerprint>/ one that is being written, or whose writer was killed
    .lock                     locked by the process that writes

The fingerprint is over path, size, times and inode of each file of the source, the content of `metadata.json` and how
images are read, so that a second run finds its snapshot without reading the source. What it finds is hashed again
before it is used. A store is made by the first snapshot, and goes with the last.

The digest is that of `merkle`. Before, in format 1, it was one sha256 over all images. Snapshots of format 1 are still
read, under the name that they have; what records and metadata say in format 1 is recognised by `Snapshot.recognize`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from image_classifier.access import Reading
from image_classifier.data.balance import find_imbalances
from image_classifier.data.content import Batch, Content
from image_classifier.data.decoding import resize_content
from image_classifier.data.findings import Findings, restore_findings
from image_classifier.data.levels import TREE_FILE, iterate_entries, write_tree
from image_classifier.data.mapping import iterate_blocks
from image_classifier.data.merkle import Tree, build_header, compute_header_digest
from image_classifier.data.metadata import METADATA_FILE, load_metadata
from image_classifier.data.parts import PARTS
from image_classifier.data.source import Source, find_source, get_folder
from image_classifier.data.unfinished import UNFINISHED_PREFIX, unfinished_folder, write_arrays
from image_classifier.errors import DataError, StorageError
from image_classifier.files import load_json
from image_classifier.image_sizes import DEFAULT_IMAGE_SIZE, ImageSize, is_image_size
from image_classifier.progress import track
from image_classifier.storage import (
    DISK,
    TEMPORARY_PREFIX,
    find_cache,
    lock,
    storage_error,
    write_atomically,
)
from image_classifier.text import is_digest, one_line

FORMAT_VERSION = 2
STORE = ".snapshots"

_READER = 3  # goes up when a source is read differently than before, so that it is read again
_READER_OF_FORMAT_1 = 2  # read alike; what it found is still looked for
_RESIZED_AT_ONCE = 500
_DAMAGED_PREFIX = "damaged-"
_DENIED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Snapshot:
    """A data set in canonical order: the training images, then those of a validation part, then the test images.

    Attributes:
        images: uint8 [N, 3, S, S], RGB, mapped from disk.
        labels: int64 [N], each an index into classes.
        classes: the names of the classes.
        num_train: how many of the N belong to the training set.
        digest: sha256 over classes, splits, images and labels, as hexadecimal digits; see `merkle`.
        name: what the data set calls itself, such as cifar10, cifar100, sample or the folder's name.
        database: NAME@VERSION of the version in the database that it was read from; None for one from files.
        num_validation: how many belong to a validation part that the source has; the rest is the test set.
        findings: what was found while image files were read; None where none were.
        notes: what is to be known of the source, in sentences.
        digest_format: of the digest: 1 where it was recognised as that of an earlier version.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    num_train: int
    digest: str
    name: str
    database: str | None = None
    num_validation: int = 0
    findings: Findings | None = None
    notes: tuple[str, ...] = ()
    digest_format: int = FORMAT_VERSION

    @property
    def image_size(self) -> ImageSize:
        """Side in pixels of the images."""
        side: ImageSize = self.images.shape[-1]
        return side

    @property
    def parts(self) -> dict[str, slice]:
        """Which of the images are those of each part, in their order; a validation part only where there is one."""
        return find_parts(self.num_train, self.num_validation, len(self.labels))

    @property
    def train(self) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """Images [num_train, 3, S, S] and labels [num_train] of the training set."""
        return self.images[self.parts["train"]], self.labels[self.parts["train"]]

    @property
    def test(self) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """Images [num_test, 3, S, S] and labels [num_test] of the test set."""
        return self.images[self.parts["test"]], self.labels[self.parts["test"]]

    @property
    def num_test(self) -> int:
        """How many images belong to the test set."""
        return len(self.labels) - self.num_train - self.num_validation

    def recognize(self, digest: str | None) -> Snapshot:
        """Take on the digest that a record, made by an earlier version, has of the same data; else change nothing."""
        if digest in (None, self.digest):
            return self
        arrays = self.images, self.labels, self.classes, self.num_train, self.num_validation
        return replace(self, digest=digest, digest_format=1) if compute_flat_digest(*arrays) == digest else self

    def count_classes(self) -> dict[str, NDArray[np.int64]]:
        """Count the images of each class in each part: [C]."""
        return {
            part: np.bincount(self.labels[images], minlength=len(self.classes)) for part, images in self.parts.items()
        }

    def describe_notes(self) -> list[str]:
        """Describe for people what is to be known of it: how it was read, and which classes are out of balance."""
        notes = [*self.notes, *(self.findings.describe() if self.findings else ())]
        warnings = find_imbalances(self.classes, self.count_classes())
        return [*(f"note: {line}" for line in notes), *(f"warning: {line}" for line in warnings)]


def load_folder_snapshot(dataset_folder: Path, reading: Reading = Reading()) -> Snapshot:
    """Map the snapshot of the files at a path, and freeze them into one first if there is none yet.

    Args:
        dataset_folder: a dataset folder, or an archive, a Parquet file or tars themselves.
        reading: how image files are read.

    Raises:
        DataError: there is no data set, or it is damaged, hostile, or not the one that `metadata.json` names.
        SettingsError: image files are to be read in some way, but there are none.
        StorageError: the disk refused the snapshot; nothing is left of it.
    """
    folder = get_folder(dataset_folder)
    metadata = load_metadata(folder)
    source = find_source(dataset_folder)
    fingerprint = compute_fingerprint(source, folder / METADATA_FILE, reading)

    def check_unchanged() -> None:
        if compute_fingerprint(source, folder / METADATA_FILE, reading) != fingerprint:
            raise DataError(f"{dataset_folder} was changed while it was read; start again")

    stores, read = find_stores(folder), partial(source.read, metadata, reading)
    snapshot = _find_snapshot(stores, fingerprint)
    if snapshot is None:
        older = compute_fingerprint(source, folder / METADATA_FILE, reading, _READER_OF_FORMAT_1)
        snapshot = _find_snapshot(stores, older)
    if snapshot is None:
        snapshot = _make_snapshot(stores, fingerprint, str(dataset_folder), read, check_unchanged)
    if metadata.digest not in (None, snapshot.recognize(metadata.digest).digest):
        raise DataError(
            f"{dataset_folder} has the digest {snapshot.digest}, but its {METADATA_FILE} says {metadata.digest}: "
            f"get the data set again, correct {METADATA_FILE}, or use the --image_size of that digest"
        )
    return replace(snapshot, notes=source.notes)


def resize_snapshot(stores: list[Path], snapshot: Snapshot, image_size: ImageSize) -> Snapshot:
    """Map the snapshot of the same images in another size, and make it first if there is none yet.

    Raises:
        StorageError: the disk refused; nothing is left of it.
    """

    def iterate(part: slice) -> Iterator[Batch]:
        for start in range(part.start, part.stop, _RESIZED_AT_ONCE):
            chosen = slice(start, min(start + _RESIZED_AT_ONCE, part.stop))
            yield snapshot.images[chosen], snapshot.labels[chosen]

    def read() -> Content:
        parts = {part: iterate(snapshot.parts.get(part, slice(0, 0))) for part in PARTS}
        content = Content(
            snapshot.name, snapshot.classes, parts, image_size=snapshot.image_size, num_images=len(snapshot.labels)
        )
        return resize_content(content, Reading(image_size=image_size))

    fingerprint = hashlib.sha256(f"{_READER} {snapshot.name} {snapshot.digest} {image_size}".encode()).hexdigest()
    return _find_snapshot(stores, fingerprint) or _make_snapshot(stores, fingerprint, snapshot.name, read)


def find_stored(stores: list[Path], digest: str, name: str) -> Snapshot | None:
    """Map the snapshot of this digest if one of the stores has it whole."""
    for store in stores:
        if (store / digest).is_dir():
            try:
                return _load_checked(store / digest, name)
            except _DamagedError as error:
                logger.warning("a snapshot is damaged and will be made again: %s", error)
    return None


def store_content(stores: list[Path], content: Content, title: str, *, digest: str | None = None) -> Snapshot:
    """Freeze content into the first store that can be written; its title is what messages call it.

    Args:
        digest: the digest that it must have.

    Raises:
        DataError: it has another digest, or nothing to train or to test with.
        StorageError: the disk refused; nothing is left of it.
    """
    with _lock_first(stores) as store:
        try:
            return _load_checked(store / _write_snapshot(store, content, title, digest), content.name)
        except OSError as error:
            raise storage_error(store, error) from error
        except _DamagedError as error:
            raise StorageError(
                f"data read back from the disk differs from what was written: {error}; check the disk"
            ) from error


def check_counts(title: str, counts: Mapping[str, int]) -> None:
    """Check that there is something to train and to test with.

    Args:
        counts: number of images of each part.

    Raises:
        DataError: there is not.
    """
    if not counts["train"] or not counts["test"]:
        raise DataError(
            f"{title} has {counts['train']:,} training images and {counts['test']:,} test images; it needs at least "
            "one of each"
        )


def compute_digest(
    images: NDArray[np.uint8],
    labels: NDArray[np.int64],
    classes: tuple[str, ...],
    num_train: int,
    num_validation: int = 0,
) -> str:
    """Compute a data set's digest, as `merkle` has it; images [N, 3, S, S], labels [N], the training set first."""
    trees = {}
    for part, place in find_parts(num_train, num_validation, len(labels)).items():
        trees[part] = Tree()
        for entries in iterate_entries(images[place], labels[place]):
            trees[part].extend(entries)
    return compute_header_digest(build_header(classes, trees, images.shape[1:]))


def compute_flat_digest(
    images: NDArray[np.uint8],
    labels: NDArray[np.int64],
    classes: tuple[str, ...],
    num_train: int,
    num_validation: int = 0,
) -> str:
    """Compute the digest of format 1: sha256 over one line of JSON, the images' bytes, and the labels' bytes.

    The line is an object with sorted keys and without spaces, in ASCII, with a newline at its end. It does not speak
    of a validation part without images. Images are uint8 [N, 3, S, S] in C order, labels int64 little endian.
    """
    header = {
        "classes": classes,
        "format": "image_classifier snapshot 1",
        "num_test": len(labels) - num_train - num_validation,
        "num_train": num_train,
        "shape": images.shape[1:],
    }
    if num_validation:
        header["num_validation"] = num_validation
    digest = hashlib.sha256(json.dumps(header, sort_keys=True, separators=(",", ":")).encode("ascii") + b"\n")
    for block in iterate_blocks(images):
        digest.update(np.ascontiguousarray(block, np.uint8).data)
    digest.update(np.ascontiguousarray(labels, "<i8").data)
    return digest.hexdigest()


def compute_fingerprint(source: Source, metadata_file: Path, reading: Reading, reader: int = _READER) -> str:
    """Compute what changes whenever a file of the source or its metadata does, from the files' status alone."""
    side = "" if reading.side == DEFAULT_IMAGE_SIZE else f", image_size={reading.side}"  # what is there is found again
    lines = [f"{reader} Reading(fit={reading.fit!r}, skip_bad={reading.skip_bad}{side}) {source.code}".rstrip()]
    try:
        for name in source.files:  # of which there can be many
            status = os.stat(f"{source.root}/{name}")
            lines.append(f"{name}\0{status.st_size} {status.st_mtime_ns} {status.st_ino} {status.st_ctime_ns}")
        metadata = metadata_file.read_bytes() if metadata_file.is_file() else b""
    except OSError as error:
        raise DataError(f"{error.filename} cannot be read: {error.strerror}") from error
    return hashlib.sha256(os.fsencode("\n".join(lines)) + b"\0" + metadata).hexdigest()


def find_stores(dataset_folder: Path | None) -> list[Path]:
    """Find the places where snapshots may lie: in the dataset folder, then in the user's cache, if there is a home."""
    cache = find_cache()
    stores = [] if cache is None else [cache / "snapshots"]
    return stores if dataset_folder is None else [dataset_folder / STORE, *stores]


@track("removing the snapshots")
def prune(dataset_folder: Path | None) -> int:
    """Remove all snapshots from the dataset folder and from the user's cache, and return their size in bytes.

    Only what a snapshot store holds is touched. A snapshot in use stays readable for who has it mapped.

    Raises:
        StorageError: the disk refused.
    """
    num_bytes = 0
    for store in find_stores(None if dataset_folder is None else get_folder(dataset_folder)):
        try:
            if not store.is_dir():
                continue
            with _locked(store):
                for entry in store.iterdir():
                    if _is_part_of_a_store(entry.name):
                        num_bytes += sum(path.stat().st_size for path in entry.rglob("*") if path.is_file())
                        DISK.remove(entry)
        except OSError as error:
            raise storage_error(store, error, "empty") from error
    return num_bytes


def _is_part_of_a_store(name: str) -> bool:
    if name == "index" or name.startswith((TEMPORARY_PREFIX, UNFINISHED_PREFIX)):
        return True
    return re.fullmatch(f"({_DAMAGED_PREFIX})?[0-9a-f]{{64}}", name) is not None


class _DamagedError(Exception):
    """A stored snapshot is not what its name says."""


def _find_snapshot(stores: list[Path], fingerprint: str) -> Snapshot | None:
    for store in stores:
        try:
            snapshot = _load_indexed(store, fingerprint)
        except _DamagedError as error:
            logger.warning("a snapshot is damaged and will be made again: %s", error)
            continue
        if snapshot is not None:
            return snapshot
    return None


def _load_indexed(store: Path, fingerprint: str) -> Snapshot | None:
    """Load the snapshot that a store's index names for a fingerprint, if there is one."""
    entry = _load_record(store / "index" / f"{fingerprint}.json") or {}
    digest, name, found = str(entry.get("digest")), str(entry.get("name")), entry.get("findings")
    if not is_digest(digest) or not (store / digest).is_dir():
        return None
    try:
        findings = None if found is None else restore_findings(found)
    except (TypeError, ValueError) as error:
        raise _DamagedError(f"{store / 'index'}: {one_line(error)}") from error
    return _load_checked(store / digest, name, findings)


def _load_checked(folder: Path, name: str, findings: Findings | None = None) -> Snapshot:
    """Map a snapshot and compute its digest again; one of format 1 is checked by that format's, too."""
    record = _load_record(folder / "snapshot.json")
    try:
        if record is None:
            raise ValueError("snapshot.json cannot be read")
        images = np.load(folder / "images.npy", mmap_mode="c", allow_pickle=False)
        labels = np.load(folder / "labels.npy", mmap_mode="c", allow_pickle=False)
        classes = tuple(record["classes"])
        num_train, num_validation = int(record["num_train"]), int(record.get("num_validation", 0))
        has_side = images.shape[1:] == build_shape(images.shape[-1]) and is_image_size(images.shape[-1])
        if not has_side or images.dtype != np.uint8 or (labels.dtype, labels.shape) != (np.int64, images.shape[:1]):
            raise ValueError("its arrays have wrong types or shapes")  # which to convert would take memory
        content = images, labels, classes, num_train, num_validation
        digest = compute_digest(*content)
        if (digest if record["format_version"] != 1 else compute_flat_digest(*content)) != folder.name:
            raise ValueError("its content does not match its digest")
    except Exception as error:  # what numpy raises for a damaged head is of many types: OverflowError, TokenError, ...
        raise _DamagedError(f"{folder}: {one_line(error)}") from error
    arrays = np.asarray(images), np.asarray(labels)
    return Snapshot(*arrays, classes, num_train, digest, name, None, num_validation, findings)


def _load_record(path: Path) -> dict[str, Any] | None:
    """Load a JSON object with a format_version, or nothing where none can be read."""
    try:
        record = load_json(path)
        version = int(record["format_version"])
    except (OSError, ValueError, TypeError, KeyError):
        return None
    if version > FORMAT_VERSION:
        raise DataError(
            f"{path} has format_version {version}, this version of image_classifier reads {FORMAT_VERSION}: "
            "use a later version, or remove the snapshots with `image_classifier data prune`"
        )
    return dict(record)


def _make_snapshot(
    stores: list[Path],
    fingerprint: str,
    title: str,
    read: Callable[[], Content],
    check_unchanged: Callable[[], None] = lambda: None,
) -> Snapshot:
    """Freeze what is read into the first store that can be written, unless another process has done so meanwhile.

    Args:
        title: what messages call it.
        check_unchanged: called when all was read; raises if that was changed meanwhile.
    """
    with _lock_first(stores) as store:
        try:
            snapshot = _load_indexed(store, fingerprint)
        except _DamagedError:
            snapshot = None
        if snapshot is not None:  # made by another process while this one waited for the lock
            return snapshot
        content = read()
        try:
            digest = _write_snapshot(store, content, title, fingerprint=fingerprint)
            check_unchanged()
            findings = content.findings
            entry = {
                "format_version": FORMAT_VERSION,
                "digest": digest,
                "name": content.name,
                "findings": findings and findings.to_json(),
            }
            (store / "index").mkdir(exist_ok=True)
            write_atomically(store / "index" / f"{fingerprint}.json", json.dumps(entry).encode())
            return _load_checked(store / digest, content.name, findings)
        except OSError as error:
            raise storage_error(store, error) from error
        except _DamagedError as error:
            raise StorageError(
                f"data read back from the disk differs from what was written: {error}; check the disk"
            ) from error


@contextmanager
def _lock_first(stores: list[Path]) -> Iterator[Path]:
    """Lock the first store that can be made and written."""
    with ExitStack() as stack:
        for number, store in enumerate(stores, 1):
            try:
                stack.enter_context(_locked(store))
                break
            except OSError as error:
                if error.errno not in _DENIED:
                    raise storage_error(store, error) from error
                if number == len(stores):
                    raise StorageError(
                        f"a snapshot can be written neither to the data set's folder nor to {store} "
                        f"({error.strerror}); "
                        "set IMAGE_CLASSIFIER_CACHE to a writable folder"
                    ) from error
        yield store


@contextmanager
def _locked(store: Path) -> Iterator[None]:
    """Keep other writers out of a store; the lock goes with the process, and an empty store with the lock."""
    path = store / ".lock"
    while True:
        store.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:  # whoever held the lock has removed the store
            continue
        lock(descriptor, path.parent)
        if os.fstat(descriptor).st_nlink:  # the file is still there
            break
        os.close(descriptor)
    try:
        yield
    finally:
        if os.listdir(store) == [path.name]:
            DISK.remove(path)
            try:
                os.rmdir(store)
            except OSError as error:  # the next process has made its lock in there by now, or has even removed it all
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):
                    raise
        os.close(descriptor)


def _write_snapshot(
    store: Path, content: Content, title: str, expected: str | None = None, fingerprint: str | None = None
) -> str:
    """Write a snapshot beside its place, then move it there, and return its digest."""
    with unfinished_folder(store, fingerprint if content.reopen else None) as (folder, is_kept):
        temporary, counts = write_arrays(folder, content, is_kept)
        check_counts(title, counts)
        images, labels = (np.load(temporary / name, mmap_mode="r") for name in ("images.npy", "labels.npy"))
        frozen = images, labels, content.classes, counts["train"], counts["validation"]
        parts = find_parts(counts["train"], counts["validation"], len(labels))
        digest = write_tree(temporary / TREE_FILE, images, labels, content.classes, parts)
        version = FORMAT_VERSION
        if expected not in (None, digest) and compute_flat_digest(*frozen) == expected:
            digest, version = expected, 1  # what was frozen by an earlier version is stored, and found, as it was then
        record = build_record(content.classes, counts, content.image_size, digest, version)
        if expected not in (None, digest):
            raise DataError(
                f"{title} has the digest {expected}, but its images now have {digest}: rows "
                "were changed since; restore the database from a backup"
            )
        DISK.write_file(temporary / "snapshot.json", json.dumps(record, indent=1).encode())
        for path in (*temporary.iterdir(), temporary):
            DISK.sync(path)
        target = store / digest
        if not _is_whole(target):
            with suppress(FileExistsError):  # without locks another process may have made it meanwhile
                DISK.rename_new(temporary, target)
            DISK.sync(store)
        return target.name


def build_record(
    classes: Sequence[str], counts: Mapping[str, int], image_size: int, digest: str, version: int = FORMAT_VERSION
) -> dict[str, Any]:
    """Build what snapshot.json says; the counts are of each part's images."""
    return {
        "format_version": version,
        "digest": digest,
        "classes": classes,
        **{f"num_{part}": number for part, number in counts.items()},
        "shape": build_shape(image_size),
    }


def find_parts(num_train: int, num_validation: int, num_images: int) -> dict[str, slice]:
    """Find which of the images are those of each part; a validation part only where there is one."""
    cut = num_train + num_validation
    validation = {"validation": slice(num_train, cut)} if num_validation else {}
    return {"train": slice(0, num_train), **validation, "test": slice(cut, num_images)}


def build_shape(image_size: int) -> tuple[int, int, int]:
    """Build the shape of an image."""
    return 3, image_size, image_size


def _is_whole(folder: Path) -> bool:
    """Say whether a snapshot lies whole under its digest; one that is damaged is set aside."""
    if not folder.is_dir():
        return False
    try:
        _load_checked(folder, folder.name)
        return True
    except _DamagedError:
        aside = folder.with_name(_DAMAGED_PREFIX + folder.name)
        DISK.remove(aside)
        DISK.rename(folder, aside)
        logger.warning("the damaged snapshot was set aside as %s", aside)
        return False
