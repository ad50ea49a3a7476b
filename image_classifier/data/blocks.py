"""Shuffling of snapshots larger than memory: random order of images, with sequential reads from disk.

A block is 1 MiB of images that follow each other in the snapshot. In each epoch all blocks come in a random order, so
many of them at a time as a window holds, and the images of a window are shuffled. So the disk reads whole blocks, each
once an epoch, and an image may come at any place of the epoch. The price: what is near in the snapshot comes within one
window. Like every order it is a function of seed, epoch and image, and for a window that holds all it is
`compute_order`'s.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from image_classifier.data.mapping import advise
from image_classifier.randomness import BLOCK, ORDER, draw_bits

BLOCK_BYTES = 2**20
"""What a disk with heads reads in the time that it takes to get there, and what Linux reads ahead at once."""


def count_block_images(shape: Sequence[int]) -> int:
    """Count the images of a block by the shape of one."""
    return max(1, BLOCK_BYTES // math.prod(shape))


def compute_windows(
    seed: int, epoch: int, indices: NDArray[np.int64], num_block_images: int, num_window_blocks: int
) -> list[NDArray[np.int64]]:
    """Compute in which order an epoch goes through the images at these indices of a snapshot: window after window.

    Args:
        indices: int64 [M], different ones.
        num_window_blocks: of a window, to the nearest that gives windows of one size.

    Returns:
        Places in the indices, int64 [m] each; together a permutation [M].
    """
    blocks, block_of = np.unique(indices // num_block_images, return_inverse=True)
    num_windows = max(1, round(len(blocks) / num_window_blocks))
    ranks = np.empty(len(blocks), np.int64)
    ranks[np.argsort(draw_bits(seed, epoch, BLOCK, blocks), kind="stable")] = np.arange(len(blocks))
    window_of = ranks[block_of] * num_windows // max(1, len(blocks))
    order = np.lexsort((draw_bits(seed, epoch, ORDER, np.arange(len(indices))), window_of))
    return np.split(order, np.searchsorted(window_of[order], np.arange(1, num_windows)))


def read_ahead(images: NDArray[np.uint8], indices: NDArray[np.int64]) -> None:
    """Have the blocks that hold these images of a mapped snapshot read into memory, while others are trained on."""
    num_block_images = count_block_images(images.shape[1:])
    for block in np.unique(indices // num_block_images).tolist():
        advise(images[block * num_block_images : (block + 1) * num_block_images], "MADV_WILLNEED")
