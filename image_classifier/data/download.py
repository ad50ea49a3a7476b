"""Downloads the published archives: resumes interrupted downloads, checks the digest, and writes atomically."""

from __future__ import annotations

import hashlib
import http.client
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from image_classifier import __version__
from image_classifier.errors import DownloadError, SettingsError
from image_classifier.progress import Task, track
from image_classifier.storage import DISK, is_same, lock, storage_error
from image_classifier.text import one_line

PART_SUFFIX = ".part"
MAX_BYTES = 2**31
"""More is not written to the disk, whatever a server sends."""

_ALGORITHMS = {32: "md5", 64: "sha256"}
_PIECE = 2**16
_WORTH_A_RETRY = (408, 429, 500, 502, 503, 504)


@dataclass(frozen=True)
class Archive:
    """A published archive, or another file.

    Attributes:
        url: its address, http or https.
        name: the name that it is kept under.
        digest: its md5 or sha256, as hexadecimal digits.
        is_shortened: whether the digest is the beginning of the sha256 alone.
        remedy: what messages advise where the address does not give the file.
    """

    url: str
    name: str
    digest: str
    is_shortened: bool = False
    remedy: str = "give another address with --url"

    def __post_init__(self) -> None:
        is_whole = self.is_shortened or len(self.digest) in _ALGORITHMS
        if not is_whole or not set(self.digest.lower()) <= set("0123456789abcdef"):
            raise SettingsError(f"--digest takes 32 (md5) or 64 (sha256) hexadecimal digits, got: {self.digest!a}")
        if urllib.parse.urlsplit(self.url).scheme not in ("http", "https"):
            raise SettingsError(f"--url takes a URL that begins with https:// or http://, got: {self.url!a}")

    @property
    def algorithm(self) -> str:
        """The name of the digest's algorithm."""
        return "sha256" if self.is_shortened else _ALGORITHMS[len(self.digest)]

    def find_other_digest(self, path: Path) -> str | None:
        """Find the digest of a file that is not the archive; None for one that is it.

        Raises:
            OSError: it cannot be read.
        """
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, self.algorithm).hexdigest()
        return None if digest.startswith(self.digest.lower()) else digest


ARCHIVES = {
    "cifar10": Archive(
        "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
        "cifar-10-python.tar.gz",
        "c58f30108f718f92721af3b95e74349a",
    ),
    "cifar100": Archive(
        "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
        "cifar-100-python.tar.gz",
        "eb9058c3a382ffc7106e4002c42a8d85",
    ),
}
"""As torchvision publishes them, in torchvision/datasets/cifar.py."""


class UnreachableError(DownloadError):
    """No try got any answer from the server: there is no network, or the address is not reached from here."""


class _BrokenOffError(Exception):
    """A try failed in a way that another one may not."""

    def __init__(self, reason: str, *, answered: bool) -> None:
        super().__init__(reason)
        self.answered = answered


# Over 50 lines: what is made is undone in the reverse order, whatever fails.
def fetch_archive(
    archive: Archive,
    folder: Path,
    *,
    timeout_s: float = 20,
    num_tries: int = 3,
    backoff_s: float = 1,
    waits: bool = False,
) -> Path:
    """Download an archive into a folder, which is made if need be; which shows its progress.

    It gets its name once its digest is right. What came so far is kept beside it as `.part` and continued by the next
    try or the next call, as far as the server allows it. Certificates are verified, proxies taken from the environment.

    Args:
        archive: what to download.
        folder: where to.
        timeout_s: how long to wait for a connection, or for the next bytes.
        num_tries: how often to try altogether.
        backoff_s: pause after the first failure; doubled after each further one.
        waits: for another process that downloads the same; otherwise that is an error.

    Raises:
        UnreachableError: no try got an answer.
        DownloadError: the server refuses, breaks off each time, or sends something else than the digest is of.
        StorageError: the disk refused; nothing is left.
    """
    target = folder / archive.name
    part = folder / (archive.name + PART_SUFFIX)
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    busy = DownloadError(f"another process is downloading to {part}; wait for it, or stop it")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(part, "ab") as file:
            lock(file.fileno(), part, None if waits else busy)
            if not is_same(part, file.fileno()):  # it was another process's, which has come to its end
                if target.is_file():
                    return target
                raise busy
            try:
                _fill(file, archive, timeout_s, num_tries, backoff_s)
                file.flush()
                os.fsync(file.fileno())
                _check_digest(part, archive)
                DISK.rename(part, target)
                DISK.sync(folder)
            except OSError:
                DISK.remove(part)
                raise
            finally:
                if not os.fstat(file.fileno()).st_size:
                    DISK.remove(part)
    except OSError as error:
        raise storage_error(target, error) from error
    finally:
        for path in missing:
            with suppress(OSError):  # it holds something, or was removed by another process
                path.rmdir()
    return target


