"""Class imbalance: warnings about a data set, and class weights and sampling for the training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from image_classifier.randomness import ORDER, SAMPLE, draw_bits
from image_classifier.text import list_first

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
        warnings.append(f"fewer than {FEW_IMAGES} training images: {list_first(names, _NUM_LISTED)}")
    if len(untested):
        warnings.append(f"no test image: {list_first([classes[label] for label in untested], _NUM_LISTED)}")
    if np.count_nonzero(train) == 1:
        warnings.append(
            f"only one class has training images, {classes[int(train.argmax())]}, so the network can learn nothing; "
            "of a folder of images, each subfolder is a class"
        )
    largest, smallest = int(train.argmax()), int(np.where(train > 0, train, train.max()).argmin())
    ratio = train[largest] / train[smallest]
    if ratio > LARGEST_MIX:
        warnings.append(
            f"classes differ in size by {ratio:.0f} : 1: {train[largest]:,} training images of {classes[largest]}, "
            f"{train[smallest]:,} of {classes[smallest]}"
        )
    return warnings


def compute_class_weights(labels: NDArray[np.int64], num_classes: int) -> NDArray[np.float64]:
    """Compute the weight of an image of each class by the inverse of the class's frequency: float64 [C].

    The weights of all images have the mean 1. A class without images has none.
    """
    counts = np.bincount(labels, minlength=num_classes)
    return np.where(counts > 0, len(labels) / (np.count_nonzero(counts) * np.maximum(counts, 1)), 0.0)


def compute_balanced_order(seed: int, epoch: int, labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Compute the order of an epoch of as many images as there are, equally many of each class: int64 [N].

    A class is gone through as often as it takes, and of the last time a part is drawn. The number of an image that
    comes for the k-th time, counted from 0, is its index plus k times N. Where all classes are of one size, the order
    is that of `compute_order`. A remainder goes to other classes each epoch.
    """
    num_images, present = len(labels), np.unique(labels)
    drawn = [np.empty(0, dtype=np.int64)]
    for place, label in enumerate(present):
        own = np.flatnonzero(labels == label)
        rank = (place + epoch) % len(present)
        num_wanted = (num_images + len(present) - 1 - rank) // len(present)
        num_times, rest = divmod(num_wanted, len(own))
        last = own + num_times * num_images
        chosen = np.argsort(draw_bits(seed, epoch, SAMPLE, last), kind="stable")[:rest]
        drawn += [own + time * num_images for time in range(num_times)] + [np.sort(last[chosen])]
    numbers = np.sort(np.concatenate(drawn))
    return numbers[np.argsort(draw_bits(seed, epoch, ORDER, numbers), kind="stable")]
