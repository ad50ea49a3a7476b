"""Random numbers as pure functions of a seed and a purpose."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

GOLDEN_RATIO = 0x9E3779B97F4A7C15
ORDER, FLIP, SHIFT_Y, SHIFT_X, CUTOUT_Y, CUTOUT_X, SPLIT, WEIGHTS = range(8)
BRIGHTNESS, CONTRAST, SATURATION, FIRST_DISTORTION, SECOND_DISTORTION, MIX, MIX_Y, MIX_X, SAMPLE, BLOCK = range(8, 18)
"""What a random number is for; each use has a stream of its own."""
DRAWS = 64
"""The stream of what a network or an optimizer of another package draws in its steps."""


def draw_bits(seed: int, part: int, stream: int, indices: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Draw 64 random bits for each index, as a function of the arguments alone.

    The part is the epoch, or the number of a layer.

    SplitMix64 in counter mode (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, OOPSLA 2014).
    """
    key = np.array([seed], dtype=np.uint64)
    for number in (part, stream):
        key = _mix(key ^ np.uint64((number + 1) * GOLDEN_RATIO % 2**64))
    return _mix(key + (indices.astype(np.uint64) + np.uint64(1)) * np.uint64(GOLDEN_RATIO))


def _mix(bits: NDArray[np.uint64]) -> NDArray[np.uint64]:
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))
