"""What lies at a path: each kind of data set is found, two of them are refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from image_classifier.data.metadata import Metadata
from image_classifier.data.source import find_source, find_sources
from image_classifier.errors import DataError
from tests.datasets import (
    OURS,
    make_arrays,
    write_archive,
    write_cifar10_binary,
    write_cifar10_python,
    write_cifar100_python,
    write_image_folder,
    write_parquet,
    write_shards,
)

ARRAYS = make_arrays()
WRITERS: dict[str, Callable[[Path], None]] = {
    "CIFAR-10 in the python layout": lambda folder: write_cifar10_python(folder, ARRAYS),
    "CIFAR-10 in the binary layout": lambda folder: write_cifar10_binary(folder / "cifar-10-batches-bin", ARRAYS),
    "CIFAR-100 in the python layout": lambda folder: write_cifar100_python(
        folder / "cifar-100-python", ARRAYS, [str(number) for number in range(100)]
    ),
    "Parquet files": lambda folder: write_parquet(folder / "plain_text", ARRAYS, OURS),
    "WebDataset tars": lambda folder: write_shards(folder, ARRAYS, OURS),
    "images by class": lambda folder: write_image_folder(folder, ARRAYS, OURS),
}


@pytest.mark.parametrize("title", WRITERS)
def test_each_kind_is_found(title: str, tmp_path: Path) -> None:
    WRITERS[title](tmp_path)
    (tmp_path / "README.md").write_text("about the data", encoding="utf-8")
    source = find_source(tmp_path)
    assert source.title.startswith(title)
    assert source.files and all((source.root / name).is_file() for name in source.files)


@pytest.mark.parametrize("one", WRITERS)
@pytest.mark.parametrize("other", WRITERS)
def test_two_data_sets_in_one_folder_are_refused_by_name(one: str, other: str, tmp_path: Path) -> None:
    if one >= other:
        return
    WRITERS[one](tmp_path)
    WRITERS[other](tmp_path)
    with pytest.raises(DataError, match="contains more than one data set") as caught:
        find_source(tmp_path)
    assert one in str(caught.value) and other in str(caught.value)


def test_a_folder_wins_over_its_own_archive(tmp_path: Path) -> None:
    for inner in ("cifar-10-batches-py", "."):
        write_cifar10_python(tmp_path / inner, ARRAYS)
        (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"not looked at")
        assert find_source(tmp_path).title.startswith("CIFAR-10 in the python layout")
        shutil.rmtree(tmp_path)
    (tmp_path / "cifar-10-batches-py").parent.mkdir()
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"")
    assert find_source(tmp_path).title.startswith("an archive")


def test_another_archive_beside_a_folder_is_a_second_data_set(tmp_path: Path) -> None:
    write_cifar10_python(tmp_path / "cifar-10-batches-py", ARRAYS)
    write_archive(tmp_path / "cifar-100-python.tar.gz", tmp_path / "cifar-10-batches-py")
    with pytest.raises(
        DataError, match=r"CIFAR-10 in the python layout .* and an archive \(.*cifar-100-python.tar.gz\)"
    ):
        find_source(tmp_path)


def test_what_is_missing_is_named_with_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match="no data set at .*none: .*`image_classifier data prepare --dataset_folder .*none`"
    ):
        find_source(tmp_path / "none")
    with pytest.raises(DataError, match="--dataset_folder '.*my images'`"):
        find_source(tmp_path / "my images")
    with pytest.raises(
        DataError,
        match="looked for CIFAR-10 and CIFAR-100 .* Parquet files, WebDataset tars, and subfolders with images",
    ):
        find_source(tmp_path)
    assert find_sources(tmp_path) == find_sources(tmp_path / "none") == []


@pytest.mark.parametrize(
    "name, complaint", [("data.zip", "is not a data set: give a folder"), ("metadata.json", "give its folder")]
)
def test_a_file_of_another_kind_is_refused(name: str, complaint: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(DataError, match=complaint):
        find_source(tmp_path / name)


def test_parquet_files_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    write_parquet(tmp_path, ARRAYS, OURS)
    (tmp_path / "test-00000-of-00001.parquet").unlink()
    with pytest.raises(DataError, match="has a split called train, but none called test: add it"):
        find_source(tmp_path)


def test_shards_that_are_missing_are_named(tmp_path: Path) -> None:
    write_parquet(tmp_path, ARRAYS, OURS)
    missing = tmp_path / "train-00001-of-00002.parquet"
    missing.unlink()
    with pytest.raises(DataError, match="has 1 of 2 Parquet shards, train-00000-of-00002.parquet: .* number 1"):
        find_source(tmp_path)
    with pytest.raises(DataError, match="has 1 of 2 Parquet shards"):
        find_source(tmp_path / "train-00000-of-00002.parquet")
    (tmp_path / "test-00000-of-00001.parquet").unlink()
    with pytest.raises(DataError, match="has 1 of 2 Parquet shards"):
        find_source(tmp_path)


@pytest.mark.parametrize("name", ["test-00000-of-00001.parquet", "validation.parquet", "val-0.parquet"])
def test_one_part_alone_is_not_taken_for_the_whole(name: str, tmp_path: Path) -> None:
    write_parquet(tmp_path, ARRAYS, OURS)
    for path in tmp_path.glob("train-*"):
        path.unlink()
    (tmp_path / "test-00000-of-00001.parquet").rename(tmp_path / name)
    with pytest.raises(DataError, match="has a split called (test|validation), but none called train"):
        find_source(tmp_path)


def test_parquet_files_that_name_no_part_are_refused(tmp_path: Path) -> None:
    for name in ("cats.parquet", "dogs.parquet"):
        (tmp_path / name).write_bytes(b"not looked at")
    with pytest.raises(DataError, match="has the Parquet files cats.parquet, dogs.parquet: there must be train-"):
        find_source(tmp_path)


def test_parquet_files_beside_the_parts_are_reported(tmp_path: Path) -> None:
    write_parquet(tmp_path, ARRAYS, OURS)
    shutil.copy(tmp_path / "test-00000-of-00001.parquet", tmp_path / "more.parquet")
    source = find_source(tmp_path)
    assert len(source.files) == 3
    assert source.notes == (f"{tmp_path} is read from train-*, test-* alone, without more.parquet",)


@pytest.mark.parametrize("name", ["validation-00000-of-00001.parquet", "val.parquet"])
def test_a_validation_part_of_parquet_files_is_read_as_one(name: str, tmp_path: Path) -> None:
    write_parquet(tmp_path, ARRAYS, OURS)
    shutil.copy(tmp_path / "test-00000-of-00001.parquet", tmp_path / name)
    content = find_source(tmp_path).read(Metadata())
    assert [sum(len(labels) for _, labels in part) for part in content.parts.values()] == [23, 7, 7]
    for path in tmp_path.glob("test-*"):
        path.unlink()
    content = find_source(tmp_path).read(Metadata())
    assert [sum(len(labels) for _, labels in part) for part in content.parts.values()] == [23, 0, 7]
