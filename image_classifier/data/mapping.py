"""Memory-mapped arrays, read in disk order and released from memory after use."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

_BLOCK_BYTES = 2**24

Number = TypeVar("Number", bound=np.generic)


def iterate_blocks(array: NDArray[Number]) -> Iterator[NDArray[Number]]:
    """Iterate over an array [N, …] in blocks of up to 16 MiB along its first axis.

    The pages of an `np.memmap` are given back behind each block: gone through once, it would stay in memory whole, and
    count as this process's. What was changed in a private mapping is lost, so it is for arrays as they were mapped.
    """
    num_rows = max(1, _BLOCK_BYTES // max(1, array[:1].nbytes))
    for start in range(0, len(array), num_rows):
        block = array[start : start + num_rows]
        yield block
        if isinstance(array, np.memmap):
            advise(block, "MADV_DONTNEED")


def advise(array: NDArray[np.generic], advice: str) -> None:
    """Give the system advice on the pages of an array whose elements follow each other; nothing where it is no mapping.

    Args:
        advice: name of a constant of `mmap`; ignored where the system does not have it.
    """
    base: object = array
    while isinstance(base, np.ndarray):
        base = base.base
    if not isinstance(base, mmap.mmap) or not hasattr(mmap, advice) or not array.nbytes:
        return
    start = _get_address(array) - _get_address(np.frombuffer(base, np.uint8))
    first = start - start % mmap.PAGESIZE
    base.madvise(getattr(mmap, advice), first, start + array.nbytes - first)


def _get_address(array: NDArray[np.generic]) -> int:
    address: int = array.__array_interface__["data"][0]
    return address
