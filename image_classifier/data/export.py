"""Exports a snapshot without loss: as images by class or as Parquet, which the trainer and other tools can read; or as
it is, with its Merkle tree, for `data fetch`."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from image_classifier.data.levels import TREE_FILE, write_tree
from image_classifier.data.metadata import METADATA_FILE, METADATA_FORMAT
from image_classifier.data.snapshot import Snapshot, build_record
from image_classifier.errors import DataError, StorageError
from image_classifier.extras import load_extra
from image_classifier.progress import track
from image_classifier.storage import DISK, written_beside

_ROWS = 1000  # images that are encoded at once


@track("writing the images")
def write_folder(snapshot: Snapshot, folder: Path) -> None:
    """Write `PART/CLASS/NUMBER.png`, where the parts are train, validation and test, and `metadata.json`.

    Images by class have an order of their own: the data set that is read from it holds the same, under another digest.

    Raises:
        DataError: a class has a name that no folder can have.
        StorageError: the folder is there already, or the disk refused; nothing is left of it.
    """
    check_folder_names(snapshot.classes, "export with --format parquet")
    with new_folder(folder) as temporary:
        for part, place in snapshot.parts.items():
            for name in snapshot.classes:
                (temporary / part / name).mkdir(parents=True)
            for start, encoded in _encode(snapshot, place):
                for number, content in enumerate(encoded, start):
                    name = snapshot.classes[int(snapshot.labels[number])]
                    DISK.write_file(temporary / part / name / f"{number:08d}.png", content)
        _write_metadata(temporary, snapshot, digest=None)


@track("writing the images")
def write_parquet(snapshot: Snapshot, folder: Path) -> None:
    """Write PART-00000-of-00001.parquet as Hugging Face has them, and `metadata.json`.

    Raises:
        SettingsError: pyarrow is missing.
        StorageError: the folder is there already, or the disk refused; nothing is left of it.
    """
    pyarrow = load_extra("pyarrow", "parquet")
    load_extra("pyarrow.parquet", "parquet")
    features = {"img": {"_type": "Image"}, "label": {"names": list(snapshot.classes), "_type": "ClassLabel"}}
    image_type = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    schema = pyarrow.schema([("img", image_type), ("label", pyarrow.int64())]).with_metadata(
        {"huggingface": json.dumps({"info": {"features": features}})}
    )
    with new_folder(folder) as temporary:
        for part, place in snapshot.parts.items():
            with pyarrow.parquet.ParquetWriter(temporary / f"{part}-00000-of-00001.parquet", schema) as writer:
                for start, encoded in _encode(snapshot, place):
                    images = [
                        {"bytes": content, "path": f"{number:08d}.png"} for number, content in enumerate(encoded, start)
                    ]
                    labels = snapshot.labels[start : start + len(encoded)]
                    columns = [pyarrow.array(images, image_type), pyarrow.array(labels)]
                    writer.write_batch(pyarrow.record_batch(columns, schema=schema))
        _write_metadata(temporary, snapshot, digest=snapshot.digest)


@track("writing the snapshot")
def write_snapshot(snapshot: Snapshot, folder: Path) -> None:
    """Write `images.npy`, `labels.npy`, `snapshot.json`, and `tree.bin`, by which single images are checked.

    Raises:
        DataError: the images are not those of the snapshot's digest.
        StorageError: the folder is there already, or the disk refused; nothing is left of it.
    """
    with new_folder(folder) as temporary:
        np.save(temporary / "images.npy", snapshot.images)
        np.save(temporary / "labels.npy", snapshot.labels)
        digest = write_tree(temporary / TREE_FILE, snapshot.images, snapshot.labels, snapshot.classes, snapshot.parts)
        if digest != snapshot.digest:
            raise DataError(f"{snapshot.name} changed while it was written; start again")
        counts = {part: place.stop - place.start for part, place in snapshot.parts.items()}
        record = build_record(snapshot.classes, counts, snapshot.image_size, digest)
        DISK.write_file(temporary / "snapshot.json", json.dumps(record, indent=1).encode())


def check_folder_names(classes: Sequence[str], remedy: str) -> None:
    """Check that each class can have a folder of its name.

    Raises:
        DataError: one cannot.
    """
    for name in classes:
        if "/" in name or name.startswith(".") or len(os.fsencode(name)) > 255:
            raise DataError(f"the class name {name!a} cannot be a folder name: {remedy}")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield a folder to fill, which gets its name when it is whole, or is removed.

    Raises:
        StorageError: the folder is there already, or the disk refused.
    """
    if os.path.lexists(folder):
        raise StorageError(f"--output: {folder} exists already; choose another, or remove it")
    if not folder.parent.is_dir():
        raise StorageError(f"--output: there is no folder {folder.parent}; create it, or choose another")
    with written_beside(folder, replace=False) as temporary:
        DISK.make_folder(temporary)
        yield temporary
        DISK.sync_all()


def _encode(snapshot: Snapshot, place: slice) -> Iterator[tuple[int, list[bytes]]]:
    """Encode images in threads: the number of the first, and the images as PNG."""
    with ThreadPoolExecutor() as threads:
        for start in range(place.start, place.stop, _ROWS):
            yield start, list(threads.map(encode_image, snapshot.images[start : min(start + _ROWS, place.stop)]))


def encode_image(image: NDArray[np.uint8]) -> bytes:
    """Encode an image [3, S, S] as PNG."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image.transpose(1, 2, 0)).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _write_metadata(folder: Path, snapshot: Snapshot, *, digest: str | None) -> None:
    content = {"format_version": METADATA_FORMAT, "name": snapshot.name, "classes": list(snapshot.classes)}
    if digest is not None:
        content["digest"] = digest
    DISK.write_file(folder / METADATA_FILE, json.dumps(content, indent=1).encode() + b"\n")
