"""Keeps freed memory: each step allocates the same tensors, and new pages cost more than the computation in them."""

from __future__ import annotations

import ctypes
import sys

# Of glibc's malloc.h.
M_TRIM_THRESHOLD = -1
M_MMAP_MAX = -4
M_ARENA_MAX = -8


def keep_freed_memory() -> bool:
    """Tell glibc's malloc to keep what is freed instead of returning it to the kernel; say whether it could be told.

    By default each tensor of 32 MiB and more is mapped anew, and the kernel fills its pages with zeros first. The same
    pages taken again make the same bits. Another allocator (jemalloc, which the records use on CPUs) would have to be
    loaded before the process starts. Holds for the whole process; without glibc nothing happens.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # musl has none
        return False
    options = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: 2**31 - 1, M_ARENA_MAX: 1}
    return all([mallopt(option, value) == 1 for option, value in options.items()])
