"""Write files so that a reader finds the old content or the new one, never a part.

Every call that changes the disk goes through a `Disk`, the seam at which the crash tests fail the N-th call.
The order is the one that survives SIGKILL and power loss (SQLite's and PostgreSQL's): write beside the target,
fsync the file, rename it, fsync the folder.

Each writer writes in a temporary folder of its own, which it holds a lock on. So writers of one name do not meet, and
what a killed one has left is told from what a living one is at work on: the kernel releases a dead process's locks.
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
"""Names that begin like this are unfinished writes, which readers ignore."""

_TEMPORARY = re.compile(re.escape(f"{TEMPORARY_PREFIX}image_classifier-") + "[0-9a-f]{16}")
_PATIENCE_S = 3  # a wait for another process that takes longer is worth a line
_RENAME_NOREPLACE, _RENAME_EXCHANGE = 1, 2  # of Linux's renameat2

logger = logging.getLogger(__name__)


def find_cache() -> Path | None:
    """Find this package's folder in the user's cache, which may not exist yet; None for who has no home.

    `IMAGE_CLASSIFIER_CACHE` names another one.
    """
    named = os.environ.get("IMAGE_CLASSIFIER_CACHE")
    path = named or os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "image_classifier")
    return None if path.startswith("~") else Path(path)


@contextmanager
def temporary_files_beside(path: Path) -> Iterator[None]:
    """Let temporary files, also of libraries and of programs that are started, lie beside what is to be written where
    the system has no place for them.

    Raises:
        StorageError: nothing can be written there either.
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
        StorageError: there is no place for one.
    """
    with ExitStack() as stack:
        try:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="image-classifier-"))
        except OSError as error:
            raise StorageError(
                f"there is no room for temporary files ({error.strerror}); name a folder that can be written in TMPDIR"
            ) from error
        yield Path(folder)


class Disk:
    """The real disk: one method for each system call that changes it."""

    def make_folder(self, path: Path) -> None:
        path.mkdir()

    def write_file(self, path: Path, content: bytes | memoryview) -> None:
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
        """Move a file or a folder; a file that is there is replaced."""
        os.replace(source, target)

    def rename_new(self, source: Path, target: Path) -> None:
        """Move a file or a folder to a name that nothing has.

        Raises:
            FileExistsError: something has it.
        """
        try:
            _rename(source, target, _RENAME_NOREPLACE)
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
                raise
            if os.path.lexists(target):  # a file system without this call, where two at once may still meet
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from error
            os.rename(source, target)

    def exchange(self, source: Path, target: Path) -> None:
        """Let two files or folders take each other's name, in one step where the file system has one."""
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
        """Remove a file, or a folder with all that it holds; nothing there is no error."""
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _rename(source: Path, target: Path, flags: int) -> None:
    """Call renameat2, which Python does not have."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    here = -100  # AT_FDCWD
    if call(here, os.fsencode(source), here, os.fsencode(target), ctypes.c_uint(flags)) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(source), None, str(target))


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
    """Replace a file whole, durably, and return the sha256 of its content.

    Raises:
        StorageError: the disk refused; the file is as it was and nothing is left beside it. (It may be the new one,
            whole, where the disk refused no more than to make its name durable.)
    """
    with written_beside(path, disk) as temporary:
        disk.write_file(temporary, content)
        disk.sync(temporary)
    return hashlib.sha256(content).hexdigest()


def write_folder_atomically(path: Path, files: dict[str, bytes], disk: Disk = DISK, *, replace: bool = False) -> None:
    """Create a folder with these files, in their order, whole or not at all.

    Args:
        replace: take the place of a folder that is there.

    Raises:
        StorageError: the disk refused, or the folder is there; nothing is left of what was begun.
    """
    with written_beside(path, disk, replace=replace) as temporary:
        disk.make_folder(temporary)
        for name, content in files.items():
            disk.write_file(temporary / name, content)
            disk.sync(temporary / name)
        disk.sync(temporary)


@contextmanager
def written_beside(path: Path, disk: Disk = DISK, *, replace: bool = True) -> Iterator[Path]:
    """Yield a temporary path; move the file or folder that was written there to the final one, or remove it.

    Args:
        replace: take the place of the file or folder that is there; else it stays, and that is an error.

    Raises:
        StorageError: the disk refused, or something else than a file or folder is there.
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
    """Check that no link, pipe or device would be replaced: one names /dev/stdout and does not mean its removal."""
    try:
        mode = path.lstat().st_mode
    except OSError:  # the write itself says it better
        return
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        kind = "a symbolic link" if stat.S_ISLNK(mode) else "no file"
        raise StorageError(f"cannot write {path}: there is {kind} of this name; choose another, or remove it")


