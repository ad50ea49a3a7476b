"""Set images of a data set aside, to test with or to validate with."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from image_classifier.randomness import SPLIT, draw_bits


def choose_test(keys: Sequence[bytes], labels: Sequence[int], seed: int) -> NDArray[np.bool_]:
    """Choose a sixth of each class, rounded down, for the test set: [N] bool.

    The choice hangs on the keys and the seed alone, not on the order that the images come in.
    """
    ranks: dict[int, list[tuple[bytes, int]]] = {}
    for position, (key, label) in enumerate(zip(keys, labels, strict=True)):
        ranks.setdefault(label, []).append((hashlib.sha256(b"%d/%s" % (seed, key)).digest(), position))
    chosen = np.zeros(len(keys), np.bool_)
    for ranked in ranks.values():
        for _, position in sorted(ranked)[: len(ranked) // 6]:
            chosen[position] = True
    return chosen


def count_validation_images(num_images: int, fraction: float) -> int:
    """Count the images that are set aside of a training set."""
    return round(num_images * fraction)


def compute_validation_split(
    seed: int, num_images: int, fraction: float
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Set a part of the training set aside; return the indices to train on and those to validate on, ascending.

    An image's place is drawn from the seed and its index, so the part is the same in every run with that seed.
    """
    permutation = np.argsort(draw_bits(seed, 0, SPLIT, np.arange(num_images)), kind="stable")
    num_validation = count_validation_images(num_images, fraction)
    return np.sort(permutation[num_validation:]), np.sort(permutation[:num_validation])
