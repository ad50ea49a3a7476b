"""Messages arrive in their order and whole, whatever their sizes; what does not fit is refused."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from image_classifier.capture.ring import Ring


@pytest.fixture(name="ends")
def make() -> Iterator[tuple[Ring, Ring]]:
    ring = Ring(64 * 64)
    yield ring, Ring(64 * 64, ring.descriptors)
    ring.close()


def test_messages_of_all_sizes_go_around_the_ring(ends: tuple[Ring, Ring]) -> None:
    ours, theirs = ends
    generator = random.Random(0)
    sent: list[tuple[bytes, bytes]] = []
    read: list[tuple[bytes, bytes]] = []
    kept: list[int] = []
    num_refused = 0
    for _ in range(2000):
        message = generator.randbytes(generator.randrange(1500)), generator.randbytes(generator.randrange(1, 400))
        if ours.append(*message):
            sent.append(message)
        else:
            num_refused += 1
        if generator.random() < 0.3:
            for found in theirs.read():
                read.append((bytes(found.pixels), bytes(found.rows)))
                kept.append(found.num_bytes)
            if generator.random() < 0.7:
                ours.free(sum(kept))
                kept.clear()
    read += [(bytes(found.pixels), bytes(found.rows)) for found in theirs.read()]
    assert read == sent and len(sent) > 500 and num_refused > 50
    assert list(theirs.read()) == []


def test_half_of_the_ring_always_fits_when_it_is_free(ends: tuple[Ring, Ring]) -> None:
    ours, theirs = ends
    for number in range(100):
        rows = bytes([number]) * (ours_half := 64 * 32 - 24)
        assert ours.append(b"", rows) and len(rows) == ours_half
        (message,) = theirs.read()
        assert bytes(message.rows) == rows
        ours.free(message.num_bytes)
        assert ours.append(b"", b"x" * (number % 7 * 64 + 1))
        ours.free(sum(message.num_bytes for message in theirs.read()))
