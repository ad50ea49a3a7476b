"""A canary answers its callers, and the champion answers where that fails; a shadow answers nobody."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from starlette.requests import Request

from image_classifier.errors import ModelError
from image_classifier.serving.batching import Observer, Ticket
from image_classifier.serving.candidates import (
    MAX_SHADOWED,
    Canary,
    PinnedTicket,
    Shadow,
    check_same_answers,
)
from image_classifier.serving.service import Caller, Service
from image_classifier.serving.settings import ServerSettings
from image_classifier.serving.telemetry import Metrics, VersionMetrics
from tests.batching import MODEL, Gated, build, run
from tests.serving import draw_images

SECOND = replace(MODEL, version="2", digest="second")


class Second(Gated):
    """Another version, which cannot compute images whose first value is 255, and answers others as asked for."""

    def __init__(self, answer: Callable[[NDArray[np.float32]], NDArray[np.float32]] = lambda rows: rows) -> None:
        super().__init__(seconds_per_image=1e-6)
        self.model = SECOND
        self._answer = answer

    def predict(self, images: NDArray[np.uint8], *, is_alone: bool = False) -> NDArray[np.float32]:
        if (images[:, 0, 0, 0] == 255).any():
            raise RuntimeError("out of order")
        return self._answer(super().predict(images, is_alone=is_alone))


class Fallbacks(Observer):
    def __init__(self) -> None:
        self.errors: list[str] = []

    def on_fallback(self, tickets: Sequence[Ticket], error: Exception) -> None:
        self.errors += [str(error)] * len(tickets)


def build_ticket(caller: str = "", first: int = 0, kind: type[Ticket] = Ticket) -> Ticket:
    pixels = draw_images(1)[0]
    pixels[0, 0] = first, 1, 2
    ticket = kind(pixels.tobytes())
    ticket.caller = caller
    return ticket


def test_a_canary_takes_a_fraction_of_the_callers_and_always_the_same() -> None:
    canary, again = Canary(Second(), 0.2), Canary(Second(), 0.2)
    callers = [f"caller-{number}" for number in range(2000)]
    taken = {caller for caller in callers if canary.takes(build_ticket(caller))}
    assert 300 < len(taken) < 500
    assert taken == {caller for caller in callers if again.takes(build_ticket(caller))}
    other = Second()
    other.model = replace(SECOND, digest="third")
    assert taken != {caller for caller in callers if Canary(other, 0.2).takes(build_ticket(caller))}
    assert Canary(Second(), 1.0).takes(build_ticket()) and not Canary(Second(), 1.0).takes(
        build_ticket(kind=PinnedTicket)
    )


@pytest.mark.parametrize("seconds_per_image", [1e-6, 1e-3])
def test_each_caller_is_answered_by_its_model(seconds_per_image: float) -> None:
    """On the event loop, and by a thread."""

    async def work() -> None:
        batcher = build(Gated(seconds_per_image=seconds_per_image), max_batch=8)
        batcher.canary = Canary(Second(), 0.5)
        tickets = [build_ticket(f"caller-{number}") for number in range(40)]
        expected = ["2" if batcher.canary.takes(ticket) else "1" for ticket in tickets]
        futures = [batcher.submit(ticket) for ticket in tickets]
        assert [(await future).classifier.model.version for future in futures] == expected
        assert set(expected) == {"1", "2"}
        batcher.stop()

    run(work)


@pytest.mark.parametrize(
    ("first", "answer", "error"),
    [
        (255, lambda rows: rows, "out of order"),
        (0, lambda rows: rows * np.float32("nan"), "its outputs have another shape or are not finite"),
        (0, lambda rows: rows[:, :1], "its outputs have another shape or are not finite"),
    ],
)
def test_where_the_canary_fails_the_champion_answers(first: int, answer: Any, error: str) -> None:
    async def work() -> None:
        fallbacks = Fallbacks()
        batcher = build(Gated(seconds_per_image=1e-6), observers=[fallbacks])
        batcher.canary = Canary(Second(answer), 1.0)
        ticket = await batcher.submit(build_ticket(first=first))
        assert ticket.classifier is batcher.classifier and ticket.row == [first, 1, 2]
        assert batcher.death is None
        batcher.stop()
        assert fallbacks.errors == [error]

    run(work)


def test_a_request_is_answered_by_one_model_even_where_the_canary_fails_for_some_images() -> None:
    async def work() -> None:
        batcher = build(Gated(seconds_per_image=1e-6), max_batch=1)
        batcher.canary = Canary(Second(), 1.0)
        service = Service(ServerSettings(model="m"), batcher, Metrics(), "m")
        request = Request({"type": "http", "caller": Caller("", "me")})
        for firsts, version in (((0, 1), "2"), ((0, 255, 1), "1")):
            tickets = await service.compute([build_ticket(first=first) for first in firsts], request)
            assert [ticket.row[0] for ticket in tickets] == list(firsts)
            assert {ticket.classifier.model.version for ticket in tickets} == {version}
        batcher.stop()

    run(work)


def test_what_each_version_computes_and_fails_is_counted_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> None:
        metrics = Metrics()
        batcher = build(Gated(seconds_per_image=1e-6), observers=[metrics, VersionMetrics(metrics)])
        batcher.canary = Canary(Second(), 0.5)
        answered: Counter[str] = Counter()
        for number in range(40):
            ticket = await batcher.submit(build_ticket(f"caller-{number}", 255 if number % 2 else 0))
            answered[ticket.classifier.model.version] += 1
        batcher.stop()
        samples = {
            (sample.name, sample.labels.get("version")): sample.value
            for family in metrics.registry.collect()
            for sample in family.samples
            if sample.name.startswith(("image_classifier_version", "image_classifier_canary"))
            and "le" not in sample.labels
        }
        for version in ("1", "2"):
            assert samples["image_classifier_version_images_total", version] == answered[version] > 0
            assert samples["image_classifier_version_confidence_count", version] == answered[version]
            assert samples["image_classifier_version_inference_duration_seconds_count", version] > 0
        assert samples["image_classifier_canary_fallbacks_total", None] > 1

    run(work)
    assert len(caplog.records) == 1 and "the champion answers instead: out of order" in caplog.text


def shadow(answer: Any, fraction: float = 1.0) -> tuple[Shadow, Counter[str], list[float]]:
    counts: Counter[str] = Counter()
    differences: list[float] = []

    def count(result: str, number: int) -> None:
        counts[result] += number

    return Shadow(Second(answer), fraction, count, differences.append), counts, differences


def build_answered(number: int, first: int = 0) -> list[Ticket]:
    tickets = [build_ticket(first=first) for _ in range(number)]
    for ticket in tickets:
        ticket.row = [float(first), 1.0, 2.0]
    return tickets


def finish(shadow: Shadow, counts: Counter[str], number: int) -> None:
    shadow.start()
    deadline = time.monotonic() + 20
    while counts.total() < number:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    shadow.stop(20)


def test_a_shadow_is_compared_with_what_was_answered() -> None:
    def turn(rows: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.where(rows[:, :1] == 9, rows[:, ::-1], rows + np.float32(0.25))

    watched, counts, differences = shadow(turn)
    watched.on_batch(build_answered(3), 0.1)
    watched.on_batch(build_answered(2, first=9), 0.1)
    finish(watched, counts, 5)
    assert counts == {"same_class": 3, "other_class": 2} and differences == [0.25] * 3 + [7.0] * 2


def test_a_shadow_that_fails_or_is_slow_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    watched, counts, _ = shadow(lambda rows: rows)
    watched.on_batch(build_answered(MAX_SHADOWED, first=255), 0.1)
    watched.on_batch(build_answered(7), 0.1)
    assert counts == {"dropped": 7}
    finish(watched, counts, MAX_SHADOWED + 7)
    assert counts == {"dropped": 7, "failed": MAX_SHADOWED}
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    partly, counts, _ = shadow(lambda rows: rows, fraction=0.5)
    partly.on_batch(build_answered(200), 0.1)
    assert 50 < len(partly._waiting) < 150


@pytest.mark.parametrize("change", [{"classes": ("a", "c", "b")}, {"image_size": 64}, {"fit": "crop"}])
def test_a_second_model_answers_in_the_same_form(change: dict[str, Any]) -> None:
    check_same_answers(SECOND, MODEL)
    with pytest.raises(ModelError, match="differ in classes, image size or fit"):
        check_same_answers(replace(SECOND, **change), MODEL)
