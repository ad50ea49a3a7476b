"""The summary of a test set: its measures, its bytes, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from image_classifier.errors import ModelError
from image_classifier.published.folder import REFERENCE, Published
from image_classifier.published.reference import (
    MEASURES,
    NUM_QUANTILES,
    NUM_SAMPLES,
    build_reference,
    choose_evenly,
    compute_stability_index,
    count_bins,
    embed,
    find_edges,
    measure,
    read_reference,
    serialize_reference,
)

CLASSES = ("cat", "dog", "ship")


def draw(number: int, num_classes: int = 3, seed: int = 0) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Draw images uint8 [N, 3, 32, 32] and answers."""
    generator = np.random.default_rng(seed)
    images = generator.integers(0, 256, (number, 3, 32, 32), np.uint8)
    return images, generator.dirichlet(np.ones(num_classes), number).astype(np.float32)


def publish(content: bytes, classes: tuple[str, ...] = CLASSES) -> Published:
    return Published({"classes": list(classes)}, {REFERENCE: content})


def test_it_is_read_as_it_was_written_and_has_the_same_bytes_again() -> None:
    images, probabilities = draw(1200)
    reference = build_reference(CLASSES, images, probabilities)
    content = serialize_reference(reference)
    assert serialize_reference(build_reference(CLASSES, images.copy(), probabilities.copy())) == content
    read = read_reference(Path("published"), publish(content))
    assert serialize_reference(read) == content
    assert (read.classes, read.image_size, read.num_images) == (CLASSES, 32, 1200)
    np.testing.assert_array_equal(read.class_counts, np.bincount(probabilities.argmax(axis=1)))
    assert read.sample.shape == (NUM_SAMPLES, 8)


def test_its_size_is_bounded() -> None:
    images, probabilities = draw(3000, num_classes=100)
    content = serialize_reference(build_reference([f"class {n}" for n in range(100)], images, probabilities))
    assert len(content) < 200_000
    assert {len(each) for each in json.loads(content)["quantiles"].values()} == {NUM_QUANTILES}


def test_measures_are_what_they_are_said_to_be() -> None:
    flat, halves = np.full((1, 32, 32, 3), 100, np.uint8), np.zeros((1, 32, 32, 3), np.uint8)
    halves[:, :, 16:] = (255, 0, 0)
    measures = measure(np.concatenate([flat, halves]), np.array([[0.25, 0.75], [1, 0]], np.float32))
    assert tuple(measures) == MEASURES
    found = {name: values.tolist() for name, values in measures.items()}
    red = 0.299 * 255
    assert found["confidence"] == [0.75, 1]
    assert found["brightness"] == [100, 42.5]
    assert found["contrast"] == [0, round(red / 2, 3)]
    assert found["sharpness"] == [0, round(2 / 30 * red / 4, 3)]  # in 2 of 30 columns, one of four neighbours
    assert found["saturation"] == [0, 127.5]
    assert found["warmth"] == [0, 127.5]


def test_embeddings_of_many_classes_have_few_dimensions() -> None:
    images, probabilities = draw(5, num_classes=40)
    measures = measure(images.transpose(0, 2, 3, 1), probabilities)
    embeddings = embed(measures, probabilities)
    logits = np.log(probabilities.astype(np.float64))
    logits -= logits.mean(axis=1, keepdims=True)
    assert embeddings.shape == (5, 21)
    np.testing.assert_allclose(embeddings[:, 0], logits[:, 0] - logits[:, 16] + logits[:, 32], atol=1e-3)


@pytest.mark.parametrize(("number", "most"), [(1, 5), (5, 5), (6, 5), (1000, 7)])
def test_rows_are_chosen_from_the_first_to_the_last(number: int, most: int) -> None:
    chosen = choose_evenly(number, most)
    assert chosen[0] == 0 and chosen[-1] == number - 1
    assert len(np.unique(chosen)) == len(chosen) == min(number, most)


def test_the_stability_index_grows_with_the_difference_and_takes_empty_bins() -> None:
    edges = find_edges(np.arange(1001.0))
    expected = count_bins(np.arange(1001.0), edges)
    assert expected.tolist() == [100] * 9 + [101]
    assert compute_stability_index(expected, expected) == 0
    near, far = (compute_stability_index(count_bins(np.arange(1001.0) + by, edges), expected) for by in (50, 2000))
    assert 0 < near < 0.25 < far < np.inf
    assert find_edges(np.ones(1001)).tolist() == [1]


def test_a_folder_without_one_is_named() -> None:
    with pytest.raises(ModelError, match="has no drift_reference.json: it was published by an earlier version"):
        read_reference(Path("published"), Published({"classes": list(CLASSES)}, {}))


@pytest.mark.parametrize(
    "change",
    [
        {"format_version": "1"},
        {"image_size": 33},
        {"num_images": 0},
        {"num_images": 10},
        {"class_counts": [1, 2]},
        {"class_counts": None},
        {"class_counts": [10**30, 0, 0]},
        {"quantiles": {}},
        {"quantiles": {name: [2, 1] + [3] * 48 for name in MEASURES}},
        {"sample": [[1, 2]]},
        {"sample": [[1, 2], [3]]},
        {"sample": [["a"] * 8] * 50},
        {"classes": 3},
        {"num_images": 50.0},
        {"num_images": 2**62, "class_counts": [2**62, 0, 0]},
        {"sample": [[1e300] * 8] * 50},
        {"quantiles": {name: [1e300] * 50 for name in MEASURES}},
    ],
)
def test_a_damaged_one_is_refused(change: dict[str, Any]) -> None:
    content = json.loads(serialize_reference(build_reference(CLASSES, *draw(50))))
    read_reference(Path("published"), publish(json.dumps(content).encode()))
    with pytest.raises(ModelError, match="drift_reference.json is damaged"):
        read_reference(Path("published"), publish(json.dumps(content | change).encode()))


def test_one_of_other_classes_or_of_a_later_format_is_refused() -> None:
    content = serialize_reference(build_reference(CLASSES, *draw(50)))
    with pytest.raises(ModelError, match="other classes than the model"):
        read_reference(Path("published"), publish(content, ("cat", "dog", "car")))
    with pytest.raises(ModelError, match="has the format 9; this version reads up to 1"):
        read_reference(Path("published"), publish(content.replace(b'"format_version":1', b'"format_version":9')))
