"""What changed between two data sets: images that were added and removed, and labels that are others."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass

import numpy as np

from image_classifier.data.snapshot import Snapshot

Key = tuple[str, bytes, int]
"""An image: its split, the sha256 of its content, and how many equal ones came before it."""


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
        num_added, num_removed, num_relabelled, num_unchanged: how many are of the training and of the test set.
    """

    added: tuple[int, ...]
    removed: tuple[int, ...]
    relabelled: tuple[Relabelled, ...]
    num_added: tuple[int, int]
    num_removed: tuple[int, int]
    num_relabelled: tuple[int, int]
    num_unchanged: tuple[int, int]


def compute_difference(old: Snapshot, new: Snapshot) -> Difference:
    """Compute what changed; an image is the same if its split and its content are."""
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
    total = (new.num_train, len(new.labels) - new.num_train)
    unchanged = np.subtract(np.subtract(total, num_added), num_relabelled)
    return Difference(
        added,
        removed,
        tuple(relabelled),
        num_added,
        _count(removed, old),
        num_relabelled,
        (int(unchanged[0]), int(unchanged[1])),
    )


def _index(snapshot: Snapshot) -> dict[Key, int]:
    counts: Counter[tuple[str, bytes]] = Counter()
    index = {}
    for number, image in enumerate(snapshot.images):
        place = ("train" if number < snapshot.num_train else "test", hashlib.sha256(image.data).digest())
        index[*place, counts[place]] = number
        counts[place] += 1
    return index


def _count(numbers: tuple[int, ...] | list[int], snapshot: Snapshot) -> tuple[int, int]:
    num_train = sum(number < snapshot.num_train for number in numbers)
    return num_train, len(numbers) - num_train
