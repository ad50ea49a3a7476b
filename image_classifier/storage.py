"""Atomic and durable writes: a reader finds the old or the new content, never a part.

Every call that changes the disk goes through a `Disk`, where the crash tests inject faults. The order of calls survives
SIGKILL and power loss, as in SQLite and PostgreSQL: write beside the target, fsync the file, rename it, fsync the
folder.

Each writer uses its own temporary folder, and holds a lock on it. So writers of the same name do not conflict. The
kernel releases the locks of dead processes, which tells their leftovers from the folders of running writers.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import logging
import os
import re
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from image_classifier.errors import ImageClassifierError, StorageError

TEMPORARY_PREFIX = ".tmp-"
"""Prefix of unfinished writes, which readers ignore."""

_TEMPORARY = re.compile(re.escape(f"{TEMPORARY_PREFIX}image_classifier-") + "[0-9a-f]{16}")
_PATIENCE_S = 3  # after which waiting for another process is logged
_RENAME_NOREPLACE, _RENAME_EXCHANGE = 1, 2  # of Linux's renameat2

logger = logging.getLogger(__name__)


def find_cache() -> Path | None:
    """Return this package's cache folder, which may not exist yet; None if the user has no home folder.

    `IMAGE_CLASSIFIER_CACHE` overrides it.
    """
    named = os.environ.get("IMAGE_CLASSIFIER_CACHE")
    path = named or os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "image_classifier")
    return None if path.startswith("~") else Path(path)


@contextmanager
def temporary_files_beside(path: Path) -> Iterator[None]:
    """If the system has no writable temporary folder, use one beside a path that will be written.

    Libraries and child processes use it, too.

    Raises:
        StorageError: that place is not writable either.
    """
    with ExitStack() as stack:
        try:
            tempfile.gettempdir()
        except FileNotFoundError:
            above = next(folder for folder in path.absolute().parents if folder.is_dir())
            try:
                scratch = str(stack.enter_context(temporary_folder(above)))
            except OSError as error:
                raise storage_error(path, error) from error
            stack.callback(setattr, tempfile, "tempdir", None)
            tempfile.tempdir = scratch
            for name in ("TMPDIR", "MPLCONFIGDIR"):
                stack.callback(os.environ.pop, name, None)
                os.environ[name] = scratch
        yield


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Yield a new temporary folder, which is removed at the end.

    Raises:
        StorageError: it cannot be created.
    """
    with ExitStack() as stack:
        try:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="image-classifier-"))
        except OSError as error:
            raise StorageError(
                f"temporary files cannot be created ({error.strerror}); set TMPDIR to a writable folder"
            ) from error
        yield Path(folder)


class Disk:
    """The real disk, with one method per system call that changes it."""

    def make_folder(self, path: Path) -> None:
        path.mkdir()

    def write_file(self, path: Path, content: bytes | memoryview) -> None:
        """Write a new file, without fsync."""
        with open(path, "xb") as file:
            file.write(content)

    def append(self, path: Path, content: bytes) -> None:
        with open(path, "ab") as file:  # buffered: a raw write may be short without an error
            file.write(content)

    def truncate(self, path: Path, size: int) -> None:
        os.truncate(path, size)

    def sync(self, path: Path) -> None:
        """Call fsync on a file or a folder."""
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def sync_all(self) -> None:
        """Call sync, for folders whose many files would take minutes one by one."""
        os.sync()

    def rename(self, source: Path, target: Path) -> None:
        """Move a file or a folder, replacing an existing file."""
        os.replace(source, target)

    def rename_new(self, source: Path, target: Path) -> None:
        """Move a file or a folder to a new name.

        Raises:
            FileExistsError: the name exists.
        """
        try:
            _rename(source, target, _RENAME_NOREPLACE)
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
                raise
            if os.path.lexists(target):  # the file system lacks the call: two writers may still conflict
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from error
            os.rename(source, target)

    def exchange(self, source: Path, target: Path) -> None:
        """Swap two files or folders, atomically if the file system supports it."""
        try:
            _rename(source, target, _RENAME_EXCHANGE)
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
                raise
            aside = source.with_name(f"{TEMPORARY_PREFIX}old")
            os.rename(target, aside)
            try:
                os.rename(source, target)
            except OSError:
                os.rename(aside, target)
                raise
            os.rename(aside, source)

    def remove(self, path: Path) -> None:
        """Remove a file or a whole folder, if it exists."""
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _rename(source: Path, target: Path, flags: int) -> None:
    """Call renameat2, which Python does not provide."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    here = -100  # AT_FDCWD
    if call(here, os.fsencode(source), here, os.fsencode(target), ctypes.c_uint(flags)) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(source), None, str(target))


DISK = Disk()


class FaultyDisk(Disk):
    """A disk that fails at one call, for tests of crashes and full disks.

    Args:
        fault: raises an OSError or ends the process.
        fault_at: number of the failing call, from 1.
        partly: the call first writes or removes half.

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

    def write_file(self, path: Path, content: bytes | memoryview) -> None:
        self._call("write_file", path, content)

    def append(self, path: Path, content: bytes) -> None:
        self._call("append", path, content)

    def truncate(self, path: Path, size: int) -> None:
        self._call("truncate", path, size)

    def sync(self, path: Path) -> None:
        self._call("sync", path)

    def rename(self, source: Path, target: Path) -> None:
        self._call("rename", source, target)

    def rename_new(self, source: Path, target: Path) -> None:
        self._call("rename_new", source, target)

    def exchange(self, source: Path, target: Path) -> None:
        self._call("exchange", source, target)

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
    """Replace a file atomically and durably, and return the sha256 of its content.

    Raises:
        StorageError: the disk refused. The file is unchanged, or new if only the last fsync failed; no temporary file
            is left.
    """
    with written_beside(path, disk) as temporary:
        disk.write_file(temporary, content)
        disk.sync(temporary)
    return hashlib.sha256(content).hexdigest()


