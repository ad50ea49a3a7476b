"""Detects the format of the data set at a path, and reads it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

from image_classifier.access import Reading
from image_classifier.data import cifar, folder, parquet, plugged, webdataset
from image_classifier.data.content import Content
from image_classifier.data.decoding import resize_content
from image_classifier.data.metadata import METADATA_FILE, Metadata
from image_classifier.data.parts import check_shards, complete_parts, find_part_of_file
from image_classifier.errors import DataError
from image_classifier.text import one_line

STRICT = Reading()


class Read(Protocol):
    """Reads a source."""

    def __call__(self, metadata: Metadata, reading: Reading = ..., /) -> Content:
        """Read it as its metadata say."""


@dataclass(frozen=True)
class Source:
    """A data set that was found but not yet read.

    Attributes:
        title: what it is, for people.
        root: the folder that it lies in.
        files: everything that the data is read from, relative to root.
        read: reads it.
        notes: what is to be known of it, in sentences.
        code: digest of what reads it, where that is of another package.
    """

    title: str
    root: Path
    files: tuple[str, ...]
    read: Read
    notes: tuple[str, ...] = ()
    code: str = ""


def get_folder(path: Path) -> Path:
    """Get the folder that `metadata.json` and the snapshots of a data set lie in: for tars, their own."""
    return path.parent if path.name.endswith(".tar") and not path.is_dir() else path


def find_source(path: Path) -> Source:
    """Find the one data set that lies at a path: a dataset folder, or an archive, a Parquet file or tars themselves.

    Raises:
        DataError: nothing is there, or nothing that is known, or more than one data set.
    """
    sources = find_sources(path)
    if not sources and not path.exists():
        raise DataError(f"no data set at {path}: there is neither a folder nor a file; {_advise(path)}")
    if not sources:
        raise DataError(
            f"no data set in {path}: looked for CIFAR-10 and CIFAR-100 (python or binary layout, folder or .tar.gz), "
            f"Parquet files, WebDataset tars, and subfolders with images; {_advise(path)}"
        )
    if len(sources) > 1:
        titles = " and ".join(source.title for source in sources)
        raise DataError(f"{path} contains more than one data set: {titles}; keep only one of them there")
    return sources[0]


def find_sources(path: Path) -> list[Source]:
    """Find all data sets that lie at a path, or none.

    Raises:
        DataError: a file that is no data set, files of which it is not clear how they belong together.
    """
    try:
        if path.exists() and (others := _find_plugged(path)):
            return others
        if webdataset.is_range(path):
            return [_build_tar_source(webdataset.list_range(path))]
        if path.is_dir():
            parquet_folders = sorted({file.parent for file in path.glob("[!.]*/*.parquet")})
            tars = webdataset.list_folder(path)
            read_elsewhere = {place.name for place in parquet_folders} | (tars.folders if tars else set())
            return [
                *_find_cifar(path),
                *_find_parquet(path, parquet_folders),
                *([_build_tar_source(tars)] if tars else []),
                *_find_images(path, read_elsewhere),
            ]
        return [_build_file_source(path)] if path.exists() else []
    except OSError as error:
        raise DataError(f"{error.filename or path} cannot be read: {one_line(error)}") from error


def _advise(path: Path) -> str:
    return (
        "name your data with --dataset_folder, or download CIFAR-10 with "
        f"`image_classifier data prepare --dataset_folder {shlex.quote(str(path))}` (--source sample: a generated set)"
    )


def _find_plugged(path: Path) -> list[Source]:
    """Find what sources of other packages read at a path; they come before the package's own."""
    return [
        Source(
            f"{reader.title} ({path})",
            path if path.is_dir() else path.parent,
            reader.list_files(path),
            partial(reader.read, path),
            (f"{path} is read by {reader.plugin}",),
            reader.plugin.digest,
        )
        for reader in plugged.load_readers()
        if reader.can_read(path)
    ]


