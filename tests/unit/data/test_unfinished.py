"""A snapshot whose maker is killed: the next one goes on with it, to the same bits, by however many threads."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from image_classifier import imaging
from image_classifier.access import Reading
from image_classifier.data import decoding, unfinished
from image_classifier.data.dataset import load_snapshot
from image_classifier.data.mapping import advise, iterate_blocks
from image_classifier.data.parts import PARTS
from image_classifier.data.snapshot import prune
from image_classifier.errors import DataError, ImageError, Interrupted
from tests.conftest import PROJECT
from tests.datasets import OURS, make_arrays, write_image_folder, write_parquet, write_shards

ARRAYS = make_arrays(70, 20)
WRITERS: dict[str, Callable[[Path], None]] = {
    "tars": lambda folder: write_shards(folder, ARRAYS, OURS),
    "Parquet": lambda folder: write_parquet(folder, ARRAYS, OURS),
    "folder": lambda folder: write_image_folder(folder, ARRAYS, OURS),
}
READING = Reading(skip_bad=True, image_size=64)  # so that each image is noted, and some are left out


@pytest.fixture(autouse=True)
def small_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of four images, each saved at once."""
    monkeypatch.setenv("IMAGE_CLASSIFIER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(decoding, "_BATCH", 4)
    monkeypatch.setattr(unfinished, "SAVE_EVERY_S", 0.0)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The encoded images that were decoded so far."""
    calls: list[bytes] = []
    decode = imaging.decode_image

    def note_and_decode(encoded: bytes, **options: Any) -> NDArray[np.uint8]:
        calls.append(encoded)
        return decode(encoded, **options)

    monkeypatch.setattr(imaging, "decode_image", note_and_decode)
    return calls


def spoil_some(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a fifth of the images refused, by their bytes."""
    decode = imaging.decode_image

    def refuse_or_decode(encoded: bytes, **options: Any) -> NDArray[np.uint8]:
        pixels = decode(encoded, **options)
        if zlib.crc32(encoded) % 5 == 1:
            raise ImageError("bad")
        return pixels

    monkeypatch.setattr(imaging, "decode_image", refuse_or_decode)


def stop_at(monkeypatch: pytest.MonkeyPatch, num_saves: int, error: BaseException) -> None:
    """Have the process stopped when so much was saved."""
    save, left = unfinished._save, iter(range(num_saves))

    def save_and_stop(*words: object) -> None:
        save(*words)  # type: ignore[arg-type]
        if next(left, None) is None:
            raise error

    monkeypatch.setattr(unfinished, "_save", save_and_stop)


@pytest.mark.parametrize("kind", WRITERS)
def test_a_snapshot_that_was_stopped_is_gone_on_with_to_the_same_bits(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decoded: list[bytes]
) -> None:
    spoil_some(monkeypatch)
    WRITERS[kind](tmp_path / "set")
    whole = load_snapshot(tmp_path / "set", reading=READING)
    assert whole.findings is not None and len(whole.findings.left_out) > 3 and whole.findings.num_fitted > 70
    assert 0 < whole.num_test < 20 and len(whole.labels) + len(whole.findings.left_out) == len(decoded) == 90
    prune(tmp_path / "set")
    decoded.clear()
    num_rounds = 0
    while True:
        num_rounds += 1
        with monkeypatch.context() as patched:
            stop_at(patched, 5, KeyboardInterrupt() if num_rounds % 2 else Interrupted("stopped by SIGTERM"))
            patched.setattr(os, "sched_getaffinity", lambda _: set(range(1 + num_rounds % 3)))
            try:
                snapshot = load_snapshot(tmp_path / "set", reading=READING)
                break
            except (KeyboardInterrupt, Interrupted):
                assert len(list((tmp_path / "set" / ".snapshots").glob("unfinished-*"))) == 1
    assert (snapshot.digest, snapshot.findings) == (whole.digest, whole.findings)
    assert num_rounds > 2 and 90 < len(decoded) <= 90 + num_rounds * 20  # those that were ahead are decoded again
    assert sorted(os.listdir(tmp_path / "set" / ".snapshots")) == [".lock", snapshot.digest, "index"]


KILLED = """
import os, signal, sys
from pathlib import Path
from typing import Any
from image_classifier.data import decoding, unfinished
from image_classifier.data.dataset import load_snapshot
decoding._BATCH, unfinished.SAVE_EVERY_S = 4, 0.0
save, left = unfinished._save, 4
def save_and_die(*words):
    global left
    save(*words)
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
unfinished._save = save_and_die
load_snapshot(Path(sys.argv[1]))
"""


def test_a_process_that_was_killed_is_gone_on_from(tmp_path: Path, decoded: list[bytes]) -> None:
    write_shards(tmp_path, ARRAYS, OURS)
    digest = load_snapshot(tmp_path).digest
    prune(tmp_path)
    for _ in range(2):
        command = [sys.executable, "-c", KILLED, str(tmp_path)]
        assert subprocess.run(command, cwd=PROJECT, timeout=60).returncode == -signal.SIGKILL
    (left,) = (tmp_path / ".snapshots").glob("unfinished-*")
    with open(left / "snapshot" / "images.npy", "ab") as file:
        file.write(b"not saved any more")
    decoded.clear()
    assert load_snapshot(tmp_path).digest == digest
    assert len(decoded) == 90 - 2 * 4 * 4


@pytest.fixture
def stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A snapshot of tars that was stopped after 24 images."""
    write_shards(tmp_path, ARRAYS, OURS)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        stop_at(patched, 5, KeyboardInterrupt())
        load_snapshot(tmp_path)
    (left,) = (tmp_path / ".snapshots").glob("unfinished-*")
    return left


def test_nothing_is_decoded_any_more_while_the_error_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decoded: list[bytes]
) -> None:
    write_shards(tmp_path, ARRAYS, OURS)
    before = set(threading.enumerate())
    with pytest.raises(KeyboardInterrupt) as error:
        stop_at(monkeypatch, 5, KeyboardInterrupt())
        load_snapshot(tmp_path)
    assert error.traceback and set(threading.enumerate()) <= before and 24 <= len(decoded) < 90


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-40] ^= 1
    path.write_bytes(content)


def change_record(**values: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "progress.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values), encoding="utf-8")

    return change


def count(num_train: int, num_test: int) -> dict[str, dict[str, int]]:
    return {part: {"kept": kept, "left_out": 0} for part, kept in zip(PARTS, (num_train, 0, num_test), strict=True)}


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: flip(folder / "snapshot" / "images.npy"),
        lambda folder: flip(folder / "labels.bin"),
        lambda folder: os.truncate(folder / "snapshot" / "images.npy", 5000),
        lambda folder: os.truncate(folder / "labels.bin", 8),
        lambda folder: (folder / "snapshot" / "images.npy").unlink(),
        lambda folder: (folder / "progress.json").write_bytes(b"{"),
        lambda folder: (folder / "progress.json").unlink(),
        change_record(parts={"train": {"kept": -3, "left_out": 0}, "validation": {"kept": 0, "left_out": 0}}),
        change_record(parts=count(-3, 27)),
        change_record(parts=count(10**15, 0)),
        change_record(notes={"left_out": [], "sizes": [[1, 2]]}),
        change_record(reader="pillow 1.0"),
    ],
)
def test_what_was_left_is_checked_and_begun_anew_where_it_is_not_whole(
    damage: Callable[[Path], None], stopped: Path, decoded: list[bytes]
) -> None:
    damage(stopped)
    digest = load_snapshot(stopped.parents[1]).digest
    assert len(decoded) == 90 and not stopped.exists()
    prune(stopped.parents[1])
    assert load_snapshot(stopped.parents[1]).digest == digest


def test_what_was_left_of_another_source_is_given_up(stopped: Path, decoded: list[bytes]) -> None:
    load_snapshot(stopped.parents[1], reading=Reading(image_size=64))
    assert len(decoded) == 90 and not stopped.exists()


def test_an_error_leaves_nothing_and_prune_removes_what_is_left(stopped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = stopped.parents[1]
    shutil.copytree(folder, folder / "copy")
    with monkeypatch.context() as patched, pytest.raises(DataError, match="cannot be read"):
        spoil_some(patched)
        load_snapshot(folder)
    assert not (folder / ".snapshots").exists()
    assert prune(folder / "copy") > 24 * 3072 and not (folder / "copy" / ".snapshots").exists()


def test_without_locks_or_for_another_user_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shards(tmp_path, ARRAYS, OURS)
    for name, value in ((("try_lock"), None), ("os.getuid", 12345)):
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(f"image_classifier.data.unfinished.{name}", lambda *_, value=value: value)
            patched.setattr(np, "fromfile", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            load_snapshot(tmp_path)
        assert not (tmp_path / ".snapshots").exists()


def test_a_mapped_array_is_gone_through_without_staying_in_memory(tmp_path: Path) -> None:
    array = np.random.default_rng(0).integers(0, 256, (7000, 3, 64, 64), np.uint8)
    np.save(tmp_path / "array.npy", array)
    mapped = np.load(tmp_path / "array.npy", mmap_mode="c")
    sizes = []
    for block, start in zip(iterate_blocks(mapped), range(0, 7000, 1365), strict=True):
        assert block.tobytes() == array[start : start + 1365].tobytes()
        sizes.append(measure_mapped(tmp_path / "array.npy"))
    assert max(sizes) < 2**15 and measure_mapped(tmp_path / "array.npy") < 2**12  # KB, of 86 MB
    plain = np.asarray(mapped)
    for _ in iterate_blocks(plain):
        assert plain.sum() >= 0
    assert measure_mapped(tmp_path / "array.npy") > 80_000  # it may be in use elsewhere
    advise(array, "MADV_DONTNEED")
    assert array.any()


def measure_mapped(path: Path) -> int:
    """Measure how many KB of a mapped file are this process's."""
    lines = Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines()
    place = next(number for number, line in enumerate(lines) if line.endswith(str(path)))
    return int(next(line for line in lines[place:] if line.startswith("Rss:")).split()[1])
