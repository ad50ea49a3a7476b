"""The metrics against a second computation in plain numpy, and what must not change an evaluation."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from image_classifier.errors import DataError, ModelError
from image_classifier.metrics import compute_metrics
from image_classifier.model.catalog import build_classifier
from image_classifier.training.evaluate import compute_evaluation, compute_probabilities


def draw_predictions(
    seed: int, num_images: int, num_classes: int, *, missing: int | None = None
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Draw probabilities that are right more often than not, and labels of which one class may be missing."""
    generator = np.random.default_rng(seed)
    present = [c for c in range(num_classes) if c != missing]
    labels = generator.choice(present, num_images)
    logits = generator.normal(size=(num_images, num_classes)) + 2 * np.eye(num_classes)[labels]
    exponentials = np.exp(logits)
    return (exponentials / exponentials.sum(1, keepdims=True)).astype(np.float32), labels.astype(np.int64)


def compute_by_hand(probabilities: NDArray[np.float32], labels: NDArray[np.int64]) -> dict[str, Any]:
    """Compute the metrics image by image, from their definitions."""
    num_images, num_classes = probabilities.shape
    predicted = [max(range(num_classes), key=row.__getitem__) for row in probabilities.tolist()]
    confusion = [[0] * num_classes for _ in range(num_classes)]
    top5 = 0
    for row, label, guess in zip(probabilities.tolist(), labels.tolist(), predicted, strict=True):
        confusion[label][guess] += 1
        top5 += label in sorted(range(num_classes), key=row.__getitem__)[-5:]
    bins: dict[int, list[tuple[float, bool]]] = {}
    for row, label, guess in zip(probabilities.tolist(), labels.tolist(), predicted, strict=True):
        bins.setdefault(int(row[guess] * 15), []).append((row[guess], label == guess))
    per_class = []
    for c in range(num_classes):
        hits, support, guesses = confusion[c][c], sum(confusion[c]), sum(row[c] for row in confusion)
        recall = hits / support if support else None
        met = support + guesses > 0
        precision = (hits / guesses if guesses else 0.0) if met else None
        f1 = 2 * hits / (support + guesses) if met else None
        per_class.append({"accuracy": recall, "precision": precision, "recall": recall, "f1": f1, "support": support})
    hits = sum(confusion[c][c] for c in range(num_classes))
    rates = ("precision", "recall", "f1")
    present = [scores for scores in per_class if scores["support"]]
    return {
        "loss": -sum(np.log(float(p[label])) for p, label in zip(probabilities, labels, strict=True)) / num_images,
        "accuracy": hits / num_images,
        "top5_accuracy": top5 / num_images,
        "per_class": per_class,
        "macro": {rate: sum(scores[rate] or 0 for scores in present) / len(present) for rate in rates},
        "micro": {rate: hits / num_images for rate in rates},
        "weighted": {
            rate: sum((scores[rate] or 0) * (scores["support"] or 0) for scores in present) / num_images
            for rate in rates
        },
        "confusion_matrix": confusion,
        "expected_calibration_error": sum(
            abs(sum(confidence for confidence, _ in held) - sum(right for _, right in held)) for held in bins.values()
        )
        / num_images,
    }


@pytest.mark.parametrize(
    ("num_images", "num_classes", "missing"), [(2000, 10, None), (37, 10, 3), (300, 100, 0), (50, 3, None), (1, 2, 0)]
)
def test_metrics_equal_a_computation_by_hand(num_images: int, num_classes: int, missing: int | None) -> None:
    probabilities, labels = draw_predictions(num_images, num_images, num_classes, missing=missing)
    classes = [f"class {c}" for c in range(num_classes)]

    metrics = compute_metrics(probabilities, labels, classes)

    expected = compute_by_hand(probabilities, labels)
    assert list(metrics["per_class"]) == classes
    for scores, expected_scores in zip(metrics["per_class"].values(), expected["per_class"], strict=True):
        assert scores == pytest.approx(expected_scores, abs=1e-6)
    assert metrics["confusion_matrix"] == expected["confusion_matrix"]
    for average in ("macro", "micro", "weighted"):
        assert metrics[average] == pytest.approx(expected[average], abs=1e-6), average
    for figure in ("loss", "accuracy", "top5_accuracy", "expected_calibration_error"):
        assert metrics[figure] == pytest.approx(expected[figure], abs=1e-6), figure
    assert metrics.keys() == expected.keys()


