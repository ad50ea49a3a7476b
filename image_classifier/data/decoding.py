"""Decode and resize the images of a source, in threads and in their order."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from image_classifier.access import Reading
from image_classifier.data.content import Batch, Content
from image_classifier.data.findings import Notebook
from image_classifier.errors import DataError, ImageError

_BATCH, _BATCH_BYTES = 500, 2**24
_FEWEST_AHEAD = 16
_NUM_LISTED = 5

T = TypeVar("T")


def resize_content(content: Content, reading: Reading) -> Content:
    """Resize a source whose images are pixels already, if they are of another size than they are to be read in.

    Raises:
        DataError: images of another size are to be refused.
    """
    if content.image_size == reading.side:
        return content
    if reading.fit == "refuse":
        raise DataError(
            f"{content.name} has images of {content.image_size} x {content.image_size} pixels instead of "
            f"{reading.side} x {reading.side}; choose --image_size {content.image_size}, or another --fit"
        )
    notebook = Notebook(reading)

    def resize(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        from image_classifier.imaging import resize_pixels  # Pillow, which a run that finds its snapshot does not need

        return resize_pixels(np.ascontiguousarray(image.transpose(1, 2, 0)), reading.side, notebook.note_size)

    def iterate(batches: Iterable[Batch]) -> Iterator[tuple[NDArray[np.uint8], int]]:
        for images, labels in batches:
            yield from zip(images, labels.tolist(), strict=True)

    parts = {part: decode_images(iterate(batches), resize) for part, batches in content.parts.items()}
    return replace(content, parts=parts, notebook=notebook, image_size=reading.side, reopen=None)


def decode_images(
    encoded: Iterable[tuple[T, int]],
    decode: Callable[[T], NDArray[np.uint8]],
    left_out: list[str] | None = None,
    notebook: Notebook | None = None,
) -> Iterator[Batch]:
    """Decode images in threads, in their order; each comes with its label.

    Args:
        decode: gives uint8 [S, S, 3].
        left_out: gets the reason for each image that cannot be read, which is left out then.
        notebook: gets what decoding an image notes when it is the image's turn, so that the notes are those of the
            batches so far.

    Raises:
        DataError: images cannot be read, and are not left out; the message lists the first of them, with the reasons.
    """
    num_bad, reasons = 0, list[str]()
    images, labels = list[NDArray[np.uint8]](), list[int]()
    for result, label in _decode_in_threads(encoded, decode, notebook or Notebook(Reading())):
        if not isinstance(result, ImageError):
            if not num_bad:  # else the rest is read for its errors alone
                images.append(result)
                labels.append(label)
        elif left_out is not None:
            left_out.append(str(result))
        else:
            num_bad += 1
            reasons += [str(result)] if num_bad <= _NUM_LISTED else []
            images, labels = [], []
        if len(images) == _BATCH or (images and len(images) * images[0].nbytes >= _BATCH_BYTES):
            yield np.stack(images), np.array(labels, np.int64)
            images, labels = [], []
    if num_bad:
        more = f"; and {num_bad - _NUM_LISTED:,} more" if num_bad > _NUM_LISTED else ""
        raise DataError(
            f"{num_bad:,} of the images cannot be read; repair or remove them, or leave them out with --skip_bad: "
            f"{'; '.join(reasons)}{more}"
        )
    if images:
        yield np.stack(images), np.array(labels, np.int64)


def _decode_in_threads(
    encoded: Iterable[tuple[T, int]], decode: Callable[[T], NDArray[np.uint8]], notebook: Notebook
) -> Iterator[tuple[NDArray[np.uint8] | ImageError, int]]:
    """Decode to [3, S, S] in order by all cores, with a few images ahead: encoded they may have 32 MB each."""

    def attempt(encoded: T) -> tuple[NDArray[np.uint8] | ImageError, list[tuple[int, int]]]:
        with notebook.apart() as sizes:
            try:
                return np.ascontiguousarray(decode(encoded).transpose(2, 0, 1)), sizes
            except ImageError as error:
                return error, sizes

    def finish() -> tuple[NDArray[np.uint8] | ImageError, int]:
        future, label = pending.popleft()
        result, sizes = future.result()
        notebook.add_sizes(sizes)
        return result, label

    pending: deque[tuple[Future[tuple[NDArray[np.uint8] | ImageError, list[tuple[int, int]]]], int]] = deque()
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    num_ahead = max(_FEWEST_AHEAD, 2 * num_cores)
    with ThreadPoolExecutor(num_cores + 1) as threads:
        try:
            for item, label in encoded:
                pending.append((threads.submit(attempt, item), label))
                if len(pending) == num_ahead:
                    yield finish()
            while pending:
                yield finish()
        finally:
            threads.shutdown(cancel_futures=True)  # after an error or an interrupt, nobody wants the images ahead