def _check_digest(part: Path, archive: Archive) -> None:
    other = archive.find_other_digest(part)
    if other is not None:
        DISK.remove(part)
        raise DownloadError(
            f"{archive.url} sent a file with the {archive.algorithm} {other} instead of {archive.digest}: it was "
            f"removed; try again, or {archive.remedy}"
        )


def _fill(file: BinaryIO, archive: Archive, timeout_s: float, num_tries: int, backoff_s: float) -> None:
    """Try until the file is as long as the server says."""
    answered = False
    with track("downloading", unit="bytes") as task:
        for attempt in range(1, num_tries + 1):
            try:
                return _receive(file, archive, timeout_s, task)
            except _BrokenOffError as error:
                answered = answered or error.answered
                reason = str(error)
            if attempt < num_tries:
                time.sleep(backoff_s * 2 ** (attempt - 1))
    if not answered:
        raise UnreachableError(f"{archive.url} cannot be reached ({reason}); check the network, or {archive.remedy}")
    raise DownloadError(
        f"{archive.url} failed {num_tries} times, last with: {reason}; "
        f"start again to continue after {os.fstat(file.fileno()).st_size:,} bytes"
    )


def _receive(file: BinaryIO, archive: Archive, timeout_s: float, task: Task) -> None:
    """Ask for what is missing and append it."""
    url = archive.url
    headers = {"User-Agent": f"image_classifier/{__version__}", "Accept-Encoding": "identity"}
    start = file.seek(0, os.SEEK_END)
    if start:
        headers["Range"] = f"bytes={start}-"
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=timeout_s)
    except urllib.error.HTTPError as error:
        with error:
            if error.code == 416 and error.headers.get("Content-Range") == f"bytes */{start}":
                return  # nothing is missing
            if error.code == 416:
                file.truncate(0)
                raise _BrokenOffError(
                    "the part that was downloaded before is longer than the file", answered=True
                ) from error
            status = f"HTTP status {error.code} {error.reason}"
            if error.code in _WORTH_A_RETRY:
                raise _BrokenOffError(status, answered=True) from error
        raise DownloadError(f"{url} answers with {status}; {archive.remedy}") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = one_line(getattr(error, "reason", error))  # URLError wraps what happened
        raise _BrokenOffError(reason, answered=False) from error
    with response:
        if response.status != 206:  # the server sends all of it again
            file.truncate(0)
            start = 0
        elif not str(response.headers.get("Content-Range")).startswith(f"bytes {start}-"):
            file.truncate(0)
            raise _BrokenOffError("the server continued at a wrong position", answered=True)
        length = response.headers.get("Content-Length", "")
        total = start + int(length) if length.isdecimal() else None
        task.total, task.done = total, start
        while piece := _read_piece(response):
            if start + len(piece) > MAX_BYTES:
                DISK.remove(Path(file.name))
                raise DownloadError(f"{url} sends more than {MAX_BYTES:,} bytes; {archive.remedy}")
            file.write(piece)
            start += len(piece)
            task.advance(len(piece))
        file.flush()
    if total is not None and start != total:
        raise _BrokenOffError(f"the connection ended after {start:,} of {total:,} bytes", answered=True)


def _read_piece(response: http.client.HTTPResponse) -> bytes:
    try:
        return response.read1(_PIECE)
    except (OSError, http.client.HTTPException) as error:
        raise _BrokenOffError(one_line(error), answered=True) from error
