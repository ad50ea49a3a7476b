"""Computes which steps of a run used an image: the order of each epoch depends on the record's seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from image_classifier.data.loader import order_images
from image_classifier.data.snapshot import build_shape
from image_classifier.data.split import compute_validation_split
from image_classifier.errors import SettingsError
from image_classifier.settings import restore_training_settings
from image_classifier.tracking.reading import read_chain

MAX_IMAGES, MAX_DRAWS = 10**8, 10**11
"""Of a training set, and of all its epochs together, whose order is computed."""


def count_steps(folder: Path) -> int:
    """Count the steps of a run that its chain has."""
    return max((line["step"] for line in read_chain(folder)), default=0)


def find_steps(
    record: dict[str, Any], num_train: int, num_steps: int, index: int, labels: NDArray[np.int64] | None = None
) -> list[int] | None:
    """Find the steps, counted from 1, that were taken on an image of the training set.

    Args:
        record: of the run.
        num_train: size of the training set, before images were set aside of it to validate on.
        num_steps: how many steps the run has taken.
        index: of the image in the training set.
        labels: int64 [num_train], which a balanced sampler goes by.

    Returns:
        None where the image was set aside to validate on.

    Raises:
        SettingsError: the sampler needs labels, or the record has settings that are not known or beyond the limits.
    """
    training = restore_training_settings(record["settings"])
    num_steps = min(num_steps, training.num_epochs * num_train)
    if num_train > MAX_IMAGES or num_steps * training.batch_size > MAX_DRAWS:
        raise SettingsError(f"the order can be computed for at most {MAX_IMAGES:,} images and 1,000 epochs")
    if training.sampler != "uniform" and labels is None:
        raise SettingsError(f"the order of --sampler {training.sampler} depends on the labels of all images")
    indices, validated = compute_validation_split(training.seed, num_train, training.validation_fraction)
    if index in validated:
        return None
    steps: list[int] = []
    steps_per_epoch = -(-len(indices) // training.batch_size)
    labels = np.empty(0, np.int64) if labels is None else labels
    window, shape = training.shuffle_window, build_shape(training.image_size)
    for epoch in range(-(-num_steps // steps_per_epoch)):
        order, *_ = order_images(training.sampler, training.seed, epoch, indices, labels, window, shape)
        places = np.flatnonzero(order == index) // training.batch_size
        steps += (epoch * steps_per_epoch + 1 + np.unique(places)).tolist()
    return [step for step in steps if step <= num_steps]
