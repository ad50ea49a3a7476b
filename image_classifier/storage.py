"""Write files so that a reader finds the old content or the new one, never a part.

Every call that changes the disk goes through a `Disk`, the seam at which the crash tests fail the N-th call.
The order is the one that survives SIGKILL and power loss (SQLite's and PostgreSQL's): write beside the target,
fsync the file, rename it, fsync the folder.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from image_classifier.errors import StorageError

TEMPORARY_PREFIX = ".tmp-"
"""Names that begin like this are unfinished writes; readers ignore them and the next writer removes them."""


def find_cache() -> Path | None:
    """Find this package's folder in the user's cache, which may not exist yet; None for who has no home.

    `IMAGE_CLASSIFIER_CACHE` names another one.
    """
    named = os.environ.get("IMAGE_CLASSIFIER_CACHE")
    path = named or os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "image_classifier")
    return None if path.startswith("~") else Path(path)


class Disk:
    """The real disk: one method for each system call that changes it."""

    def make_folder(self, path: Path) -> None:
        path.mkdir()

    def write_file(self, path: Path, content: bytes) -> None:
        """Write a new file at once; the content may still be in the kernel's memory afterwards."""
        with open(path, "xb") as file:
            file.write(content)

    def append(self, path: Path, content: bytes) -> None:
        with open(path, "ab") as file:  # buffered: a raw write may write less than it was given, and say so to nobody
            file.write(content)

    def truncate(self, path: Path, size: int) -> None:
        os.truncate(path, size)

    def sync(self, path: Path) -> None:
        """Force a file, or a folder's list of names, onto the disk."""
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def sync_all(self) -> None:
        """Force everything onto the disk: for folders of so many files that one by one would take minutes."""
        os.sync()

    def rename(self, source: Path, target: Path) -> None:
        os.replace(source, target)

    def remove(self, path: Path) -> None:
        """Remove a file, or a folder with all that it holds; nothing there is no error."""
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


DISK = Disk()


class FaultyDisk(Disk):
    """A disk at one of whose calls something happens: for tests of what a crash or a full disk leaves.

    Args:
        fault: called there; it raises an OSError, or ends the process.
        fault_at: number of the call, counted from 1.
        partly: half of what the call was to write, or to remove, is done before.

    Attributes:
        calls: name and path of each call so far.
    """

    def __init__(self, fault: Callable[[], object], fault_at: int, *, partly: bool = False) -> None:
        self.calls: list[tuple[str, Path]] = []
        self._fault = fault
        self._fault_at = fault_at
        self._partly = partly

    def make_folder(self, path: Path) -> None:
        self._call("make_folder", path)

    def write_file(self, path: Path, content: bytes) -> None:
        self._call("write_file", path, content)

    def append(self, path: Path, content: bytes) -> None:
        self._call("append", path, content)

    def truncate(self, path: Path, size: int) -> None:
        self._call("truncate", path, size)

    def sync(self, path: Path) -> None:
        self._call("sync", path)

    def rename(self, source: Path, target: Path) -> None:
        self._call("rename", source, target)

    def remove(self, path: Path) -> None:
        self._call("remove", path)

    def _call(self, name: str, path: Path, *arguments: Any) -> None:
        self.calls.append((name, path))
        if len(self.calls) == self._fault_at:
            if self._partly and name in ("write_file", "append"):
                getattr(super(), name)(path, arguments[0][: len(arguments[0]) // 2])
            elif self._partly and name == "remove" and path.is_dir():
                names = sorted(path.iterdir())
                for file in names[: len(names) // 2]:
                    super().remove(file)
            self._fault()
        getattr(super(), name)(path, *arguments)


def write_atomically(path: Path, content: bytes, disk: Disk = DISK) -> str:
    """Replace a file whole, durably, and return the sha256 of its content.

    Raises:
        StorageError: the disk refused; the file is as it was and nothing is left beside it. (It may be the new one,
            whole, where the disk refused no more than to make its name durable.)
    """
    with written_beside(path, disk) as temporary:
        disk.write_file(temporary, content)
        disk.sync(temporary)
    return hashlib.sha256(content).hexdigest()


def write_folder_atomically(path: Path, files: dict[str, bytes], disk: Disk = DISK) -> None:
    """Create a folder with these files, in their order, whole or not at all.

    Raises:
        StorageError: the disk refused; nothing is left of what was begun.
    """
    with written_beside(path, disk) as temporary:
        disk.make_folder(temporary)
        for name, content in files.items():
            disk.write_file(temporary / name, content)
            disk.sync(temporary / name)
        disk.sync(temporary)


@contextmanager
def written_beside(path: Path, disk: Disk = DISK) -> Iterator[Path]:
    """Yield a temporary path; move what was written there to the final one, or remove it.

    Raises:
        StorageError: the disk refused.
    """
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{path.name}")
    try:
        disk.remove(temporary)
        yield temporary
        disk.rename(temporary, path)
        disk.sync(path.parent)
    except BaseException as error:
        with suppress(OSError):  # what the disk refused first is what the user must hear
            DISK.remove(temporary)
        if isinstance(error, OSError):
            raise storage_error(path, error) from error
        raise


def remove_folder(path: Path, disk: Disk = DISK) -> None:
    """Remove a folder such that one that is removed in part is never found under its name.

    Raises:
        StorageError: the disk refused.
    """
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{path.name}")
    try:
        disk.remove(temporary)
        disk.rename(path, temporary)
        disk.remove(temporary)
    except OSError as error:
        raise storage_error(path, error, "remove") from error


def compute_file_digest(path: Path) -> str:
    """Compute the sha256 of a file's content, as lower-case hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


_REMEDIES = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some of your quota",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.EROFS: "choose a folder that can be written",
    errno.EACCES: "choose a folder that can be written",
    errno.EPERM: "choose a folder that can be written",
}


def storage_error(path: Path, error: OSError, verb: str = "write") -> StorageError:
    """Say in one line what the disk refused, with the remedy where there is a usual one."""
    remedy = _REMEDIES.get(error.errno or 0, "check the disk and the path")
    return StorageError(f"cannot {verb} {path}: {error.strerror or error}; {remedy}")
