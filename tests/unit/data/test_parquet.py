"""Parquet files as Hugging Face publishes them: read back equal, or refused with file, row and reason."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from image_classifier.data.metadata import Metadata
from image_classifier.data.parquet import iterate_images, read_files
from image_classifier.errors import DataError
from image_classifier.imaging import MAX_BYTES
from tests.bombs import build_parquet_of_levels, write_parquet_of_one_value, write_parquet_of_zeros
from tests.conftest import PROJECT
from tests.datasets import (
    OURS,
    PUBLISHED,
    assert_equal,
    collect,
    encode,
    make_arrays,
    write_parquet,
    write_parquet_file,
)

NAMES = ("ant", "bee", "cow")


def read_all(folder: Path, metadata: Metadata = Metadata()) -> Any:
    """Read a folder's train-* and test-*."""
    return read_files({part: sorted(folder.glob(f"{part}*")) for part in ("train", "test")}, "name", metadata)


@pytest.mark.parametrize("columns", [("img", "label"), ("image", "label"), ("img", "fine_label"), ("image", "labels")])
def test_files_are_read_back_equal(columns: tuple[str, str], tmp_path: Path) -> None:
    arrays = make_arrays(num_classes=3)
    write_parquet(tmp_path, arrays, NAMES, columns=columns)
    content = read_all(tmp_path)
    assert_equal(content, arrays)
    assert (content.name, content.classes) == ("name", NAMES)


def test_cifar10_is_known_by_its_published_names(tmp_path: Path) -> None:
    write_parquet(tmp_path, make_arrays(), PUBLISHED)
    content = read_all(tmp_path)
    assert (content.name, list(content.classes)) == ("cifar10", OURS)


def test_one_file_is_split_by_the_seed(tmp_path: Path) -> None:
    encoded = [encode(np.full((3, 32, 32), number, np.uint8)) for number in range(60)]
    write_parquet_file(tmp_path / "all.parquet", encoded, [number % 3 for number in range(60)], NAMES)
    chosen = []
    for seed in (0, 0, 1):
        images, labels, num_train = collect(
            read_files({"train": [tmp_path / "all.parquet"]}, "all", Metadata(split_seed=seed))
        )
        rows = images[:, 0, 0, 0]
        np.testing.assert_array_equal(labels, rows % 3)
        assert np.bincount(labels[num_train:]).tolist() == [3, 3, 3]
        assert sorted(rows) == list(range(60)) and all(np.diff(rows[:num_train].astype(int)) > 0)
        chosen.append(set(rows[num_train:]))
    assert chosen[0] == chosen[1] != chosen[2]


def test_a_column_of_plain_bytes_is_read(tmp_path: Path) -> None:
    table = pyarrow.table({"image": [encode(np.full((3, 5, 7), 9, np.uint8))] * 6, "label": [0] * 6})
    pyarrow.parquet.write_table(table, tmp_path / "all.parquet")
    images, _, _ = collect(read_files({"train": [tmp_path / "all.parquet"]}, "all", Metadata(classes=("a", "b"))))
    assert images.shape == (6, 3, 32, 32) and (images == 9).all()


@pytest.mark.parametrize("names", [None, [], ["a", "a"]])
def test_without_names_metadata_must_give_them(names: list[str] | None, tmp_path: Path) -> None:
    write_parquet(tmp_path, make_arrays(num_classes=2), names)
    with pytest.raises(DataError, match="has no class names in its Hugging Face metadata: put them into a metadata"):
        read_all(tmp_path)
    assert read_all(tmp_path, Metadata(classes=("a", "b"))).classes == ("a", "b")


@pytest.mark.parametrize("label", [3, -1, None, "ant", 1.5])
def test_a_label_outside_the_classes_is_named(label: Any, tmp_path: Path) -> None:
    labels = [type(label)(0), type(label)(0), label] if label is not None else [0, 0, None]
    write_parquet_file(tmp_path / "all.parquet", [encode(np.zeros((3, 32, 32), np.uint8))] * 3, labels, NAMES)
    with pytest.raises(
        DataError, match=r"all\.parquet has the label .* in row \d; it must be a whole number from 0 to 2"
    ):
        read_files({"train": [tmp_path / "all.parquet"]}, "all", Metadata())


def test_unreadable_images_are_listed_with_row_and_reason(tmp_path: Path) -> None:
    good = encode(np.zeros((3, 32, 32), np.uint8))
    write_parquet_file(tmp_path / "train.parquet", [good, b"none", good, None], [0] * 4, NAMES)
    write_parquet_file(tmp_path / "test.parquet", [good], [0], NAMES)
    with pytest.raises(
        DataError,
        match=r"2 of the images .* \S+train.parquet row 1: not a PNG.* \S+train.parquet row 3: the file is empty",
    ):
        collect(read_all(tmp_path))
    rows = [("0.png", good), ("1.png", b"none"), ("2.png", good), ("3.png", None)]
    assert list(iterate_images(tmp_path / "train.parquet")) == rows


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a", make_arrays(), NAMES, columns=("picture", "label"))
    write_parquet(tmp_path / "b", make_arrays(), NAMES, columns=("img", "kind"))
    with pytest.raises(DataError, match="needs a column img or image, but it has picture, label"):
        collect(read_all(tmp_path / "a", Metadata(classes=tuple(OURS))))
    with pytest.raises(DataError, match="needs a column label or fine_label or labels, but it has img, kind"):
        read_all(tmp_path / "b")


