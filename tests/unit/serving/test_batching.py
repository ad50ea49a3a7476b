"""Batching: what waits is taken together, nobody gets another's answer, and nothing is computed for nobody."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from image_classifier.errors import ImageError, ImageSizeError
from image_classifier.imaging import decode_image
from image_classifier.published.predictor import PublishedModel
from image_classifier.serving import batching
from image_classifier.serving.batching import (
    Batcher,
    DeadlineError,
    InferenceError,
    Observer,
    QueueFullError,
    Ticket,
)
from tests.batching import MODEL, Gated, build, run, wait_until
from tests.bombs import build_png
from tests.confined import call_confined
from tests.serving import draw_images, encode


class Broken(Gated):
    """Fails as a library does that has lost its mind."""

    def predict(self, images: NDArray[np.uint8], *, is_alone: bool = False) -> NDArray[np.float32]:
        raise RuntimeError("out of order")


class Dropped(Observer):
    """Keeps why images were dropped."""

    def __init__(self) -> None:
        self.reasons: list[str] = []

    def on_drop(self, ticket: Ticket, reason: str) -> None:
        self.reasons.append(reason)


def build_tickets(images: NDArray[np.uint8]) -> list[Ticket]:
    return [Ticket(image.tobytes()) for image in images]


async def wait_for(event: threading.Event) -> None:
    assert await asyncio.to_thread(event.wait, 20)


def test_what_waits_is_taken_together_and_no_batch_is_too_large() -> None:
    async def work() -> None:
        classifier = Gated(is_open=False, seconds_per_image=1e-3)
        batcher = build(classifier)
        first = [batcher.submit(ticket) for ticket in build_tickets(draw_images(3))]
        await wait_for(classifier.entered)
        others = [batcher.submit(ticket) for ticket in build_tickets(draw_images(10))]
        assert batcher.num_pending == 13
        classifier.gate.set()
        await asyncio.gather(*first, *others)
        assert max(classifier.sizes) == 4
        assert sum(classifier.sizes) == 13
        assert batcher.num_pending == 0
        batcher.stop()

    run(work)


@pytest.mark.parametrize(
    ("seconds_per_image", "num_at_once", "largest"),
    [(1e-6, 12, 8), (4e-4, 2, 8), (1e-3, 0, 5), (4e-3, 0, 2), (1.0, 0, 1)],
)
def test_what_is_quick_is_computed_at_once_and_what_is_slow_is_shared(
    seconds_per_image: float, num_at_once: int, largest: int
) -> None:
    """A batch ends at 8 images, or at the 5 ms after which another thread had better take some."""

    async def work() -> None:
        classifier = Gated(seconds_per_image=seconds_per_image)
        batcher = build(classifier, max_batch=8, num_threads=2)
        for number in (1, 2, 8, 12, 1):
            classifier.sizes, classifier.threads = [], []
            await asyncio.gather(*(batcher.submit(ticket) for ticket in build_tickets(draw_images(number))))
            is_at_once = number <= num_at_once
            assert {name == "MainThread" for name in classifier.threads} == {is_at_once}
            assert max(classifier.sizes) <= largest
            assert sum(classifier.sizes) == number
            await wait_until(lambda: not batcher._busy_since)
        batcher.stop()

    run(work)


def test_two_threads_share_what_waits() -> None:
    async def work() -> None:
        classifier = Gated(is_open=False, seconds_per_image=3e-4)
        batcher = build(classifier, max_batch=10, num_threads=2)
        futures = [batcher.submit(ticket) for ticket in build_tickets(draw_images(10))]
        await wait_until(lambda: len(classifier.sizes) == 2)
        assert classifier.sizes[0] <= 5  # less where it was quick to see the first ones
        assert set(classifier.threads) == {"inference-0", "inference-1"}
        classifier.gate.set()
        await asyncio.gather(*futures)
        batcher.stop()

    run(work)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.booleans(), st.sampled_from([1e-6, 1e-3]))
def test_everybody_gets_his_own_answer(sizes: Sequence[int], is_encoded: bool, seconds_per_image: float) -> None:
    async def work() -> None:
        batcher = build(Gated(seconds_per_image=seconds_per_image), num_threads=2)

        async def ask(seed: int, size: int) -> None:
            images = draw_images(size, seed)
            contents = [encode(image) if is_encoded else image.tobytes() for image in images]
            tickets = [Ticket(None, each, ("PNG",)) if is_encoded else Ticket(each) for each in contents]
            for image, future in zip(images, [batcher.submit(ticket) for ticket in tickets], strict=True):
                ticket = await future
                assert ticket.row == image[0, 0].tolist()
                assert [ticket.row[index] for index in ticket.order] == sorted(ticket.row, reverse=True)

        await asyncio.gather(*(ask(seed, size) for seed, size in enumerate(sizes)))
        batcher.stop()

    run(work)


def test_a_full_queue_has_no_room() -> None:
    async def work() -> None:
        classifier = Gated(is_open=False)
        batcher = build(classifier, max_queue=3)
        futures = [batcher.submit(ticket) for ticket in build_tickets(draw_images(3))]
        with pytest.raises(QueueFullError):
            batcher.check_room(1)
        classifier.gate.set()
        await asyncio.gather(*futures)
        batcher.check_room(3)
        batcher.stop()

    run(work)


def test_what_waits_too_long_is_given_up_though_the_thread_is_busy() -> None:
    async def work() -> None:
        dropped = Dropped()
        classifier = Gated(is_open=False)
        batcher = build(classifier, timeout_s=0.1, observers=[dropped])
        first, second = [batcher.submit(ticket) for ticket in build_tickets(draw_images(2))]
        await wait_for(classifier.entered)
        with pytest.raises(DeadlineError):
            await second
        with pytest.raises(DeadlineError):
            await first
        classifier.gate.set()
        while batcher.num_pending:
            await asyncio.sleep(0.01)
        assert sum(classifier.sizes) in (1, 2) and dropped.reasons == ["deadline"] * 2
        batcher.stop()

    run(work)


def test_what_nobody_waits_for_is_not_computed() -> None:
    async def work() -> None:
        dropped = Dropped()
        classifier = Gated(is_open=False)
        batcher = build(classifier, observers=[dropped])
        first = batcher.submit(build_tickets(draw_images(1))[0])
        await wait_for(classifier.entered)
        others = [batcher.submit(ticket) for ticket in build_tickets(draw_images(6))]
        for future in others[:5]:
            future.cancel()
        classifier.gate.set()
        await asyncio.gather(first, others[5])
        assert classifier.sizes == [1, 1]
        assert dropped.reasons == ["client_left"] * 5
        batcher.stop()

    run(work)


def test_an_image_that_cannot_be_read_fails_alone() -> None:
    async def work() -> None:
        batcher = build(Gated())
        good = batcher.submit(Ticket(None, encode(draw_images(1)[0]), ("PNG",)))
        bad = batcher.submit(Ticket(None, b"bad", ("PNG",)))
        with pytest.raises(ImageError, match="not a PNG"):
            await bad
        assert (await good).pixels == draw_images(1)[0].tobytes()
        assert batcher.num_pending == 0
        batcher.stop()

    run(work)


@pytest.mark.parametrize(
    ("side", "is_flat", "threads"),
    [
        (32, False, ["MainThread"]),
        (300, True, ["MainThread", "decoder"]),  # few bytes; the event loop looks, and hands it on
        (300, False, ["decoder"]),
    ],
)
def test_only_a_small_file_is_decoded_by_the_event_loop(
    side: int, is_flat: bool, threads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def note(*arguments: Any, **options: Any) -> NDArray[np.uint8]:
        seen.append(threading.current_thread().name.partition("-")[0])
        return decode_image(*arguments, **options)

    monkeypatch.setattr(batching, "decode_image", note)
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    content = encode(np.zeros_like(pixels) if is_flat else pixels)
    assert (len(content) <= batching.SMALL_FILE_BYTES) == (side == 32 or is_flat)

    async def work() -> None:
        batcher = build(Gated())
        assert (await batcher.submit(Ticket(None, content, ("PNG",)))).pixels == decode_image(content).tobytes()
        batcher.stop()

    run(work)
    assert seen == threads


def test_an_image_is_fitted_as_the_model_says_that_computes_it() -> None:
    content = encode(np.random.default_rng(0).integers(0, 256, (40, 90, 3), dtype=np.uint8))

    async def work() -> None:
        classifier = Gated()
        classifier.model = replace(MODEL, fit="crop")
        batcher = build(classifier)
        ticket = await batcher.submit(Ticket(None, content, ("PNG",)))
        assert ticket.pixels == decode_image(content, fit="crop").tobytes() != decode_image(content).tobytes()
        batcher.stop()

    run(work)


@pytest.mark.parametrize(
    ("content", "is_small"),
    [
        (encode(draw_images(1)[0]), True),
        (encode(draw_images(1)[0], "WEBP", lossless=True), True),
        (encode(draw_images(1)[0], "BMP"), False),
        (encode(draw_images(1)[0])[:1000] + b"zTXt", False),
        (encode(draw_images(1)[0], "JPEG", exif=b"Exif\0\0II*\0"), False),
        (bytes(batching.SMALL_FILE_BYTES + 1), False),
    ],
)
def test_what_may_unpack_to_more_than_an_image_is_not_small(content: bytes, is_small: bool) -> None:
    assert batching.is_small(content) == is_small


def test_an_image_is_computed_by_the_model_that_was_current_when_it_came() -> None:
    async def work() -> None:
        old, new = Gated(is_open=False), Gated()
        batcher = build(old, max_batch=8)
        before = [batcher.submit(ticket) for ticket in build_tickets(draw_images(3))]
        await wait_for(old.entered)
        batcher.classifier = new
        after = [batcher.submit(ticket) for ticket in build_tickets(draw_images(3))]
        old.gate.set()
        assert {(await future).classifier for future in before} == {old}
        assert {(await future).classifier for future in after} == {new}
        assert sum(old.sizes) == sum(new.sizes) == 3
        batcher.stop()

    run(work)


def test_images_get_the_side_that_the_model_takes() -> None:
    async def work() -> None:
        batcher = build(Gated(image_size=96))
        small, raw = draw_images(1)[0], draw_images(1, side=96)[0]
        tickets = [Ticket(None, encode(small), ("PNG",)), Ticket(raw.tobytes())]
        first, second = await asyncio.gather(*(batcher.submit(ticket) for ticket in tickets))
        assert first.pixels == decode_image(encode(small), side=96).tobytes()
        assert second.row == raw[0, 0].tolist()
        batcher.stop()

    run(work)


def test_a_quick_model_that_follows_does_not_make_the_slow_one_quick() -> None:
    async def work() -> None:
        old = Gated(seconds_per_image=1.0)
        batcher = build(old)
        futures = [batcher.submit(ticket) for ticket in build_tickets(draw_images(2))]
        batcher.classifier = Gated(seconds_per_image=1e-6)
        await asyncio.gather(*futures)
        assert set(old.threads) == {"inference-0"}
        batcher.stop()

    run(work)


def test_a_dead_thread_fails_what_waits_and_is_told() -> None:
    async def work() -> None:
        deaths: list[BaseException] = []
        batcher = build(Broken(), on_death=deaths.append)
        assert batcher.is_beating()
        futures = [batcher.submit(ticket) for ticket in build_tickets(draw_images(3))]
        for future in futures:
            with pytest.raises(InferenceError):
                await future
        assert [str(death) for death in deaths] == ["out of order"]
        assert not batcher.is_beating()
        with pytest.raises(InferenceError):
            batcher.check_room(1)

    run(work)


def test_a_batch_that_takes_too_long_is_no_heartbeat() -> None:
    async def work() -> None:
        classifier = Gated(is_open=False)
        batcher = build(classifier)
        future = batcher.submit(build_tickets(draw_images(1))[0])
        await wait_for(classifier.entered)
        assert batcher.is_beating(within_s=10)
        await asyncio.sleep(0.05)
        assert not batcher.is_beating(within_s=0.01)
        classifier.gate.set()
        await future
        assert batcher.is_beating(within_s=0.01)
        batcher.stop()

    run(work)


class Held(Gated):
    """Lets no decoder past, of those whose name begins so, that asks how images are fitted; or ends it."""

    def __init__(self, end: BaseException | None = None, name: str = "decoder") -> None:
        self.name = name
        self.passed = threading.Event()
        self.asked: list[str] = []
        self.end = end
        super().__init__()

    @property
    def model(self) -> PublishedModel:
        if threading.current_thread().name.startswith(self.name):
            self.asked.append(threading.current_thread().name)
            if self.end is not None:
                raise self.end
            assert self.passed.wait(20)
        return MODEL

    @model.setter
    def model(self, model: PublishedModel) -> None:
        assert model is MODEL


def build_file(side: int, caller: str = "") -> Ticket:
    """Build the ticket of an even PNG, which is decoded by a decoding thread."""
    ticket = Ticket(None, build_png(side, side, content=bytes((side + 1) * side)), ("PNG",))
    ticket.caller = caller
    return ticket


COSTLY_SIDE = 2000
"""Of a square that is not cheap to decode."""


def test_a_costly_image_waits_for_costly_ones_and_a_cheap_one_does_not() -> None:
    """Of one caller, and with one inference thread."""

    async def work() -> None:
        held = Held(name="decoder-0")
        batcher = build(held)
        costly = [batcher.submit(build_file(COSTLY_SIDE)) for _ in range(3)]
        await wait_until(lambda: bool(held.asked))
        batcher.classifier = Gated()
        await asyncio.gather(*(batcher.submit(build_file(300)) for _ in range(8)))
        assert not any(future.done() for future in costly)
        held.passed.set()
        await asyncio.gather(*costly)
        batcher.stop()

    run(work)


@pytest.mark.parametrize("num_threads, num_decoders", [(1, 2), (2, 2), (3, 3), (8, 8)])
def test_some_threads_decode_what_is_cheap_alone(num_threads: int, num_decoders: int) -> None:
    batcher = Batcher(Gated(), max_batch=1, max_queue=1, timeout_s=1, num_threads=num_threads)
    only_cheap = [thread._args[0] for thread in batcher._decoders]  # type: ignore[attr-defined]
    assert len(only_cheap) == num_decoders and 1 <= only_cheap.count(False) <= 2 and only_cheap.count(True) >= 1


def test_an_image_over_the_limit_is_refused_by_whoever_takes_it() -> None:
    async def work() -> None:
        batcher = build(Gated(), max_pixels=1_000_000)
        small = Ticket(None, build_png(1001, 1000), ("PNG",))
        with pytest.raises(ImageSizeError, match="^1001 x 1000 pixels, but at most 1,000,000 are decoded"):
            await batcher.submit(small)
        with pytest.raises(ImageSizeError, match="^2000 x 2000 pixels, but at most 1,000,000 are decoded"):
            await batcher.submit(build_file(COSTLY_SIDE))
        assert (await batcher.submit(build_file(999))).pixels == bytes(3072)
        batcher.stop()

    run(work)


def test_an_unexpected_error_in_decoding_is_that_of_one_image(caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> None:
        batcher = build(Held(RuntimeError("out of order")))
        failed = [batcher.submit(build_file(300)) for _ in range(4)]
        for future in failed:
            with pytest.raises(ImageError, match="^the image cannot be decoded"):
                await future
        batcher.classifier = Gated()
        assert (await batcher.submit(build_file(300))).pixels == bytes(3072)
        assert batcher.is_beating() and batcher.num_pending == 0
        batcher.stop()

    run(work)
    assert caplog.text.count("RuntimeError: out of order") == 4


def decode_beyond_memory(path: Path) -> None:
    """Decode in a batcher a file that takes more memory than this process may have, then a small one."""

    async def work() -> None:
        batcher = build(Gated(), max_pixels=50_000_000)
        with pytest.raises(ImageError, match="^there is not enough memory to decode the image$"):
            await batcher.submit(Ticket(None, path.read_bytes(), ("PNG",)))
        assert (await batcher.submit(build_file(300))).pixels == bytes(3072)
        assert batcher.is_beating()
        batcher.stop()

    run(work)


def test_too_little_memory_for_an_image_is_that_images_failure(tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    path.write_bytes(build_png(7000, 7000, colour=2, content=bytes(1 + 7000 * 3) * 7000))
    outcome = call_confined("tests.unit.serving.test_batching:decode_beyond_memory", path, memory_mb=180)
    assert outcome.error is None


def test_a_decoder_that_is_stuck_is_no_heartbeat() -> None:
    async def work() -> None:
        held = Held()
        batcher = build(held)
        future = batcher.submit(build_file(300))
        await wait_until(lambda: bool(held.asked))
        assert batcher.is_beating(within_s=10)
        await asyncio.sleep(0.05)
        assert not batcher.is_beating(within_s=0.01)
        held.passed.set()
        await future
        await wait_until(lambda: not batcher._encoded.list_began())
        assert batcher.is_beating(within_s=0.01)
        batcher.stop()

    run(work)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_decoder_that_has_died_is_no_heartbeat() -> None:
    async def work() -> None:
        batcher = build(Held(SystemExit()), timeout_s=0.2)
        assert batcher.is_beating()
        with pytest.raises(DeadlineError):
            await batcher.submit(build_file(300))
        assert not batcher.is_beating()
        batcher.stop()

    run(work)


def test_what_waits_to_be_decoded_is_decoded_after_the_stop() -> None:
    async def work() -> None:
        held = Held()
        batcher = build(held)
        tickets = [build_file(side) for side in (COSTLY_SIDE, 300, COSTLY_SIDE, 300)]
        for ticket in tickets:
            batcher.submit(ticket)
        await wait_until(lambda: bool(held.asked))
        batcher.stop()
        held.passed.set()
        await wait_until(lambda: not any(thread.is_alive() for thread in batcher._decoders))
        assert [ticket.pixels for ticket in tickets] == [bytes(3072)] * 4

    run(work)
