"""A classifier that answers when it is let, and batchers around it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from image_classifier.image_sizes import ImageSize
from image_classifier.published.predictor import PublishedModel
from image_classifier.serving.app import App
from image_classifier.serving.auth import Gate
from image_classifier.serving.batching import Batcher
from image_classifier.serving.service import Service
from image_classifier.serving.settings import ServerSettings
from image_classifier.serving.telemetry import Metrics

MODEL = PublishedModel(
    path=Path("model.onnx"),
    classes=("a", "b", "c"),
    version="1",
    experiment_name="e",
    run_name="r",
    data_digest="0",
    views="one",
    format_version=1,
)


class Gated:
    """Answers with the first three pixels of an image, when it is let; keeps each batch's size and thread."""

    def __init__(self, *, is_open: bool = True, seconds_per_image: float = 3e-3, image_size: ImageSize = 32) -> None:
        self.model = MODEL if image_size == MODEL.image_size else replace(MODEL, image_size=image_size)
        self.seconds_per_image = seconds_per_image
        self.sizes: list[int] = []
        self.threads: list[str] = []
        self.gate = threading.Event()
        self.entered = threading.Event()
        if is_open:
            self.gate.set()

    def predict(self, images: NDArray[np.uint8], *, is_alone: bool = False) -> NDArray[np.float32]:
        self.sizes.append(len(images))
        self.threads.append(threading.current_thread().name)
        self.entered.set()
        assert self.gate.wait(20)
        return images[:, 0, 0, :].astype(np.float32)


def run(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(work(), 30))


def build(
    classifier: Gated, *, max_batch: int = 4, max_queue: int = 100, timeout_s: float = 20, **others: Any
) -> Batcher:
    batcher = Batcher(classifier, max_batch=max_batch, max_queue=max_queue, timeout_s=timeout_s, **others)
    batcher.start()
    return batcher


async def wait_until(is_so: Callable[[], bool]) -> None:
    while not is_so():
        await asyncio.sleep(0.001)


def build_app(gate: Gate | None = None, image_size: ImageSize = 32, **settings: Any) -> App:
    """Build an application whose batcher has not been started."""
    metrics = Metrics()
    classifier = Gated(seconds_per_image=1e-6, image_size=image_size)
    batcher = Batcher(classifier, max_batch=8, max_queue=64, timeout_s=5, observers=[metrics])
    chosen = ServerSettings(model="model", **settings)
    return App(chosen, Service(chosen, batcher, metrics, "model"), gate or Gate(), metrics)