def remove_folder(path: Path, disk: Disk = DISK) -> None:
    """Remove a folder such that one that is removed in part is never found under its name.

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
    """Yield a new folder to write in, locked, which is removed at the end with what is left in it.

    What killed writers left beside it is removed before. What cannot be removed stays for the next writer to try.
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
        except FileNotFoundError:  # another writer took it for a leftover before it was locked
            continue
        if try_lock(descriptor) is not False and is_same(path, descriptor):
            return path, descriptor
        os.close(descriptor)


def remove_leftovers(folder: Path, disk: Disk = DISK) -> None:
    """Remove what killed writers left in a folder. One that cannot be removed, such as another user's, stays."""
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
    """Lock an open file or folder; say whether that succeeded, None where the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # ENOLCK, ENOSYS, EOPNOTSUPP; and EBADF, which is NFS's answer for a folder
        return None
    return True


def lock(descriptor: int, path: Path, busy: ImageClassifierError | None = None) -> None:
    """Lock an open file or folder for as long as it is open.

    Where the file system has no locks a warning says so, and the caller goes on without.

    Args:
        path: what is locked, for messages.
        busy: raised where another process holds the lock; without it that process is waited for.
    """
    started, is_told = time.monotonic(), False
    while (locked := try_lock(descriptor)) is False:
        if busy is not None:
            raise busy
        if not is_told and time.monotonic() - started > _PATIENCE_S:
            logger.warning("waiting for another process that writes to %s", path)
            is_told = True
        time.sleep(0.02)
    if locked is None:
        logger.warning("the file system of %s has no locks: let no other process write there meanwhile", path)


@contextmanager
def locked_folder(path: Path, busy: ImageClassifierError | None = None) -> Iterator[None]:
    """Hold the lock of a folder, which dies with the process.

    Args:
        busy: raised where another process holds it; without it that process is waited for.

    Raises:
        OSError: there is no such folder, or another one took its place while it was waited for.
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
    """Hold the lock of a file, which is made if need be; it dies with the process.

    Args:
        busy: raised where another process holds it; without it that process is waited for.

    Raises:
        StorageError: the file cannot be made.
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
    """Say whether a path still names what was opened."""
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
    errno.EROFS: "choose a folder that can be written",
    errno.EACCES: "choose a folder that can be written",
    errno.EPERM: "choose a folder that can be written",
    errno.EEXIST: "another process has made it; look at it, then choose another name or remove it",
    errno.ENOTEMPTY: "another process has made it; look at it, then choose another name or remove it",
    errno.ENOENT: "see whether its folder is there",
    errno.ENOTDIR: "a file, or a link to nothing, is where a folder must be",
    errno.EISDIR: "a folder has this name; choose another",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "a link leads to itself; remove it",
}


REFUSALS = frozenset(_REMEDIES) - {errno.EEXIST, errno.ENOTEMPTY, errno.ENOENT, errno.ENOTDIR, errno.EISDIR}
"""Numbers of errors that come from the disk or the system wherever they turn up, and not from a defect."""


def storage_error(path: Path, error: OSError, verb: str = "write") -> StorageError:
    """Say in one line what the disk refused, with the remedy where there is a usual one."""
    remedy = _REMEDIES.get(error.errno or 0, "check the disk and the path")
    if verb == "use" and error.errno in (errno.EACCES, errno.EPERM):
        remedy = "get the right to, or choose another"
    return StorageError(f"cannot {verb} {path}: {error.strerror or error}; {remedy}")
