"""The sample set: ten kinds of shapes and patterns, drawn from a seed, for a first run without a network.

Each image has a shape of random place, size, angle and colour on a background that runs from one colour to another,
with specks and noise. All arithmetic is in integers, and all chance comes from a hash of (seed, split, image, draw),
so the bits depend neither on the machine nor on the version of a library.
"""

from __future__ import annotations

import json
import math
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from image_classifier.data.metadata import METADATA_FILE, METADATA_FORMAT
from image_classifier.errors import DataError, SettingsError
from image_classifier.progress import track
from image_classifier.storage import locked_folder, storage_error, write_atomically, write_folder_atomically

CLASSES = ("circle", "ring", "crescent", "square", "triangle", "star", "cross", "stripes", "checkerboard", "dots")
MAX_IMAGES = 100_000
"""The set is drawn in memory."""

_SIDE = 32
_SAMPLES = 4  # samples a pixel along each axis: edges have 17 grades
_UNITS = 8  # lengths are in eighths of a pixel
_CHUNK = 250  # images that are drawn at once: 16 MiB an array of samples
_NUM_SPECKS = 4
_NUM_DRAWS = 64
_TRAIN, _TEST = 0, 1

_ANGLES = 256
_COS = np.array([round(4096 * math.cos(2 * math.pi * step / _ANGLES)) for step in range(_ANGLES)], np.int32)
_SIN = np.array([round(4096 * math.sin(2 * math.pi * step / _ANGLES)) for step in range(_ANGLES)], np.int32)

Integers = NDArray[np.int32]


@track("generating the sample set")
def write_sample(folder: Path, *, num_train: int = 5000, num_test: int = 1000, seed: int = 0) -> None:
    """Draw the sample set and write it in CIFAR-10's binary layout, with a `metadata.json` that says `sample`.

    Raises:
        SettingsError: there would be no image to train or to test with, or too many.
        DataError: the folder holds one already, or another process writes one to it.
        StorageError: the disk refused.
    """
    for option, value in (("num_train", num_train), ("num_test", num_test)):
        if not 1 <= value <= MAX_IMAGES:
            raise SettingsError(f"--{option} takes a whole number from 1 to {MAX_IMAGES}, got: {value}")
    if not 0 <= seed < 2**63:
        raise SettingsError(f"--seed takes a whole number from 0 to 2**63 - 1, got: {seed}")
    images, labels = draw_sample(num_train, _TRAIN, seed)
    parts = zip(np.array_split(images, 5), np.array_split(labels, 5), strict=True)
    files = {f"data_batch_{number}.bin": _build_records(*part) for number, part in enumerate(parts, 1)}
    files["test_batch.bin"] = _build_records(*draw_sample(num_test, _TEST, seed))
    files["batches.meta.txt"] = "".join(f"{name}\n" for name in CLASSES).encode()
    metadata = {"format_version": METADATA_FORMAT, "name": "sample", "classes": CLASSES}
    files[METADATA_FILE] = json.dumps(metadata, indent=1).encode() + b"\n"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        if not folder.exists():
            return write_folder_atomically(folder, files)
        with locked_dataset(folder):
            if all((folder / name).exists() for name in files):
                raise DataError(f"{folder} has a sample set already; leave out --source to use it")
            for name, content in files.items():
                write_atomically(folder / name, content)
    except OSError as error:
        raise storage_error(folder, error) from error


def locked_dataset(folder: Path) -> AbstractContextManager[None]:
    """Lock a folder into which a data set is written file by file.

    Raises:
        DataError: another process holds it.
        OSError: there is no such folder.
    """
    return locked_folder(folder, DataError(f"another process writes a data set to {folder}; wait for it"))


def _build_records(images: NDArray[np.uint8], labels: NDArray[np.int64]) -> bytes:
    return np.column_stack([labels.astype(np.uint8), images.reshape(len(images), -1)]).tobytes()


