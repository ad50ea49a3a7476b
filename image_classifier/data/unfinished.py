"""An unfinished snapshot, written image by image, which the next process continues if this one is killed.

It lies in the store that it will be in::

    unfinished-<fingerprint>/progress.json        how far it is, on the disk for certain
    unfinished-<fingerprint>/labels.bin           int64 [n]
    unfinished-<fingerprint>/snapshot/images.npy  uint8 [n, 3, S, S]

`progress.json` has digests of both, which are checked before more is written behind them. Only what follows from the
source alone is kept there, so the snapshot does not depend on who wrote which part of it. A store has one of these of
a user at most: to begin another is to give the one before up.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import time
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import BinaryIO

import numpy as np

from image_classifier.data.content import Content
from image_classifier.data.levels import TREE_FILE
from image_classifier.errors import Interrupted
from image_classifier.files import check_form, load_json
from image_classifier.progress import track
from image_classifier.storage import DISK, temporary_folder, try_lock, write_atomically
from image_classifier.text import one_line

UNFINISHED_PREFIX = "unfinished-"
SAVE_EVERY_S = 5.0
"""What a kill costs at most; each time the disk is waited for."""

_PROGRESS, _LABELS, _IMAGES = "progress.json", "labels.bin", "images.npy"
_FORM = {"reader": str, "parts": {str: {"kept": int, "left_out": int}}, "images": str, "labels": str, "notes": dict}
_READ_AT_ONCE = 2**22

logger = logging.getLogger(__name__)


@dataclass
class _File:
    """A file that grows, with the digest of all that was written behind its head."""

    file: BinaryIO
    digest: hashlib._Hash = field(default_factory=hashlib.sha256)

    def write(self, content: memoryview) -> None:
        self.file.write(content)
        self.digest.update(content)

    def sync(self) -> str:
        self.file.flush()
        os.fsync(self.file.fileno())
        return self.digest.hexdigest()

    def cut(self, head_bytes: int, num_bytes: int) -> str:
        """Cut off what follows so many bytes behind the head; return the digest of what stays."""
        self.digest = hashlib.sha256()
        self.file.truncate(head_bytes + num_bytes)
        self.file.seek(head_bytes)
        while part := self.file.read(_READ_AT_ONCE):
            self.digest.update(part)
        if self.file.tell() != head_bytes + num_bytes:
            raise ValueError("it became shorter")
        return self.digest.hexdigest()


@contextmanager
def unfinished_folder(store: Path, fingerprint: str | None) -> Iterator[tuple[Path, bool]]:
    """Yield a folder in a store to write a snapshot in, and whether the next process finds it after a kill.

    It is removed at the end, and after an error, but not when the process was asked to stop.

    Args:
        fingerprint: of the source; None for one that cannot be gone on with.

    Raises:
        OSError: the disk refused.
    """
    with ExitStack() as stack:
        if fingerprint is not None:
            path = store / f"{UNFINISHED_PREFIX}{fingerprint}"
            for other in store.glob(f"{UNFINISHED_PREFIX}*"):
                if other != path:
                    _remove(other)
            path.mkdir(exist_ok=True)
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            stack.callback(os.close, descriptor)
            if try_lock(descriptor) and os.fstat(descriptor).st_uid == os.getuid():
                with _removed_unless_stopped(path):
                    yield path, True
                return
            with suppress(OSError):  # without locks another process may write there, too, and has what it writes
                path.rmdir()
        yield stack.enter_context(temporary_folder(store)), False


@contextmanager
def _removed_unless_stopped(path: Path) -> Iterator[None]:
    try:
        yield
    except (Interrupted, KeyboardInterrupt):
        raise
    except BaseException:
        _remove(path)
        raise
    _remove(path)


def _remove(path: Path) -> None:
    with suppress(OSError):  # another user's, which is theirs to go on with
        DISK.remove(path)


def write_arrays(folder: Path, content: Content, is_kept: bool) -> tuple[Path, dict[str, int]]:
    """Write images.npy and labels.npy; return the folder that they lie in, and the number of images of each part.

    Args:
        folder: what `unfinished_folder` yielded.
        is_kept: whether another process may have begun there, or will go on.

    Raises:
        DataError: what the content raises while it is read.
        OSError: the disk refused.
    """
    target = folder / "snapshot"
    target.mkdir(exist_ok=is_kept)
    for name in (TREE_FILE, "snapshot.json"):
        (target / name).unlink(missing_ok=True)  # of a process that was killed at the very end
    shape = (3, content.image_size, content.image_size)
    with open(target / _IMAGES, "a+b") as images, open(folder / _LABELS, "a+b") as labels:
        files = {"images": _File(images), "labels": _File(labels)}
        done = _go_on(folder, files, content, shape) if is_kept else None
        if done is None:
            for file in files.values():
                file.cut(0, 0)
            images.write(_build_header(0, shape))
            done = {part: {"kept": 0, "left_out": 0} for part in content.parts}
        num_done = sum(counts["kept"] + counts["left_out"] for counts in done.values())
        with track("reading the data set", content.num_images, "images", done=num_done) as task:
            started = saved = time.monotonic()
            for part, counts in done.items():
                for num_images in _write_part(files, content, part, counts):
                    task.advance(num_images)
                    if is_kept and time.monotonic() - saved > SAVE_EVERY_S:
                        _save(folder, files, content, done)
                        saved = time.monotonic()
        if is_kept and time.monotonic() - started > SAVE_EVERY_S:  # what comes next is to read it all once more
            _save(folder, files, content, done)
    num_kept = {part: counts["kept"] for part, counts in done.items()}
    with open(target / _IMAGES, "r+b") as images:
        images.write(_build_header(sum(num_kept.values()), shape))
    np.save(target / "labels.npy", np.fromfile(folder / _LABELS, np.int64))
    return target, num_kept


def _write_part(files: dict[str, _File], content: Content, part: str, counts: dict[str, int]) -> Iterator[int]:
    """Write what is left of a part, and yield how many images each batch had, those that were left out counted."""
    left_out = content.notebook.left_out if content.notebook is not None else []
    num_before = len(left_out) - counts["left_out"]
    num_read = counts["kept"] + counts["left_out"]
    assert num_read == 0 or content.reopen is not None
    batches = content.reopen(part, num_read) if num_read and content.reopen else content.parts[part]
    try:
        for images, labels in batches:
            files["images"].write(np.ascontiguousarray(images, np.uint8).data)
            files["labels"].write(np.ascontiguousarray(labels, np.int64).data)
            counts["kept"] += len(labels)
            counts["left_out"] = len(left_out) - num_before
            yield counts["kept"] + counts["left_out"] - num_read
            num_read = counts["kept"] + counts["left_out"]
    finally:
        if isinstance(batches, Generator):
            batches.close()  # after an error or an interrupt: else its threads decode on while the error is reported
    counts["left_out"] = len(left_out) - num_before


def _save(folder: Path, files: dict[str, _File], content: Content, done: dict[str, dict[str, int]]) -> None:
    notes = {} if content.notebook is None else content.notebook.to_json()
    record = {"format_version": 1, "reader": _describe_reader(), "parts": done, "notes": notes}
    record |= {name: file.sync() for name, file in files.items()}
    write_atomically(folder / _PROGRESS, json.dumps(record).encode())


def _go_on(
    folder: Path, files: dict[str, _File], content: Content, shape: tuple[int, int, int]
) -> dict[str, dict[str, int]] | None:
    """Bring both files to where the last one was saved; None where there is nothing to go on with."""
    try:
        record = load_json(folder / _PROGRESS)
        check_form(record, _FORM)
        done: dict[str, dict[str, int]] = record["parts"]
        if record["reader"] != _describe_reader() or list(done) != list(content.parts):
            return None
        if any(number < 0 for counts in done.values() for number in counts.values()):
            raise ValueError("its number of images is negative")
        num_images = sum(counts["kept"] for counts in done.values())
        head = _build_header(0, shape)
        sizes = {"images": (len(head), num_images * int(np.prod(shape))), "labels": (0, num_images * 8)}
        for name, file in files.items():
            if file.cut(*sizes[name]) != record[name]:
                raise ValueError(f"its {name} were changed after they were written")
        if content.notebook is not None:
            content.notebook.restore(record["notes"])
        return done
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        logger.warning("an unfinished snapshot is started again: %s: %s", folder, one_line(error))
        return None


def _describe_reader() -> str:
    """Describe what the pixels depend on beside the source."""
    return f"pillow {version('pillow')}"


def _build_header(num_images: int, shape: tuple[int, int, int]) -> bytes:
    # numpy pads the header so that the first axis can grow without moving what follows.
    head = io.BytesIO()
    description = {"descr": "|u1", "fortran_order": False, "shape": (num_images, *shape)}
    np.lib.format.write_array_header_1_0(head, description)
    return head.getvalue()
