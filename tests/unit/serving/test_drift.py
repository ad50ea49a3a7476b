"""The metrics of drift: of the latest images of one model, and only when there are enough."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Event

import numpy as np
import pytest
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry

from image_classifier.errors import ModelError, SettingsError
from image_classifier.published.predictor import PublishedModel, load_predictor
from image_classifier.published.reference import build_reference, serialize_reference
from image_classifier.serving.batching import Ticket
from image_classifier.serving.drift import IMAGES_PER_S, DriftWindow
from image_classifier.serving.server import Server, bind
from image_classifier.serving.settings import ServerSettings
from image_classifier.serving.source import ModelSource
from tests.serving import draw_images, write_model, write_published_model

IMAGES = draw_images(300)
ANSWERS = np.random.default_rng(0).dirichlet((0.3, 0.3, 0.3), len(IMAGES)).astype(np.float32)
STABILITY, BRIGHTNESS = "image_classifier_drift_stability", "image_classifier_drift_brightness"


class Computer:
    """What computed a ticket."""

    seconds_per_image = 0.0

    def __init__(self, model: PublishedModel) -> None:
        self.model = model

    def predict(self, images: NDArray[np.uint8], *, is_alone: bool) -> NDArray[np.float32]:
        raise AssertionError("its tickets have their answers")


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(scope="module")
def model() -> PublishedModel:
    reference = serialize_reference(build_reference("abc", IMAGES.transpose(0, 3, 1, 2), ANSWERS))
    return PublishedModel(Path("model"), tuple("abc"), "1", "e", "r", "0" * 64, "one", 1, reference=reference)


def build_tickets(model: PublishedModel, images: NDArray[np.uint8], answers: NDArray[np.float32]) -> list[Ticket]:
    tickets = []
    for image, row in zip(images, answers, strict=True):
        ticket = Ticket(image.tobytes())
        ticket.classifier, ticket.row, ticket.order = Computer(model), row.tolist(), np.argsort(-row).tolist()
        tickets.append(ticket)
    return tickets


def read(window: DriftWindow) -> dict[str, float]:
    """Read the metrics as Prometheus gets them."""
    registry = CollectorRegistry()
    registry.register(window)
    samples = [sample for family in registry.collect() for sample in family.samples]
    assert {sample.name for sample in samples} <= {STABILITY, BRIGHTNESS}
    return {sample.labels.get("of", "shift"): sample.value for sample in samples}


def test_images_of_the_test_set_are_no_drift(model: PublishedModel) -> None:
    window = DriftWindow(Clock())
    window.watch(model, 300)
    tickets = build_tickets(model, IMAGES, ANSWERS)
    window.add(tickets[:299])
    assert read(window) == {}
    window.add(tickets[299:])
    metrics = read(window)
    assert metrics.keys() == {"classes", "confidence", "brightness", "shift"}
    assert max(map(abs, metrics.values())) < 1e-3


def test_values_that_come_often_are_no_drift() -> None:
    """Such as a confidence of nearly 1, which the reference has rounded."""
    images = np.concatenate([IMAGES[:7]] * 60)
    answers = np.concatenate([ANSWERS[:6], np.array([[1 - 2e-7, 1e-7, 1e-7]], np.float32)] * 60)
    reference = serialize_reference(build_reference("abc", images.transpose(0, 3, 1, 2), answers))
    model = PublishedModel(Path("m"), tuple("abc"), "1", "e", "r", "0" * 64, "one", 1, reference=reference)
    window = DriftWindow(Clock())
    window.watch(model, 420)
    window.add(build_tickets(model, images, answers))
    assert max(map(abs, read(window).values())) < 1e-3


def test_the_latest_images_count(model: PublishedModel) -> None:
    window = DriftWindow(Clock())
    window.watch(model, 200)
    window.add(build_tickets(model, IMAGES[:100], ANSWERS[:100]))
    sure = np.tile(np.array([0.9, 0.05, 0.05], np.float32), (200, 1))
    window.add(build_tickets(model, IMAGES[:200] // 2, sure))
    metrics = read(window)
    levels = IMAGES.mean(axis=(1, 2, 3))
    shift = (np.mean(IMAGES[:200] // 2) - levels.mean()) / levels.std()
    assert metrics["shift"] == pytest.approx(shift, rel=0.01) and shift < -10
    assert min(metrics[name] for name in ("classes", "confidence", "brightness")) > 1


def test_answers_of_another_model_do_not_count(model: PublishedModel) -> None:
    window = DriftWindow(Clock())
    window.add(build_tickets(model, IMAGES, ANSWERS))
    window.watch(model, 200)
    assert read(window) == {}
    window.add(build_tickets(replace(model, version="2"), IMAGES, ANSWERS))
    assert read(window) == {}


def test_at_a_high_load_a_part_is_looked_at(model: PublishedModel) -> None:
    clock = Clock()
    window = DriftWindow(clock)
    window.watch(model, IMAGES_PER_S + 200)
    tickets = build_tickets(model, IMAGES, ANSWERS)
    for _ in range(20):
        window.add(tickets)
    assert read(window) == {}
    clock.now += 0.39
    window.add(tickets)
    assert read(window) == {}
    clock.now += 0.02
    window.add(tickets)
    assert read(window)


def test_the_window_is_read_in_one_thread_while_another_adds_to_it(model: PublishedModel) -> None:
    clock, tickets, has_ended = Clock(), build_tickets(model, IMAGES, ANSWERS), Event()
    window = DriftWindow(clock)
    window.watch(model, len(tickets))
    window.add(tickets)

    def add() -> None:
        while not has_ended.is_set():
            clock.now += 1
            window.add(tickets[: len(tickets) // 2])

    with ThreadPoolExecutor(1) as threads:
        adding = threads.submit(add)
        sizes = {len(read(window)) for _ in range(200)}
        has_ended.set()
        adding.result()
    assert sizes == {4}


def test_a_model_without_a_reference_or_with_a_damaged_one_is_refused_and_shows_nothing(model: PublishedModel) -> None:
    window = DriftWindow(Clock())
    for content, reason in ((None, "has no drift_reference.json"), (b"{}", "is damaged")):
        window.watch(model, 200)
        window.add(build_tickets(model, IMAGES, ANSWERS))
        assert read(window)
        with pytest.raises(ModelError, match=reason):
            window.watch(replace(model, reference=content), 200)
        window.add(build_tickets(model, IMAGES, ANSWERS))
        assert read(window) == {}


@pytest.mark.parametrize("size", [-1, 1, 199])
def test_a_window_that_is_too_small_is_refused(size: int) -> None:
    with pytest.raises(SettingsError, match="--drift_window takes 0, or a whole number of 200 or more"):
        ServerSettings(model="m", drift_window=size)


def test_a_server_of_a_model_without_a_reference_does_not_start(tmp_path: Path) -> None:
    settings = ServerSettings(model=str(write_model(tmp_path / "model.onnx")), port=0, drift_window=200)
    with bind(settings) as listener, pytest.raises(ModelError, match="has no drift_reference.json"):
        Server(settings, ModelSource(settings, None), listener)


def test_a_later_version_without_a_reference_is_served_without_these_metrics(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = ServerSettings(model=str(write_published_model(tmp_path / "one", IMAGES[:50])), port=0, drift_window=200)
    with bind(settings) as listener:
        server = Server(settings, ModelSource(settings, None), listener)
    model = load_predictor(tmp_path / "one", num_threads=1).model
    server._watch_drift(model)
    assert not caplog.records
    server._watch_drift(replace(model, reference=None))
    assert "the metrics show no drift" in caplog.text and "has no drift_reference.json" in caplog.text
