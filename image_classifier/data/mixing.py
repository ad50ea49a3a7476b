"""Mixup and cutmix: mixes the images of a batch with each other, and their targets too.

An image's partner is the next one in its batch, the last one's the first. How much of it is taken is drawn for each
image. Pixels are mixed in 256ths and whole numbers, so that every processor computes the same ones.
"""

from __future__ import annotations

import decimal
from decimal import Decimal
from functools import cache

import numpy as np
from numpy.typing import NDArray

from image_classifier.randomness import MIX, MIX_X, MIX_Y, draw_bits

ONE = 256
IMAGES_AT_ONCE = 64  # whose 16-bit copies stay in the cache


def build_targets(num_classes: int, label_smoothing: float, weights: NDArray[np.float64]) -> NDArray[np.float32]:
    """Build what an image of each class is trained towards: float32 [C, C], a row a class, which sums to its weight.

    Args:
        weights: of an image of each class, float64 [C].
    """
    rows = np.eye(num_classes) * (1 - label_smoothing) + label_smoothing / num_classes
    return (rows * weights[:, None]).astype(np.float32)


def find_partners(num_images: int, batch_size: int) -> NDArray[np.int64]:
    """Find the image that each is mixed with, in batches that follow each other; the last may be smaller: [N]."""
    places = np.arange(num_images)
    starts = places // batch_size * batch_size
    sizes = np.minimum(num_images - starts, batch_size)
    return starts + (places - starts + 1) % sizes


def mix_images(
    images: NDArray[np.uint8],
    partners: NDArray[np.int64],
    numbers: NDArray[np.int64],
    seed: int,
    epoch: int,
    alpha: float,
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Mix images [N, 3, H, W] with their partners (Zhang and others: mixup, 2017).

    Args:
        partners: of each image, int64 [N].
        numbers: by which the images are told apart in an epoch, int64 [N].
        alpha: shares are drawn from Beta(alpha, alpha).

    Returns:
        The mixed images, and the share of each image in its mixture, float32 [N].
    """
    parts = draw_parts(draw_bits(seed, epoch, MIX, numbers), alpha)
    mixed = np.empty_like(images)
    for start in range(0, len(images), IMAGES_AT_ONCE):
        some = slice(start, start + IMAGES_AT_ONCE)
        part = parts[some, None, None, None].astype(np.uint16)
        mixed[some] = (part * images[some] + (ONE - part) * images[partners[some]] + ONE // 2) >> 8
    return mixed, (parts / ONE).astype(np.float32)


def cut_images(
    images: NDArray[np.uint8],
    partners: NDArray[np.int64],
    numbers: NDArray[np.int64],
    seed: int,
    epoch: int,
    alpha: float,
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Take a rectangle of images [N, 3, H, W] from their partners (Yun and others: CutMix, 2019).

    It has the sides' ratio of the image and a centre anywhere in it; what lies outside is cut off. Arguments and
    results are those of `mix_images`, but the area that is left to an image is its share.
    """
    height, width = images.shape[2:]
    rows, columns = (
        (draw_bits(seed, epoch, stream, numbers) % np.uint64(size)).astype(np.int64)
        for stream, size in ((MIX_Y, height), (MIX_X, width))
    )
    sides = np.sqrt(1 - draw_parts(draw_bits(seed, epoch, MIX, numbers), alpha) / ONE)  # IEEE 754 defines the root
    reaches = [(sides * size).astype(np.int64) // 2 for size in (height, width)]
    tops, lefts = (np.maximum(at - reach, 0) for at, reach in zip((rows, columns), reaches, strict=True))
    bottoms = np.minimum(rows + reaches[0], height)
    rights = np.minimum(columns + reaches[1], width)
    mixed = images.copy()
    edges = (edge.tolist() for edge in (partners, tops, bottoms, lefts, rights))
    for image, partner, top, bottom, left, right in zip(mixed, *edges, strict=True):
        image[:, top:bottom, left:right] = images[partner, :, top:bottom, left:right]
    return mixed, (1 - (bottoms - tops) * (rights - lefts) / (height * width)).astype(np.float32)


def draw_parts(bits: NDArray[np.uint64], alpha: float) -> NDArray[np.int64]:
    """Turn random bits [N] into numbers drawn from Beta(alpha, alpha), in 256ths: int64 [N], 0 to 256."""
    return np.searchsorted(_compute_thresholds(alpha), bits, side="right").astype(np.int64)


@cache
def _compute_thresholds(alpha: float) -> NDArray[np.uint64]:
    """Compute the bits from which on a drawn number is rounded to the next 256th: uint64 [256].

    They are the distribution function between two 256ths, times 2**64. Decimal's arithmetic is defined to the last
    digit; a mathematical library's logarithm, by which one would draw from a beta distribution, differs by processor.
    """
    with decimal.localcontext(decimal.Context(prec=50)):
        middle = 2 * _compute_partial_beta(Decimal(alpha), Decimal("0.5"))
        lower = [
            int(_compute_partial_beta(Decimal(alpha), (number + Decimal("0.5")) / ONE) / middle * 2**64)
            for number in range(ONE // 2)
        ]
    upper = [min(2**64 - threshold, 2**64 - 1) for threshold in reversed(lower)]
    return np.array(lower + upper, dtype=np.uint64)


def _compute_partial_beta(alpha: Decimal, x: Decimal) -> Decimal:
    """Compute the integral of Beta(alpha, alpha) from 0 to x, up to a factor that depends on alpha alone.

    By the series of DLMF 8.17.8, whose terms are all positive.
    """
    term = total = Decimal(1)
    number = 0
    while term > total * Decimal("1e-45"):
        term *= (2 * alpha + number) / (alpha + 1 + number) * x
        total += term
        number += 1
    return (alpha * (x * (1 - x)).ln()).exp() * total
