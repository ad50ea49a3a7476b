"""Reads WebDataset tars in place: members `KEY.jpg` and `KEY.cls`, or `KEY.json` with a label, which share a key.

A set is a range of shards as `train-{000000..000123}.tar`, a folder of shards, or one tar. Canonical order is the order
of the shards by name, or in the range, and of the keys in each. Nothing is unpacked: a member's name is a key and never
a path, and an image is read from where it lies in its shard.
(https://github.com/webdataset/webdataset#the-webdataset-format)
"""

from __future__ import annotations

import re
import tarfile
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from image_classifier.access import IMAGE_SUFFIXES, Reading
from image_classifier.data.card import check_sizes
from image_classifier.data.content import Batch, Content
from image_classifier.data.decoding import decode_images
from image_classifier.data.findings import Notebook
from image_classifier.data.metadata import Metadata
from image_classifier.data.parts import PARTS, check_shards, complete_parts, find_part, find_part_of_shard
from image_classifier.data.split import choose_test
from image_classifier.errors import DataError, ImageError
from image_classifier.files import parse_json
from image_classifier.text import is_name, list_classes, list_first, one_line

MAX_SHARDS = 100_000
MAX_KEYS = 10_000_000
"""Of all shards; each takes about 200 bytes of memory until the snapshot is made."""
MAX_LABEL_BYTES = 2**20
MAX_HEAD_BYTES = 2**14
"""Of the name of a member, or of what else extends its head."""

_KINDS = {**{suffix[1:]: 0 for suffix in IMAGE_SUFFIXES}, "cls": 1, "json": 2}
_JSON_KEYS = ("label", "cls")
_BRACES = re.compile(r"\{(?:(?P<first>[0-9]{1,9})\.\.(?P<last>[0-9]{1,9})|(?P<names>[^{}]*,[^{}]*))\}")
_NO_MEMBER = bytes(tarfile.BLOCKSIZE)

Label = int | str


@dataclass(frozen=True)
class Listing:
    """Shards as they were listed.

    Attributes:
        root: the folder that they lie in.
        parts: the shards of each part, relative to root and in their order; of train alone where a sixth of the images
            is used to test.
        name: what the set is called if `metadata.json` does not say.
        notes: what is to be known of it, in sentences.
    """

    root: Path
    parts: Mapping[str, tuple[str, ...]]
    name: str
    notes: tuple[str, ...] = ()

    @property
    def files(self) -> tuple[str, ...]:
        """All shards."""
        return tuple(name for names in self.parts.values() for name in names)

    @property
    def folders(self) -> set[str]:
        """The sub-folders that shards lie in."""
        return {name.split("/")[0] for name in self.files if "/" in name}


def is_range(path: Path) -> bool:
    """Say whether a path names shards by braces."""
    return "{" in path.name and path.name.endswith(".tar") and not path.exists()


def list_range(path: Path) -> Listing:
    """List the shards that a path with braces names: all of them must be there.

    Raises:
        DataError: a shard is missing, or braces hold neither a range nor names.
    """
    names = tuple(_expand(path.name, path))
    missing = [name for name in names if not (path.parent / name).is_file()]
    if missing:
        raise DataError(
            f"{path} names {len(names):,} shards, of which {len(missing):,} are missing, the first is {missing[0]}: "
            "get all of them, or correct the range"
        )
    name = path.name.partition("{")[0].strip("-_.") or path.resolve().parent.name
    notes: list[str] = []
    return Listing(path.parent, _group(names, path, notes, is_whole=False), name, tuple(notes))


def list_folder(folder: Path) -> Listing | None:
    """List the shards in a folder, or in its sub-folders of the parts; None if there are none.

    Raises:
        DataError: a shard or a part is missing, or there twice.
    """
    notes: list[str] = []
    if names := [path.name for path in _list_tars(folder)]:
        return Listing(folder, _group(names, folder, notes, is_whole=True), folder.resolve().name, tuple(notes))
    parts: dict[str, tuple[str, ...]] = {}
    for below in sorted(folder.iterdir()):
        part = find_part(below.name)
        if part is None or not below.is_dir() or not (tars := _list_tars(below)):
            continue
        if part in parts:
            raise DataError(
                f"{folder} has two subfolders for the same split, one of them is {below.name}: keep one of them"
            )
        check_shards([path.name for path in tars], below, "tar")
        parts[part] = tuple(f"{below.name}/{path.name}" for path in tars)
    if not parts:
        return None
    return Listing(folder, complete_parts(parts, folder, notes), folder.resolve().name, tuple(notes))


