"""Classes of which a data set has too few images, none to test with, or many more than of another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

FEW_IMAGES = 10
"""Fewer images of a class to train with get a warning."""
LARGEST_MIX = 10
"""A class with more than so many times the images of another gets a warning."""

_NUM_LISTED = 5


def find_imbalances(classes: Sequence[str], counts: Mapping[str, NDArray[np.int64]]) -> list[str]:
    """Find what is out of balance, in a sentence each.

    Args:
        counts: number of images of each class, int64 [C], in each part.
    """
    train, test = counts["train"], counts["test"]
    warnings = []
    few, untested = (np.flatnonzero(is_so).tolist() for is_so in (train < FEW_IMAGES, test == 0))
    if len(few):
        names = [f"{classes[label]} ({train[label]})" for label in few]
        warnings.append(f"fewer than {FEW_IMAGES} images to train with: {_list(names)}")
    if len(untested):
        warnings.append(f"no image to test with: {_list([classes[label] for label in untested])}")
    largest, smallest = int(train.argmax()), int(np.where(train > 0, train, train.max()).argmin())
    ratio = train[largest] / train[smallest]
    if ratio > LARGEST_MIX:
        warnings.append(
            f"classes differ in size by {ratio:.0f} : 1: {train[largest]:,} images of {classes[largest]} to train "
            f"with, {train[smallest]:,} of {classes[smallest]}"
        )
    return warnings


def _list(names: Sequence[str]) -> str:
    listed = ", ".join(names[:_NUM_LISTED])
    return f"{listed} and {len(names) - _NUM_LISTED:,} more classes" if len(names) > _NUM_LISTED else listed
