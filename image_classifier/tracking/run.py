"""Writes a run folder: one process at a time, and atomically."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from image_classifier.errors import RunBusyError, RunError
from image_classifier.storage import (
    DISK,
    TEMPORARY_PREFIX,
    Disk,
    locked_folder,
    storage_error,
    write_atomically,
    write_folder_atomically,
)
from image_classifier.tracking.checking import is_finished
from image_classifier.tracking.layout import (
    CHAIN,
    FORMAT_VERSION,
    MANIFEST,
    METRICS,
    RECORD,
    describe_file,
    is_as_described,
    list_run_files,
)
from image_classifier.tracking.reading import compute_manifest_digest


class RunFolder:
    """A run folder that is being written, by this process alone.

    Args:
        path: the folder; it exists.
        disk: the seam through which everything is written.
    """

    def __init__(self, path: Path, disk: Disk = DISK) -> None:
        self.path = path
        self.disk = disk
        self._status = path.stat()

    def check_place(self) -> None:
        """Check that the path still names the folder that was opened: what follows would go into another run.

        Raises:
            RunError: it was moved, removed or replaced.
        """
        try:
            is_there = os.path.samestat(self._status, self.path.stat())
        except FileNotFoundError:
            is_there = False
        except OSError:  # the write that follows says it better
            return
        if not is_there:
            raise RunError(
                f"{self.path} was moved, removed or replaced during the training, so nothing more is written; "
                "put it back and continue with --resume"
            )

    def write(self, name: str, content: bytes) -> str:
        """Write one of the run's files whole and durably; return its sha256."""
        self.check_place()
        return write_atomically(self.path / name, content, self.disk)

    def write_folder(self, name: str, files: dict[str, bytes]) -> None:
        """Write a folder beside the run's files whole, in the place of an earlier one."""
        self.check_place()
        write_folder_atomically(self.path / name, files, self.disk, replace=True)

    def write_json(self, name: str, value: Any) -> str:
        """Write a value as readable, strict JSON."""
        return self.write(name, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())

    def append_line(self, name: str, value: dict[str, Any]) -> None:
        """Append a line of JSON to a growing file, whole or not at all; `sync_lines` makes it durable."""
        self.check_place()
        path, size = self.path / name, 0
        try:
            size = path.stat().st_size if path.exists() else 0
            self.disk.append(path, (json.dumps(value, allow_nan=False) + "\n").encode())
        except OSError as error:
            with suppress(OSError):
                os.truncate(path, size)
            raise storage_error(path, error) from error

    def sync_lines(self) -> dict[str, dict[str, Any]]:
        """Force the growing files onto the disk; return the size and sha256 of each, for a checkpoint to remember."""
        self.check_place()
        try:
            paths = [self.path / name for name in (METRICS, CHAIN) if (self.path / name).exists()]
            for path in paths:
                self.disk.sync(path)
            self.disk.sync(self.path)
            return {path.name: describe_file(path) for path in paths}
        except OSError as error:
            raise storage_error(self.path, error) from error

    def check_lines(self, lines: dict[str, dict[str, Any]]) -> None:
        """Check that the growing files still begin with what a checkpoint remembers of them.

        Raises:
            RunError: one is shorter, or was changed.
        """
        for name, facts in lines.items():
            if not is_as_described(self.path / name, facts, may_go_on=True):
                raise RunError(f"{self.path / name} has lost or changed lines since the checkpoint")

    def cut_lines(self, lines: dict[str, dict[str, Any]]) -> None:
        """Cut the growing files back to where they stood at a checkpoint, or to nothing."""
        for name in (METRICS, CHAIN):
            path, size = self.path / name, lines.get(name, {"size": 0})["size"]
            try:
                if path.exists() and path.stat().st_size > size:
                    self.disk.truncate(path, size)
            except OSError as error:
                raise storage_error(path, error) from error

    def finish(self, **facts: Any) -> None:
        """Write the manifest over every file of the run: from then on the run is finished."""
        files = {name: describe_file(self.path / name) for name in list_run_files(self.path)}
        manifest = {"format_version": FORMAT_VERSION, **facts, "files": files}
        self.write_json(MANIFEST, {**manifest, "digest": compute_manifest_digest(manifest)})


@contextmanager
def open_run_folder(path: Path, *, resume: bool, disk: Disk = DISK) -> Iterator[RunFolder]:
    """Create a run's folder, or open the one to resume, and hold a lock on it that dies with the process.

    What a killed process had begun to write is removed, and so is a folder that was created and got no record.

    Raises:
        RunError: it exists (or, to resume, does not, or is no run's), or another process is writing it.
        StorageError: the disk refuses.
    """
    error = RunBusyError(f"another process is training into {path}; wait for it, or choose another --run_name")
    with ExitStack() as stack:
        try:
            created = _find_resumable(path) if resume else _create_folders(path, disk)
            stack.enter_context(locked_folder(path, error))
            stack.callback(_remove_without_record, path, created)
            for leftover in path.glob(f"{TEMPORARY_PREFIX}*"):  # nobody else writes here: the lock is held
                disk.remove(leftover)
        except FileExistsError as error:
            raise run_exists_error(path) from error
        except OSError as error:
            raise storage_error(path, error) from error
        yield RunFolder(path, disk)


def _find_resumable(path: Path) -> list[Path]:
    """Check that a folder holds a run, or what a killed process has left of its beginning; no folder is created."""
    if not path.is_dir():
        raise RunError(f"there is no run {path} to resume; leave out --resume to start it")
    names = sorted(name for name in os.listdir(path) if not name.startswith(TEMPORARY_PREFIX))
    if names and RECORD not in names:
        raise RunError(f"{path} has {names[0]} but no {RECORD}: it is not a run, so it cannot be resumed")
    return []


def _create_folders(path: Path, disk: Disk, num_tries: int = 10) -> list[Path]:
    """Create a folder and those missing above it, durably and all or none; return which, the outermost first.

    Raises:
        FileExistsError: the folder itself exists.
    """
    created: list[Path] = []
    try:
        for folder in (*reversed(path.parents), path):
            if folder != path and folder.is_dir():
                continue
            try:
                disk.make_folder(folder)
            except FileExistsError as error:
                if folder == path:
                    raise
                if not folder.is_dir():
                    raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder)) from error
                continue  # another process has made it at the same moment
            created.append(folder)
            disk.sync(folder.parent)
    except BaseException as error:
        _remove_without_record(path, created)
        if isinstance(error, FileNotFoundError) and num_tries > 1:  # another process has removed what it had made
            return _create_folders(path, disk, num_tries - 1)
        raise
    return created


def _remove_without_record(path: Path, created: list[Path]) -> None:
    with suppress(OSError):  # a folder that holds something stays
        if not os.path.exists(path / RECORD):  # False, and no error, for a name that is too long
            for folder in reversed(created):
                folder.rmdir()


def run_exists_error(path: Path) -> RunError:
    """Say that a run folder is taken, with the advice that fits."""
    advice = "choose another --run_name"
    if path.is_dir() and not is_finished(path):
        advice += ", or continue it with --resume"
    return RunError(f"the run folder {path} exists already; {advice}")
