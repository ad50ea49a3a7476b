"""Reads images from one subfolder per class: `train/CLASS/…`, `test/CLASS/…`, or `CLASS/…` to be split.

`validation/CLASS/…` may lie beside them. Canonical order is by path, compared byte by byte, within each part.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from image_classifier.access import IMAGE_SUFFIXES, Reading
from image_classifier.data.card import check_sizes
from image_classifier.data.content import Batch, Content
from image_classifier.data.decoding import decode_images
from image_classifier.data.findings import Notebook
from image_classifier.data.metadata import Metadata
from image_classifier.data.parts import PARTS, complete_parts, find_part
from image_classifier.data.split import choose_test
from image_classifier.errors import DataError

_LEFT_ASIDE = ("thumbs.db", "desktop.ini")
"""What file managers leave behind; files whose name begins with a dot are left aside too."""


@dataclass(frozen=True)
class ImageFolder:
    """A folder of images as it was listed.

    Attributes:
        folder: the folder.
        parts: the sub-folder of each part; none where the classes' sub-folders lie in the folder itself.
        classes: the names of the classes' sub-folders, sorted.
        files: paths of all images, relative to the folder, in canonical order.
        notes: what is to be known of it, in sentences.
    """

    folder: Path
    parts: Mapping[str, str]
    classes: tuple[str, ...]
    files: tuple[str, ...]
    notes: tuple[str, ...] = ()


def list_images(folder: Path, ignored: Set[str]) -> ImageFolder | None:
    """List a folder of images by class; None if no sub-folder, apart from the ignored ones, holds an image.

    Raises:
        DataError: an image lies outside the classes, a part is missing or there twice, or sub-folders form a loop.
    """
    names = [name for name in _list_folders(folder) if name not in ignored]
    notes: list[str] = []
    parts = _find_parts(folder, names, notes)
    classes: set[str] = set()
    files: list[str] = []
    for top in [f"{name}/" for name in parts.values()] or [""]:
        for name in _list_folders(folder / top) if parts else names:
            classes.add(name)
            files += _walk(folder, top + name, ())
    has_images = any(name.lower().endswith(IMAGE_SUFFIXES) for name in files)
    for place in [folder] * has_images + [folder / name for name in parts.values()]:
        for path in sorted(place.iterdir()):
            if path.name.lower().endswith(IMAGE_SUFFIXES) and path.is_file():
                raise DataError(
                    f"{path} is not in a class folder: move it into the subfolder of its class, or remove it"
                )
    if not has_images:
        return None
    others = sorted(set(names) - set(parts.values()))
    if parts and others:
        notes.append(f"{folder} is read from {', '.join(parts.values())} alone, without {', '.join(others)}")
    return ImageFolder(folder, parts, tuple(sorted(classes)), tuple(sorted(files, key=os.fsencode)), tuple(notes))


def _find_parts(folder: Path, names: Sequence[str], notes: list[str]) -> dict[str, str]:
    """Find the sub-folder of each part; none where the sub-folders are classes, one of which may be called so."""
    named = {name: part for name in names if (part := find_part(name)) is not None}
    if len(set(named.values())) < 2 and not any(_list_folders(folder / name) for name in named):
        return {}
    parts: dict[str, str] = {}
    for name, part in named.items():
        if part in parts:
            raise DataError(
                f"{folder} has two subfolders for the same split, {parts[part]} and {name}: keep one of them"
            )
        parts[part] = name
    return complete_parts(parts, folder, notes)


def read_images(listing: ImageFolder, metadata: Metadata, reading: Reading = Reading()) -> Content:
    """Read a folder of images; each is decoded when its batch is asked for.

    Raises:
        DataError: `metadata.json` does not name a sub-folder's class; there are more or fewer images than a
            `dataset_info` states; while the batches are gone through, an image that cannot be read.
    """
    classes = metadata.classes or listing.classes
    unknown = [name for name in listing.classes if name not in classes]
    if unknown:
        raise DataError(f"{listing.folder}: metadata.json does not list the subfolders {', '.join(unknown)} as classes")
    depth = 1 if listing.parts else 0
    labels = {path: classes.index(path.split("/")[depth]) for path in listing.files}
    files: dict[str, list[str]] = {part: [] for part in PARTS}
    if listing.parts:
        part_of = {name: part for part, name in listing.parts.items()}
        for path in listing.files:
            files[part_of[path.split("/")[0]]].append(path)
        check_sizes({part: len(paths) for part, paths in files.items()}, (listing.folder,))
    else:
        check_sizes({"train": len(listing.files)}, (listing.folder,))
        keys = [os.fsencode(path) for path in listing.files]
        is_test = choose_test(keys, list(labels.values()), metadata.split_seed)
        for path, chosen in zip(listing.files, is_test, strict=True):
            files["test" if chosen else "train"].append(path)

    def batches(part: str, start: int = 0) -> Iterator[Batch]:
        from image_classifier.imaging import load_image  # Pillow, which a run that finds its snapshot does not need

        encoded = ((listing.folder / path, labels[path]) for path in files[part][start:])
        decode = partial(load_image, side=reading.side, fit=reading.fit, note_size=notebook.note_size)
        return decode_images(encoded, decode, notebook.left_out if reading.skip_bad else None, notebook)

    notebook = Notebook(reading)
    name = metadata.name or listing.folder.resolve().name
    parts = {part: batches(part) for part in files}
    return Content(name, classes, parts, notebook, reading.side, len(listing.files), batches)


def _list_folders(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith(".") and path.is_dir())


def _walk(root: Path, relative: str, above: tuple[str, ...]) -> list[str]:
    """List the files below a folder as paths relative to the root; links are followed, loops are not."""
    files = []
    here = os.path.realpath(root / relative)
    if here in above:
        raise DataError(f"{root / relative} is a link to one of its parent folders; remove it")
    with os.scandir(root / relative) as entries:
        for entry in entries:
            if entry.name.startswith(".") or entry.name.lower() in _LEFT_ASIDE:
                continue
            if entry.is_dir():
                files += _walk(root, f"{relative}/{entry.name}", (*above, here))
            elif entry.is_file():
                files.append(f"{relative}/{entry.name}")
            else:
                raise DataError(f"{entry.path} is a broken link or a device, not a file; remove it")
    return files
