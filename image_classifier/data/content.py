"""What every source gives: a name, the classes, and the images batch by batch; and what `metadata.json` says of it."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from image_classifier.access import Reading
from image_classifier.data.findings import Findings, Notebook
from image_classifier.errors import DataError, ImageError
from image_classifier.files import load_json
from image_classifier.image_sizes import DEFAULT_IMAGE_SIZE
from image_classifier.text import one_line

METADATA_FILE = "metadata.json"
METADATA_FORMAT = 1
CIFAR10_CLASSES = ("plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
"""The names that this package gives to CIFAR-10's classes, in the order of the labels."""
CIFAR10_PUBLISHED_CLASSES = ("airplane", "automobile", *CIFAR10_CLASSES[2:])
"""The names that CIFAR-10 is published with; where a source has exactly these, it is CIFAR-10."""

MAX_CLASSES = 1000
"""An evaluation counts which class was taken for which: of ten thousand classes that is a table of 800 MB."""

_BATCH, _BATCH_BYTES = 500, 2**24
_FEWEST_AHEAD = 16
_NUM_LISTED = 5

T = TypeVar("T")
Batch = tuple[NDArray[np.uint8], NDArray[np.int64]]
"""Images [n, 3, S, S] RGB and labels [n]."""


@dataclass(frozen=True)
class Content:
    """A data set as it is read.

    Attributes:
        parts: the batches of the training, the validation and the test part, in this order; they are made while they
            are gone through, once. A source without a validation part has no batch of it.
        notebook: what is found meanwhile; None for a source whose images are taken as they are.
        image_size: side in pixels of the images.
        num_images: how many there are, as far as that is known before they are read.
        reopen: gives the batches of a part from its N-th image on, those that are left out counted; None for a source
            that is read from its beginning alone.
    """

    name: str
    classes: tuple[str, ...]
    parts: Mapping[str, Iterable[Batch]]
    notebook: Notebook | None = None
    image_size: int = DEFAULT_IMAGE_SIZE
    num_images: int | None = None
    reopen: Callable[[str, int], Iterable[Batch]] | None = None

    def __post_init__(self) -> None:
        if len(self.classes) > MAX_CLASSES:
            raise DataError(
                f"{self.name} has {len(self.classes):,} classes, at most {MAX_CLASSES:,} are read; merge some"
            )

    @property
    def findings(self) -> Findings | None:
        """What was found in what was gone through so far."""
        return None if self.notebook is None else self.notebook.summarize()


@dataclass(frozen=True)
class Metadata:
    """What `metadata.json` in the dataset folder says; each part is optional.

    Attributes:
        name: what the data set calls itself.
        classes: the names of the classes, in the order of the labels.
        digest: the digest that the snapshot must have.
        split_seed: seed by which a folder of images without train/ and test/ is split.
    """

    name: str | None = None
    classes: tuple[str, ...] | None = None
    digest: str | None = None
    split_seed: int = 0


def load_metadata(folder: Path) -> Metadata:
    """Load a dataset folder's `metadata.json`; without one everything is left to the source.

    Raises:
        DataError: it is no JSON object, or has an unknown key or a value of the wrong type.
    """
    path = folder / METADATA_FILE
    try:
        content = load_json(path)
    except (FileNotFoundError, NotADirectoryError):
        return Metadata()
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as JSON: {one_line(error)}; correct it") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} must hold a JSON object, got: {type(content).__name__}")
    version = content.pop("format_version", METADATA_FORMAT)
    if type(version) is int and version > METADATA_FORMAT:
        raise DataError(
            f"{path} has format_version {version}; this version of image_classifier reads {METADATA_FORMAT}"
        )
    checks = {
        "format_version": (type(version) is int and version >= 1, f"the number {METADATA_FORMAT}", version),
        "name": _check(content, "name", is_name, "a text on one line"),
        "classes": _check(content, "classes", _are_classes, "a list of different names"),
        "digest": _check(content, "digest", _is_digest, "64 hexadecimal digits"),
        "split_seed": _check(content, "split_seed", _is_seed, "a whole number from 0 to 2**63 - 1"),
    }
    for key in content:
        if key not in checks:
            raise DataError(f"{path} has the unknown key {key!a}; it may have {', '.join(checks)}")
    for key, (good, takes, got) in checks.items():
        if not good:
            raise DataError(f"{path}: {key} takes {takes}, got: {json.dumps(got)[:200]}")
    classes, digest = content.get("classes"), content.get("digest")
    return Metadata(
        content.get("name"),
        tuple(classes) if classes else None,
        digest and digest.lower(),
        content.get("split_seed", 0),
    )


