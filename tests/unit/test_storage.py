"""Files and folders are written whole or not at all, whatever call of the disk fails or is the last."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from image_classifier import storage
from image_classifier.errors import StorageError
from image_classifier.storage import (
    TEMPORARY_PREFIX,
    Disk,
    FaultyDisk,
    compute_file_digest,
    locked_folder,
    remove_folder,
    storage_error,
    write_atomically,
    write_folder_atomically,
)
from tests.conftest import PROJECT, leave_out_coverage

OLD, NEW = b"old" * 10, b"the new content" * 10
FILES = {"state.pth": NEW, "manifest.json": b"{}"}


class Refusal(Exception):
    """Something other than an OSError that ends a write in its middle, as a signal's handler may."""


def refuse() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def list_names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def count_calls(write: Callable[[Disk], object]) -> int:
    """Count the calls of a write; at the last one, the removal of the emptied folder, it may fail without harm."""
    disk = FaultyDisk(refuse, 0)
    write(disk)
    assert disk.calls[-1][0] == "remove"
    return len(disk.calls)


def list_faults(num_calls: int) -> Iterator[tuple[int, bool]]:
    return ((number, partly) for number in range(1, num_calls + 1) for partly in (False, True))


PROGRAM = """
import os, resource, signal, sys
from pathlib import Path
from image_classifier.storage import *
path, number, partly = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "True"
disk = FaultyDisk(lambda: os.kill(os.getpid(), signal.SIGKILL), number, partly=partly)
"""


def die_at(statement: str, path: Path, number: int, partly: bool) -> None:
    """Do something in a process that is killed at a call to the disk, and see to it that it was."""
    words = [sys.executable, "-c", PROGRAM + statement, str(path), str(number), str(partly)]
    assert subprocess.run(words, cwd=PROJECT).returncode == -signal.SIGKILL


