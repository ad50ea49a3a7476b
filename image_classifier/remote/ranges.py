"""Reads parts of the files of a folder, here or elsewhere, and counts the bytes."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from image_classifier.errors import RemoteError, SettingsError
from image_classifier.references import get_url
from image_classifier.remote.store import Object, Patience, RetryError, Store
from image_classifier.storage import storage_error


class RangeReader:
    """A folder whose files are read in parts.

    Args:
        place: a path, or a URL with s3://, gs://, https://, http:// or file://.

    Attributes:
        num_bytes: read so far.

    Raises:
        SettingsError: the URL is none, is signed for one file, or what reaches it is not installed.
    """

    def __init__(self, place: Path | str, patience: Patience = Patience()) -> None:
        self._url = get_url(place)
        if self._url is not None and self._url.query.reveal():
            raise SettingsError(f"{self._url} is signed for one file; give the address of a folder, without a ?")
        self._path = Path(place) if self._url is None else self._url.find_local_path()
        self._patience = patience
        self._remote: dict[str, tuple[Store, Object]] = {}
        self.num_bytes = 0

    def __str__(self) -> str:
        return str(self._path if self._url is None else self._url)

    def find_size(self, name: str) -> int | None:
        """Find the size in bytes of a file; None if there is no such file.

        Raises:
            RemoteError: the place cannot be reached, refuses, or says no size.
            StorageError: the disk refused.
        """
        if self._path is not None:
            path = self._path / name
            try:
                return path.stat().st_size if path.is_file() else None
            except OSError as error:
                raise storage_error(path, error, "read") from error
        assert self._url is not None
        store = Store(self._url.join(name), self._patience)
        entry = store.list_objects(missing_ok=True).get(name)
        if entry is None:
            return None
        if entry.size is None or not entry.has_ranges:
            raise _no_ranges_error(store)
        self._remote[name] = store, entry
        return entry.size

    def read(self, name: str, start: int, size: int) -> bytes:
        """Read a part of a file whose size was asked for.

        Raises:
            RemoteError: the place cannot be reached, refuses, sends whole files alone, or the file has changed.
            StorageError: the disk refused.
        """
        step = self._patience.piece
        pieces = [self._read(name, at, min(step, start + size - at)) for at in range(start, start + size, step)]
        return b"".join(pieces)

    def _read(self, name: str, start: int, size: int) -> bytes:
        if self._path is not None:
            try:
                with open(self._path / name, "rb") as file:
                    file.seek(start)
                    content = file.read(size)
            except OSError as error:
                raise storage_error(self._path / name, error, "read") from error
            if len(content) != size:
                raise RemoteError(f"{self._path / name} was changed while it was read; start again")
        else:
            store, entry = self._remote[name]
            content = store.call(partial(_ask, store, entry, start, size))
        self.num_bytes += size
        return content


def _ask(store: Store, entry: Object, start: int, size: int) -> bytes:
    with store.open(entry, has_ranges=True) as file:
        file.seek(start)
        try:
            content = file.read(size)
        except ValueError:  # fsspec's, where the whole file comes
            raise _no_ranges_error(store) from None
    if len(content) != size:
        raise RetryError(f"{len(content):,} bytes arrived instead of {size:,}")
    return content


def _no_ranges_error(store: Store) -> RemoteError:
    return RemoteError(f"{store.url} comes only as a whole, not in parts; download the folder, and name the copy")
