"""A ring buffer in shared memory: one process appends messages, another one reads them in order without copying."""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

_HEAD = struct.Struct("<qqq")  # bytes until the next message, bytes of pixels, bytes of rows; 0 rows mark a gap
_ALIGNMENT = 64


class Message(NamedTuple):
    """A view of a message in the ring, valid until its bytes are freed.

    Attributes:
        num_bytes: number of bytes to free afterwards, including a gap before the message.
    """

    pixels: memoryview
    rows: memoryview
    num_bytes: int


class Ring:
    """A ring buffer of messages.

    Args:
        size: in bytes, a multiple of 64. A message of half that size fits into an empty ring.
        descriptors: of the other process's ring; by default a new ring is created.

    Attributes:
        descriptors: of the memory, and of an eventfd that counts unread bytes.
    """

    def __init__(self, size: int, descriptors: tuple[int, int] | None = None) -> None:
        self._size = size
        self._start = self._end = 0  # of what is not freed, in bytes since the beginning
        if descriptors is None:
            descriptors = os.memfd_create("captures"), os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            os.ftruncate(descriptors[0], size)
        self.descriptors = descriptors
        # Populate the pages now: each first write would otherwise cost 10 us while requests are answered.
        self._memory = mmap.mmap(descriptors[0], size, mmap.MAP_SHARED | mmap.MAP_POPULATE)

    def append(self, pixels: bytes, rows: bytes) -> bool:
        """Append a message if there is room, and return whether there was."""
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
        os.eventfd_write(self.descriptors[1], skipped + length)  # makes the message visible to the reader
        return True

    def free(self, num_bytes: int) -> None:
        """Free the bytes of messages that the reader has processed."""
        self._start += num_bytes

    def clear(self) -> None:
        """Discard all messages after the reader died; the next reader starts with an empty ring."""
        self._start = self._end = 0
        with suppress(BlockingIOError):
            os.eventfd_read(self.descriptors[1])

    def read(self) -> Iterator[Message]:
        """Yield the messages that were appended since the last call."""
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
        """Release the memory."""
        self._memory.close()
        for descriptor in self.descriptors:
            os.close(descriptor)
