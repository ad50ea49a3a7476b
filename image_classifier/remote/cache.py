"""Downloads remote folders into the user's cache and checks them.

Each state of a place has a folder of its own there::

    remote/<key>/incoming-<boot>/  what has come so far; a later try goes on with it, until the system is restarted
    remote/<key>/<name>            the folder or file, whole, with the name that it has there

The key is over the URL without its query, and over name, size and version of each object. So an object that changes
makes another state, and a state that is here is taken without a look at its content.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from io import BufferedRandom
from pathlib import Path

from image_classifier.errors import RemoteError, SettingsError
from image_classifier.progress import Task, track
from image_classifier.references import Url, get_url
from image_classifier.remote.store import (
    MANIFEST,
    NUM_THREADS,
    ChangedError,
    Object,
    Patience,
    RetryError,
    Store,
    load_digests,
)
from image_classifier.storage import DISK, find_cache, locked_folder, storage_error

_FOLDER = "remote"
_SMALLEST_PIECE = 2**16

_urls: dict[str, str] = {}
"""URLs by the paths of their copies, of this process."""


def localize(place: Path | str, patience: Patience = Patience()) -> Path:
    """Give the path on this machine of a folder or file: a path as it is, and for a URL that of a checked copy.

    Args:
        place: a path, or a URL with s3://, gs://, https://, http:// or file://.

    Raises:
        SettingsError: the URL is none, or what reaches it is not installed.
        RemoteError: it cannot be reached, refuses, has nothing there, changed meanwhile, or sends something else.
        StorageError: the disk refused; nothing is left.
    """
    url = get_url(place)
    if url is None:
        return Path(place)
    local_path = url.find_local_path()
    if local_path is None:
        local_path = _fetch(Store(url, patience))
        _urls[str(local_path)] = str(url)
    return local_path


def name_urls(text: str) -> str:
    """Replace the paths of copies in a message by the URLs that the user named."""
    for path, url in _urls.items():
        text = text.replace(path, url)
    return text


def prune() -> int:
    """Remove what was fetched, but for what is being fetched now; return its size in bytes.

    Raises:
        StorageError: the disk refused.
    """
    cache, num_bytes = find_cache(), 0
    folder = None if cache is None else cache / _FOLDER
    if folder is None or not folder.is_dir():
        return 0
    for state in sorted(folder.iterdir()):
        try:
            with locked_folder(state, RemoteError("it is being downloaded")):
                num_bytes += sum(path.stat().st_size for path in state.rglob("*") if path.is_file())
                DISK.remove(state)
        except RemoteError:
            continue
        except OSError as error:
            raise storage_error(state, error, "remove") from error
    return num_bytes


def _fetch(store: Store) -> Path:
    """Fetch what lies at a place, unless this state of it is here already."""
    objects = store.list_objects()
    cache = find_cache()
    if cache is None:
        raise SettingsError("there is no cache folder for copies; set IMAGE_CLASSIFIER_CACHE to a folder")
    state = cache / _FOLDER / _compute_key(store.url, objects)
    target = state / store.url.name
    try:
        while not target.exists():
            state.mkdir(parents=True, exist_ok=True)
            with ExitStack() as stack:
                try:
                    stack.enter_context(locked_folder(state))
                except FileNotFoundError:  # it was pruned meanwhile
                    continue
                if not target.exists():  # by now: another process may have fetched it
                    _fill(store, objects, state, target)
    except OSError as error:
        raise storage_error(target, error) from error
    return target


def _compute_key(url: Url, objects: Mapping[str, Object]) -> str:
    """Compute what names a state; one that cannot be told from the next gets a name that no other has."""
    facts = [[name, each.size, each.version] for name, each in sorted(objects.items())]
    unknown = "" if all(each.version for each in objects.values()) else secrets.token_hex(8)
    return hashlib.sha256(json.dumps([str(url), facts, unknown]).encode()).hexdigest()[:32]


def _fill(store: Store, objects: Mapping[str, Object], state: Path, target: Path) -> None:
    """Fetch all objects of a state; the copy gets its name once all are right, and still the same there."""
    incoming = state / f"incoming-{_find_boot()}"
    for leftover in state.iterdir():
        if leftover != incoming:
            DISK.remove(leftover)
    is_file = [each.path for each in objects.values()] == [store.path]
    folder = incoming if is_file else incoming / target.name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _receive_all(store, objects, folder)
        if store.list_objects() != objects:
            raise store.changed_error()
        DISK.sync_all()
        DISK.rename_new(incoming / target.name, target)
        DISK.sync(state)
        DISK.remove(incoming)
    except OSError:
        with suppress(OSError):
            DISK.remove(incoming)
        raise


def _find_boot() -> str:
    """Find what names the time since the system's start: what came before it may have lost parts with the power."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return secrets.token_hex(8)


