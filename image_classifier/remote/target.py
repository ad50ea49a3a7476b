"""Copies a folder to a remote place, with the manifest last."""

from __future__ import annotations

import hashlib
import secrets
import shutil
from collections.abc import Collection, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path

from image_classifier.errors import RemoteError, SettingsError
from image_classifier.progress import track
from image_classifier.references import get_url
from image_classifier.remote.store import MANIFEST, Patience, Store, describe_object, is_hidden, load_fsspec
from image_classifier.storage import DISK, storage_error, written_beside


class Target:
    """A folder that is to hold a copy; it need not exist yet.

    Args:
        place: a path, or a URL with s3://, gs:// or file://.
        option: that names it, for messages.

    Raises:
        SettingsError: it can only be read, or what reaches it is not installed.
    """

    def __init__(self, place: Path | str, option: str, patience: Patience = Patience()) -> None:
        url = get_url(place)
        self._path = Path(place) if url is None else url.find_local_path()
        self._store: Store | None = None
        if url is not None and self._path is None:
            if url.is_web:
                raise SettingsError(f"--{option} takes a folder, s3:// or gs://: {url} is read-only")
            load_fsspec(url)
            self._store = Store(url, patience)

    def overlaps(self, folder: Path) -> bool:
        """Say whether the place lies in a folder on this machine, or the folder in it."""
        if self._path is None:
            return False
        place, folder = self._path.resolve(), folder.resolve()
        return place.is_relative_to(folder) or folder.is_relative_to(place)

    def __str__(self) -> str:
        return str(self._path if self._store is None else self._store.url)

    def probe(self) -> None:
        """Check that the place can be written to.

        Raises:
            RemoteError: it cannot be reached, or refuses.
            StorageError: the disk refused.
        """
        name = f".tmp-image_classifier-{secrets.token_hex(8)}"
        if self._store is not None:
            path = f"{self._store.path}/{name}"
            self._store.call(self._store.fs.pipe_file, path, b"")
            with suppress(RemoteError):  # who may write need not be one who may remove
                self._store.call(self._store.fs.rm_file, path)
        elif self._path is not None:
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                DISK.make_folder(self._path.parent / name)
                DISK.remove(self._path.parent / name)
            except OSError as error:
                raise storage_error(self._path, error) from error

    def read(self, name: str) -> bytes | None:
        """Read a small file of the folder; None if there is none.

        Raises:
            RemoteError: it cannot be reached, or refuses.
            StorageError: the disk refused.
        """
        if self._store is not None:
            return self._store.read_below(name)
        assert self._path is not None
        try:
            return (self._path / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise storage_error(self._path / name, error, "read") from error

    def copy(self, folder: Path, *, replaceable: Collection[str] = ()) -> None:
        """Copy a folder there, its manifest last: a copy that was broken off has none, and the next call completes it.

        Hidden files stay here. What is there with the same content is not sent again. A finished copy with the same
        manifest is left as it is.

        Args:
            replaceable: files and folders that are removed there where they are not here. With the manifest among
                them a finished copy of something else is replaced; else that is an error.

        Raises:
            RemoteError: it cannot be reached, refuses, or holds something else; no manifest is there then but one that
                was there before.
            StorageError: the disk refused.
        """
        files = _list_files(folder)
        theirs, ours = self.read(MANIFEST), files[MANIFEST].read_bytes() if MANIFEST in files else None
        if theirs is not None and MANIFEST not in replaceable:
            if theirs == ours:
                return
            raise RemoteError(f"{self} exists already with other content; choose another name, or remove it")
        if self._store is not None:
            _upload(self._store, files, replaceable)
        elif self._path is not None:
            _copy_here(self._path, files, replaceable)


def _list_files(folder: Path) -> dict[str, Path]:
    """List the files of a folder that are copied, by name and in their order.

    What grows while a run trains comes before the checkpoints that count on it, and the manifest last.
    """
    files = {}
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if not is_hidden(name) and (path.is_symlink() or not path.is_dir()):
            if path.is_symlink() or not path.is_file():
                raise RemoteError(f"{path} is not a regular file, so it cannot be copied; put a file there")
            files[name] = path
    return dict(sorted(files.items(), key=lambda item: (item[0] == MANIFEST, "/" in item[0], item[0])))


def _check_present(
    place: object, present: Collection[str], ours: Collection[str], replaceable: Collection[str]
) -> None:
    """Check that nothing lies in an unfinished copy that this one is not the rest of."""
    for name in present:
        if name not in ours and name.partition("/")[0] not in replaceable:
            raise RemoteError(f"{place} has {name!a}, which does not belong to the copy; choose another place")


def _copy_here(target: Path, files: Mapping[str, Path], replaceable: Collection[str]) -> None:
    """Copy files to a folder on this machine, whole or not at all."""
    try:
        if target.is_dir():
            _check_present(target, _list_files(target), files, replaceable)
        target.parent.mkdir(parents=True, exist_ok=True)
        with written_beside(target) as temporary:
            for name, path in files.items():
                (temporary / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, temporary / name)
            DISK.sync_all()
    except OSError as error:
        raise storage_error(target, error) from error


def _upload(store: Store, files: Mapping[str, Path], replaceable: Collection[str]) -> None:
    """Copy files to an object store; what is of no use there any more goes before the manifest comes."""
    present = store.list_objects(missing_ok=True)
    _check_present(store.url, present, files, replaceable)
    if MANIFEST in present:
        store.call(store.fs.rm_file, present.pop(MANIFEST).path)
    sizes = {name: path.stat().st_size for name, path in files.items()}
    with track("uploading", sum(sizes.values()), "bytes") as task:
        for name, path in files.items():
            if name == MANIFEST:
                _remove(store, present, files)
            there = present.get(name)
            if there is None or (there.size, there.md5) != (sizes[name], _compute_md5(path)):
                store.call(store.fs.put_file, str(path), f"{store.path}/{name}")
                size = describe_object(store.url, store.call(store.fs.info, f"{store.path}/{name}")).size
                if size != sizes[name]:
                    raise RemoteError(f"{store.url}/{name} has {size} bytes instead of {sizes[name]:,}; start again")
            task.advance(sizes[name])
    if MANIFEST not in files:
        _remove(store, present, files)


def _remove(store: Store, present: Mapping[str, object], files: Collection[str]) -> None:
    for name in present.keys() - set(files):
        store.call(store.fs.rm_file, f"{store.path}/{name}")


def _compute_md5(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, partial(hashlib.md5, usedforsecurity=False)).hexdigest()
