"""Storage of captures: a local folder, or any URL that fsspec supports."""

from __future__ import annotations

import fcntl
import os
import re
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from image_classifier.errors import SettingsError, StorageError
from image_classifier.extras import load_extra
from image_classifier.files import read_file
from image_classifier.references import describe_place, get_url
from image_classifier.storage import Disk, storage_error, temporary_folder
from image_classifier.text import one_line

FILE = re.compile(r"date=\d{4}-\d\d-\d\d/hour=\d\d/[^/.][^/]*\.parquet")
"""Path of a capture file, relative to the place."""

BLOCK_BYTES = 4096
"""What a disk takes at once without the kernel's memory: memory and length are multiples of it."""


class Place(Protocol):
    """Storage of capture files, with paths such as `date=2026-11-30/hour=12/NAME.parquet`."""

    def write(self, path: str, content: bytes | memoryview) -> None:
        """Write a new file atomically.

        Raises:
            OSError: the write failed.
            StorageError: likewise.
        """

    def read(self, path: str, max_bytes: int) -> bytes:
        """Read a file.

        Raises:
            OSError: it cannot be read.
            ValueError: it is larger than `max_bytes`.
        """

    def list_files(self) -> dict[str, int]:
        """List the sorted paths of the files, with their sizes in bytes.

        Raises:
            OSError: the place cannot be read.
        """

    def measure(self) -> int:
        """Compute the total size of all files in bytes, without blocking other threads.

        Raises:
            OSError: the place cannot be read.
        """


class UncachedDisk(Disk):
    """The real disk, whose files are written past the kernel's memory where that is possible.

    Nobody reads captures soon, and the kernel's memory costs the processor several times the way to the disk.
    """

    def write_file(self, path: Path, content: bytes | memoryview) -> None:
        view, num_written = memoryview(content), 0
        with open(path, "xb", buffering=0) as file:
            flags = fcntl.fcntl(file, fcntl.F_GETFL)
            with suppress(OSError):  # of a file system that cannot; a full disk is met again below
                fcntl.fcntl(file, fcntl.F_SETFL, flags | getattr(os, "O_DIRECT", 0))
                num_written = file.write(view[: len(view) // BLOCK_BYTES * BLOCK_BYTES])
            fcntl.fcntl(file, fcntl.F_SETFL, flags)
            while num_written < len(view):
                num_written += file.write(view[num_written:])


class LocalPlace:
    """A local folder, created with the first file."""

    def __init__(self, folder: Path, disk: Disk = UncachedDisk()) -> None:
        self._folder = folder
        self._disk = disk

    def __str__(self) -> str:
        return str(self._folder)

    def check_writable(self) -> None:
        """Check that the folder, or the nearest one above it that exists, can be written to.

        Raises:
            SettingsError: it cannot.
        """
        above = next(each for each in (self._folder, *self._folder.absolute().parents) if each.exists())
        if not (above.is_dir() and os.access(above, os.W_OK | os.X_OK)):
            raise SettingsError(f"--capture: {self._folder} cannot be written to; choose another folder")

    def write(self, path: str, content: bytes | memoryview) -> None:
        target = self._folder / path
        try:
            self._make_folders(target.parent)
            with temporary_folder(self._folder, self._disk) as folder:  # also removes leftovers of killed writers
                temporary = folder / target.name
                self._disk.write_file(temporary, content)
                self._disk.sync(temporary)
                self._disk.rename(temporary, target)
                self._disk.sync(target.parent)
        except OSError as error:
            raise storage_error(target, error) from error

    def _make_folders(self, folder: Path) -> None:
        missing = [each for each in (folder, *folder.parents) if not each.is_dir()]
        for each in reversed(missing):
            try:
                self._disk.make_folder(each)
            except FileExistsError:  # another writer created it
                if not each.is_dir():
                    raise
            self._disk.sync(each.parent)

    def read(self, path: str, max_bytes: int) -> bytes:
        return read_file(self._folder / path, max_bytes)

    def list_files(self) -> dict[str, int]:
        if not self._folder.is_dir():
            raise FileNotFoundError(2, "No such folder", str(self._folder))
        found = {str(each.relative_to(self._folder)): each for each in self._folder.glob("date=*/hour=*/*.parquet")}
        return {path: found[path].lstat().st_size for path in sorted(found) if FILE.fullmatch(path)}

    def measure(self) -> int:
        num_bytes = 0
        for folder, _, names in os.walk(self._folder):
            for name in names:
                with suppress(FileNotFoundError):  # removed meanwhile
                    num_bytes += os.lstat(os.path.join(folder, name)).st_size
            time.sleep(0.001)
        return num_bytes


class RemotePlace:
    """Storage at a URL, such as s3://BUCKET/FOLDER. One call uploads a whole file.

    Raises:
        SettingsError: fsspec, or its library for the URL, is missing.
    """

    def __init__(self, url: str) -> None:
        fsspec = load_extra("fsspec.core", "capture")
        self._url = url
        try:
            self._files: Any
            self._files, root = fsspec.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise SettingsError(
                f"{self} cannot be reached: {one_line(error)}; install the library, or name a folder"
            ) from None
        self._root = root.rstrip("/")

    def __str__(self) -> str:
        return describe_place(self._url)

    def write(self, path: str, content: bytes | memoryview) -> None:
        try:
            self._files.pipe_file(f"{self._root}/{path}", bytes(content))
        except Exception as error:  # the library's own types
            raise StorageError(
                f"cannot write {self}/{path}: {one_line(error)}; check that the place exists and is writable"
            ) from error

    def read(self, path: str, max_bytes: int) -> bytes:
        try:
            content: bytes = self._files.cat_file(f"{self._root}/{path}", start=0, end=max_bytes + 1)
        except Exception as error:
            raise OSError(one_line(error)) from error
        if len(content) > max_bytes:
            raise ValueError(f"it has more than the {max_bytes:,} bytes allowed")
        return content

    def list_files(self) -> dict[str, int]:
        try:
            self._files.invalidate_cache()
            found = self._files.find(self._root, detail=True)
        except Exception as error:
            raise OSError(one_line(error)) from error
        start = f"{self._root}/"
        sizes = {path.rpartition(start)[2]: int(facts.get("size") or 0) for path, facts in found.items()}
        return {path: sizes[path] for path in sorted(sizes) if FILE.fullmatch(path)}

    def measure(self) -> int:
        return sum(self.list_files().values())


def open_place(place: str | Path) -> Place:
    """Open a folder, or a URL that fsspec supports, without writing.

    Raises:
        SettingsError: the URL has a user name or password, or fsspec or its library for the URL is missing.
    """
    text = str(place)
    url = get_url(text)
    if url is not None and (path := url.find_local_path()):
        return LocalPlace(path)
    if re.match(r"[^/]*://[^/]*@", text):  # a scheme that `get_url` does not know
        raise SettingsError(
            "the URL must not contain a user name or password; set them in the environment (docs/remote.md)"
        )
    return RemotePlace(text) if "://" in text else LocalPlace(Path(text))
