"""CIFAR's layouts: read back equal to what was written, or refused with the file's name."""

from __future__ import annotations

import gzip
import io
import pickle
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from image_classifier.data.cifar import LAYOUTS, Layout, find_layouts, read_archive, read_folder
from image_classifier.data.metadata import Metadata
from image_classifier.errors import DataError
from tests.datasets import (
    OURS,
    PUBLISHED,
    Arrays,
    assert_equal,
    collect,
    make_arrays,
    pickle_python2,
    write_archive,
    write_cifar10_binary,
    write_cifar10_python,
    write_cifar100_binary,
    write_cifar100_python,
)

PYTHON10, BINARY10, PYTHON100, BINARY100 = LAYOUTS
FINE = [f"fine_{number}" for number in range(100)]
WRITERS: list[tuple[Layout, Callable[[Path, Arrays], None]]] = [
    (PYTHON10, write_cifar10_python),
    (BINARY10, write_cifar10_binary),
    (PYTHON100, lambda folder, arrays: write_cifar100_python(folder, arrays, FINE)),
    (BINARY100, lambda folder, arrays: write_cifar100_binary(folder, arrays, FINE)),
]
EACH_LAYOUT = pytest.mark.parametrize("layout, write", WRITERS, ids=lambda item: getattr(item, "title", ""))


@EACH_LAYOUT
def test_folder_and_archive_are_read_back_equal(layout: Layout, write: Any, tmp_path: Path) -> None:
    arrays = make_arrays(num_classes=layout.num_classes)
    write(tmp_path / layout.folder, arrays)
    write_archive(tmp_path / layout.archive, tmp_path / layout.folder)
    for content in (
        read_folder(tmp_path / layout.folder, layout, Metadata()),
        read_archive(tmp_path / layout.archive, Metadata()),
    ):
        assert_equal(content, arrays)
        assert content.name == layout.name
        assert list(content.classes) == (OURS if layout.num_classes == 10 else FINE)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_batches_pickled_again_by_python_3_are_read_back_equal(protocol: int, tmp_path: Path) -> None:
    arrays = make_arrays()
    write_cifar10_python(tmp_path, arrays, protocol=protocol)
    assert_equal(read_folder(tmp_path, PYTHON10, Metadata()), arrays)


@settings(max_examples=30, deadline=None)
@given(st.integers(5, 40), st.integers(1, 12), st.integers(0, 2**32), st.sampled_from([BINARY10, PYTHON10]))
def test_any_number_of_images_is_read_back_equal(
    tmp_path_factory: pytest.TempPathFactory, num_train: int, num_test: int, seed: int, layout: Layout
) -> None:
    folder = tmp_path_factory.mktemp("cifar")
    arrays = make_arrays(num_train, num_test, seed=seed)
    (write_cifar10_binary if layout is BINARY10 else write_cifar10_python)(folder, arrays)
    assert_equal(read_folder(folder, layout, Metadata()), arrays)


def test_each_layout_is_found_by_any_of_its_files() -> None:
    for layout in LAYOUTS:
        for name in layout.files:
            assert find_layouts({name, "readme.html"}) == [layout]
    assert find_layouts({"readme.html"}) == []


def test_metadata_names_the_data_set_and_its_classes(tmp_path: Path) -> None:
    write_cifar10_python(tmp_path, make_arrays())
    content = read_folder(tmp_path, PYTHON10, Metadata(name="mine", classes=tuple("abcdefghij")))
    assert (content.name, content.classes) == ("mine", tuple("abcdefghij"))


@pytest.mark.parametrize("layout", [PYTHON10, BINARY10])
def test_class_names_of_another_data_set_in_this_layout_are_kept(layout: Layout, tmp_path: Path) -> None:
    names = [f"kind_{number}" for number in range(10)]
    (write_cifar10_python if layout.pickled else write_cifar10_binary)(tmp_path / "own", make_arrays())
    meta = pickle_python2({"label_names": names}) if layout.pickled else "\n".join(names).encode()
    (tmp_path / "own" / layout.meta).write_bytes(meta)
    content = read_folder(tmp_path / "own", layout, Metadata())
    assert (content.name, list(content.classes)) == ("own", names)


def test_cifar10_without_meta_has_this_package_s_names(tmp_path: Path) -> None:
    write_cifar10_binary(tmp_path, make_arrays())
    (tmp_path / BINARY10.meta).unlink()
    assert list(read_folder(tmp_path, BINARY10, Metadata()).classes) == OURS


def test_cifar100_without_meta_needs_names(tmp_path: Path) -> None:
    write_cifar100_binary(tmp_path, make_arrays(), FINE)
    (tmp_path / BINARY100.meta).unlink()
    with pytest.raises(
        DataError, match="no file fine_label_names.txt that names the classes; name them in metadata.json"
    ):
        read_folder(tmp_path, BINARY100, Metadata())


