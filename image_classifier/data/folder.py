"""Read a folder of images with one sub-folder a class: `train/CLASS/…` and `test/CLASS/…`, or `CLASS/…` to be split.

Canonical order is by path, compared byte by byte, within the training set and within the test set.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Set
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from image_classifier.data.card import check_sizes
from image_classifier.data.content import STRICT, Batch, Content, Metadata, Tolerance, choose_test, decode_images
from image_classifier.errors import DataError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")  # imaging has them too, but imports Pillow
SPLITS = ("train", "test")

_LEFT_ASIDE = ("thumbs.db", "desktop.ini")
"""What file managers leave behind; files whose name begins with a dot are left aside too."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageFolder:
    """A folder of images as it was listed.

    Attributes:
        folder: the folder.
        is_split: whether it has train/ and test/ above the classes.
        classes: the names of the classes' sub-folders, sorted.
        files: paths of all images, relative to the folder, in canonical order.
    """

    folder: Path
    is_split: bool
    classes: tuple[str, ...]
    files: tuple[str, ...]


def list_images(folder: Path, ignored: Set[str]) -> ImageFolder | None:
    """List a folder of images by class; None if no sub-folder, apart from the ignored ones, holds an image.

    Raises:
        DataError: an image lies outside the classes, train/ lacks test/, or sub-folders form a loop.
    """
    names = [name for name in _list_folders(folder) if name not in ignored]
    is_split = set(SPLITS) <= set(names)
    tops = [f"{split}/" for split in SPLITS] if is_split else [""]
    classes: set[str] = set()
    files: list[str] = []
    for top in tops:
        for name in _list_folders(folder / top) if is_split else names:
            classes.add(name)
            files += _walk(folder, top + name, ())
    if not any(name.lower().endswith(SUFFIXES) for name in files):
        return None
    for top in {"", *tops}:
        for path in sorted((folder / top).iterdir()):
            if path.name.lower().endswith(SUFFIXES) and path.is_file():
                raise DataError(f"{path} lies in no class: move it into the sub-folder of its class, or remove it")
    if is_split and len(names) > len(SPLITS):
        logger.warning("%s is read from train and test alone, without %s", folder, ", ".join(set(names) - set(SPLITS)))
    if not is_split and "train" in names and _list_folders(folder / "train"):
        raise DataError(
            f"{folder} has a sub-folder train but no sub-folder test: add test, or move the classes up out of train "
            "and a sixth of the images is used to test"
        )
    return ImageFolder(folder, is_split, tuple(sorted(classes)), tuple(sorted(files, key=os.fsencode)))


def read_images(listing: ImageFolder, metadata: Metadata, tolerance: Tolerance = STRICT) -> Content:
    """Read a folder of images; each is decoded when its batch is asked for.

    Raises:
        DataError: `metadata.json` does not name a sub-folder's class; while the batches are gone through, an image
            that cannot be read.
    """
    classes = metadata.classes or listing.classes
    unknown = [name for name in listing.classes if name not in classes]
    if unknown:
        raise DataError(
            f"{listing.folder}: metadata.json does not name the sub-folders {', '.join(unknown)} as classes"
        )
    tests = sum(path.startswith("test/") for path in listing.files) if listing.is_split else 0
    check_sizes({"train": len(listing.files) - tests, "test": tests}, (listing.folder,))
    depth = 1 if listing.is_split else 0
    labels = {path: classes.index(path.split("/")[depth]) for path in listing.files}
    if listing.is_split:
        is_test = [path.startswith("test/") for path in listing.files]
    else:
        keys = [os.fsencode(path) for path in listing.files]
        is_test = choose_test(keys, list(labels.values()), metadata.split_seed).tolist()

    def batches(test: bool) -> Iterator[Batch]:
        from image_classifier.imaging import load_image  # Pillow, which a run that finds its snapshot does not need

        chosen = [path for path, belongs in zip(listing.files, is_test, strict=True) if belongs == test]
        encoded = ((listing.folder / path, labels[path]) for path in chosen)
        return decode_images(encoded, partial(load_image, resize=tolerance.resize), tolerance.skip)

    return Content(metadata.name or listing.folder.resolve().name, classes, batches(False), batches(True))


def _list_folders(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith(".") and path.is_dir())


def _walk(root: Path, relative: str, above: tuple[str, ...]) -> list[str]:
    """List the files below a folder as paths relative to the root; links are followed, loops are not."""
    files = []
    here = os.path.realpath(root / relative)
    if here in above:
        raise DataError(f"{root / relative} is a link to a folder that it lies in; remove it")
    with os.scandir(root / relative) as entries:
        for entry in entries:
            if entry.name.startswith(".") or entry.name.lower() in _LEFT_ASIDE:
                continue
            if entry.is_dir():
                files += _walk(root, f"{relative}/{entry.name}", (*above, here))
            elif entry.is_file():
                files.append(f"{relative}/{entry.name}")
            else:
                raise DataError(f"{entry.path} is no file but a broken link or a device; remove it")
    return files
