"""Prometheus metrics for drift of the latest answered images from the test set; cheap enough for the event loop."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from image_classifier.published.predictor import PublishedModel
from image_classifier.published.reference import (
    Reference,
    compute_stability_index,
    count_both,
    get_class_bins,
    parse_reference,
    round_measure,
)
from image_classifier.serving.batching import Ticket

IMAGES_PER_S = 500
"""Sampling limit: the brightness of an image takes some microseconds, hardly less than a small network."""


class DriftWindow(Collector):
    """A sliding window of the images that one model answered, as a Prometheus collector.

    Args:
        clock: returns monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._model: PublishedModel | None = None
        self._reference: Reference
        self._lock = threading.Lock()
        self._rows: deque[tuple[int, float, float]] = deque()  # class, confidence, brightness
        self._room, self._seen_at = 0.0, 0.0

    def watch(self, model: PublishedModel, size: int) -> None:
        """Start an empty window of `size` images for a model. Metrics appear once it is full.

        Raises:
            ModelError: the model's reference is missing or damaged. No metrics appear then.
        """
        self._model = None
        reference = parse_reference(model.path, model.reference, model.classes)
        with self._lock:
            self._reference, self._rows, self._model = reference, deque(maxlen=size), model

    def add(self, tickets: Sequence[Ticket]) -> None:
        """Add images of one batch, up to the sampling limit. Images of other models are ignored."""
        if tickets[0].classifier.model is not self._model:
            return
        now = self._clock()
        self._room = min(IMAGES_PER_S, self._room + (now - self._seen_at) * IMAGES_PER_S)
        self._seen_at = now
        chosen = tickets[: int(self._room)]
        self._room -= len(chosen)
        if chosen:
            pixels = np.frombuffer(b"".join([ticket.pixels or b"" for ticket in chosen]), np.uint8)
            brightness = pixels.reshape(len(chosen), -1).mean(axis=1).tolist()
            bests = [ticket.order[0] for ticket in chosen]
            confidences = [ticket.row[best] for ticket, best in zip(chosen, bests, strict=True)]
            with self._lock:
                self._rows.extend(zip(bests, confidences, brightness, strict=True))

    def _copy_full(self) -> tuple[Reference, list[tuple[int, float, float]]] | None:
        """Copy the window with its reference; None while it is not full."""
        with self._lock:
            is_full = self._model is not None and len(self._rows) == self._rows.maxlen
            return (self._reference, list(self._rows)) if is_full else None

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Compute the metrics, in any thread; they have no values while the window is not full."""
        stability = GaugeMetricFamily(
            "image_classifier_drift_stability",
            "Population stability index of the latest images against the model's test set",
            labels=("of",),
        )
        brightness = GaugeMetricFamily(
            "image_classifier_drift_brightness",
            "Mean brightness of the latest images minus that of the test set, in its standard deviations",
        )
        window = self._copy_full()
        if window is not None:
            reference, rows = window
            classes, confidences, levels = (np.array(column) for column in zip(*rows, strict=True))
            bins = get_class_bins(reference.class_counts)
            expected = np.bincount(bins, reference.class_counts).astype(np.int64)
            counts = np.bincount(bins[classes], minlength=len(expected))
            stability.add_metric(("classes",), compute_stability_index(counts, expected))
            for name, values in (("confidence", confidences), ("brightness", levels)):
                rounded = round_measure(name, values)
                pair = count_both(reference.quantiles[name], rounded, reference.num_images)
                stability.add_metric((name,), compute_stability_index(*pair))
            quantiles = reference.quantiles["brightness"]
            shift = (levels.mean() - quantiles.mean()) / max(float(quantiles.std()), 1.0)
            brightness.add_metric((), float(shift))
        yield stability
        yield brightness
