"""Merkle trees of sizes at which their shape changes."""

from __future__ import annotations

from random import Random

from image_classifier.data.merkle import ENTRY_BYTES

SIZES = (1, 2, 15, 16, 17, 31, 32, 255, 256, 257, 272, 273, 4096, 4097)


def make_entries(num: int) -> bytes:
    """Make random entries, the same for the same number."""
    return Random(num).randbytes(num * ENTRY_BYTES)
