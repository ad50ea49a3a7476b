"""Compares two data sets: added and removed images, and changed labels."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from image_classifier.data.parts import PARTS
from image_classifier.data.snapshot import Snapshot
from image_classifier.errors import DataError
from image_classifier.progress import track

Key = tuple[str, bytes, int]
"""An image: its part, the sha256 of its content, and how many equal ones came before it."""


@dataclass(frozen=True)
class Relabelled:
    """An image with another label: its numbers in both data sets, and its label there."""

    old: int
    new: int
    old_label: int
    new_label: int


@dataclass(frozen=True)
class Difference:
    """What changed.

    Attributes:
        added: numbers in the new data set.
        removed: numbers in the old one.
        relabelled: the images whose class has another name.
        num_added, num_removed, num_relabelled, num_unchanged: how many are of each part, by its name.
    """

    added: tuple[int, ...]
    removed: tuple[int, ...]
    relabelled: tuple[Relabelled, ...]
    num_added: Mapping[str, int]
    num_removed: Mapping[str, int]
    num_relabelled: Mapping[str, int]
    num_unchanged: Mapping[str, int]


@track("comparing the data sets")
def compute_difference(old: Snapshot, new: Snapshot) -> Difference:
    """Compute what changed; an image is the same if its part and its content are.

    Raises:
        DataError: the images of one are of another size than those of the other.
    """
    if old.image_size != new.image_size:
        raise DataError(
            f"the images are of {old.image_size} x {old.image_size} pixels in one data set and of {new.image_size} x "
            f"{new.image_size} in the other: use the same --image_size for both"
        )
    before, after = _index(old), _index(new)
    added = tuple(number for key, number in after.items() if key not in before)
    removed = tuple(number for key, number in before.items() if key not in after)
    relabelled = []
    for key, number in after.items():
        if key in before:
            pair = Relabelled(before[key], number, int(old.labels[before[key]]), int(new.labels[number]))
            if old.classes[pair.old_label] != new.classes[pair.new_label]:
                relabelled.append(pair)
    num_added = _count(added, new)
    num_relabelled = _count([pair.new for pair in relabelled], new)
    total = _count(range(len(new.labels)), new)
    return Difference(
        added,
        removed,
        tuple(relabelled),
        num_added,
        _count(removed, old),
        num_relabelled,
        {part: count - num_added[part] - num_relabelled[part] for part, count in total.items()},
    )


def _index(snapshot: Snapshot) -> dict[Key, int]:
    counts: Counter[tuple[str, bytes]] = Counter()
    index = {}
    for part, images in snapshot.parts.items():
        for number in range(images.start, images.stop):
            place = (part, hashlib.sha256(snapshot.images[number].data).digest())
            index[*place, counts[place]] = number
            counts[place] += 1
    return index


def _count(numbers: Sequence[int], snapshot: Snapshot) -> dict[str, int]:
    """Count those of the numbers that lie in each part."""
    counts = dict.fromkeys(PARTS, 0)
    for part, images in snapshot.parts.items():
        counts[part] = sum(images.start <= number < images.stop for number in numbers)
    return counts
