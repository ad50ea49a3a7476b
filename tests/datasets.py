"""Data sets for tests, written by code that shares nothing with the package that reads them."""

from __future__ import annotations

import io
import json
import pickle
import struct
import subprocess
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from image_classifier.data.content import Content
from tests import forked
from tests.conftest import PROJECT

PUBLISHED = "airplane automobile bird cat deer dog frog horse ship truck".split()
OURS = "plane car bird cat deer dog frog horse ship truck".split()
PYTHON_FILES = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]


@dataclass(frozen=True)
class Arrays:
    """Random images [N, 3, 32, 32] with labels [N]; the first num_train are to train with."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    num_train: int

    @property
    def batches(self) -> list[tuple[NDArray[np.uint8], NDArray[np.int64]]]:
        """Five batches to train with, one to test with, as CIFAR-10 has them."""
        parts = [*np.array_split(np.arange(self.num_train), 5), np.arange(self.num_train, len(self.labels))]
        return [(self.images[part], self.labels[part]) for part in parts]

    @property
    def splits(self) -> list[tuple[NDArray[np.uint8], NDArray[np.int64]]]:
        """What to train with, and what to test with."""
        cut = self.num_train
        return [(self.images[:cut], self.labels[:cut]), (self.images[cut:], self.labels[cut:])]


def make_arrays(num_train: int = 23, num_test: int = 7, num_classes: int = 10, seed: int = 0) -> Arrays:
    """Make random images and labels."""
    generator = np.random.default_rng(seed)
    images = generator.integers(0, 256, (num_train + num_test, 3, 32, 32), dtype=np.uint8)
    return Arrays(images, generator.integers(0, num_classes, num_train + num_test), num_train)


def pickle_python2(batch: dict[str, Any]) -> bytes:
    """Pickle a dict of uint8 arrays and of lists of small numbers and texts, byte for byte as Python 2 does."""

    def text(value: str) -> bytes:
        return b"U" + struct.pack("B", len(value)) + value.encode()

    def whole(number: int) -> bytes:
        return b"K" + struct.pack("B", number) if 0 <= number < 256 else b"J" + struct.pack("<i", number)

    def array(value: NDArray[np.uint8]) -> bytes:
        content = np.ascontiguousarray(value).tobytes()
        start = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01"
        kind = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
        shape = b"".join(whole(size) for size in value.shape)
        return start + shape + b"\x86" + kind + b"T" + struct.pack("<i", len(content)) + content + b"tb"

    parts = [b"\x80\x02}("]
    for key, value in batch.items():
        parts.append(text(key))
        if isinstance(value, np.ndarray):
            parts.append(array(value))
        else:
            parts += [b"](", *(text(item) if isinstance(item, str) else whole(int(item)) for item in value), b"e"]
    return b"".join([*parts, b"u."])


def write_cifar10_python(folder: Path, arrays: Arrays, *, protocol: int | None = None) -> None:
    """Write CIFAR-10's python layout: as Python 2 did, or pickled again by Python 3 with some protocol."""
    dump = pickle_python2 if protocol is None else lambda batch: pickle.dumps(batch, protocol)
    folder.mkdir(parents=True, exist_ok=True)
    for name, (images, labels) in zip(PYTHON_FILES, arrays.batches, strict=True):
        batch = {"batch_label": [name], "labels": labels.tolist(), "data": images.reshape(-1, 3072)}
        (folder / name).write_bytes(dump(batch))
    (folder / "batches.meta").write_bytes(dump({"label_names": PUBLISHED, "num_cases_per_batch": [1]}))


def write_cifar10_binary(folder: Path, arrays: Arrays) -> None:
    """Write CIFAR-10's binary layout."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (images, labels) in zip(PYTHON_FILES, arrays.batches, strict=True):
        records = [bytes([label]) + image.tobytes() for image, label in zip(images, labels, strict=True)]
        (folder / f"{name}.bin").write_bytes(b"".join(records))
    (folder / "batches.meta.txt").write_text("\n".join(PUBLISHED) + "\n\n", encoding="utf-8")


def write_cifar100_python(folder: Path, arrays: Arrays, classes: Sequence[str]) -> None:
    """Write CIFAR-100's python layout."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (images, labels) in zip(("train", "test"), arrays.splits, strict=True):
        batch = {"fine_labels": labels.tolist(), "coarse_labels": [0] * len(labels), "data": images.reshape(-1, 3072)}
        (folder / name).write_bytes(pickle_python2(batch))
    (folder / "meta").write_bytes(pickle_python2({"fine_label_names": classes, "coarse_label_names": ["all"]}))


def write_cifar100_binary(folder: Path, arrays: Arrays, classes: Sequence[str]) -> None:
    """Write CIFAR-100's binary layout."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (images, labels) in zip(("train.bin", "test.bin"), arrays.splits, strict=True):
        records = [b"\x13" + bytes([label]) + image.tobytes() for image, label in zip(images, labels, strict=True)]
        (folder / name).write_bytes(b"".join(records))
    (folder / "fine_label_names.txt").write_text("\n".join(classes) + "\n", encoding="utf-8")


def write_archive(path: Path, folder: Path) -> None:
    """Pack a folder as it is published: the files below the folder's name, here from last to first."""
    with tarfile.open(path, "w:gz", compresslevel=1) as archive:
        archive.add(folder, folder.name, recursive=False)
        for file in sorted(folder.iterdir(), reverse=True):
            archive.add(file, f"{folder.name}/{file.name}")


