"""The drift reference of a published model: statistics of the test set's images and predictions.

`publish` writes it; the server's metrics and `drift` compare later images with it. Its size is bounded: counts,
quantiles, and a sample of low-dimensional embeddings. It contains no image.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from image_classifier import files
from image_classifier.errors import ModelError
from image_classifier.image_sizes import ImageSize, is_image_size
from image_classifier.published.folder import REFERENCE, Published
from image_classifier.text import one_line

FORMAT_VERSION = 1
NUM_QUANTILES = 1001
"""Maximum number of quantiles per measure: each is exact to a thousandth of the images."""
NUM_SAMPLES = 512
"""Maximum number of embeddings."""
MEASURES = ("confidence", "brightness", "contrast", "sharpness", "saturation", "warmth")
"""Measures of an image: the probability of the predicted class, then statistics of the pixels."""

_MAX_FOLDED = 16
_MAX_BINS = 20  # of classes: with more, chance alone gives a stability index of 0.1 for a few hundred images
_MIN_PROBABILITY = 1e-6
_MAX_IMAGES = 2**31  # so that numbers of images times quantiles are exact
_MAX_VALUE = 1e6  # far above all pixel values and log probabilities
_CHUNK_BYTES = 2**23


@dataclass(frozen=True)
class Reference:
    """Statistics of a test set.

    Attributes:
        num_images: in the test set.
        class_counts: int64 [C], number of images predicted as each class.
        quantiles: by measure, float64 [Q], ascending from minimum to maximum.
        sample: float64 [M, D], embeddings of evenly spaced test images.
    """

    classes: tuple[str, ...]
    image_size: ImageSize
    num_images: int
    class_counts: NDArray[np.int64]
    quantiles: dict[str, NDArray[np.float64]]
    sample: NDArray[np.float64]


def build_reference(classes: Sequence[str], images: NDArray[np.uint8], probabilities: NDArray[np.float32]) -> Reference:
    """Build the reference from test images, uint8 [N, 3, S, S], and their predictions, float32 [N, C]."""
    num_images, _, image_size, _ = images.shape
    measures = measure(images.transpose(0, 2, 3, 1), probabilities)
    sampled = choose_evenly(num_images, NUM_SAMPLES)
    assert is_image_size(image_size)
    return Reference(
        classes=tuple(classes),
        image_size=image_size,
        num_images=num_images,
        class_counts=np.bincount(probabilities.argmax(axis=1), minlength=len(classes)),
        quantiles={
            name: np.sort(values)[choose_evenly(num_images, NUM_QUANTILES)] for name, values in measures.items()
        },
        sample=embed({name: values[sampled] for name, values in measures.items()}, probabilities[sampled]),
    )


def choose_evenly(number: int, most: int) -> NDArray[np.int64]:
    """Choose `most` evenly spaced indices below `number`, including the first and last; all if there are fewer."""
    if number <= most:
        return np.arange(number)
    return np.arange(most) * (number - 1) // (most - 1)


def measure(images: NDArray[np.uint8], probabilities: NDArray[np.float32]) -> dict[str, NDArray[np.float64]]:
    """Measure images, uint8 [N, S, S, 3], and their predictions, float32 [N, C]: float64 [N] by measure.

    Brightness is the mean pixel value, and contrast the standard deviation of the luminance. Sharpness is the mean
    absolute difference of the luminance from the mean of its four neighbours. Saturation is the mean of the largest
    minus the smallest channel, and warmth the mean of red minus blue. All are on the scale of 0 to 255.
    """
    step = max(1, _CHUNK_BYTES // (3 * images.shape[1] ** 2))  # bounds the memory of intermediate values
    chunks = [_measure_pixels(images[start : start + step]) for start in range(0, len(images), step)]
    columns = np.concatenate([probabilities.max(axis=1, keepdims=True).astype(np.float64), np.concatenate(chunks)], 1)
    return {name: round_measure(name, columns[:, column]) for column, name in enumerate(MEASURES)}


def round_measure(name: str, values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Round values as in the reference, so that equal values stay equal."""
    return values.round(6 if name == "confidence" else 3)


def _measure_pixels(images: NDArray[np.uint8]) -> NDArray[np.float64]:
    levels = images.astype(np.int32)
    luminance = levels @ np.array([299, 587, 114], np.int32)  # in thousandths
    inner = luminance[:, 1:-1, 1:-1]
    neighbours = luminance[:, :-2, 1:-1] + luminance[:, 2:, 1:-1] + luminance[:, 1:-1, :-2] + luminance[:, 1:-1, 2:]
    sides = (1, 2)
    columns = (
        levels.mean((1, 2, 3)),
        luminance.std(sides) / 1000,
        np.abs(4 * inner - neighbours).mean(sides) / 4000,
        (levels.max(axis=3) - levels.min(axis=3)).mean(sides),
        (levels[..., 0] - levels[..., 2]).mean(sides),
    )
    return np.stack(columns, axis=1)