def list_file(path: Path) -> Listing:
    """List a tar that is a whole set by itself."""
    check_shards([path.name], path.parent, "tar")
    return Listing(path.parent, {"train": (path.name,)}, path.stem)


def _list_tars(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.tar") if not path.name.startswith("."))


def _group(names: Sequence[str], where: Path, notes: list[str], *, is_whole: bool) -> dict[str, tuple[str, ...]]:
    """Group shards by the part that their names say.

    Args:
        is_whole: the shards of a part must be all that there are of it by their numbers.
    """
    groups: dict[str | None, list[str]] = {}
    for name in names:
        groups.setdefault(find_part_of_shard(name), []).append(name)
    others = groups.pop(None, [])
    parts = {part: groups[part] for part in groups if part is not None}
    if not parts or (not others and not is_whole and len(parts) == 1):
        parts, others = {"train": list(names)}, []
    else:
        parts = complete_parts(parts, where, notes)
    for shards in parts.values():
        if is_whole:
            check_shards(shards, where, "tar")
    if others:
        notes.append(f"{where} is read from shards of {', '.join(parts)} alone, without {list_first(others, 5)}")
    return {part: tuple(shards) for part, shards in parts.items()}


def _expand(name: str, path: Path) -> list[str]:
    """Expand the braces in a name: `{000..123}` to numbers of as many digits, `{a,b}` to each of these."""
    names = [""]
    position = 0
    for match in _BRACES.finditer(name):
        first, last = match["first"], match["last"]
        if first is not None and int(last) < int(first):
            raise DataError(f"{path}: the range {match[0]} ends before it begins; write the lower number first")
        num_here = match["names"].count(",") + 1 if first is None else int(last) - int(first) + 1
        if num_here * len(names) > MAX_SHARDS:
            raise DataError(f"{path} names more than {MAX_SHARDS:,} shards; create larger shards")
        width = max(len(first), len(last)) if first is not None and "0" in (first[0], last[0]) else 0
        here = (
            match["names"].split(",")
            if first is None
            else [f"{number:0{width}d}" for number in range(int(first), int(last) + 1)]
        )
        names = [before + name[position : match.start()] + one for before in names for one in here]
        position = match.end()
    names = [before + name[position:] for before in names]
    if "{" in names[0] or "}" in names[0] or len(set(names)) < len(names):
        raise DataError(f"{path} has braces that name no shards; write the shards as name-{{000000..000123}}.tar")
    return names


@dataclass(frozen=True)
class _Shard:
    """Where the images of a shard lie in it, and what they are: keys, labels and rows [n, 2] of position and size."""

    path: Path
    keys: Sequence[str]
    labels: Sequence[Label]
    images: NDArray[np.int64]


def read_shards(listing: Listing, metadata: Metadata, reading: Reading = Reading()) -> Content:
    """Read shards; their heads and labels at once, and each image when its batch is asked for.

    Raises:
        DataError: a shard is cut or damaged, a key has no image or no label, or two of one; the classes have no names,
            or a label is none of them; there are more or fewer images than a `dataset_info` states; while the batches
            are gone through, an image that cannot be read.
    """
    shards: dict[str, list[_Shard]] = {}
    num_keys = 0
    for part, names in listing.parts.items():
        shards[part] = [_index_shard(listing.root / name, MAX_KEYS - num_keys) for name in names]
        num_keys += sum(len(shard.keys) for shard in shards[part])
    every = [shard for part in shards.values() for shard in part]
    classes = metadata.classes or _name_classes(every, listing.root)
    labels = {part: [_number_labels(shard, classes) for shard in shards[part]] for part in shards}
    chosen = {part: [np.ones(len(shard.keys), np.bool_) for shard in shards[part]] for part in shards}
    check_sizes({part: sum(map(len, labels[part])) for part in labels}, (listing.root,))
    if shards.keys() == {"train"}:
        keys = [f"{shard.path.name}/{key}".encode("utf-8", "surrogateescape") for shard in every for key in shard.keys]
        is_test = choose_test(keys, np.concatenate(labels["train"]).tolist(), metadata.split_seed)
        halves = np.split(is_test, np.cumsum([len(shard.keys) for shard in every])[:-1])
        shards, labels = {"train": every, "test": every}, {"train": labels["train"], "test": labels["train"]}
        chosen = {"train": [~half for half in halves], "test": halves}

    def batches(part: str, start: int = 0) -> Iterator[Batch]:
        encoded = _iterate_images(shards.get(part, []), labels.get(part, []), chosen.get(part, []), start)
        return decode_images(encoded, decode, notebook.left_out if reading.skip_bad else None, notebook)

    notebook = Notebook(reading)
    decode = partial(_decode, reading=reading, notebook=notebook)
    parts = {part: batches(part) for part in PARTS}
    return Content(metadata.name or listing.name, classes, parts, notebook, reading.side, num_keys, batches)


def _iterate_images(
    shards: Sequence[_Shard], labels: Sequence[NDArray[np.int64]], chosen: Sequence[NDArray[np.bool_]], start: int
) -> Iterator[tuple[tuple[str, bytes], int]]:
    """Iterate over name, bytes and label of the images that are chosen, from the one with the number `start` on."""
    from image_classifier.imaging import MAX_BYTES

    for shard, numbers, is_chosen in zip(shards, labels, chosen, strict=True):
        rows = np.flatnonzero(is_chosen)
        if start < len(rows):
            with _open(shard.path) as file:
                for row in rows[start:].tolist():
                    offset, size = shard.images[row].tolist()
                    file.seek(offset)
                    name = f"{shard.path} key {ascii(shard.keys[row])[:200]}"
                    yield (name, file.read(min(size, MAX_BYTES + 1))), int(numbers[row])
        start = max(start - len(rows), 0)


def _decode(image: tuple[str, bytes], *, reading: Reading, notebook: Notebook) -> NDArray[np.uint8]:
    from image_classifier.imaging import decode_image  # Pillow, which a run that finds its snapshot does not need

    name, content = image
    try:
        return decode_image(content, side=reading.side, fit=reading.fit, note_size=notebook.note_size)
    except ImageError as error:
        raise ImageError(f"{name}: {error}") from error


def _index_shard(path: Path, max_keys: int) -> _Shard:
    """Find image and label of each key in a shard, in the order in which the keys first come."""
    rows: dict[str, int] = {}
    places = array("q")  # of each key: position and size of its image, its .cls and its .json; 0 for none
    try:
        with _open(path) as file:
            for member in _iterate_members(file):
                place, slash, base = member.name.rpartition("/")
                stem, dot, suffix = base.partition(".")
                if not stem or not dot or not member.isreg():
                    continue
                row = rows.setdefault(place + slash + stem, len(rows))
                if 3 * 2 * row == len(places):
                    places.extend([0] * 6)
                if len(rows) > max_keys:
                    raise DataError(f"belongs to a set of more than {MAX_KEYS:,} images; use fewer")
                kind = _KINDS.get(suffix.lower())
                if kind is None:
                    continue
                at = 2 * (3 * row + kind)
                if places[at]:
                    what = ("image", ".cls", ".json")[kind]
                    raise DataError(
                        f"has a second {what} for the same key, the member {ascii(member.name)[:200]}; create the "
                        f"shard again"
                    )
                places[at], places[at + 1] = member.offset_data, member.size
            table = np.array(places, np.int64).reshape(-1, 3, 2)
            names: dict[Label, Label] = {}  # each text once
            labels = [_find_label(file, key, *places) for key, places in zip(rows, table.tolist(), strict=True)]
            return _Shard(path, list(rows), [names.setdefault(label, label) for label in labels], table[:, 0].copy())
    except DataError as error:
        raise DataError(f"{path} {error}") from None


def _find_label(file: BinaryIO, key: str, image: list[int], cls: list[int], json: list[int]) -> Label:
    """Find the label of a key whose members have these positions and sizes."""
    shown = f"has the key {ascii(key)[:200]}"
    if not image[0]:
        raise DataError(f"{shown} without an image; each key must have one of {', '.join(IMAGE_SUFFIXES)}")
    label = None
    if cls[0]:
        label = _read_label(file, shown, "cls", *cls)
    elif json[0]:
        label = _read_label(file, shown, "json", *json)
    if label is None:
        raise DataError(
            f"{shown} without a label; each key must have a .cls, or a .json with {' or '.join(_JSON_KEYS)}, a number "
            "or a name"
        )
    return label


def _read_label(file: BinaryIO, shown: str, suffix: str, offset: int, size: int) -> Label | None:
    """Read a label: a number, or the name of a class; None where a .json has none."""
    if size > MAX_LABEL_BYTES:
        raise DataError(f"{shown} with a .{suffix} of {size:,} bytes, too many for a label; create the shard again")
    file.seek(offset)
    content = file.read(size)
    value: Any
    try:
        if suffix == "cls":
            value = content.decode("utf-8").strip()
            value = int(value) if re.fullmatch("[0-9]{1,9}", value) else value
        else:
            record = parse_json(content)
            value = next((record[key] for key in _JSON_KEYS if key in record), None) if type(record) is dict else None
    except ValueError as error:
        kind = "UTF-8" if suffix == "cls" else "JSON"
        raise DataError(
            f"{shown} with a .{suffix} that is not {kind}: {one_line(error)}; create the shard again"
        ) from error
    if value is not None and not (type(value) is int and 0 <= value < 2**31) and not is_name(value):
        raise DataError(
            f"{shown} with the label {ascii(value)[:50]}; it must be a number from 0 on, or a name on one line"
        )
    label: Label | None = value
    return label


def _name_classes(shards: Iterable[_Shard], root: Path) -> tuple[str, ...]:
    """Name the classes by the labels, sorted, where these are names."""
    names = {label for shard in shards for label in shard.labels}
    texts = sorted(label for label in names if isinstance(label, str))
    if len(texts) < len(names):
        raise DataError(
            f"{root} has shards with numbers as labels: put the class names into a metadata.json in the same folder, "
            f"such as "
            '{"classes": ["first", "second"]}'
        )
    return tuple(texts)


def _number_labels(shard: _Shard, classes: Sequence[str]) -> NDArray[np.int64]:
    numbers: dict[Label, int] = {name: number for number, name in enumerate(classes)}
    numbers |= {number: number for number in range(len(classes))}
    for key, label in zip(shard.keys, shard.labels, strict=True):
        if label not in numbers:
            raise DataError(
                f"{shard.path} has the key {ascii(key)[:200]} with the label {ascii(label)[:50]}, which is not one of "
                f"the "
                f"classes {list_classes(classes)}: correct it, or metadata.json"
            )
    return np.array([numbers[label] for label in shard.labels], np.int64)


def _open(path: Path) -> BinaryIO:
    try:
        return open(path, "rb")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error


class _Heads:
    """A file of which only short pieces are read, and whole ones: tarfile takes what the heads of members ask for."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        """Read so many bytes.

        Raises:
            DataError: there are fewer, or these are too many for a head.
        """
        if not 0 <= size <= MAX_HEAD_BYTES:
            raise DataError(f"has a header of {size:,} bytes, too many for a member; create the shard again")
        content = self._file.read(size)
        if len(content) < size:
            raise DataError("is truncated: it has no end marker of a tar; get it again")
        return content


def _iterate_members(file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """Iterate over the members of a tar up to its end mark; the file may be moved meanwhile.

    Head by head: `TarFile` keeps all of them in memory, and takes a tar that was cut between two members for whole.
    """
    num_bytes, position = file.seek(0, 2), 0
    heads = _Heads(file)
    try:
        file.seek(0)
        tar = tarfile.TarFile(fileobj=heads, errors="surrogateescape")  # type: ignore[arg-type]  # it is only read
        while True:
            heads.seek(position)
            if heads.read(tarfile.BLOCKSIZE) == _NO_MEMBER:
                break
            heads.seek(position)
            member = tarfile.TarInfo.fromtarfile(tar)
            tar.pax_headers = {}  # those of all members to come, of which there may be any number
            shown = f"holds {ascii(member.name)[:200]}"
            if not (member.isreg() or member.isdir()) or member.issparse():
                raise DataError(f"{shown}, which is not a regular file; create the shard again, with files only")
            end = member.offset_data + (member.size if member.isreg() else 0)
            if not member.offset_data <= end <= num_bytes:
                raise DataError(f"is truncated: it {shown} of {member.size:,} bytes, but ends before; get it again")
            position = end + -end % tarfile.BLOCKSIZE
            yield member
    except DataError:
        raise
    except Exception as error:  # tarfile raises what it likes for a damaged head: ValueError, RecursionError, ...
        raise DataError(f"is not a tar, or is damaged: {one_line(error)}; get it again") from error
    while rest := file.read(2**20):
        if rest.count(0) < len(rest):
            raise DataError("has data after its end marker, like concatenated tars; create the shard again")
