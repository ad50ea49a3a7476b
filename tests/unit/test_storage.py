"""Files and folders are written whole or not at all, whatever call of the disk fails or is the last."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from image_classifier.errors import StorageError
from image_classifier.storage import (
    TEMPORARY_PREFIX,
    Disk,
    FaultyDisk,
    compute_file_digest,
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
    disk = FaultyDisk(refuse, 0)
    write(disk)
    return len(disk.calls)


def list_faults(num_calls: int) -> Iterator[tuple[int, bool]]:
    return ((number, partly) for number in range(1, num_calls + 1) for partly in (False, True))


PROGRAM = """
import os, resource, signal, sys
from pathlib import Path
from image_classifier.storage import Disk, FaultyDisk, remove_folder, write_atomically
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
    beside = tmp_path / f"{TEMPORARY_PREFIX}folder"
    assert disk.calls == [
        ("remove", beside),
        ("make_folder", beside),
        ("write_file", beside / "state.pth"),
        ("sync", beside / "state.pth"),
        ("write_file", beside / "manifest.json"),
        ("sync", beside / "manifest.json"),
        ("sync", beside),
        ("rename", beside),
        ("sync", tmp_path),
    ]


def test_a_file_whose_write_fails_at_any_call_is_as_it_was_and_nothing_is_left(tmp_path: Path) -> None:
    path = tmp_path / "file"
    num_calls = count_calls(lambda disk: write_atomically(path, OLD, disk))
    for number, partly in list_faults(num_calls):
        write_atomically(path, OLD)
        with pytest.raises(StorageError, match=r"^cannot write .*/file: No space left on device; free some space$"):
            write_atomically(path, NEW, FaultyDisk(refuse, number, partly=partly))
        assert path.read_bytes() == (NEW if number == num_calls else OLD)  # at the last its name alone may be lost
        assert list_names(tmp_path) == ["file"]


def test_a_folder_whose_write_fails_at_any_call_is_whole_or_not_there_and_nothing_is_left(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    num_calls = count_calls(lambda disk: write_folder_atomically(path, FILES, disk))
    for number, partly in list_faults(num_calls):
        if path.exists():
            remove_folder(path)
        with pytest.raises(StorageError, match="No space left on device"):
            write_folder_atomically(path, FILES, FaultyDisk(refuse, number, partly=partly))
        assert list_names(tmp_path) == (
            [] if number < num_calls else ["folder", "folder/manifest.json", "folder/state.pth"]
        )


def test_a_write_that_a_signal_ends_leaves_nothing_and_the_reason_is_not_changed(tmp_path: Path) -> None:
    def interrupt() -> None:
        raise Refusal

    for number in range(1, 5):
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


def test_what_cannot_be_removed_is_reported(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(StorageError, match=r"^cannot remove .*/folder: No space left on device"):
        remove_folder(tmp_path / "folder", FaultyDisk(refuse, 2))


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
        (errno.EROFS, "choose a folder that can be written"),
        (errno.EACCES, "choose a folder that can be written"),
        (errno.EIO, "check the disk"),
    ],
)
def test_an_error_names_the_path_the_reason_and_the_remedy_in_one_line(number: int, remedy: str) -> None:
    message = str(storage_error(Path("/somewhere/file"), OSError(number, os.strerror(number))))
    assert message.startswith("cannot write /somewhere/file: ") and os.strerror(number) in message
    assert remedy in message and "\n" not in message
