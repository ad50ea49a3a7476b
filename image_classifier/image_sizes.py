"""The sides in pixels that a snapshot's images may have."""

from __future__ import annotations

from typing import Literal, TypeGuard, get_args

from image_classifier.errors import SettingsError
from image_classifier.text import quote_unprintable

ImageSize = Literal[32, 64, 96, 128, 224]

IMAGE_SIZES: tuple[ImageSize, ...] = get_args(ImageSize)
"""Sides in pixels that a snapshot's images may have."""

DEFAULT_IMAGE_SIZE: ImageSize = 32
"""CIFAR's, which the recipes are for; what was made before there were others has it."""


def is_image_size(value: object) -> TypeGuard[ImageSize]:
    """Say whether a snapshot's images may have this side in pixels."""
    return type(value) is int and value in IMAGE_SIZES


def check_image_size(value: object) -> None:
    """Check that a snapshot's images may have this side in pixels.

    Raises:
        SettingsError: they may not.
    """
    if not is_image_size(value):
        takes = ", ".join(map(str, IMAGE_SIZES))
        raise SettingsError(f"--image_size takes one of {takes}, got: {quote_unprintable(str(value))}")


def scale_batch(num_images: int, side: int) -> int:
    """Scale a number of images that are computed at once to their side in pixels, so that large ones take no more
    memory than those of 64 pixels."""
    return max(1, num_images * 64**2 // max(64, side) ** 2)
