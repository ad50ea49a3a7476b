"""Names of training, validation and test splits, and a check that all shards of a split exist."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Literal, TypeVar

from image_classifier.errors import DataError
from image_classifier.text import list_first

T = TypeVar("T")

PARTS = ("train", "validation", "test")
"""The parts of a data set, in the order that a snapshot has them in."""

CONDITIONS = ("class", "split", "source", "added_by")
"""What a version may be limited by; each takes some of the values that samples have."""

_NAMES = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "test": "test",
    "testing": "test",
}
_FILE = re.compile(rf"(?P<part>{'|'.join(sorted(_NAMES, reverse=True))})(?![a-z]).*\.parquet", re.IGNORECASE)
_SHARD = re.compile(
    r"(?P<stem>.*?)[-_.]?(?P<index>[0-9]{1,9})(?P<of>-of-(?P<count>[0-9]{1,9})(?:-[0-9a-f]{6,64})?)?\.(parquet|tar)"
)


def find_part(folder_name: str) -> str | None:
    """Find the part that a folder of this name holds; None for any other name."""
    return _NAMES.get(folder_name.lower())


def find_part_of_file(file_name: str) -> str | None:
    """Find the part that a Parquet file of this name belongs to; None for any other name."""
    match = _FILE.fullmatch(file_name)
    return None if match is None else _NAMES[match["part"].lower()]


def find_part_of_shard(file_name: str) -> str | None:
    """Find the part that a tar of this name belongs to, such as imagenet-train-000000.tar; None where it says none."""
    words = re.split("[^a-z]+", file_name.lower())
    return next((_NAMES[word] for word in words if word in _NAMES), None)


def complete_parts(parts: Mapping[str, T], where: object, notes: list[str]) -> dict[str, T]:
    """Order the parts that a source has; its validation part is used to test where it has no test part.

    Args:
        notes: gets a sentence where that is so.

    Raises:
        DataError: it has some of the parts, but nothing to train or nothing to test with.
    """
    found = dict(parts)
    if found.keys() == {"train", "validation"}:
        found["test"] = found.pop("validation")
        notes.append(f"{where} has no test split: its validation split is used for the test")
    missing = [part for part in ("train", "test") if part not in found]
    if found and missing:
        raise DataError(
            f"{where} has a split called {' and '.join(found)}, but none called {' or '.join(missing)}: add it; or put "
            "all class folders into one folder, and a sixth of the images becomes the test set"
        )
    return {part: found[part] for part in PARTS if part in found}


def check_shards(names: Sequence[str], where: object, kind: Literal["Parquet", "tar"] = "Parquet") -> None:
    """Check that Parquet files, or tars, of one part are all of its shards, each once, by their names.

    Names are `NAME-00000-of-00002.parquet`, perhaps with a hash behind; or `NAME-0.parquet`, `NAME-1.parquet` and so
    on; or one file with any other name.

    Raises:
        DataError: one is missing, there twice, or does not say which shard it is.
    """
    matches = [_SHARD.fullmatch(name) for name in names]
    if len(names) == 1 and not (matches[0] and (matches[0]["of"] or matches[0]["index"].startswith("00"))):
        return  # one file, whose number is part of its name, as in cifar10.parquet
    shards: dict[int, str] = {}
    kinds, listed = set(), list_first(names, 5)
    for name, match in zip(names, matches, strict=True):
        if match is None:
            raise DataError(
                f"{where} has the {kind} files {listed}, and {name} has no shard number; name shards "
                f"as train-00000-of-00002.{kind.lower()}, and remove other files"
            )
        index = int(match["index"])
        if index in shards:
            raise DataError(f"{where} has shard {index} twice, as {shards[index]} and {name}; remove one of them")
        shards[index] = name
        kinds.add((match["stem"], None if match["count"] is None else int(match["count"])))
    if len(kinds) > 1:
        raise DataError(
            f"{where} has the {kind} files {listed}, whose names are those of different sets of shards; "
            "remove those that do not belong there"
        )
    ((_, count),) = kinds
    wanted = range(min(1, *shards), max(shards) + 1) if count is None else range(count)
    if max(shards) not in wanted:
        raise DataError(
            f"{where} has {shards[max(shards)]}, but shards are numbered from 0 to {len(wanted) - 1}; remove it"
        )
    num_missing = len(wanted) - len(shards)
    if num_missing:
        first = next(index for index in wanted if index not in shards)
        raise DataError(
            f"{where} has {len(shards):,} of {len(wanted):,} {kind} shards, {listed}: {num_missing:,} are "
            f"missing, the first is number {first}; get all of them, or give a file that is the whole set a name "
            "without a number"
        )
