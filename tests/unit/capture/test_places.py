"""A folder for captures: files are whole there, whatever their size and the file system."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest

from image_classifier.capture.places import BLOCK_BYTES, LocalPlace, UncachedDisk
from image_classifier.errors import SettingsError

MEMORY = Path("/dev/shm")
"""A file system in memory, which may have no way past the kernel's."""


@pytest.mark.parametrize("is_aligned", [True, False])
@pytest.mark.parametrize("num_bytes", [0, 1, BLOCK_BYTES - 1, BLOCK_BYTES, 3 * BLOCK_BYTES + 5])
def test_a_file_holds_what_was_written_wherever_the_memory_begins(
    tmp_path: Path, num_bytes: int, is_aligned: bool
) -> None:
    memory = mmap.mmap(-1, num_bytes + BLOCK_BYTES)
    memory[:] = os.urandom(len(memory))
    start = 0 if is_aligned else 1
    content = memoryview(memory)[start : start + num_bytes]
    UncachedDisk().write_file(tmp_path / "file", content)
    assert (tmp_path / "file").read_bytes() == content
    with pytest.raises(FileExistsError):
        UncachedDisk().write_file(tmp_path / "file", content)


def test_a_file_system_without_direct_access_gets_the_file_too() -> None:
    path = MEMORY / f"image_classifier-{os.getpid()}"
    content = os.urandom(2 * BLOCK_BYTES + 5)
    try:
        UncachedDisk().write_file(path, content)
        assert path.read_bytes() == content
    finally:
        path.unlink()


@pytest.mark.parametrize("name", ["file", "file/captured"])
def test_a_place_that_nobody_can_write_to_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    LocalPlace(tmp_path / "new" / "captured").check_writable()
    with pytest.raises(SettingsError, match="--capture: .* cannot be written to; choose another folder"):
        LocalPlace(tmp_path / name).check_writable()
    assert not (tmp_path / "new").exists()


def test_what_the_disk_has_no_room_for_is_an_error(tmp_path: Path) -> None:
    program = (
        "import mmap, pathlib, resource, signal\n"
        "from image_classifier.capture.places import UncachedDisk\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))\n"
        "UncachedDisk().write_file(pathlib.Path('file'), memoryview(mmap.mmap(-1, 40_960)))\n"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1 and "File too large" in result.stderr
