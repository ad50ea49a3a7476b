"""Sizes that metadata beside a data set states: one that has others is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from image_classifier.data.card import check_sizes
from image_classifier.data.metadata import load_metadata
from image_classifier.data.source import find_source
from image_classifier.errors import DataError
from tests.datasets import OURS, make_arrays, write_image_folder, write_parquet

ARRAYS = make_arrays()  # 23 images to train with, 7 to test with


def write_card(folder: Path, info: Any) -> None:
    """Write a README.md as Hugging Face's data sets have it."""
    head = yaml.safe_dump({"license": "mit", "dataset_info": info})
    (folder / "README.md").write_text(f"---\n{head}---\n\n# Images\n\n---\n", encoding="utf-8")


def build_info(num_train: int, num_test: int) -> dict[str, Any]:
    """Build the part of a `dataset_info` that states sizes."""
    splits = (("train", num_train), ("test", num_test), ("unsupervised", 5))
    return {"splits": [{"name": name, "num_bytes": 9, "num_examples": size} for name, size in splits]}


def read(folder: Path) -> None:
    """Begin to read what lies in a folder."""
    find_source(folder).read(load_metadata(folder))


@pytest.mark.parametrize("layout", ["parquet", "parquet below", "images"])
@pytest.mark.parametrize("file", ["README.md", "dataset_infos.json"])
def test_a_set_of_another_size_than_is_stated_is_refused(layout: str, file: str, tmp_path: Path) -> None:
    def state(num_train: int, num_test: int) -> None:
        info = build_info(num_train, num_test)
        if file == "README.md":
            write_card(tmp_path, info)
        else:
            info["splits"] = {split["name"]: split for split in info["splits"]}
            (tmp_path / file).write_text(json.dumps({"plain_text": info}), encoding="utf-8")

    if layout == "images":
        write_image_folder(tmp_path, ARRAYS, OURS)
    else:
        write_parquet(tmp_path / "data" if layout == "parquet below" else tmp_path, ARRAYS, OURS)
    state(23, 7)
    read(tmp_path)
    state(24, 7)
    with pytest.raises(
        DataError, match=f"{file} says that the data set has 24 train images, but 23 are here: get the complete"
    ):
        read(tmp_path)


def test_a_part_that_is_stated_and_missing_is_noticed(tmp_path: Path) -> None:
    write_parquet(tmp_path, ARRAYS, OURS)
    for path in tmp_path.glob("train-*"):
        path.unlink()
    (tmp_path / "test-00000-of-00001.parquet").rename(tmp_path / "train-00000-of-00001.parquet")
    read(tmp_path)  # a sixth of the only file is used to test
    write_card(tmp_path, build_info(7, 10))
    with pytest.raises(DataError, match="says that the data set has 10 test images, but 0 are here"):
        read(tmp_path)


def test_of_several_configurations_one_must_fit(tmp_path: Path) -> None:
    write_card(tmp_path, [build_info(100, 20), build_info(23, 7)])
    check_sizes({"train": 23, "test": 7}, (tmp_path,))
    with pytest.raises(DataError, match="100 train images, but 23 are here, 20 test images, but 8 are here"):
        check_sizes({"train": 23, "test": 8}, (tmp_path,))


def test_sizes_in_the_schema_of_a_parquet_file_are_checked(tmp_path: Path) -> None:
    import pyarrow.parquet

    write_parquet(tmp_path, ARRAYS, OURS)
    path = tmp_path / "test-00000-of-00001.parquet"
    table = pyarrow.parquet.read_table(path)
    metadata = json.loads(table.schema.metadata[b"huggingface"])
    metadata["info"]["splits"] = {"test": {"num_examples": 8}}
    table = table.replace_schema_metadata({"huggingface": json.dumps(metadata)})
    pyarrow.parquet.write_table(table, path)
    with pytest.raises(DataError, match=r"test-\S+ says that the data set has 8 test images, but 7 are here"):
        read(tmp_path)


@pytest.mark.parametrize(
    "text", ["---\ndataset_info: [\n---\n", "---\n- dataset_info\n---\n", "---\nname: dataset_info\n---\n"]
)
def test_a_card_that_cannot_be_read_is_named(text: str, tmp_path: Path) -> None:
    write_image_folder(tmp_path, ARRAYS, OURS)
    (tmp_path / "README.md").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match="README.md has no valid dataset_info .*; correct it, or remove it"):
        read(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "about the data", "---\nlicense: mit\n---\n", "---\ndataset_info: {splits: 1}\n---\n"]
)
def test_a_readme_that_states_no_sizes_does_not_matter(text: str, tmp_path: Path) -> None:
    write_image_folder(tmp_path, ARRAYS, OURS)
    (tmp_path / "README.md").write_text(text, encoding="utf-8")
    read(tmp_path)
    shutil.rmtree(tmp_path)
