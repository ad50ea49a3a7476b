"""Distortions: held against Pillow's, and the same pixels on every processor."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps

from image_classifier.data.distortion import (
    DISTORTIONS,
    GREY,
    MOST,
    ONE,
    Pixels,
    change_brightness,
    change_contrast,
    change_saturation,
    change_sharpness,
    distort_images,
    equalize,
    jitter_colors,
    posterize,
    rotate,
    shear,
    solarize,
    stretch_contrast,
    translate,
)
from image_classifier.data.sample import draw_sample
from image_classifier.randomness import draw_bits

IMAGES = draw_sample(40, 0, 0)[0]
LARGE = np.repeat(np.repeat(IMAGES[:6], 3, axis=2), 2, axis=3)  # 96 x 64 pixels
BITS = [draw_bits(0, 0, stream, np.arange(40)) for stream in range(3)]


def show(image: NDArray[np.uint8]) -> Image.Image:
    return Image.fromarray(image.transpose(1, 2, 0))


def read(picture: Image.Image) -> NDArray[np.int32]:
    return np.asarray(picture).transpose(2, 0, 1).astype(np.int32)


@pytest.mark.parametrize(
    ("ours", "pillows"),
    [
        (lambda image: equalize(image, 9, 1), ImageOps.equalize),
        (lambda image: posterize(image, 30, 1), lambda picture: ImageOps.posterize(picture, 4)),
        (lambda image: posterize(image, 9, 1), lambda picture: ImageOps.posterize(picture, 7)),
        (lambda image: solarize(image, 15, 1), lambda picture: ImageOps.solarize(picture, 128)),
    ],
)
def test_whole_numbers_are_those_of_pillow(
    ours: Callable[[Pixels], Pixels], pillows: Callable[[Image.Image], Image.Image]
) -> None:
    for image in IMAGES:
        assert np.array_equal(ours(image.astype(np.int32)), read(pillows(show(image))))


@pytest.mark.parametrize("factor", [0.25, 0.75, 1.0, 1.5])
@pytest.mark.parametrize(
    ("change", "enhance"),
    [
        (change_brightness, ImageEnhance.Brightness),
        (change_contrast, ImageEnhance.Contrast),
        (change_saturation, ImageEnhance.Color),
        (change_sharpness, ImageEnhance.Sharpness),
    ],
)
def test_colours_are_within_rounding_those_of_pillow(
    change: Callable[[Pixels, int], Pixels],
    enhance: Callable[[Image.Image], ImageEnhance._Enhance],
    factor: float,
) -> None:
    for image in LARGE:
        ours = change(image.astype(np.int32), round(factor * ONE))
        theirs = read(enhance(show(image)).enhance(factor))
        assert np.abs(ours - theirs).max() <= 2
        if factor == 1:
            assert np.array_equal(ours, image)


def test_a_stretched_channel_reaches_from_0_to_255_and_a_flat_one_stays() -> None:
    image = IMAGES[0].astype(np.int32) // 2 + 30
    image[2] = 77
    stretched = stretch_contrast(image, 9, 1)
    assert stretched[:2].min(axis=(1, 2)).tolist() == [0, 0] and stretched[:2].max(axis=(1, 2)).tolist() == [255, 255]
    assert (stretched[2] == 77).all()
    assert np.abs(stretched - read(ImageOps.autocontrast(show(image.astype(np.uint8))))).max() <= 1


@pytest.mark.parametrize("sign", [1, -1])
def test_an_image_is_rotated_about_its_middle(sign: int) -> None:
    for image in LARGE:
        theirs = read(show(image).rotate(30 * sign, Image.Resampling.NEAREST, fillcolor=(GREY,) * 3))
        assert (rotate(image.astype(np.int32), MOST, -sign) == theirs).mean() > 0.97


@pytest.mark.parametrize("sign", [1, -1])
def test_images_are_sheared_and_shifted_in_both_directions(sign: int) -> None:
    image = LARGE[0].astype(np.int32)
    shifted = translate(image, MOST, sign, along=1)
    kept, taken, outside = slice(35), slice(29, 64), slice(35, 64)  # of 64 columns, shifted to the left
    if sign < 0:
        kept, taken, outside = taken, kept, slice(29)
    assert np.array_equal(shifted[:, :, kept], image[:, :, taken]) and (shifted[:, :, outside] == GREY).all()
    across = shear(image, MOST, sign, along=1)
    for row in (0, 95):  # 47.5 rows from the middle
        distance = round(0.3 * (row - 47.5) * sign)
        columns = np.arange(64) + distance
        inside = (columns >= 0) & (columns < 64)
        assert np.array_equal(across[:, row, inside], image[:, row, columns[inside]])
        assert (across[:, row, ~inside] == GREY).all()
    turned = shear(image.swapaxes(1, 2), MOST, sign, along=0)
    assert np.array_equal(turned.swapaxes(1, 2), across)


def test_every_distortion_but_one_changes_images_and_leaves_uint8() -> None:
    unchanged = set()
    for number, distort in enumerate(DISTORTIONS):
        images = [distort(image.astype(np.int32), 9, sign) for image in LARGE for sign in (-1, 1)]
        assert all(image.shape == (3, 96, 64) and image.min() >= 0 and image.max() <= 255 for image in images)
        if all(np.array_equal(image, LARGE[at // 2]) for at, image in enumerate(images)):
            unchanged.add(number)
    assert unchanged == {0}


def test_factors_of_a_jitter_cover_their_range() -> None:
    flat = np.full((4000, 3, 1, 1), 100, dtype=np.uint8)
    bits = np.random.default_rng(0).integers(0, 2**64, (3, len(flat)), dtype=np.uint64)
    jitter_colors(flat, 0.5, *bits)  # of which a grey pixel shows the brightness alone
    assert (flat.min(), flat.max()) == (50, 150) and 97 < flat.mean() < 103


def test_pixels_are_those_of_every_processor() -> None:
    """Nothing here is rounded as a processor or a library likes it, so one digest holds for all."""
    digest = hashlib.sha256()
    for magnitude in (1, 9, 30):
        for distort in DISTORTIONS:
            for image in (*IMAGES[:3], *LARGE[:2]):
                for sign in (-1, 1):
                    digest.update(distort(image.astype(np.int32), magnitude, sign).astype(np.uint8).tobytes())
    images = IMAGES.copy()
    distort_images(images, 9, *BITS[:2])
    jitter_colors(images, 0.4, *BITS)
    digest.update(images.tobytes())
    assert digest.hexdigest() == "14f427f23c3a99ff97f9be9d837b50e6286c693e7795234cc26577c798335089"