@EACH_LAYOUT
def test_a_missing_file_is_named(layout: Layout, write: Any, tmp_path: Path) -> None:
    folder = tmp_path / layout.folder
    write(folder, make_arrays())
    (folder / layout.test).unlink()
    write_archive(tmp_path / layout.archive, folder)
    complaint = f"has {re.escape(layout.title)} without {layout.test};"
    with pytest.raises(DataError, match=complaint):
        read_folder(folder, layout, Metadata())
    with pytest.raises(DataError, match=complaint):
        read_archive(tmp_path / layout.archive, Metadata())


@EACH_LAYOUT
def test_a_truncated_file_is_named_wherever_it_ends(layout: Layout, write: Any, tmp_path: Path) -> None:
    write(tmp_path, make_arrays(num_classes=layout.num_classes))
    path = tmp_path / layout.train[-1]
    content = path.read_bytes()
    for sixteenth in range(16):
        path.write_bytes(content[: len(content) * sixteenth // 16 - (sixteenth > 0)])  # not between two records
        with pytest.raises(DataError, match=re.escape(str(path))):
            collect(read_folder(tmp_path, layout, Metadata()))


@EACH_LAYOUT
def test_a_label_outside_the_classes_is_named(layout: Layout, write: Any, tmp_path: Path) -> None:
    arrays = make_arrays(num_classes=layout.num_classes)
    arrays.labels[arrays.num_train + 3] = layout.num_classes
    write(tmp_path, arrays)
    with pytest.raises(DataError, match=rf"{layout.test} has the label {layout.num_classes} at image 3, but there are"):
        collect(read_folder(tmp_path, layout, Metadata()))


@pytest.mark.parametrize(
    "batch, reason",
    [
        ({"labels": [1]}, "data must be uint8 .* got: NoneType"),
        ({"data": np.zeros((1, 3071), np.uint8), "labels": [1]}, r"data must be uint8 .* got: uint8 \[1, 3071\]"),
        ({"data": np.zeros(3072, np.uint8), "labels": [1]}, r"got: uint8 \[3072\]"),
        ({"data": np.zeros((1, 3072), np.int16), "labels": [1]}, r"got: int16 \[1, 3072\]"),
        ({"data": np.zeros((), np.uint8), "labels": [1]}, r"got: uint8 \[\]"),
        ({"data": np.zeros((2, 3072), np.uint8), "labels": [1]}, "labels must be 2 integers"),
        ({"data": np.zeros((1, 3072), np.uint8)}, "labels must be 1 integers"),
        ({"data": np.zeros((1, 3072), np.uint8), "labels": ["a"]}, "labels must be 1 integers"),
        ({"data": np.zeros((1, 3072), np.uint8), "labels": [2**100]}, "test_batch"),
        ({"data": np.zeros((1, 3072), np.uint8), "labels": [-1]}, "has the label -1"),
        ({"data": np.zeros((1, 3072), np.uint8), "labels": np.array([10])}, "has the label 10"),
    ],
)
def test_a_batch_of_the_wrong_shape_is_refused(batch: dict[str, Any], reason: str, tmp_path: Path) -> None:
    write_cifar10_python(tmp_path, make_arrays())
    (tmp_path / "test_batch").write_bytes(pickle.dumps(batch))
    with pytest.raises(DataError, match=reason):
        collect(read_folder(tmp_path, PYTHON10, Metadata()))


@pytest.mark.parametrize("names", [["a", "a"], [], ["a\nb"], [1], [""], "ab"])
def test_class_names_that_are_none_are_refused(names: Any, tmp_path: Path) -> None:
    write_cifar10_python(tmp_path, make_arrays())
    (tmp_path / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    with pytest.raises(DataError, match=r"batches\.meta .*class names"):
        read_folder(tmp_path, PYTHON10, Metadata())


def test_a_file_that_is_a_folder_is_refused(tmp_path: Path) -> None:
    write_cifar10_python(tmp_path, make_arrays())
    (tmp_path / "test_batch").unlink()
    (tmp_path / "test_batch").mkdir()
    with pytest.raises(DataError, match="test_batch cannot be read: Is a directory"):
        collect(read_folder(tmp_path, PYTHON10, Metadata()))


def write_members(path: Path, members: dict[str, bytes | tarfile.TarInfo]) -> None:
    """Write an archive of members as they are given."""
    with tarfile.open(path, "w:gz", compresslevel=1) as archive:
        for name, content in members.items():
            info = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            if isinstance(content, bytes):
                info.size = len(content)
            archive.addfile(info, io.BytesIO(content) if isinstance(content, bytes) else None)


def list_members(folder: Path) -> dict[str, bytes | tarfile.TarInfo]:
    """Write a data set and return its files by name."""
    write_cifar10_binary(folder, make_arrays())
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_an_archive_cut_short_is_refused_wherever_it_ends(tmp_path: Path) -> None:
    write_cifar10_binary(tmp_path / "data", make_arrays())
    write_archive(tmp_path / "whole.tar.gz", tmp_path / "data")
    content = (tmp_path / "whole.tar.gz").read_bytes()
    for sixteenth in range(16):
        path = tmp_path / "part.tar.gz"
        path.write_bytes(content[: len(content) * sixteenth // 16])
        with pytest.raises(DataError, match=re.escape(str(path))):
            collect(read_archive(path, Metadata()))


def test_an_archive_with_a_flipped_bit_is_refused(tmp_path: Path) -> None:
    """But for bits that mean nothing, such as the length of a code that no byte uses: they change no image."""
    write_cifar10_binary(tmp_path / "data", make_arrays())
    path = tmp_path / "archive.tar.gz"
    write_archive(path, tmp_path / "data")
    good = path.read_bytes()
    num_refused = 0
    for sixteenth in range(1, 16):
        content = bytearray(good)
        content[len(content) * sixteenth // 16] ^= 4
        path.write_bytes(content)
        try:
            assert_equal(read_archive(path, Metadata()), make_arrays())
        except DataError as error:
            assert "archive.tar.gz" in str(error)
            num_refused += 1
    assert num_refused > 10


def test_names_that_leave_the_archive_write_nothing(tmp_path: Path) -> None:
    members = {f"../../{name}": content for name, content in list_members(tmp_path / "data").items()}
    members["../escaped"] = members["/escaped"] = b"escaped"
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    write_members(inner / "hostile.tar.gz", members)
    before = sorted(tmp_path.rglob("*"))
    assert_equal(read_archive(inner / "hostile.tar.gz", Metadata()), make_arrays())
    assert sorted(tmp_path.rglob("*")) == before


KINDS = [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.GNUTYPE_SPARSE]


@pytest.mark.parametrize("kind", KINDS)
def test_members_that_are_no_files_are_not_read(kind: bytes, tmp_path: Path) -> None:
    members = list_members(tmp_path / "data")
    link = tarfile.TarInfo("test_batch.bin")
    link.type, link.linkname = kind, "/etc/passwd"
    write_members(tmp_path / "hostile.tar.gz", members | {"test_batch.bin": link})
    with pytest.raises(DataError, match="hostile.tar.gz contains 'test_batch.bin', which is not a regular file"):
        read_archive(tmp_path / "hostile.tar.gz", Metadata())


def test_an_archive_that_unpacks_to_too_much_is_refused(tmp_path: Path) -> None:
    write_members(tmp_path / "bomb.tar.gz", {"zeros": bytes(3_000_000), **list_members(tmp_path / "data")})
    assert (tmp_path / "bomb.tar.gz").stat().st_size < 200_000
    assert_equal(read_archive(tmp_path / "bomb.tar.gz", Metadata(), max_bytes=4_000_000), make_arrays())
    with pytest.raises(DataError, match="bomb.tar.gz unpacks to more than 2,000,000 bytes"):
        read_archive(tmp_path / "bomb.tar.gz", Metadata(), max_bytes=2_000_000)


def test_a_member_that_claims_to_be_huge_is_refused(tmp_path: Path) -> None:
    huge = tarfile.TarInfo("test_batch.bin")
    huge.size = 2**40
    with gzip.open(tmp_path / "huge.tar.gz", "wb") as file:
        file.write(huge.tobuf(tarfile.GNU_FORMAT) + bytes(512))
    with pytest.raises(DataError, match=r"contains 'test_batch.bin' with 1,099,511,627,776 bytes"):
        read_archive(tmp_path / "huge.tar.gz", Metadata())


def write_heads(path: Path, *heads: bytes) -> Path:
    """Write an archive of blocks as they are given, and its end."""
    path.write_bytes(gzip.compress(b"".join(heads) + bytes(1024), 1))
    return path


def build_pax(body: bytes) -> bytes:
    """Build an extended head, which says something of the next member."""
    head = tarfile.TarInfo("PaxHeaders/a")
    head.type, head.size = tarfile.XHDTYPE, len(body)
    return head.tobuf(tarfile.USTAR_FORMAT) + body + bytes(-len(body) % 512)


@pytest.mark.parametrize(
    "heads, reason",
    [
        (build_pax(b"") * 1001, "contains more than 1,000 files"),
        (build_pax(b"1" * 200_000), "contains 'a' with 200,000 bytes, too many for a CIFAR file"),
        (build_pax(b"1" * 10_000), "is not a complete .tar.gz"),
        (build_pax(b"0 a=b\n"), "is not a complete .tar.gz"),
        (build_pax(b"-9 a=b\n"), "is not a complete .tar.gz"),
        (build_pax(b"x a=b\n"), "is not a complete .tar.gz"),
        (build_pax(b"25 GNU.sparse.major=1.00\n") * 900, "must contain one data set"),
        (tarfile.TarInfo("a" * 5000).tobuf(tarfile.GNU_FORMAT) * 300, "must contain one data set"),
        (tarfile.TarInfo("é" * 5000).tobuf(tarfile.PAX_FORMAT) * 300, "must contain one data set"),
        (b"x" * 512, "is not a complete .tar.gz"),
        (bytes(1024) + b"x" * 512, "has data after the end of the archive"),
    ],
)
def test_what_extends_an_archive_is_passed_over_or_refused(heads: bytes, reason: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"^{re.escape(str(tmp_path))}/archive.tar.gz {reason}"):
        read_archive(write_heads(tmp_path / "archive.tar.gz", heads), Metadata())


@pytest.mark.parametrize("how", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_archives_of_each_format_are_read(how: int, tmp_path: Path) -> None:
    write_cifar10_binary(tmp_path / "data", make_arrays())
    with tarfile.open(tmp_path / "archive.tar.gz", "w:gz", format=how) as archive:
        archive.add(tmp_path / "data", "é" * 50 + "/" + "long" * 40 if how != tarfile.USTAR_FORMAT else "data")
    assert_equal(read_archive(tmp_path / "archive.tar.gz", Metadata()), make_arrays())


def test_an_archive_is_one_gzip_stream(tmp_path: Path) -> None:
    """Empty ones take no room in what is unpacked, but time."""
    write_members(tmp_path / "archive.tar.gz", list_members(tmp_path / "data"))
    content = (tmp_path / "archive.tar.gz").read_bytes()
    (tmp_path / "archive.tar.gz").write_bytes(content + bytes(100))
    assert_equal(read_archive(tmp_path / "archive.tar.gz", Metadata()), make_arrays())
    (tmp_path / "archive.tar.gz").write_bytes(content + gzip.compress(b"") * 1000)
    with pytest.raises(DataError, match="has more than one gzip stream"):
        read_archive(tmp_path / "archive.tar.gz", Metadata())


def test_an_archive_needs_one_data_set(tmp_path: Path) -> None:
    members = list_members(tmp_path / "data")
    write_members(tmp_path / "two.tar.gz", members | {"train": b"", "test": b""})
    write_members(tmp_path / "none.tar.gz", {"readme.html": b""})
    write_members(tmp_path / "twice.tar.gz", members | {"again/test_batch.bin": b""})
    with pytest.raises(DataError, match="contains CIFAR-10 in the binary layout and CIFAR-100 in the python layout"):
        read_archive(tmp_path / "two.tar.gz", Metadata())
    with pytest.raises(DataError, match="contains no CIFAR data set"):
        read_archive(tmp_path / "none.tar.gz", Metadata())
    with pytest.raises(DataError, match="contains test_batch.bin twice"):
        read_archive(tmp_path / "twice.tar.gz", Metadata())


def test_a_batch_of_another_size_than_the_meta_file_says_is_refused(tmp_path: Path) -> None:
    arrays = make_arrays(20, 4)  # four in each batch
    write_cifar10_python(tmp_path, arrays, protocol=2)
    meta = {"label_names": PUBLISHED, "num_cases_per_batch": 4}
    (tmp_path / "batches.meta").write_bytes(pickle.dumps(meta, 2))
    assert_equal(read_folder(tmp_path, PYTHON10, Metadata()), arrays)
    meta["num_cases_per_batch"] = 10000
    (tmp_path / "batches.meta").write_bytes(pickle.dumps(meta, 2))
    with pytest.raises(DataError, match="data_batch_1 has 4 images, but batches.meta says that each batch has 10,000"):
        collect(read_folder(tmp_path, PYTHON10, Metadata()))


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_batch_under_the_name_of_another_is_refused(protocol: int, tmp_path: Path) -> None:
    arrays = make_arrays()
    write_cifar10_python(tmp_path, arrays)
    images, labels = arrays.batches[0]
    batch = {"data": images.reshape(-1, 3072), "labels": labels.tolist()}
    labelled = {"data_batch_1": "training batch 1 of 5", "test_batch": "testing batch 1 of 1"}
    for name, label in labelled.items():
        (tmp_path / name).write_bytes(pickle.dumps(batch | {"batch_label": label}, protocol))
    collect(read_folder(tmp_path, PYTHON10, Metadata()))
    (tmp_path / "data_batch_3").write_bytes((tmp_path / "data_batch_1").read_bytes())
    with pytest.raises(DataError, match="data_batch_3 has the name 'training batch 1 of 5', which is data_batch_1"):
        collect(read_folder(tmp_path, PYTHON10, Metadata()))