def draw_sample(num_images: int, split: int, seed: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Draw images uint8 [N, 3, 32, 32] and their labels int64 [N], each class as often as the others."""
    index = np.arange(num_images, dtype=np.uint64)
    key = _hash(np.array([seed], np.uint64), split)
    order = np.argsort(_hash(_hash(key, 0), index), kind="stable")
    labels = np.empty(num_images, np.int64)
    labels[order] = np.arange(num_images) % len(CLASSES)
    images = np.empty((num_images, 3, _SIDE, _SIDE), np.uint8)
    keys = _hash(_hash(key, 1), index)
    for start in range(0, num_images, _CHUNK):
        part = slice(start, start + _CHUNK)
        images[part] = _draw(labels[part], keys[part])
    return images, labels


def _hash(key: NDArray[np.uint64], value: NDArray[np.uint64] | int) -> NDArray[np.uint64]:
    """Mix a value into a key: the finalizer of splitmix64, https://prng.di.unimi.it/splitmix64.c."""
    counter = np.atleast_1d(np.asarray(value, np.uint64)) + np.uint64(1)
    mixed: NDArray[np.uint64] = key + counter * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


class _Chance:
    """Random whole numbers of a chunk of images, drawn in a fixed order."""

    def __init__(self, keys: NDArray[np.uint64]) -> None:
        self._keys = keys[:, None]
        self._count = 0

    def draw(self, low: int, high: int, *shape: int) -> Integers:
        """Draw numbers from low up to but not including high, [n, *shape]."""
        size = math.prod(shape)
        counter = np.arange(self._count, self._count + size, dtype=np.uint64)
        self._count += size
        numbers = (_hash(self._keys, counter[None]) >> np.uint64(32)) * np.uint64(high - low) >> np.uint64(32)
        return (numbers.astype(np.int32) + low).reshape(-1, *shape)


def _draw(labels: NDArray[np.int64], keys: NDArray[np.uint64]) -> NDArray[np.uint8]:
    chance = _Chance(keys)
    ground, other, shape = _draw_colours(chance)
    image = _draw_ground(chance, ground, other)
    image = _blend(image, shape, _draw_shapes(chance, labels))
    for _ in range(_NUM_SPECKS):
        image = _blend(image, chance.draw(0, 256, 3), _draw_speck(chance))
    image = np.where(chance.draw(0, 6, 1, 1, 1) == 0, 255 - image, image)  # a few are dark on light
    strength = chance.draw(2, 20, 1, 1, 1)
    noise = chance.draw(0, 256, 4, 3, _SIDE, _SIDE).sum(axis=1, dtype=np.int32) - 510  # close to a bell curve
    drawn: NDArray[np.uint8] = np.clip(image + (noise * strength >> 7), 0, 255).astype(np.uint8)
    return drawn


def _draw_colours(chance: _Chance) -> tuple[Integers, Integers, Integers]:
    """Draw two dark colours of the ground and a light one of the shape that stands out from both, each [n, 3]."""
    ground = chance.draw(0, 150, 3)
    other = np.clip(ground + chance.draw(-60, 61, 3), 0, 255)
    candidates = chance.draw(80, 256, 2, 3)
    contrast = np.minimum(*(np.abs(candidates - colour[:, None]).sum(axis=2) for colour in (ground, other)))
    return ground, other, candidates[np.arange(len(candidates)), contrast.argmax(axis=1)]


def _draw_ground(chance: _Chance, ground: Integers, other: Integers) -> Integers:
    """Draw a run of colour in a random direction, [n, 3, 32, 32]."""
    angle = chance.draw(0, _ANGLES, 1, 1)
    across, down = np.arange(_SIDE)[None, None, :] * 2 - 31, np.arange(_SIDE)[None, :, None] * 2 - 31
    share = (across * _COS[angle] + down * _SIN[angle]) // (44 * 32) + 128  # 0 to 256 from edge to edge
    share = np.clip(share, 0, 256)[:, None].astype(np.int32)
    run: Integers = ground[:, :, None, None] + ((other - ground)[:, :, None, None] * share >> 8)
    return run


def _blend(image: Integers, colour: Integers, cover: Integers) -> Integers:
    """Lay a colour [n, 3] over an image where a shape covers it, [n, 32, 32] from 0 to 16."""
    return image + ((colour[:, :, None, None] - image) * cover[:, None] >> 4)


def _draw_speck(chance: _Chance) -> Integers:
    """Draw a small disc that distracts."""
    radius = chance.draw(3, 26, 1, 1)
    across, down = _offsets(chance.draw(0, _SIDE * _UNITS, 2))
    return _average(across * across + down * down < radius * radius)


def _draw_shapes(chance: _Chance, labels: NDArray[np.int64]) -> Integers:
    """Draw each image's shape; [n, 32, 32] from 0 to 16."""
    radius = chance.draw(9 * _UNITS, 15 * _UNITS, 1, 1)
    margin = radius[:, 0] * 3 // 4 + _UNITS  # a shape may leave the image by up to a quarter of its radius
    centre = margin + (chance.draw(0, 256, 2) * (_SIDE * _UNITS - 2 * margin) >> 8)
    angle = chance.draw(0, _ANGLES, 1, 1)
    across, down = _offsets(centre)
    # Along the shape's own axes; its radius is 256 long.
    u = ((across * _COS[angle] + down * _SIN[angle]) // radius) >> 4
    v = ((down * _COS[angle] - across * _SIN[angle]) // radius) >> 4
    inside = np.zeros(u.shape, np.bool_)
    for label in range(len(CLASSES)):
        chosen = labels == label
        inside[chosen] = _is_inside(CLASSES[label], u[chosen], v[chosen])
    return _average(inside)


def _offsets(centre: Integers) -> tuple[Integers, Integers]:
    """Compute how far each sample lies to the right of and below a centre [n, 2]: [n, 1, 128] and [n, 128, 1]."""
    step = _UNITS // _SAMPLES
    samples = np.arange(_SIDE * _SAMPLES, dtype=np.int32) * step + step // 2
    return samples[None, None, :] - centre[:, 0, None, None], samples[None, :, None] - centre[:, 1, None, None]


def _average(inside: NDArray[np.bool_]) -> Integers:
    """Count the samples inside for each pixel: [n, 128, 128] to [n, 32, 32]."""
    cover: Integers = inside.reshape(-1, _SIDE, _SAMPLES, _SIDE, _SAMPLES).sum(axis=(2, 4), dtype=np.int32)
    return cover


def _is_inside(name: str, u: Integers, v: Integers) -> NDArray[np.bool_]:
    """Say which samples lie inside a shape whose radius is 256; u and v are in the shape's own axes."""
    square = u * u + v * v
    inside: NDArray[np.bool_]
    match name:
        case "circle":
            inside = square < 240**2
        case "ring":
            inside = (square < 256**2) & (square > 150**2)
        case "crescent":
            inside = (square < 256**2) & ((u - 120) ** 2 + v * v > 210**2)
        case "square":
            inside = np.maximum(np.abs(u), np.abs(v)) < 200
        case "triangle":  # equilateral: 443 / 256 is the root of 3
            inside = (u > -128) & (u + (v * 443 >> 8) < 256) & (u - (v * 443 >> 8) < 256)
        case "star":  # what lies inside of at least four of the five lines that a pentagram is drawn of
            sides = [(u * _COS[step] + v * _SIN[step] >> 12) < 98 for step in (0, 51, 102, 154, 205)]
            inside = np.add.reduce(sides, dtype=np.int32) >= 4
        case "cross":
            inside = (np.minimum(np.abs(u), np.abs(v)) < 80) & (np.maximum(np.abs(u), np.abs(v)) < 256)
        case "stripes":
            inside = u % 192 < 96
        case "checkerboard":
            inside = (u % 320 < 160) ^ (v % 320 < 160)
        case _:  # dots
            inside = (u % 224 - 112) ** 2 + (v % 224 - 112) ** 2 < 72**2
    return inside