def choose_test(keys: Sequence[bytes], labels: Sequence[int], seed: int) -> NDArray[np.bool_]:
    """Choose a sixth of each class, rounded down, for the test set: [N] bool.

    The choice hangs on the keys and the seed alone, not on the order that the images come in.
    """
    ranks: dict[int, list[tuple[bytes, int]]] = {}
    for position, (key, label) in enumerate(zip(keys, labels, strict=True)):
        ranks.setdefault(label, []).append((hashlib.sha256(b"%d/%s" % (seed, key)).digest(), position))
    chosen = np.zeros(len(keys), np.bool_)
    for ranked in ranks.values():
        for _, position in sorted(ranked)[: len(ranked) // 6]:
            chosen[position] = True
    return chosen


def resize_content(content: Content, reading: Reading) -> Content:
    """Resize a source whose images are pixels already, if they are of another size than they are to be read in.

    Raises:
        DataError: images of another size are to be refused.
    """
    if content.image_size == reading.side:
        return content
    if reading.fit == "refuse":
        raise DataError(
            f"{content.name} has images of {content.image_size} x {content.image_size} pixels instead of "
            f"{reading.side} x {reading.side}; choose --image_size {content.image_size}, or another --fit"
        )
    notebook = Notebook(reading)

    def resize(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        from image_classifier.imaging import resize_pixels  # Pillow, which a run that finds its snapshot does not need

        return resize_pixels(np.ascontiguousarray(image.transpose(1, 2, 0)), reading.side, notebook.note_size)

    def iterate(batches: Iterable[Batch]) -> Iterator[tuple[NDArray[np.uint8], int]]:
        for images, labels in batches:
            yield from zip(images, labels.tolist(), strict=True)

    parts = {part: decode_images(iterate(batches), resize) for part, batches in content.parts.items()}
    return replace(content, parts=parts, notebook=notebook, image_size=reading.side, reopen=None)


def decode_images(
    encoded: Iterable[tuple[T, int]],
    decode: Callable[[T], NDArray[np.uint8]],
    left_out: list[str] | None = None,
    notebook: Notebook | None = None,
) -> Iterator[Batch]:
    """Decode images in threads, in their order; each comes with its label.

    Args:
        decode: gives uint8 [S, S, 3].
        left_out: gets the reason for each image that cannot be read, which is left out then.
        notebook: gets what decoding an image notes when it is the image's turn, so that the notes are those of the
            batches so far.

    Raises:
        DataError: images cannot be read, and are not left out; the message lists the first of them, with the reasons.
    """
    num_bad, reasons = 0, list[str]()
    images, labels = list[NDArray[np.uint8]](), list[int]()
    for result, label in _decode_in_threads(encoded, decode, notebook or Notebook(Reading())):
        if not isinstance(result, ImageError):
            if not num_bad:  # else the rest is read for its errors alone
                images.append(result)
                labels.append(label)
        elif left_out is not None:
            left_out.append(str(result))
        else:
            num_bad += 1
            reasons += [str(result)] if num_bad <= _NUM_LISTED else []
            images, labels = [], []
        if len(images) == _BATCH or (images and len(images) * images[0].nbytes >= _BATCH_BYTES):
            yield np.stack(images), np.array(labels, np.int64)
            images, labels = [], []
    if num_bad:
        more = f"; and {num_bad - _NUM_LISTED:,} more" if num_bad > _NUM_LISTED else ""
        raise DataError(
            f"{num_bad:,} of the images cannot be read; mend or remove them, or leave them out with --skip_bad: "
            f"{'; '.join(reasons)}{more}"
        )
    if images:
        yield np.stack(images), np.array(labels, np.int64)


def _decode_in_threads(
    encoded: Iterable[tuple[T, int]], decode: Callable[[T], NDArray[np.uint8]], notebook: Notebook
) -> Iterator[tuple[NDArray[np.uint8] | ImageError, int]]:
    """Decode to [3, S, S] in order by all cores, with a few images ahead: encoded they may have 32 MB each."""

    def attempt(encoded: T) -> tuple[NDArray[np.uint8] | ImageError, list[tuple[int, int]]]:
        with notebook.apart() as sizes:
            try:
                return np.ascontiguousarray(decode(encoded).transpose(2, 0, 1)), sizes
            except ImageError as error:
                return error, sizes

    def finish() -> tuple[NDArray[np.uint8] | ImageError, int]:
        future, label = pending.popleft()
        result, sizes = future.result()
        notebook.add_sizes(sizes)
        return result, label

    pending: deque[tuple[Future[tuple[NDArray[np.uint8] | ImageError, list[tuple[int, int]]]], int]] = deque()
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    num_ahead = max(_FEWEST_AHEAD, 2 * num_cores)
    with ThreadPoolExecutor(num_cores + 1) as threads:
        for item, label in encoded:
            pending.append((threads.submit(attempt, item), label))
            if len(pending) == num_ahead:
                yield finish()
        while pending:
            yield finish()


def is_name(value: Any) -> bool:
    """Say whether a value is a printable text on one line."""
    return isinstance(value, str) and value.isprintable() and value.strip() != ""


def list_classes(classes: Sequence[str]) -> str:
    """List the names of classes for a message: the first ten, and how many there are."""
    listed = ", ".join(classes[:10])
    return f"{listed}, … ({len(classes)})" if len(classes) > 10 else listed


def _check(content: dict[str, Any], key: str, accepts: Any, takes: str) -> tuple[bool, str, Any]:
    return (key not in content or accepts(content[key]), takes, content.get(key))


def _are_classes(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(map(is_name, value)) and len(set(value)) == len(value)


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-fA-F]{64}", value) is not None


def _is_seed(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63
