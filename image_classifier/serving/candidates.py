"""A second model beside the one that answers: as a canary it answers some callers, as a shadow it only computes.

Both take images of the same size and have the same classes, so that nobody who asks sees another form of answer.
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
"""Images that wait for the shadow; more are left out."""

SHADOW_BATCH = 32
POLL_S = 0.05

logger = logging.getLogger(__name__)


class PinnedTicket(Ticket):
    """An image that no canary answers, because its client named a version, or the canary has failed."""

    __slots__ = ()


class Canary:
    """A model that answers a part of the callers; the same ones in every process and after every start.

    Args:
        fraction: of the callers.
    """

    def __init__(self, classifier: Classifier, fraction: float) -> None:
        self.fraction = fraction
        self.seconds_per_image = classifier.seconds_per_image
        self._classifier = classifier

    @property
    def model(self) -> PublishedModel:
        return self._classifier.model

    def takes(self, ticket: Ticket) -> bool:
        """Say whether an image is one for the canary."""
        if isinstance(ticket, PinnedTicket):
            return False
        text = f"{self.model.digest} {ticket.caller}".encode("utf-8", "replace")
        share = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") / 2**64
        return share < self.fraction

    def predict(self, images: NDArray[np.uint8], *, is_alone: bool) -> NDArray[np.float32]:
        """Predict uint8 [N, S, S, 3] images: float32 [N, C] probabilities.

        Raises:
            ValueError: they are none.
        """
        rows = self._classifier.predict(images, is_alone=is_alone)
        if rows.shape != (len(images), len(self.model.classes)) or not np.isfinite(rows).all():
            raise ValueError("its answers are no probabilities")
        return rows


Count = Callable[[str, int], object]


class Shadow(Observer):
    """Computes in a thread of its own what was answered, and counts how the answers compare.

    Args:
        fraction: of the images.
        count: hears of images by `same_class`, `other_class`, `dropped` or `failed`; called from several threads.
        observe: hears of the largest difference of a probability, of each image.
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
        """End the thread after the batch that it is at."""
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
            except Exception as error:  # whatever it was: nobody waits for this
                self._count("failed", len(batch))
                if not self._has_failed:
                    logger.error("the shadow, version %s, fails: %s", self.classifier.model.version, one_line(error))
                self._has_failed = True

    def _compare(self, batch: Sequence[Ticket]) -> None:
        side = self.classifier.model.image_size
        pixels = np.frombuffer(b"".join([ticket.pixels or b"" for ticket in batch]), np.uint8)
        rows = self.classifier.predict(pixels.reshape(-1, side, side, 3), is_alone=False)
        answered = np.array([ticket.row for ticket in batch], np.float32)
        differences = np.abs(rows - answered).max(axis=1)
        if not np.isfinite(differences).all():
            raise ValueError("its answers are no probabilities")
        num_same = int((rows.argmax(axis=1) == answered.argmax(axis=1)).sum())
        self._count("same_class", num_same)
        self._count("other_class", len(batch) - num_same)
        for difference in differences.tolist():
            self._observe(difference)


def check_same_answers(model: PublishedModel, champion: PublishedModel) -> None:
    """Check that a model answers in the same form as the one beside which it computes.

    Raises:
        ModelError: it takes images of another size or fit, or has other classes, or in another order.
    """
    if any(getattr(model, name) != getattr(champion, name) for name in ("image_size", "fit", "classes")):
        raise ModelError(
            f"{model.path} has other classes than {champion.path}, or takes images of another size or fit: a canary or "
            "shadow has the same, in the same order; choose another"
        )