def _receive_all(store: Store, objects: Mapping[str, Object], folder: Path) -> None:
    """Receive all objects, several at once; first the manifest, which says what the others must be."""
    sizes = [each.size for each in objects.values() if each.size is not None]
    with track("downloading", sum(sizes) if len(sizes) == len(objects) else None, "bytes") as task:
        receive = partial(_receive, store, folder, task, threading.Event())
        digests: dict[str, str] = {}
        if MANIFEST in objects:
            receive(MANIFEST, objects[MANIFEST], None)
            digests = load_digests(folder / MANIFEST)
        others = [name for name in objects if name != MANIFEST]
        with ThreadPoolExecutor(NUM_THREADS) as pool:
            futures = [pool.submit(receive, name, objects[name], digests.get(name)) for name in others]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                receive.args[-1].set()
                raise


def _receive(
    store: Store, folder: Path, task: Task, stopped: threading.Event, name: str, entry: Object, sha256: str | None
) -> None:
    """Receive an object into a file, unless another one has failed."""
    if stopped.is_set():
        return
    try:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a+b") as file:
            _Download(store, name, entry, sha256, file, task, stopped).run()
    except BaseException:
        stopped.set()
        raise


@dataclass
class _Download:
    """An object on its way into a file, which may hold its beginning.

    Attributes:
        sha256: of its content, if a manifest says it.
        stopped: whether another one has failed, so that this one is not needed.
    """

    store: Store
    name: str
    entry: Object
    sha256: str | None
    file: BufferedRandom
    task: Task
    stopped: threading.Event

    def __post_init__(self) -> None:
        self._piece = self.store.patience.piece
        self._furthest = self._seek_end()

    def run(self) -> None:
        """Receive and check it, and again where that fails, until several tries have come no further."""
        patience, num_failed = self.store.patience, 0
        has_ranges = self.entry.has_ranges
        self.task.advance(self._furthest)
        while not self.stopped.is_set():
            before = self._furthest
            try:
                self._append(has_ranges)
                return self._check()
            except ChangedError:
                raise self.store.changed_error() from None
            except _NoRangesError:
                has_ranges, reason = False, "it sends no parts of files"
            except RetryError as error:
                reason = str(error)
            self._piece = max(min(self._piece, _SMALLEST_PIECE), self._piece // 2)
            num_failed = 1 if self._furthest > before else num_failed + 1
            if num_failed == patience.num_tries:
                raise self.store.failed_error(f"{self.name}: {reason}")
            self.stopped.wait(patience.get_pause_s(num_failed))

    def _seek_end(self) -> int:
        return self.file.seek(0, os.SEEK_END)

    def _empty(self) -> None:
        self.task.advance(-self._seek_end())
        self.file.truncate(0)

    def _append(self, has_ranges: bool) -> None:
        """Ask for what is missing, piece by piece."""
        size = self.entry.size
        if not has_ranges or (size is not None and self._seek_end() > size):
            self._empty()
        start = self._seek_end()
        if start == size:
            return
        with self.store.explained():
            remote = self.store.open(self.entry, has_ranges=has_ranges)
        with remote:
            if start:
                remote.seek(start)
            while start != size and not self.stopped.is_set():
                wanted = self._piece if size is None else min(self._piece, size - start)
                try:
                    with self.store.explained():
                        content = remote.read(wanted)
                except RemoteError:
                    if self.store.url.is_web and has_ranges and start:
                        raise _NoRangesError from None
                    raise
                if not content and size is None:
                    return
                if not 0 < len(content) <= wanted:
                    raise RetryError(f"{len(content):,} bytes arrived instead of {wanted:,}")
                self.file.write(content)
                self.file.flush()
                start += len(content)
                self._furthest = max(self._furthest, start)
                self.task.advance(len(content))
                self._piece = min(self.store.patience.piece, 2 * self._piece)

    def _check(self) -> None:
        """Check the content by the digest that is known of it, and forget it if it is something else."""
        expected, algorithm = (self.sha256, "sha256") if self.sha256 else (self.entry.md5, "md5")
        if expected is None or self.stopped.is_set():
            return
        self.file.seek(0)
        new = hashlib.sha256 if self.sha256 else partial(hashlib.md5, usedforsecurity=False)
        found = hashlib.file_digest(self.file, new).hexdigest()
        if found != expected and (self.sha256 or not self._is_encrypted()):
            self._empty()
            raise RetryError(f"it sent a file with the {algorithm} {found} instead of {expected}")

    def _is_encrypted(self) -> bool:
        """Say whether S3 has encrypted an object with a key of its owner, so that its ETag is no MD5."""
        if self.store.url.scheme != "s3":
            return False
        bucket, _, key = self.entry.path.partition("/")
        head = self.store.call(partial(self.store.fs.call_s3, "head_object", Bucket=bucket, Key=key))
        return "SSECustomerAlgorithm" in head or str(head.get("ServerSideEncryption")).startswith("aws:")


class _NoRangesError(Exception):
    """A web server sends whole files alone."""
