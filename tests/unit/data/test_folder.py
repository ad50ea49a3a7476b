"""Folders of images: any size and depth, split or to be split, and everything that is out of place."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from image_classifier import imaging
from image_classifier.access import IMAGE_SUFFIXES
from image_classifier.data.folder import ImageFolder, list_images, read_images
from image_classifier.data.metadata import Metadata
from image_classifier.errors import DataError
from tests.datasets import collect, encode, make_arrays, write_image_folder

CLASSES = ("ant", "bee", "cow")


def list_all(folder: Path) -> ImageFolder:
    """List a folder that does hold images."""
    listing = list_images(folder, set())
    assert listing is not None
    return listing


def write_images(folder: Path, names: list[str]) -> None:
    """Write images whose first pixel counts them."""
    for number, name in enumerate(names):
        image = np.zeros((3, 32, 32), np.uint8)
        image[:, 0, 0] = number
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encode(image))


def test_split_folder_is_read_back_equal_in_the_order_of_the_paths(tmp_path: Path) -> None:
    arrays = make_arrays(20, 10, num_classes=3)
    write_image_folder(tmp_path, arrays, CLASSES)
    listing = list_all(tmp_path)
    assert listing.files == tuple(sorted(listing.files))
    content = read_images(listing, Metadata())
    images, labels, num_train = collect(content)
    order = np.concatenate(
        [np.argsort(arrays.labels[:20], kind="stable"), 20 + np.argsort(arrays.labels[20:], kind="stable")]
    )
    np.testing.assert_array_equal(images, arrays.images[order])
    np.testing.assert_array_equal(labels, arrays.labels[order])
    assert (num_train, content.classes, content.name) == (20, CLASSES, tmp_path.name)


def test_folder_without_a_split_gives_a_sixth_of_each_class_to_test(tmp_path: Path) -> None:
    write_images(tmp_path, [f"{name}/{number}.png" for name in CLASSES for number in range(13)])
    images, labels, num_train = collect(read_images(list_all(tmp_path), Metadata()))
    assert np.bincount(labels[:num_train]).tolist() == [11, 11, 11]
    assert np.bincount(labels[num_train:]).tolist() == [2, 2, 2]
    assert sorted(images[:, 0, 0, 0]) == list(range(39))


def test_the_split_hangs_on_the_paths_and_the_seed_alone(tmp_path: Path) -> None:
    names = [f"{name}/{number}.png" for name in CLASSES for number in range(13)]
    write_images(tmp_path / "one", names)
    for name in reversed(names):  # listed in another order, under another name
        (tmp_path / "two" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(tmp_path / "one" / name, tmp_path / "two" / name)
    one, two, other = (
        collect(read_images(list_all(tmp_path / folder), Metadata(split_seed=seed)))
        for folder, seed in (("one", 0), ("two", 0), ("one", 1))
    )
    np.testing.assert_array_equal(one[0], two[0])
    assert one[2] == other[2]
    assert set(one[0][one[2] :, 0, 0, 0]) != set(other[0][other[2] :, 0, 0, 0])


@settings(max_examples=30, deadline=None)
@given(
    st.sets(
        st.text(
            st.characters(exclude_characters="/\\\0", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12
        ).filter(lambda name: not name.startswith(".") and name.lower() not in ("thumbs.db", "desktop.ini")),
        min_size=2,
        max_size=8,
    )
)
def test_any_file_names_are_read_in_the_order_of_their_bytes(
    tmp_path_factory: pytest.TempPathFactory, names: set[str]
) -> None:
    folder = tmp_path_factory.mktemp("images")
    write_images(folder, [f"a/{name}.png" for name in sorted(names, key=lambda name: f"{name}.png".encode())])
    listing = list_all(folder)
    images, _, _ = collect(read_images(listing, Metadata()))
    assert sorted(images[:, 0, 0, 0]) == list(range(len(names)))
    assert list(listing.files) == sorted(listing.files, key=os.fsencode)


def test_images_of_any_size_format_and_depth_are_read(tmp_path: Path) -> None:
    (tmp_path / "train" / "ant" / "deep" / "er").mkdir(parents=True)
    (tmp_path / "test" / "ant").mkdir(parents=True)
    image = np.full((3, 70, 45), 90, np.uint8)
    (tmp_path / "train" / "ant" / "deep" / "er" / "a.JPG").write_bytes(encode(image, "JPEG"))
    (tmp_path / "train" / "ant" / "b.webp").write_bytes(encode(image, "WEBP", lossless=True))
    (tmp_path / "test" / "ant" / "c.bmp").write_bytes(encode(image, "BMP"))
    images, labels, num_train = collect(read_images(list_all(tmp_path), Metadata()))
    assert images.shape == (3, 3, 32, 32) and num_train == 2
    np.testing.assert_allclose(images, 90, atol=2)
    assert labels.tolist() == [0, 0, 0]


def test_class_without_images_keeps_its_place(tmp_path: Path) -> None:
    write_image_folder(tmp_path, make_arrays(8, 4, num_classes=1), CLASSES)
    shutil.rmtree(tmp_path / "test" / "bee")
    content = read_images(list_all(tmp_path), Metadata())
    assert content.classes == CLASSES
    assert set(collect(content)[1]) == {0}


def test_metadata_orders_the_classes_and_adds_some(tmp_path: Path) -> None:
    write_images(tmp_path, ["train/ant/0.png", "train/bee/1.png", "test/ant/2.png"])
    content = read_images(list_all(tmp_path), Metadata(name="insects", classes=("wasp", "bee", "ant")))
    assert (content.name, content.classes) == ("insects", ("wasp", "bee", "ant"))
    assert collect(content)[1].tolist() == [2, 1, 2]
    with pytest.raises(DataError, match="metadata.json does not list the subfolders bee as classes"):
        read_images(list_all(tmp_path), Metadata(classes=("ant", "fly")))


def test_what_file_managers_leave_behind_is_left_aside(tmp_path: Path) -> None:
    write_images(tmp_path, ["ant/0.png", "bee/1.png"])
    for name in ("ant/.DS_Store", "ant/Thumbs.db", "bee/desktop.ini", "README.md"):
        (tmp_path / name).write_bytes(b"none")
    write_images(tmp_path, [".hidden/0.png", "ant/.hidden/0.png"])
    assert list_all(tmp_path).files == ("ant/0.png", "bee/1.png")


def test_an_unreadable_file_in_a_class_is_named_with_the_reason(tmp_path: Path) -> None:
    for name, content, reason in (("1.png", b"", "the file is empty"), ("notes.txt", b"text", "not a PNG")):
        write_images(tmp_path / name, ["train/ant/0.png", "test/ant/0.png"])
        path = tmp_path / name / "train" / "ant" / name
        path.write_bytes(content)
        with pytest.raises(DataError, match=f"^1 of the images cannot be read; .*: {re.escape(str(path))}: {reason}"):
            collect(read_images(list_all(tmp_path / name), Metadata()))


def test_all_unreadable_images_are_counted_and_some_listed(tmp_path: Path) -> None:
    write_images(tmp_path, [*(f"train/ant/{number}.png" for number in range(20)), "test/ant/0.png"])
    for number in range(12, 20):
        (tmp_path / "train" / "ant" / f"{number}.png").write_bytes(b"no image")
    with pytest.raises(
        DataError, match=r"^8 of the images cannot be read; .*ant/12\.png: not a PNG.*ant/16\.png: .*; and 3 more$"
    ):
        collect(read_images(list_all(tmp_path), Metadata()))


@pytest.mark.parametrize("name", ["loose.png", "train/loose.jpg", "test/loose.bmp"])
def test_an_image_outside_the_classes_is_refused(name: str, tmp_path: Path) -> None:
    write_images(tmp_path, ["train/ant/0.png", "test/ant/1.png", name])
    with pytest.raises(DataError, match=f"{name} is not in a class folder"):
        list_images(tmp_path, set())


def test_train_without_test_is_refused_unless_it_is_a_class(tmp_path: Path) -> None:
    write_images(tmp_path / "split", ["train/ant/0.png"])
    with pytest.raises(
        DataError, match="has a split called train, but none called test: add it; or put all class folders"
    ):
        list_images(tmp_path / "split", set())
    write_images(tmp_path / "toys", ["train/0.png", "car/1.png"])
    assert list_all(tmp_path / "toys").classes == ("car", "train")


@pytest.mark.parametrize(
    "names", [("train", "test", "val"), ("Training", "TESTING", "valid"), ("train", "test", "validation")]
)
def test_a_validation_part_is_read_as_one(names: tuple[str, str, str], tmp_path: Path) -> None:
    train, test, validation = names
    write_images(
        tmp_path, [f"{train}/ant/0.png", f"{test}/ant/1.png", f"{validation}/ant/2.png", f"{validation}/bee/3.png"]
    )
    content = read_images(list_all(tmp_path), Metadata())
    numbers = {
        part: [int(image[0, 0, 0]) for images, _ in batches for image in images]
        for part, batches in content.parts.items()
    }
    assert numbers == {"train": [0], "validation": [2, 3], "test": [1]}
    assert content.classes == ("ant", "bee")


def test_a_validation_part_is_used_to_test_where_there_is_no_other(tmp_path: Path) -> None:
    write_images(tmp_path, ["train/ant/0.png", "valid/ant/1.png"])
    listing = list_all(tmp_path)
    content = read_images(listing, Metadata())
    assert [len(list(batches)) for batches in content.parts.values()] == [1, 0, 1]
    assert listing.notes == (f"{tmp_path} has no test split: its validation split is used for the test",)


@pytest.mark.parametrize(
    ("names", "complaint"),
    [
        (
            ["train/a/0.png", "test/a/1.png", "val/a/2.png", "valid/a/3.png"],
            "two subfolders for the same split, val and valid",
        ),
        (["train/a/0.png", "Train/a/1.png", "test/a/2.png"], "two subfolders for the same split, Train and train"),
        (["test/a/0.png", "val/a/1.png"], "has a split called .*, but none called train"),
        (["test/a/0.png"], "has a split called test, but none called train"),
        (["train/0.png", "test/1.png"], "0.png is not in a class folder"),
    ],
)
def test_parts_that_are_not_clear_are_refused(names: list[str], complaint: str, tmp_path: Path) -> None:
    write_images(tmp_path, names)
    with pytest.raises(DataError, match=complaint):
        list_images(tmp_path, set())


def test_a_class_may_be_called_as_a_part_is(tmp_path: Path) -> None:
    write_images(tmp_path, ["valid/0.png", "void/1.png"])
    assert list_all(tmp_path).classes == ("valid", "void")


def test_folders_beside_the_parts_are_reported(tmp_path: Path) -> None:
    write_images(tmp_path, ["train/ant/0.png", "test/ant/1.png", "more/ant/2.png"])
    listing = list_all(tmp_path)
    assert listing.files == ("test/ant/1.png", "train/ant/0.png")
    assert listing.notes == (f"{tmp_path} is read from train, test alone, without more",)


def test_a_loop_of_links_is_refused_and_other_links_are_followed(tmp_path: Path) -> None:
    write_images(tmp_path / "elsewhere", ["ant/0.png", "ant/1.png"])
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "ant").symlink_to(tmp_path / "elsewhere" / "ant")
    assert list_all(tmp_path / "data").files == ("ant/0.png", "ant/1.png")
    (tmp_path / "elsewhere" / "ant" / "again").symlink_to(tmp_path / "elsewhere" / "ant")
    with pytest.raises(DataError, match="again is a link to one of its parent folders"):
        list_images(tmp_path / "data", set())


def test_folder_without_images_is_none(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "notes.txt").write_bytes(b"")
    assert list_images(tmp_path, set()) is None


@pytest.mark.parametrize("make", [lambda path: path.symlink_to("nowhere"), os.mkfifo])
def test_what_is_no_file_is_refused(make: Callable[[Path], None], tmp_path: Path) -> None:
    write_images(tmp_path, ["ant/0.png"])
    make(tmp_path / "ant" / "1.png")
    with pytest.raises(DataError, match=r"ant/1.png is a broken link or a device, not a file"):
        list_images(tmp_path, set())


def test_what_counts_as_an_image_is_what_can_be_decoded() -> None:
    formats = Image.registered_extensions()
    assert {formats[suffix] for suffix in IMAGE_SUFFIXES} == set(imaging.FORMATS)
