"""A second model beside the champion: a canary answers a part of the callers, a shadow only computes and is compared.

Both have the champion's classes and image size, so that answers have the same form.
"""

from __future__ import annotations

import hashlib
import logging
import random
import threading
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from image_classifier.errors import ModelError
from image_classifier.published.predictor import PublishedModel
from image_classifier.serving.batching import Classifier, Observer, Ticket
from image_classifier.text import one_line

MAX_SHADOWED = 256
"""Length of the shadow's queue; further images are dropped."""

SHADOW_BATCH = 32
POLL_S = 0.05

logger = logging.getLogger(__name__)


class PinnedTicket(Ticket):
    """An image for the champion alone: its client named the version, or the canary failed."""

    __slots__ = ()


class Canary:
    """A model that answers a fraction of the callers: the same callers in every process and after every restart.

    Args:
        fraction: of the callers, from 0 to 1.
    """

    def __init__(self, classifier: Classifier, fraction: float) -> None:
        self.fraction = fraction
        self.seconds_per_image = classifier.seconds_per_image
        self._classifier = classifier

    @property
    def model(self) -> PublishedModel:
        return self._classifier.model

    def takes(self, ticket: Ticket) -> bool:
        """Return whether the canary answers an image."""
        if isinstance(ticket, PinnedTicket):
            return False
        text = f"{self.model.digest} {ticket.caller}".encode("utf-8", "replace")
        share = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") / 2**64
        return share < self.fraction

    def predict(self, images: NDArray[np.uint8], *, is_alone: bool) -> NDArray[np.float32]:
        """Predict images, uint8 [N, S, S, 3], as probabilities, float32 [N, C].

        Raises:
            ValueError: the model's outputs have another shape or are not finite.
        """
        rows = self._classifier.predict(images, is_alone=is_alone)
        if rows.shape != (len(images), len(self.model.classes)) or not np.isfinite(rows).all():
            raise ValueError("its outputs have another shape or are not finite")
        return rows


Count = Callable[[str, int], object]


class Shadow(Observer):
    """Computes answered images again with a second model, in its own thread, and compares the answers.

    Args:
        fraction: of the images, from 0 to 1.
        count: called from several threads with `same_class`, `other_class`, `dropped` or `failed` and a number.
        observe: called with the largest absolute difference of a probability, for each image.
    """

    def __init__(
        self, classifier: Classifier, fraction: float, count: Count, observe: Callable[[float], object]
    ) -> None:
        self.classifier = classifier
        self._fraction = fraction
        self._count = count
        self._observe = observe
        self._waiting: deque[Ticket] = deque()
        self._has_ended = threading.Event()
        self._has_failed = False
        self._thread = threading.Thread(target=self._work, name="shadow", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self, within_s: float) -> None:
        """Stop the thread after its current batch."""
        self._has_ended.set()
        self._thread.join(within_s)

    def on_batch(self, tickets: Sequence[Ticket], seconds: float) -> None:
        for ticket in tickets:
            if self._fraction < 1 and random.random() >= self._fraction:  # nosec B311: nobody gains by guessing it
                continue
            if len(self._waiting) >= MAX_SHADOWED:
                self._count("dropped", 1)
            else:
                self._waiting.append(ticket)

    def _work(self) -> None:
        while not self._has_ended.is_set():
            if not self._waiting:
                self._has_ended.wait(POLL_S)
                continue
            batch = [self._waiting.popleft() for _ in range(min(len(self._waiting), SHADOW_BATCH))]
            try:
                self._compare(batch)
            except Exception as error:  # no client waits for the shadow
                self._count("failed", len(batch))
                if not self._has_failed:
                    logger.error("the shadow (version %s) failed: %s", self.classifier.model.version, one_line(error))
                self._has_failed = True

    def _compare(self, batch: Sequence[Ticket]) -> None:
        side = self.classifier.model.image_size
        pixels = np.frombuffer(b"".join([ticket.pixels or b"" for ticket in batch]), np.uint8)
        rows = self.classifier.predict(pixels.reshape(-1, side, side, 3), is_alone=False)
        answered = np.array([ticket.row for ticket in batch], np.float32)
        differences = np.abs(rows - answered).max(axis=1)
        if not np.isfinite(differences).all():
            raise ValueError("its outputs are not finite")
        num_same = int((rows.argmax(axis=1) == answered.argmax(axis=1)).sum())
        self._count("same_class", num_same)
        self._count("other_class", len(batch) - num_same)
        for difference in differences.tolist():
            self._observe(difference)


def check_same_answers(model: PublishedModel, champion: PublishedModel) -> None:
    """Check that a canary or shadow answers in the same form as the champion.

    Raises:
        ModelError: its classes, their order, its image size or its fit differ.
    """
    if any(getattr(model, name) != getattr(champion, name) for name in ("image_size", "fit", "classes")):
        raise ModelError(
            f"{model.path} and {champion.path} differ in classes, image size or fit: a canary or shadow has the same "
            "ones, classes in the same order; choose another model"
        )
