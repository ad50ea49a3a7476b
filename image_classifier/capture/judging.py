"""Compares two models on captured images with labels that arrived later. Both models predict all images again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from image_classifier.capture.files import Captures
from image_classifier.capture.labels import load_labels
from image_classifier.errors import DataError
from image_classifier.progress import track
from image_classifier.published.predictor import Predictor

BATCH = 64


@dataclass
class Judged:
    """Results of two models on the same images.

    Attributes:
        num_answered: images that the candidate answered when they were captured.
        only_candidate: images that only the candidate classifies correctly.
        only_former: images that only the former model classifies correctly.
    """

    num_images: int = 0
    num_answered: int = 0
    only_candidate: int = 0
    only_former: int = 0

    @property
    def difference(self) -> float:
        """Accuracy of the candidate minus that of the former model."""
        return (self.only_candidate - self.only_former) / self.num_images


def judge(captures: Captures, labels: Path, candidate: Predictor, former: Predictor) -> Judged:
    """Compare a candidate with the former model on the captured images that have a label.

    Clients may choose request ids: of several images with the same id, the first counts.

    Raises:
        DataError: the models' classes or image sizes differ, the place or the labels cannot be read, or the candidate
            answered none of the labelled images.
    """
    model = candidate.model
    if (model.classes, model.image_size) != (former.model.classes, former.model.image_size):
        raise DataError("the two models cannot be compared: their classes or image sizes differ")
    waiting = load_labels(labels, model.classes)
    judged = Judged()
    with track("judging captured images", len(waiting), "images") as task:
        for captured in captures:
            if captured.facts.image_size != model.image_size:
                continue
            keys = list(zip(captured.request_ids, captured.image_indices.tolist(), strict=True))
            rows = [row for row, key in enumerate(keys) if key in waiting]
            found = {keys[row]: row for row in reversed(rows)}  # the first of several
            answers = np.array([waiting.pop(key) for key in found], np.int64)
            order = np.array(list(found.values()), np.int64)
            for start in range(0, len(order), BATCH):
                images, expected = captured.pixels[order[start : start + BATCH]], answers[start : start + BATCH]
                is_right, was_right = (each.predict(images).argmax(axis=1) == expected for each in (candidate, former))
                judged.only_candidate += int((is_right & ~was_right).sum())
                judged.only_former += int((was_right & ~is_right).sum())
            judged.num_images += len(order)
            judged.num_answered += len(order) * (captured.facts.model_digest == model.digest)
            task.done = judged.num_images
    if not judged.num_answered:
        raise DataError(
            f"none of the labels in {labels} belongs to a captured image that {model.path} answered; serve the model "
            "as a canary first"
        )
    return judged
