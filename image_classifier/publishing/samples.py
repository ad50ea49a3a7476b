"""Sample test images of a published model, side by side in one PNG file."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from image_classifier.errors import SettingsError

MAX_SAMPLES = 24
"""So that the file has at most 4 MB, whatever the images' size."""


def check_num_samples(num_samples: int) -> None:
    """Check how many images are to be shown.

    Raises:
        SettingsError: they are more than there may be, or fewer than none.
    """
    if not 0 <= num_samples <= MAX_SAMPLES:
        raise SettingsError(f"--num_samples takes 0 to {MAX_SAMPLES}, got: {num_samples}")


def choose_samples(labels: NDArray[np.int64], num_samples: int) -> NDArray[np.int64]:
    """Choose images: the first of each class, then the second; where there are more classes, evenly over them.

    Args:
        labels: int64 [N].

    Returns:
        int64 [M], their numbers; fewer than asked for where there are fewer.
    """
    by_class = np.argsort(labels, kind="stable")
    _, starts, counts = np.unique(labels[by_class], return_index=True, return_counts=True)
    rank = np.arange(len(labels)) - np.repeat(starts, counts)  # of an image within its class
    order = by_class[np.lexsort((labels[by_class], rank))]
    if num_samples < len(starts):
        return order[np.linspace(0, len(starts) - 1, num_samples).round().astype(np.int64)]
    return order[:num_samples]


def encode_samples(images: NDArray[np.uint8]) -> bytes:
    """Encode images [M, 3, S, S] as a PNG of S rows and M times S columns."""
    strip = np.concatenate(list(images.transpose(0, 2, 3, 1)), axis=1)
    buffer = io.BytesIO()
    Image.fromarray(strip).save(buffer, format="PNG")
    return buffer.getvalue()