def write_folder_atomically(path: Path, files: dict[str, bytes], disk: Disk = DISK, *, replace: bool = False) -> None:
    """Create a folder with these files atomically.

    Args:
        replace: replace an existing folder.

    Raises:
        StorageError: the disk refused, or the folder exists; no temporary file is left.
    """
    with written_beside(path, disk, replace=replace) as temporary:
        disk.make_folder(temporary)
        for name, content in files.items():
            disk.write_file(temporary / name, content)
            disk.sync(temporary / name)
        disk.sync(temporary)


@contextmanager
def written_beside(path: Path, disk: Disk = DISK, *, replace: bool = True) -> Iterator[Path]:
    """Yield a temporary path; then move what was written there to the final path, or after an error remove it.

    Args:
        replace: replace an existing file or folder; otherwise it is an error.

    Raises:
        StorageError: the disk refused, or the final path is neither a file nor a folder.
    """
    try:
        _check_target(path)
        with temporary_folder(path.parent, disk) as folder:
            temporary = folder / path.name
            yield temporary
            if not replace:
                disk.rename_new(temporary, path)
            elif temporary.is_dir() and path.is_dir():
                disk.exchange(temporary, path)
            else:
                disk.rename(temporary, path)
            disk.sync(path.parent)
    except OSError as error:
        raise storage_error(path, error) from error


def _check_target(path: Path) -> None:
    """Check that no link, pipe or device such as /dev/stdout would be replaced."""
    try:
        mode = path.lstat().st_mode
    except OSError:  # the write reports it
        return
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        kind = "a symbolic link" if stat.S_ISLNK(mode) else "no file"
        raise StorageError(f"cannot write {path}: there is {kind} of this name; choose another, or remove it")


def remove_folder(path: Path, disk: Disk = DISK) -> None:
    """Remove a folder atomically: no partial folder is ever visible under its name.

    Raises:
        StorageError: the disk refused.
    """
    try:
        with temporary_folder(path.parent, disk) as temporary:
            disk.rename(path, temporary / path.name)
            disk.remove(temporary / path.name)
    except OSError as error:
        raise storage_error(path, error, "remove") from error


@contextmanager
def temporary_folder(parent: Path, disk: Disk = DISK) -> Iterator[Path]:
    """Yield a new locked folder, which is removed at the end with its content.

    Leftovers of killed writers beside it are removed first. What cannot be removed is left to the next writer.
    """
    remove_leftovers(parent, disk)
    path, descriptor = _make_locked_folder(parent, disk)
    try:
        yield path
        with suppress(OSError):
            disk.remove(path)
    finally:
        with suppress(OSError):
            DISK.remove(path)
        os.close(descriptor)


