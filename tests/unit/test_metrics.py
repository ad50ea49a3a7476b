"""The metrics against torchmetrics, which is the measure of what each name means."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchmetrics.functional import classification

from image_classifier.errors import DataError
from image_classifier.metrics import NUM_CALIBRATION_BINS, build_evaluation, compute_metrics
from tests.runs import draw_predictions


@pytest.mark.parametrize(("num_images", "num_classes"), [(1, 2), (7, 3), (400, 10), (5000, 100)])
def test_the_metrics_are_those_of_torchmetrics(num_images: int, num_classes: int) -> None:
    probabilities, labels = draw_predictions(0.7, num_images, num_classes)
    metrics = compute_metrics(probabilities, labels, [str(index) for index in range(num_classes)])
    scores, target = torch.from_numpy(probabilities.astype(np.float64)).clamp(0, 1), torch.from_numpy(labels)
    predicted = scores.argmax(dim=1)
    for name, metric in {"precision": "precision", "recall": "recall", "f1": "f1_score"}.items():
        function = getattr(classification, f"multiclass_{metric}")
        for average in ("micro", "weighted"):
            expected = function(predicted, target, num_classes, average=average).item()
            assert metrics[average][name] == pytest.approx(expected, abs=1e-6)
        for index, expected in enumerate(function(predicted, target, num_classes, average="none").tolist()):
            value = metrics["per_class"][str(index)][name]
            assert value is None or value == pytest.approx(expected, abs=1e-6)
    top5 = classification.multiclass_accuracy(scores, target, num_classes, average="micro", top_k=min(5, num_classes))
    error = classification.multiclass_calibration_error(scores, target, num_classes, n_bins=NUM_CALIBRATION_BINS)
    assert metrics["top5_accuracy"] == pytest.approx(top5.item(), abs=1e-6)
    assert metrics["expected_calibration_error"] == pytest.approx(error.item(), abs=1e-6)
    assert metrics["loss"] == pytest.approx(torch.nn.functional.nll_loss(scores.log(), target).item())
    assert metrics["accuracy"] == pytest.approx((predicted == target).float().mean().item())
    confusion = classification.multiclass_confusion_matrix(predicted, target, num_classes)
    assert metrics["confusion_matrix"] == confusion.tolist()


def test_the_loss_of_certain_predictions_is_0_without_a_sign() -> None:
    metrics = compute_metrics(np.eye(2, dtype=np.float32), np.array([0, 1]), ["a", "b"])
    assert f"{metrics['loss']:.4f}" == "0.0000"


def test_an_empty_test_set_is_an_error() -> None:
    nothing = np.empty((0, 2), np.float32)
    with pytest.raises(DataError, match="no images"):
        build_evaluation(nothing, np.empty(0, np.int64), ["a", "b"], views="one", single_view=None)