def encode(image: NDArray[np.uint8], image_format: str = "PNG", **options: Any) -> bytes:
    """Encode an image [3, height, width]."""
    buffer = io.BytesIO()
    Image.fromarray(image.transpose(1, 2, 0)).save(buffer, image_format, **options)
    return buffer.getvalue()


def write_image_folder(folder: Path, arrays: Arrays, classes: Sequence[str]) -> None:
    """Write train/CLASS/NUMBER.png and test/CLASS/NUMBER.png; each class has its folder, with images or without."""
    for split, (images, labels) in zip(("train", "test"), arrays.splits, strict=True):
        for name in classes:
            (folder / split / name).mkdir(parents=True)
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            (folder / split / classes[label] / f"{number:05d}.png").write_bytes(encode(image))


def write_parquet(
    folder: Path,
    arrays: Arrays,
    classes: Sequence[str] | None,
    *,
    columns: tuple[str, str] = ("img", "label"),
    rows_per_group: int = 4,
) -> None:
    """Write train-*.parquet in two files and test-*.parquet as Hugging Face publishes them."""
    cut, middle = arrays.num_train, arrays.num_train // 2
    files = {
        "train-00000-of-00002.parquet": slice(0, middle),
        "train-00001-of-00002.parquet": slice(middle, cut),
        "test-00000-of-00001.parquet": slice(cut, None),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in files.items():
        encoded = [encode(image) for image in arrays.images[part]]
        write_parquet_file(folder / name, encoded, arrays.labels[part].tolist(), classes, columns, rows_per_group)


def write_parquet_file(
    path: Path,
    encoded: Sequence[bytes | None],
    labels: Sequence[Any],
    classes: Sequence[str] | None,
    columns: tuple[str, str] = ("img", "label"),
    rows_per_group: int = 4,
) -> None:
    """Write one Parquet file with images, labels and, in the schema, the names of the classes."""
    import pyarrow
    import pyarrow.parquet

    image_type = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    structs = [{"bytes": content, "path": f"{number}.png"} for number, content in enumerate(encoded)]
    table = pyarrow.table({columns[0]: pyarrow.array(structs, image_type), columns[1]: labels})
    if classes is not None:
        features = {columns[0]: {"_type": "Image"}, columns[1]: {"names": list(classes), "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pyarrow.parquet.write_table(table, path, row_group_size=rows_per_group)


def write_tar(path: Path, members: Iterable[tuple[str, bytes | None]], **options: Any) -> None:
    """Write a tar with these members; one without content is a symbolic link to /etc/passwd."""
    with tarfile.open(path, "w", **options) as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            if content is None:
                member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
            member.size = len(content or b"")
            archive.addfile(member, io.BytesIO(content or b""))


def list_members(arrays: Arrays, part: slice, classes: Sequence[str] | None = None) -> list[tuple[str, bytes]]:
    """List the members of a shard of WebDataset: KEY.png, and KEY.cls; with classes, KEY.json with a name instead."""
    members = []
    for number, (image, label) in enumerate(zip(arrays.images[part], arrays.labels[part], strict=True)):
        key = f"{(part.start or 0) + number:06d}"
        named = json.dumps({"label": classes[label]}) if classes else None
        members.append((f"{key}.png", encode(image)))
        members.append((f"{key}.cls", b"%d\n" % label) if named is None else (f"{key}.json", named.encode()))
    return members


def write_shards(folder: Path, arrays: Arrays, classes: Sequence[str]) -> None:
    """Write train-*.tar in three shards and test-*.tar, as WebDataset has them, and metadata.json with the classes."""
    folder.mkdir(parents=True, exist_ok=True)
    cut = arrays.num_train
    bounds = [0, cut // 3, cut // 2, cut]
    for number, (start, stop) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        write_tar(folder / f"train-{number:06d}.tar", list_members(arrays, slice(start, stop)))
    write_tar(folder / "test-000000.tar", list_members(arrays, slice(cut, len(arrays.labels))))
    (folder / "metadata.json").write_text(json.dumps({"classes": list(classes)}), encoding="utf-8")


def collect(content: Content) -> tuple[NDArray[np.uint8], NDArray[np.int64], int]:
    """Read everything."""
    train, *others = (list(batches) for batches in content.parts.values())
    batches = [*train, *chain.from_iterable(others)]
    images, labels = (np.concatenate(arrays) for arrays in zip(*batches, strict=True))
    return images, labels, sum(len(labels) for _, labels in train)


def assert_equal(content: Content, arrays: Arrays) -> None:
    images, labels, num_train = collect(content)
    assert images.dtype == np.uint8 and labels.dtype == np.int64
    np.testing.assert_array_equal(images, arrays.images)
    np.testing.assert_array_equal(labels, arrays.labels)
    assert num_train == arrays.num_train


def run_data(*words: object, cwd: Path = PROJECT, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run `image_classifier data`."""
    variables = {"PYTHONPATH": str(PROJECT)} | variables
    return forked.run("image_classifier", "data", *words, cwd=cwd, variables=variables, strict=True, timeout_s=120)


def assert_refused(result: subprocess.CompletedProcess[str], complaint: str) -> None:
    """Check for one line on stderr, nothing on stdout, and exit status 2."""
    errors = [line for line in result.stderr.splitlines() if not line.startswith("downloading ")]
    assert len(errors) == 1 and errors[0].startswith("error: ") and complaint in errors[0], result.stderr
    assert (result.returncode, result.stdout) == (2, "")