@given(st.binary(max_size=2000))
def test_what_is_written_is_what_is_read_and_its_digest_returned(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.mktemp("storage") / "file"
    for _ in range(2):  # new, then replaced
        assert write_atomically(path, content) == hashlib.sha256(content).hexdigest() == compute_file_digest(path)
        assert path.read_bytes() == content
    assert list_names(path.parent) == ["file"]


def test_a_folder_gets_its_files(tmp_path: Path) -> None:
    write_folder_atomically(tmp_path / "folder", FILES)
    assert {name: (tmp_path / "folder" / name).read_bytes() for name in FILES} == FILES
    assert list_names(tmp_path) == ["folder", "folder/manifest.json", "folder/state.pth"]


def test_everything_is_on_the_disk_before_it_gets_its_name_and_the_name_is_on_the_disk_last(tmp_path: Path) -> None:
    disk = FaultyDisk(refuse, 0)
    write_folder_atomically(tmp_path / "folder", FILES, disk)
    beside = disk.calls[0][1]
    assert beside.parent == tmp_path and beside.name.startswith(TEMPORARY_PREFIX)
    assert disk.calls == [
        ("make_folder", beside),
        ("make_folder", beside / "folder"),
        ("write_file", beside / "folder" / "state.pth"),
        ("sync", beside / "folder" / "state.pth"),
        ("write_file", beside / "folder" / "manifest.json"),
        ("sync", beside / "folder" / "manifest.json"),
        ("sync", beside / "folder"),
        ("rename_new", beside / "folder"),
        ("sync", tmp_path),
        ("remove", beside),
    ]


def test_a_file_whose_write_fails_at_any_call_is_as_it_was_and_nothing_is_left(tmp_path: Path) -> None:
    path = tmp_path / "file"
    num_calls = count_calls(lambda disk: write_atomically(path, OLD, disk))
    for number, partly in list_faults(num_calls):
        write_atomically(path, OLD)
        disk = FaultyDisk(refuse, number, partly=partly)
        if number == num_calls:
            write_atomically(path, NEW, disk)
        else:
            with pytest.raises(StorageError, match=r"^cannot write .*/file: No space left on device; free some space$"):
                write_atomically(path, NEW, disk)
        assert path.read_bytes() == (OLD if number < num_calls - 1 else NEW)  # before, its name alone may be lost
        assert list_names(tmp_path) == ["file"]


def test_a_folder_whose_write_fails_at_any_call_is_whole_or_not_there_and_nothing_is_left(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    num_calls = count_calls(lambda disk: write_folder_atomically(path, FILES, disk))
    for number, partly in list_faults(num_calls):
        if path.exists():
            remove_folder(path)
        with pytest.raises(StorageError, match="No space left on device") if number < num_calls else nullcontext():
            write_folder_atomically(path, FILES, FaultyDisk(refuse, number, partly=partly))
        assert list_names(tmp_path) == (
            [] if number < num_calls - 1 else ["folder", "folder/manifest.json", "folder/state.pth"]
        )


OTHER_FILES = {"state.pth": OLD, "notes.txt": b"another file"}


def read_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_folder_that_is_replaced_is_the_old_or_the_new_one_whatever_fails(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    write_folder_atomically(path, OTHER_FILES)
    num_calls = count_calls(lambda disk: write_folder_atomically(path, OTHER_FILES, disk, replace=True))
    for number, partly in list_faults(num_calls):
        write_folder_atomically(path, OTHER_FILES, replace=True)
        with pytest.raises(StorageError, match="No space left on device") if number < num_calls else nullcontext():
            write_folder_atomically(path, FILES, FaultyDisk(refuse, number, partly=partly), replace=True)
        assert read_files(path) == (FILES if number > num_calls - 2 else OTHER_FILES)
        assert {name.partition("/")[0] for name in list_names(tmp_path)} == {"folder"}


def test_a_folder_whose_replacement_is_killed_at_any_call_is_the_old_or_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    write_folder_atomically(path, OTHER_FILES)
    num_calls = count_calls(lambda disk: write_folder_atomically(path, OTHER_FILES, disk, replace=True))
    seen = set()
    for number, partly in list_faults(num_calls):
        write_folder_atomically(path, OTHER_FILES, replace=True)
        die_at(f"write_folder_atomically(path, {FILES!r}, disk, replace=True)", path, number, partly)
        seen.add(frozenset(read_files(path).items()))
    assert seen == {frozenset(OTHER_FILES.items()), frozenset(FILES.items())}
    write_folder_atomically(path, FILES, replace=True)
    assert {name.partition("/")[0] for name in list_names(tmp_path)} == {"folder"}


def test_a_folder_that_is_there_stays_unless_it_is_to_be_replaced(tmp_path: Path) -> None:
    write_folder_atomically(tmp_path / "folder", OTHER_FILES)
    with pytest.raises(StorageError, match="File exists; it exists already"):
        write_folder_atomically(tmp_path / "folder", FILES)
    assert read_files(tmp_path / "folder") == OTHER_FILES and list_names(tmp_path)[0] == "folder"
    (tmp_path / "empty").mkdir()
    with pytest.raises(StorageError, match="File exists"):  # rename alone would replace it
        write_folder_atomically(tmp_path / "empty", FILES)


def test_where_the_file_system_cannot_exchange_names_it_is_done_in_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse_flags(*words: object) -> None:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(storage, "_rename", refuse_flags)
    write_folder_atomically(tmp_path / "folder", OTHER_FILES)
    with pytest.raises(StorageError, match="File exists"):
        write_folder_atomically(tmp_path / "folder", FILES)
    write_folder_atomically(tmp_path / "folder", FILES, replace=True)
    assert read_files(tmp_path / "folder") == FILES
    assert {name.partition("/")[0] for name in list_names(tmp_path)} == {"folder"}


def test_a_write_that_a_signal_ends_leaves_nothing_and_the_reason_is_not_changed(tmp_path: Path) -> None:
    def interrupt() -> None:
        raise Refusal

    for number in range(1, 4):
        with pytest.raises(Refusal):
            write_atomically(tmp_path / "file", NEW, FaultyDisk(interrupt, number, partly=True))
        assert list_names(tmp_path) == []


def test_a_writer_killed_at_any_call_leaves_the_old_or_the_new_and_the_next_one_succeeds(tmp_path: Path) -> None:
    path = tmp_path / "file"
    num_calls = count_calls(lambda disk: write_atomically(path, OLD, disk))
    seen = set()
    for number, partly in list_faults(num_calls):
        write_atomically(path, OLD)
        die_at(f"write_atomically(path, {NEW!r}, disk)", path, number, partly)
        seen.add(path.read_bytes())
        write_atomically(path, NEW)
        assert path.read_bytes() == NEW and list_names(tmp_path) == ["file"]
    assert seen == {OLD, NEW}


def test_a_folder_whose_removal_is_killed_at_any_call_is_whole_or_gone(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    write_folder_atomically(path, FILES)
    num_calls = count_calls(lambda disk: remove_folder(path, disk))
    for number, partly in list_faults(num_calls):
        if not path.exists():
            write_folder_atomically(path, FILES)
        die_at("remove_folder(path, disk)", path, number, partly)
        assert not path.exists() or list_names(path) == sorted(FILES)
        if not path.exists():
            write_folder_atomically(path, FILES)
        remove_folder(path)
        assert list_names(tmp_path) == []


@pytest.mark.parametrize("number", [1, 2, 3])
def test_what_cannot_be_removed_is_reported(number: int, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(StorageError, match=r"^cannot remove .*/folder: No space left on device"):
        remove_folder(tmp_path / "folder", FaultyDisk(refuse, number))
    assert list_names(tmp_path) == ([] if number == 3 else ["folder"])


@pytest.mark.parametrize("name", ["n" * 255, "ü" * 127 + "n", "-n", "new\nline", "\udcff"])
def test_a_name_may_be_as_long_and_as_odd_as_the_file_system_takes(name: str, tmp_path: Path) -> None:
    for content in (OLD, NEW):
        write_atomically(tmp_path / name, content)
        assert (tmp_path / name).read_bytes() == content
    (tmp_path / name).unlink()
    write_folder_atomically(tmp_path / name, FILES)
    remove_folder(tmp_path / name)
    assert list_names(tmp_path) == []
    with pytest.raises(StorageError, match="File name too long; choose a shorter name"):
        write_atomically(tmp_path / ("n" * 256), NEW)
    assert list_names(tmp_path) == []


@pytest.mark.parametrize("kind", ["link", "dangling", "pipe", "device"])
def test_no_link_pipe_or_device_is_replaced_by_a_file(kind: str, tmp_path: Path) -> None:
    path, target = tmp_path / "file", tmp_path / "target"
    if kind == "device":
        path = Path(os.devnull)
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(target)
        if kind == "link":
            target.write_bytes(OLD)
    before = path.lstat()
    for write in (lambda: write_atomically(path, NEW), lambda: write_folder_atomically(path, FILES, replace=True)):
        with pytest.raises(StorageError, match="no file|a symbolic link"):
            write()
    assert os.path.samestat(before, path.lstat())
    assert not target.exists() or target.read_bytes() == OLD


# What a killed writer leaves, and what a living one is at work on.

HOLDING = "with written_beside(path) as temporary:\n temporary.mkdir(); print(temporary, flush=True); sys.stdin.read()"


@contextmanager
def writing(path: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A process in the middle of a write, and the temporary path that it writes to."""
    words = [sys.executable, "-c", PROGRAM + HOLDING, str(path), "0", "False"]
    with subprocess.Popen(words, cwd=PROJECT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process, Path(process.stdout.readline().rstrip("\n"))
        process.kill()


def test_what_a_living_writer_writes_stays_and_what_a_killed_one_left_is_removed_by_the_next(tmp_path: Path) -> None:
    path = tmp_path / "file"
    foreign = [".tmp-other", ".tmp-image_classifier-notes", ".tmp-0123456789abcdef", "tmp-image_classifier-" + "0" * 16]
    for name in foreign:
        (tmp_path / name).write_bytes(b"of somebody else")
    with writing(tmp_path / "other") as (process, temporary):
        write_atomically(path, OLD)
        write_folder_atomically(tmp_path / "folder", FILES)
        remove_folder(tmp_path / "folder")
        assert temporary.is_dir(), "the file of a living writer was removed"
        process.kill()
        process.wait()
        assert temporary.is_dir()
        write_atomically(path, NEW)
        assert list_names(tmp_path) == sorted([*foreign, "file"])


def test_a_leftover_that_cannot_be_removed_hinders_nobody(tmp_path: Path) -> None:
    leftover = tmp_path / f"{TEMPORARY_PREFIX}image_classifier-{'0' * 16}"
    leftover.mkdir()
    disk = FaultyDisk(refuse, 1)  # at its removal
    write_atomically(tmp_path / "file", NEW, disk)
    assert disk.calls[0] == ("remove", leftover) and (tmp_path / "file").read_bytes() == NEW


def test_a_file_system_without_locks_is_written_and_no_leftover_taken_for_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse_lock(*words: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse_lock)
    leftover = tmp_path / f"{TEMPORARY_PREFIX}image_classifier-{'0' * 16}"
    leftover.mkdir()
    write_atomically(tmp_path / "file", NEW)
    assert leftover.is_dir() and (tmp_path / "file").read_bytes() == NEW
    with locked_folder(tmp_path, StorageError("busy")):
        assert "has no locks: no other process may write there" in caplog.text


def test_the_lock_of_a_folder_is_refused_or_waited_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    program = "with locked_folder(path):\n print('locked', flush=True); sys.stdin.read()"
    words = [sys.executable, "-c", PROGRAM + program, str(tmp_path), "0", "False"]
    with subprocess.Popen(words, cwd=PROJECT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdin is not None and other.stdout.readline() == "locked\n"
        with pytest.raises(StorageError, match="busy"), locked_folder(tmp_path, StorageError("busy")):
            pass
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(storage, "_PATIENCE_S", 0)
            patch.setattr(storage.logger, "warning", lambda *words: other.kill())  # it is told, and then it goes on
            with locked_folder(tmp_path):
                assert other.wait() == -signal.SIGKILL


def test_a_folder_that_another_took_the_place_of_is_not_locked(tmp_path: Path) -> None:
    flock = fcntl.flock

    def replace(*words: Any) -> None:
        (tmp_path / "folder").rename(tmp_path / "moved")
        (tmp_path / "folder").mkdir()
        flock(*words)

    (tmp_path / "folder").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fcntl, "flock", replace)
        with pytest.raises(FileNotFoundError), locked_folder(tmp_path / "folder"):
            pass


def test_an_append_that_a_limit_cuts_short_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_bytes(b"x" * 90)
    limit = "resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))\nDisk().append(path, b'y' * 20)"
    words = [sys.executable, "-c", PROGRAM + limit, str(path), "0", "False"]
    result = subprocess.run(words, cwd=PROJECT, env=leave_out_coverage(), capture_output=True, text=True)
    assert result.returncode == 1 and result.stderr.endswith(f"OSError: [Errno {errno.EFBIG}] File too large\n")


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EFBIG, "ulimit -f"),
        (errno.EROFS, "choose a writable folder"),
        (errno.EACCES, "choose a writable folder"),
        (errno.EIO, "check the disk"),
    ],
)
def test_an_error_names_the_path_the_reason_and_the_remedy_in_one_line(number: int, remedy: str) -> None:
    message = str(storage_error(Path("/somewhere/file"), OSError(number, os.strerror(number))))
    assert message.startswith("cannot write /somewhere/file: ") and os.strerror(number) in message
    assert remedy in message and "\n" not in message
