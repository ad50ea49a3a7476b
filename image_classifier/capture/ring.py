"""Memory that two processes share: one appends messages, the other one reads them in their order, without a copy."""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

_HEAD = struct.Struct("<qqq")  # bytes until the next message, of the pixels, and of the rows; without rows it is a gap
_ALIGNMENT = 64


class Message(NamedTuple):
    """A message as it lies in the ring, until its bytes are freed there.

    Attributes:
        num_bytes: to be freed when it is done with, with those of a gap before it.
    """

    pixels: memoryview
    rows: memoryview
    num_bytes: int


class Ring:
    """A ring of messages.

    Args:
        size: in bytes, a multiple of 64; a message of up to half of that fits when all before it are freed.
        descriptors: of the other process's ring; by default a new one is made.

    Attributes:
        descriptors: of the memory, and of the counter of bytes that were appended and not yet read.
    """

    def __init__(self, size: int, descriptors: tuple[int, int] | None = None) -> None:
        self._size = size
        self._start = self._end = 0  # of what is not freed, in bytes since the beginning
        if descriptors is None:
            descriptors = os.memfd_create("captures"), os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            os.ftruncate(descriptors[0], size)
        self.descriptors = descriptors
        # Taken now: while requests are answered, the kernel would take 10 us for each page that is written first.
        self._memory = mmap.mmap(descriptors[0], size, mmap.MAP_SHARED | mmap.MAP_POPULATE)

    def append(self, pixels: bytes, rows: bytes) -> bool:
        """Append a message, and say whether there was room."""
        length = -(-(_HEAD.size + len(pixels) + len(rows)) // _ALIGNMENT) * _ALIGNMENT
        at = self._end % self._size
        skipped = self._size - at if at + length > self._size else 0
        if self._end - self._start + skipped + length > self._size:
            return False
        if skipped:
            _HEAD.pack_into(self._memory, at, skipped, 0, 0)
            at = 0
        _HEAD.pack_into(self._memory, at, length, len(pixels), len(rows))
        middle = at + _HEAD.size + len(pixels)
        self._memory[at + _HEAD.size : middle] = pixels
        self._memory[middle : middle + len(rows)] = rows
        self._end += skipped + length
        os.eventfd_write(self.descriptors[1], skipped + length)  # from now on the reader sees the message
        return True

    def free(self, num_bytes: int) -> None:
        """Take back the bytes of messages that the reader is done with."""
        self._start += num_bytes

    def clear(self) -> None:
        """Forget all messages, when their reader has gone: the next one begins anew."""
        self._start = self._end = 0
        with suppress(BlockingIOError):
            os.eventfd_read(self.descriptors[1])

    def read(self) -> Iterator[Message]:
        """Read what was appended since the last time."""
        try:
            unread = os.eventfd_read(self.descriptors[1])
        except BlockingIOError:
            return
        view, gap = memoryview(self._memory), 0
        while unread:
            at = self._end % self._size
            length, num_pixels, num_rows = _HEAD.unpack_from(view, at)
            self._end += length
            unread -= length
            middle = at + _HEAD.size + num_pixels
            if num_rows:
                yield Message(view[at + _HEAD.size : middle], view[middle : middle + num_rows], gap + length)
            gap = 0 if num_rows else length

    def close(self) -> None:
        """Give the memory back."""
        self._memory.close()
        for descriptor in self.descriptors:
            os.close(descriptor)
