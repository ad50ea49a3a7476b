"""Colour and geometric augmentation in integer arithmetic, so every processor computes the same pixels.

An image is [..., 3, H, W]. A factor of a distortion counts 256ths: 256 leaves an image as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import numpy as np
from numpy.typing import NDArray

GREY = 128
ONE = 256
"""The factor that changes nothing."""
FIXED_POINT_BITS = 16
MOST = 30
"""The highest magnitude of RandAugment."""
IMAGES_AT_ONCE = 64  # whose 32-bit copies stay in the cache

Pixels = NDArray[np.int32]


def jitter_colors(images: NDArray[np.uint8], strength: float, *bits: NDArray[np.uint64]) -> None:
    """Multiply brightness, contrast and saturation of images [N, 3, H, W], in place.

    Args:
        strength: factors lie from 1 - strength to 1 + strength.
        bits: random bits [N] for each of the three.
    """
    reach = max(round(strength * ONE), 1)
    factors = [(each % np.uint64(2 * reach + 1)).astype(np.int32) + (ONE - reach) for each in bits]
    for start in range(0, len(images), IMAGES_AT_ONCE):
        part = slice(start, start + IMAGES_AT_ONCE)
        pixels = images[part].astype(np.int32)
        for change, factor in zip((change_brightness, change_contrast, change_saturation), factors, strict=True):
            pixels = change(pixels, factor[part, None, None, None])
        images[part] = pixels


def distort_images(images: NDArray[np.uint8], magnitude: int, *bits: NDArray[np.uint64]) -> None:
    """Distort images [N, 3, H, W] in place, once for each array of random bits [N].

    RandAugment (Cubuk and others, 2019): each time one of fourteen distortions, all of one magnitude, with the ranges
    of torchvision's `RandAugment`.

    Args:
        magnitude: 1 to 30.
    """
    for each in bits:
        numbers = (each % np.uint64(len(DISTORTIONS))).tolist()
        signs = np.where(each >> np.uint64(63), 1, -1).tolist()
        for image, number, sign in zip(images, numbers, signs, strict=True):
            image[:] = DISTORTIONS[number](image.astype(np.int32), magnitude, sign)


def blend(image: Pixels, other: Pixels | int, factor: Pixels | int) -> Pixels:
    """Move from another image through this one by a factor, rounded and cut to 0 to 255."""
    blended: Pixels = np.clip((image * factor + other * (ONE - factor) + ONE // 2) >> 8, 0, 255)
    return blended


def change_brightness(image: Pixels, factor: Pixels | int) -> Pixels:
    """Multiply the pixels."""
    return blend(image, 0, factor)


def change_contrast(image: Pixels, factor: Pixels | int) -> Pixels:
    """Multiply the pixels' distance from the mean grey of the image."""
    grey = compute_grey(image)
    num_pixels = grey.shape[-1] * grey.shape[-2]
    mean = (grey.sum(axis=(-3, -2, -1), dtype=np.int64, keepdims=True) + num_pixels // 2) // num_pixels
    return blend(image, mean.astype(np.int32), factor)


def change_saturation(image: Pixels, factor: Pixels | int) -> Pixels:
    """Multiply the pixels' distance from their own grey."""
    return blend(image, compute_grey(image), factor)


def change_sharpness(image: Pixels, factor: Pixels | int) -> Pixels:
    """Multiply the pixels' distance from those of a smoothed image; the outermost stay."""
    height, width = image.shape[-2:]
    smooth = image.copy()
    parts = [image[..., y : height - 2 + y, x : width - 2 + x] for y in range(3) for x in range(3)]
    smooth[..., 1:-1, 1:-1] = (sum(parts) + 4 * image[..., 1:-1, 1:-1] + 6) // 13
    return blend(image, smooth, factor)


def compute_grey(image: Pixels) -> Pixels:
    """Compute the luma (ITU-R 601) of each pixel: [..., 1, H, W]."""
    red, green, blue = (image[..., channel, None, :, :] for channel in range(3))
    grey: Pixels = (77 * red + 150 * green + 29 * blue + 128) >> 8
    return grey


def posterize(image: Pixels, magnitude: int, sign: int) -> Pixels:
    """Keep the highest bits of each number: 4 at the highest magnitude."""
    return image & -(1 << round(4 * magnitude / MOST))


def solarize(image: Pixels, magnitude: int, sign: int) -> Pixels:
    """Invert the numbers from a threshold on, which the magnitude lowers from 255 to 0."""
    return np.where(image >= 255 - 255 * magnitude // MOST, 255 - image, image)


def stretch_contrast(image: Pixels, magnitude: int, sign: int) -> Pixels:
    """Stretch each channel to 0 to 255."""
    low, high = (find(axis=(1, 2), keepdims=True) for find in (image.min, image.max))
    return np.where(high > low, (image - low) * 255 // np.maximum(high - low, 1), image)


def equalize(image: Pixels, magnitude: int, sign: int) -> Pixels:
    """Give each channel an even histogram, as Pillow does."""
    channels = []
    for channel in image:
        counts = np.bincount(channel.ravel(), minlength=256)
        step = (counts.sum() - counts[np.flatnonzero(counts)[-1]]) // 255
        before = np.cumsum(counts) - counts
        channels.append(np.minimum((before + step // 2) // step, 255)[channel] if step else channel)
    return np.stack(channels).astype(np.int32)


def shear(image: Pixels, magnitude: int, sign: int, *, along: int) -> Pixels:
    """Shift rows (along 1) or columns (along 0) by up to 0.3 of their distance from the middle."""
    slope = sign * _to_fixed_point(0.3 * magnitude / MOST)
    one = 1 << FIXED_POINT_BITS
    return transform(image, (one, slope, 0, one) if along else (one, 0, slope, one))


def translate(image: Pixels, magnitude: int, sign: int, *, along: int) -> Pixels:
    """Shift to the side (along 1) or up and down (along 0) by up to 150/331 of the image."""
    distance = sign * (image.shape[1 + along] * 150 * magnitude // (331 * MOST))
    one = 1 << FIXED_POINT_BITS
    return transform(image, (one, 0, 0, one), (distance, 0) if along else (0, distance))


def rotate(image: Pixels, magnitude: int, sign: int) -> Pixels:
    """Rotate by up to 30 degrees.

    The tangent of half the angle grows with the magnitude. It gives sine and cosine by operations that IEEE 754
    defines, which the functions of a mathematical library are not.
    """
    tangent = sign * (2 - math.sqrt(3)) * magnitude / MOST
    scale = 1 + tangent * tangent
    cosine, sine = _to_fixed_point((1 - tangent * tangent) / scale), _to_fixed_point(2 * tangent / scale)
    return transform(image, (cosine, sine, -sine, cosine))


def transform(image: Pixels, matrix: tuple[int, int, int, int], shift: tuple[int, int] = (0, 0)) -> Pixels:
    """Take each pixel from the nearest one at matrix @ (x, y) + shift, from the middle; grey from outside.

    Args:
        matrix: of x from x, x from y, y from x, y from y, in 65536ths.
        shift: x and y in pixels.
    """
    height, width = image.shape[1:]
    places, is_outside = _locate_sources(height, width, matrix, shift)
    taken = image.reshape(len(image), -1)[:, places]
    taken[:, is_outside] = GREY
    return taken.reshape(image.shape)


def _to_fixed_point(number: float) -> int:
    return round(number * (1 << FIXED_POINT_BITS))


@cache
def _locate_sources(
    height: int, width: int, matrix: tuple[int, int, int, int], shift: tuple[int, int]
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Say from where in an image, row by row, each pixel is taken, and which lie outside: both [H * W]."""
    # Twice the distance from the middle, which is a whole number.
    y, x = np.meshgrid(*(2 * np.arange(size) - (size - 1) for size in (height, width)), indexing="ij")
    half = 1 << FIXED_POINT_BITS
    columns, rows = (
        ((along_x * x + along_y * y + ((size - 1) << FIXED_POINT_BITS) + half) >> (FIXED_POINT_BITS + 1)) + distance
        for along_x, along_y, size, distance in zip(matrix[::2], matrix[1::2], (width, height), shift, strict=True)
    )
    is_outside = (columns < 0) | (columns >= width) | (rows < 0) | (rows >= height)
    places = np.clip(rows, 0, height - 1) * width + np.clip(columns, 0, width - 1)
    return places.ravel(), is_outside.ravel()


def _enhance(change: Callable[[Pixels, int], Pixels]) -> Callable[[Pixels, int, int], Pixels]:
    """Make a distortion of a change by a factor, up to 0.9 below or above 1."""
    return lambda image, magnitude, sign: change(image, ONE + sign * round(0.9 * ONE * magnitude / MOST))


DISTORTIONS: tuple[Callable[[Pixels, int, int], Pixels], ...] = (
    lambda image, magnitude, sign: image,
    lambda image, magnitude, sign: shear(image, magnitude, sign, along=1),
    lambda image, magnitude, sign: shear(image, magnitude, sign, along=0),
    lambda image, magnitude, sign: translate(image, magnitude, sign, along=1),
    lambda image, magnitude, sign: translate(image, magnitude, sign, along=0),
    rotate,
    _enhance(change_brightness),
    _enhance(change_saturation),
    _enhance(change_contrast),
    _enhance(change_sharpness),
    posterize,
    solarize,
    stretch_contrast,
    equalize,
)
"""Of an image [3, H, W], by a magnitude from 0 to 30, in one direction (1) or the other (-1)."""