def embed(measures: dict[str, NDArray[np.float64]], probabilities: NDArray[np.float32]) -> NDArray[np.float64]:
    """Embed images by their probabilities, float32 [N, C], and measures: float64 [N, D] with D at most 21.

    A published model returns no features. Log probabilities distinguish classes; the pixel statistics detect blur or
    tints of all classes. With more than 16 classes, several share a dimension, with alternating signs.
    """
    logits = np.log(np.maximum(probabilities.astype(np.float64), _MIN_PROBABILITY))
    logits -= logits.mean(axis=1, keepdims=True)
    num_classes = logits.shape[1]
    folded = np.zeros((len(logits), min(num_classes, _MAX_FOLDED)))
    for start in range(0, num_classes, _MAX_FOLDED):
        part = logits[:, start : start + _MAX_FOLDED]
        folded[:, : part.shape[1]] += part if start // _MAX_FOLDED % 2 == 0 else -part
    statistics = [measures[name] for name in MEASURES if name != "confidence"]
    return np.concatenate([folded, np.stack(statistics, axis=1)], axis=1).round(3)


# Population stability


def find_edges(quantiles: NDArray[np.float64]) -> NDArray[np.float64]:
    """Find the edges between ten bins of equal counts; fewer bins if values repeat."""
    deciles = choose_evenly(len(quantiles), 11)[1:-1]
    return np.unique(quantiles[deciles])


def count_bins(values: NDArray[np.float64], edges: NDArray[np.float64]) -> NDArray[np.int64]:
    """Count the values in each bin; a value on an edge belongs to the bin above."""
    return np.bincount(np.searchsorted(edges, values, side="right"), minlength=len(edges) + 1)


def count_both(
    quantiles: NDArray[np.float64], values: NDArray[np.float64], num_images: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Count a window's values, and the images of the reference, in bins by the reference's deciles."""
    edges = find_edges(quantiles)
    expected = count_bins(quantiles, edges) * num_images // len(quantiles)
    return count_bins(values, edges), expected


def get_class_bins(class_counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the bin of each class: its own, or with many classes one of twenty bins of similar counts."""
    if len(class_counts) <= _MAX_BINS:
        return np.arange(len(class_counts))
    middles = (np.cumsum(class_counts) - class_counts / 2) / class_counts.sum()
    return np.unique((middles * _MAX_BINS).astype(np.int64), return_inverse=True)[1]


def compute_stability_index(counts: NDArray[np.int64], expected: NDArray[np.int64]) -> float:
    """Compute the population stability index (PSI): the sum of (p - q) ln(p / q) over bins.

    Half an image is added to each bin. Rule of thumb from credit scoring: below 0.1 is stable, above 0.25 has shifted.
    """
    shares = [(each + 0.5) / (each.sum() + 0.5 * len(each)) for each in (counts, expected)]
    return float(((shares[0] - shares[1]) * np.log(shares[0] / shares[1])).sum())


# The file


def serialize_reference(reference: Reference) -> bytes:
    """Serialize a reference deterministically."""
    content = {
        "format_version": FORMAT_VERSION,
        "classes": list(reference.classes),
        "image_size": reference.image_size,
        "num_images": reference.num_images,
        "class_counts": reference.class_counts.tolist(),
        "quantiles": {name: reference.quantiles[name].tolist() for name in MEASURES},
        "sample": reference.sample.tolist(),
    }
    return (json.dumps(content, separators=(",", ":"), allow_nan=False) + "\n").encode()


def read_reference(folder: Path, published: Published) -> Reference:
    """Read the reference of a published model.

    Raises:
        ModelError: as `parse_reference`.
    """
    return parse_reference(folder, published.files.get(REFERENCE), published.manifest["classes"])


def parse_reference(folder: Path, raw: bytes | None, classes: Sequence[str]) -> Reference:
    """Parse the reference of a model with these classes.

    Args:
        raw: content of the file in the model's folder; None if there is none.

    Raises:
        ModelError: it is missing, damaged, or has other classes.
    """
    path = folder / REFERENCE
    if raw is None:
        raise ModelError(
            f"{folder} has no {REFERENCE}: it was published by an earlier version, or without test images; publish the "
            "run again with --overwrite"
        )
    try:
        content = files.parse_json(raw)
        if content["format_version"] > FORMAT_VERSION:
            raise ModelError(
                f"{path} has the format {content['format_version']}; this version reads up to {FORMAT_VERSION}: "
                "install a later one"
            )
        reference = _parse(content)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ModelError(f"{path} is damaged: {one_line(error)}; publish the run again") from error
    if reference.classes != tuple(classes):
        raise ModelError(f"{path} has other classes than the model; publish the run again")
    return reference


def _parse(content: dict[str, Any]) -> Reference:
    image_size, classes, num_images = content["image_size"], content["classes"], content["num_images"]
    counts = np.array(content["class_counts"], np.int64)
    quantiles = {name: np.array(content["quantiles"][name], np.float64) for name in MEASURES}
    sample = np.array(content["sample"], np.float64)
    width = min(len(classes), _MAX_FOLDED) + len(MEASURES) - 1
    num_quantiles = min(num_images, NUM_QUANTILES)
    if not is_image_size(image_size):
        raise ValueError("image_size")
    if type(num_images) is not int or not 1 <= num_images <= _MAX_IMAGES:
        raise ValueError("num_images")
    if counts.shape != (len(classes),) or counts.min() < 0 or counts.sum() != num_images:
        raise ValueError("class_counts")
    if any(each.shape != (num_quantiles,) or (np.diff(each) < 0).any() for each in quantiles.values()):
        raise ValueError("quantiles")
    if sample.shape != (min(num_images, NUM_SAMPLES), width):
        raise ValueError("sample")
    if not all((np.abs(each) <= _MAX_VALUE).all() for each in (sample, *quantiles.values())):
        raise ValueError("a value out of range")
    return Reference(tuple(classes), image_size, num_images, counts, quantiles, sample)