def _find_cifar(path: Path) -> list[Source]:
    """Find CIFAR's layouts: as files in the folder, in their published sub-folder, or else in their archive."""
    sources = []
    here = cifar.find_layouts({entry.name for entry in path.iterdir() if entry.is_file()})
    for layout in cifar.LAYOUTS:
        if layout in here:
            sources.append(_build_cifar_source(path, layout))
        if (path / layout.folder).is_dir():
            sources.append(_build_cifar_source(path / layout.folder, layout))
        elif (path / layout.archive).is_file() and layout not in here:
            sources.append(_build_file_source(path / layout.archive))
    return sources


def _build_cifar_source(path: Path, layout: cifar.Layout) -> Source:
    files = tuple(name for name in (*layout.files, layout.meta) if (path / name).is_file())
    return Source(
        f"{layout.title} ({path})",
        path,
        files,
        lambda metadata, reading=STRICT: resize_content(cifar.read_folder(path, layout, metadata), reading),
    )


def _find_parquet(path: Path, below: list[Path]) -> list[Source]:
    """Find Parquet files in the folder or in one of the folders below it."""
    sources = []
    for place in (path, *below):
        files = sorted(place.glob("*.parquet"))
        parts: dict[str, list[Path]] = {}
        notes: list[str] = []
        others: list[Path] = []
        for file in files:
            part = find_part_of_file(file.name)
            (others if part is None else parts.setdefault(part, [])).append(file)
        if len(files) == 1 and parts.keys() <= {"train"}:
            parts, others = {"train": files}, []
        elif files:
            parts = complete_parts(parts, place, notes)
            if not parts:
                raise DataError(
                    f"{place} has the Parquet files {', '.join(file.name for file in files)}: there must be "
                    "train-*.parquet and test-*.parquet, or a single file, of which a sixth becomes the test set"
                )
        for shards in parts.values():
            check_shards([file.name for file in shards], place)
        if others:
            names = ", ".join(file.name for file in others)
            notes.append(f"{place} is read from {', '.join(f'{part}-*' for part in parts)} alone, without {names}")
        if files:
            sources.append(_build_parquet_source(place, parts, path.resolve().name, notes))
    return sources


def _build_tar_source(listing: webdataset.Listing) -> Source:
    return Source(
        f"WebDataset tars ({listing.root})",
        listing.root,
        listing.files,
        lambda metadata, reading=STRICT: webdataset.read_shards(listing, metadata, reading),
        listing.notes,
    )


def _build_parquet_source(
    place: Path, parts: Mapping[str, Sequence[Path]], name: str, notes: Sequence[str] = ()
) -> Source:
    return Source(
        f"Parquet files ({place})",
        place,
        tuple(file.name for files in parts.values() for file in files),
        lambda metadata, reading=STRICT: parquet.read_files(parts, name, metadata, reading),
        tuple(notes),
    )


def _find_images(path: Path, others: set[str]) -> list[Source]:
    """Find sub-folders with images, apart from those that belong to another kind of data set."""
    listing = folder.list_images(path, others | {layout.folder for layout in cifar.LAYOUTS})
    if listing is None:
        return []
    return [
        Source(
            f"images by class ({path})",
            path,
            listing.files,
            lambda metadata, reading=STRICT: folder.read_images(listing, metadata, reading),
            listing.notes,
        )
    ]


def _build_file_source(path: Path) -> Source:
    if path.name.endswith((".tar.gz", ".tgz")):
        return Source(
            f"an archive ({path})",
            path.parent,
            (path.name,),
            lambda metadata, reading=STRICT: resize_content(cifar.read_archive(path, metadata), reading),
        )
    if path.name.endswith(".parquet"):
        check_shards([path.name], path.parent)
        return _build_parquet_source(path.parent, {"train": [path]}, path.stem)
    if path.name.endswith(".tar"):
        return _build_tar_source(webdataset.list_file(path))
    if path.name == METADATA_FILE:
        raise DataError(f"{path} is a description of a data set: give its folder instead")
    raise DataError(f"{path} is not a data set: give a folder, a CIFAR .tar.gz, a .parquet file, or a WebDataset .tar")
