"""Judge two models on captured images whose labels came later: both compute all of them here."""

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
    """How two models do on the same images.

    Attributes:
        num_answered: images that the candidate had answered when they were captured.
        only_candidate: images that the candidate alone has right.
        only_former: likewise the one before.
    """

    num_images: int = 0
    num_answered: int = 0
    only_candidate: int = 0
    only_former: int = 0

    @property
    def difference(self) -> float:
        """Accuracy of the candidate minus that of the one before."""
        return (self.only_candidate - self.only_former) / self.num_images


def judge(captures: Captures, labels: Path, candidate: Predictor, former: Predictor) -> Judged:
    """Judge a candidate beside the model before it, on the captured images that have a label.

    Clients may choose the ids of their requests: of images with one id, the first counts.

    Raises:
        DataError: the models have other classes or image sizes, the place or the labels cannot be read, or none of
            the labelled images was answered by the candidate.
    """
    model = candidate.model
    if (model.classes, model.image_size) != (former.model.classes, former.model.image_size):
        raise DataError("the two models have other classes, or take images of another size: nothing compares them")
    waiting = load_labels(labels, model.classes)
    judged = Judged()
    with track("judging captured images", len(waiting), "images") as task:
        for captured in captures:
            if captured.facts.image_size != model.image_size:
                continue
            keys = list(zip(captured.request_ids, captured.image_indices.tolist(), strict=True))
            rows = [row for row, key in enumerate(keys) if key in waiting]
            found = {keys[row]: row for row in reversed(rows)}  # of several the first
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
            f"none of the labels in {labels} is of an image that {model.path} answered and that was captured; serve it "
            "as a canary first"
        )
    return judged