def test_a_class_without_images_has_no_figures_and_weighs_nothing() -> None:
    labels = np.array([0, 0, 1], dtype=np.int64)
    probabilities = np.array([[0.8, 0.1, 0.1, 0], [0.2, 0.1, 0.7, 0], [0.1, 0.9, 0, 0]], dtype=np.float32)

    metrics = compute_metrics(probabilities, labels, ["a", "b", "guessed", "never met"])

    assert metrics["per_class"]["guessed"] == {
        "accuracy": None,
        "precision": 0.0,
        "recall": None,
        "f1": 0.0,
        "support": 0,
    }
    assert metrics["per_class"]["never met"]["precision"] is None
    assert metrics["per_class"]["never met"]["f1"] is None
    assert metrics["macro"]["recall"] == 0.75
    assert metrics["macro"]["precision"] == 1.0


def test_figures_are_strict_json_and_read_like_decimals() -> None:
    probabilities = np.array([[1, 0, 0]] * 8051 + [[0, 1, 0]] * 1949, dtype=np.float32)
    metrics = compute_metrics(probabilities, np.zeros(10_000, dtype=np.int64), ["a", "b", "c"])

    assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics
    assert metrics["accuracy"] == 0.8051
    assert 10 < metrics["loss"] < 100  # the wrong ones have probability 0, and infinity is no JSON


class Brightness(nn.Module):
    """Two classes: is the left half brighter than the right?"""

    def forward(self, images: Tensor) -> Tensor:
        halves = images.float().mean(dim=(1, 2))
        difference = halves[:, :16].mean(1) - halves[:, 16:].mean(1)
        return torch.stack([difference, -difference], dim=1) / 255


def test_mirror_views_average_the_image_and_its_mirror_image() -> None:
    images = np.zeros((2, 3, 32, 32), dtype=np.uint8)
    images[0, :, :, :16] = 255  # left
    images[1, :, :16, :] = 255  # top: its own mirror image

    one = compute_probabilities(Brightness(), images)
    both = compute_probabilities(Brightness(), images, views="mirror")

    assert one[0, 0] == pytest.approx(1 / (1 + np.exp(-2)))
    assert both == pytest.approx(0.5)
    assert one.dtype == both.dtype == np.dtype("float32")