def test_a_damaged_file_is_refused_wherever_it_ends(tmp_path: Path) -> None:
    write_parquet(tmp_path, make_arrays(), NAMES)
    path = tmp_path / "test-00000-of-00001.parquet"
    content = path.read_bytes()
    for quarter in range(4):
        path.write_bytes(content[: len(content) * quarter // 4])
        with pytest.raises(DataError, match=f"{re.escape(str(path))} .*get it again"):
            collect(read_all(tmp_path, Metadata(classes=tuple(OURS))))


@pytest.mark.parametrize("num_images", [2, 4])
def test_rows_without_an_image_or_a_label_are_refused(num_images: int, tmp_path: Path) -> None:
    """The file is changed between the reading of its labels and that of its images."""
    good = encode(np.zeros((3, 32, 32), np.uint8))
    write_parquet_file(tmp_path / "train.parquet", [good] * 3, [0] * 3, NAMES)
    write_parquet_file(tmp_path / "test.parquet", [good], [0], NAMES)
    content = read_all(tmp_path)
    write_parquet_file(tmp_path / "train.parquet", [good] * num_images, [0] * num_images, NAMES)
    with pytest.raises(DataError, match=f"train.parquet is damaged: it has 3 labels, but {num_images} images"):
        collect(content)


@pytest.mark.parametrize(
    "write, reason",
    [
        (lambda path: write_parquet_of_zeros(path, 3, 30_000_000), "unpacks to more than 100 times its size"),
        (lambda path: write_parquet_of_one_value(path, 1000, bytes(1_000_000)), "unpacks to more than 100 times"),
        (lambda path: write_parquet_of_one_value(path, 10_000, b"image"), r"has 10,000 rows in [\d,]+ bytes, which no"),
        (lambda path: path.write_bytes(build_parquet_of_levels(10_000)), "too deeply nested"),
    ],
    ids=["zeros", "one value", "rows", "levels"],
)
def test_a_file_that_unpacks_to_what_no_images_do_is_refused(
    write: Callable[[Path], None], reason: str, tmp_path: Path
) -> None:
    write(tmp_path / "all.parquet")
    with pytest.raises(DataError, match=f"^{re.escape(str(tmp_path))}/all.parquet .*{reason}"):
        for _ in iterate_images(tmp_path / "all.parquet"):
            pass


def test_a_value_larger_than_an_image_may_be_is_not_passed_on(tmp_path: Path) -> None:
    content = np.random.default_rng(0).bytes(MAX_BYTES + 1000)
    write_parquet_file(tmp_path / "all.parquet", [content], [0], NAMES)
    ((_, read),) = iterate_images(tmp_path / "all.parquet")
    assert read == content[: MAX_BYTES + 1]
    with pytest.raises(DataError, match="row 0: more than 33,554,432 bytes; scale it down"):
        collect(
            read_files({"train": [tmp_path / "all.parquet"], "test": [tmp_path / "all.parquet"]}, "all", Metadata())
        )


def test_a_path_that_is_none_is_refused(tmp_path: Path) -> None:
    table = pyarrow.table({"image": [{"bytes": b"image", "path": "a" * 5000}], "label": [0]})
    pyarrow.parquet.write_table(table, tmp_path / "all.parquet")
    with pytest.raises(DataError, match="has a path of more than 4,096 characters"):
        list(iterate_images(tmp_path / "all.parquet"))


@pytest.mark.parametrize(
    "images", [[1, 2], [[b"a"], [b"b"]], [{"bytes": [b"a"]}, {"bytes": [b"b"]}], [{"bytes": b"a", "path": b"b"}] * 2]
)
def test_columns_of_other_types_are_refused(images: list[Any], tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"image": images, "label": [0, 0]}), tmp_path / "all.parquet")
    with pytest.raises(DataError, match="has (bytes|path) of type .* in image; get it again"):
        list(iterate_images(tmp_path / "all.parquet"))


def test_without_pyarrow_the_remedy_is_named(tmp_path: Path) -> None:
    write_parquet(tmp_path, make_arrays(), PUBLISHED)
    script = (
        "import sys; sys.modules['pyarrow'] = None\n"
        "from image_classifier.__main__ import main\n"
        "sys.exit(main(['data', 'info', '--dataset_folder', sys.argv[1]]))"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], cwd=PROJECT, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 2
    assert "needs pyarrow, which is not installed: pip install image-classifier[parquet]" in result.stderr
    assert len(result.stderr.splitlines()) == 1