def _make_locked_folder(parent: Path, disk: Disk) -> tuple[Path, int]:
    while True:
        path = parent / f"{TEMPORARY_PREFIX}image_classifier-{secrets.token_hex(8)}"
        disk.make_folder(path)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:  # another writer removed it as a leftover before it was locked
            continue
        if try_lock(descriptor) is not False and is_same(path, descriptor):
            return path, descriptor
        os.close(descriptor)


def remove_leftovers(folder: Path, disk: Disk = DISK) -> None:
    """Remove leftovers of killed writers in a folder, except those that cannot be removed, such as another user's."""
    with suppress(OSError):
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            if _TEMPORARY.fullmatch(entry.name):
                _remove_unless_locked(folder / entry.name, disk)


def _remove_unless_locked(path: Path, disk: Disk) -> None:
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            if try_lock(descriptor):
                disk.remove(path)
        finally:
            os.close(descriptor)


def try_lock(descriptor: int) -> bool | None:
    """Try to lock an open file or folder; return whether that succeeded, or None if the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # ENOLCK, ENOSYS, EOPNOTSUPP; EBADF for a folder on NFS
        return None
    return True


def lock(descriptor: int, path: Path, busy: ImageClassifierError | None = None) -> None:
    """Lock an open file or folder until it is closed.

    If the file system has no locks, it logs a warning and returns.

    Args:
        path: of the file or folder, for messages.
        busy: raised if another process holds the lock; by default, wait for it.
    """
    started, is_logged = time.monotonic(), False
    while (locked := try_lock(descriptor)) is False:
        if busy is not None:
            raise busy
        if not is_logged and time.monotonic() - started > _PATIENCE_S:
            logger.warning("waiting for another process that writes to %s", path)
            is_logged = True
        time.sleep(0.02)
    if locked is None:
        logger.warning("the file system of %s has no locks: no other process may write there meanwhile", path)


@contextmanager
def locked_folder(path: Path, busy: ImageClassifierError | None = None) -> Iterator[None]:
    """Hold the lock of a folder until the block or the process ends.

    Args:
        busy: raised if another process holds the lock; by default, wait for it.

    Raises:
        OSError: the folder does not exist, or was replaced while waiting.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        lock(descriptor, path, busy)
        if not is_same(path, descriptor):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        yield
    finally:
        os.close(descriptor)


@contextmanager
def locked_file(path: Path, busy: ImageClassifierError | None = None) -> Iterator[None]:
    """Hold the lock of a file, created if necessary, until the block or the process ends.

    Args:
        busy: raised if another process holds the lock; by default, wait for it.

    Raises:
        StorageError: the file cannot be created.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise storage_error(path, error) from error
    try:
        lock(descriptor, path, busy)
        yield
    finally:
        os.close(descriptor)


def is_same(path: Path, descriptor: int) -> bool:
    """Return whether a path still refers to the open file."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def compute_file_digest(path: Path) -> str:
    """Compute the sha256 of a file's content, as lower-case hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


_REMEDIES = {
    errno.EIO: "check the disk",
    errno.ESTALE: "the folder was moved on its server; start again",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some of your quota",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.EROFS: "choose a writable folder",
    errno.EACCES: "choose a writable folder",
    errno.EPERM: "choose a writable folder",
    errno.EEXIST: "it exists already; choose another name or remove it",
    errno.ENOTEMPTY: "it exists already; choose another name or remove it",
    errno.ENOENT: "check that its folder exists",
    errno.ENOTDIR: "a file or a broken link is in the place of a folder",
    errno.EISDIR: "a folder has this name; choose another",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "a link leads to itself; remove it",
}


REFUSALS = frozenset(_REMEDIES) - {errno.EEXIST, errno.ENOTEMPTY, errno.ENOENT, errno.ENOTDIR, errno.EISDIR}
"""Error numbers that always come from the disk or the system, not from a defect of this package."""


def storage_error(path: Path, error: OSError, verb: str = "write") -> StorageError:
    """Build an error with the reason of the disk and the usual remedy."""
    remedy = _REMEDIES.get(error.errno or 0, "check the disk and the path")
    if verb == "use" and error.errno in (errno.EACCES, errno.EPERM):
        remedy = "get the permission, or choose another"
    return StorageError(f"cannot {verb} {path}: {error.strerror or error}; {remedy}")