def test_six_views_are_averaged_where_one_is_unsure_and_only_there() -> None:
    """The network's logit is the brightness of the corner, which each view has another pixel at."""

    class Corner(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            logit = images.float()[:, 0, 0, 0] / 100
            return torch.stack([logit, -logit], dim=1)

    images = np.zeros((2, 3, 32, 32), dtype=np.uint8)
    images[0, :, 0, 0], images[0, :, 0, 31], images[0, :, 1, 1], images[0, :, 1, 30] = 2, 10, 30, 50
    images[1, :, 0, 0] = 200  # sure by itself

    one = compute_probabilities(Corner(), images)
    six = compute_probabilities(Corner(), images, views="six")

    weights = {2: 0.25, 10: 0.25, 30: 0.25, 50: 0.25}  # both shifts bring the pixel at (1, 1) to the corner
    expected = sum(weight / (1 + np.exp(-2 * pixel / 100)) for pixel, weight in weights.items())
    assert six[0, 0] == pytest.approx(expected)
    assert six[1].tolist() == one[1].tolist()
    assert six.dtype == np.dtype("float32")


@pytest.mark.parametrize("num_classes", [1, 2])
def test_six_views_do_with_few_classes(num_classes: int) -> None:
    classifier = build_classifier("lenet", num_classes, input_mean=(0.5,) * 3, input_std=(0.25,) * 3, seed=0)
    images = np.random.default_rng(0).integers(0, 256, (3, 3, 32, 32), dtype=np.uint8)
    assert np.allclose(compute_probabilities(classifier, images, views="six").sum(1), 1)


@settings(max_examples=25, deadline=None)
@given(num_images=st.integers(1, 40), batch_size=st.integers(1, 50), seed=st.integers(0, 99))
def test_any_batch_size_gives_the_same_evaluation(num_images: int, batch_size: int, seed: int) -> None:
    classifier = build_classifier("resnet", 10, input_mean=(0.5,) * 3, input_std=(0.25,) * 3, seed=seed)
    classifier.train()  # batch norm by the batch would make the result depend on it
    generator = np.random.default_rng(seed)
    images = generator.integers(0, 256, (num_images, 3, 32, 32), dtype=np.uint8)
    labels = generator.integers(0, 10, num_images)
    classes = [str(c) for c in range(10)]

    whole = compute_probabilities(classifier, images, views="mirror", batch_size=num_images)
    parts = compute_probabilities(classifier, images, views="mirror", batch_size=batch_size)

    assert np.allclose(whole, parts, atol=1e-6)
    expected, metrics = (compute_metrics(p, labels, classes) for p in (whole, parts))
    assert metrics["confusion_matrix"] == expected["confusion_matrix"]
    assert metrics["per_class"] == expected["per_class"]
    assert metrics["loss"] == pytest.approx(expected["loss"], abs=1e-5)


def test_evaluation_has_both_accuracies_and_the_probabilities_they_come_from() -> None:
    images = np.zeros((4, 3, 32, 32), dtype=np.uint8)
    images[:3, :, :, :16] = 255
    labels = np.array([0, 0, 1, 1], dtype=np.int64)

    evaluation, probabilities = compute_evaluation(Brightness(), images, labels, ["left", "right"], views="mirror")

    assert evaluation["format_version"] == 1
    assert evaluation["num_images"] == 4
    assert evaluation["views"] == "mirror"
    assert evaluation["accuracy_single_view"] == 0.5  # by the image alone; the mirror image makes each a draw
    assert probabilities == pytest.approx(0.5)
    single, alone = compute_evaluation(Brightness(), images, labels, ["left", "right"])
    assert single["accuracy"] == single["accuracy_single_view"] == 0.5
    assert np.array_equal(alone, compute_probabilities(Brightness(), images))


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_restored_and_no_statistics_are_learnt(training: bool) -> None:
    classifier = build_classifier("resnet", 10, input_mean=(0.5,) * 3, input_std=(0.25,) * 3, seed=0)
    classifier.train(training)
    before = {name: tensor.clone() for name, tensor in classifier.state_dict().items()}

    compute_probabilities(classifier, np.zeros((3, 3, 32, 32), dtype=np.uint8))

    assert classifier.training is training
    assert all(torch.equal(tensor, before[name]) for name, tensor in classifier.state_dict().items())


def test_probabilities_are_fp32_under_a_callers_autocast() -> None:
    classifier = build_classifier("lenet", 10, input_mean=(0.5,) * 3, input_std=(0.25,) * 3, seed=0)
    images = np.random.default_rng(0).integers(0, 256, (5, 3, 32, 32), dtype=np.uint8)

    with torch.autocast("cpu", torch.bfloat16):
        inside = compute_probabilities(classifier, images)

    assert np.array_equal(inside, compute_probabilities(classifier, images))


def test_images_mapped_read_only_are_taken_and_none_gives_an_empty_table() -> None:
    classifier = build_classifier("lenet", 7, input_mean=(0.5,) * 3, input_std=(0.25,) * 3, seed=0)
    images = np.zeros((3, 3, 32, 32), dtype=np.uint8)
    images.flags.writeable = False

    assert compute_probabilities(classifier, images).shape == (3, 7)
    assert compute_probabilities(classifier, images[:0]).shape == (0, 7)


def test_a_network_that_gives_no_numbers_is_refused() -> None:
    classifier = build_classifier("lenet", 10, input_mean=(0.5,) * 3, input_std=(0.25,) * 3, seed=0)
    with torch.no_grad():
        next(classifier.parameters()).fill_(float("nan"))

    with pytest.raises(ModelError, match="lower --learning_rate"):
        compute_probabilities(classifier, np.zeros((3, 3, 32, 32), dtype=np.uint8))


def test_an_empty_test_set_is_refused() -> None:
    with pytest.raises(DataError, match="the test set is empty"):
        compute_evaluation(
            Brightness(), np.zeros((0, 3, 32, 32), dtype=np.uint8), np.zeros(0, dtype=np.int64), ["left", "right"]
        )


def test_rows_are_those_of_all_images_and_large_images_come_in_smaller_batches() -> None:
    class Noted(nn.Module):
        """Keeps the sizes of its batches; answers by the first pixels of an image."""

        def __init__(self) -> None:
            super().__init__()
            self.sizes: list[int] = []

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            self.sizes.append(len(images))
            return images[:, :, 0, 0].float() / 255

    images = np.random.default_rng(0).integers(0, 256, (50, 3, 224, 224), dtype=np.uint8)
    network, rows = Noted(), np.array([7, 3, 49, 3])
    whole = compute_probabilities(network, images, views="six")
    assert max(network.sizes) == 40
    assert np.array_equal(compute_probabilities(network, images, rows, views="six"), whole[rows])
    assert np.array_equal(compute_probabilities(network, images, rows), compute_probabilities(network, images)[rows])
