"""Captures: what is written is read, and what is broken is named."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from image_classifier.capture.files import (
    CaptureFacts,
    build_schema,
    parse_captured,
    read_captures,
)
from image_classifier.capture.places import LocalPlace, open_place
from image_classifier.errors import DataError, SettingsError, StorageError
from image_classifier.storage import FaultyDisk
from tests.captures import CapturedImage, build_capture, build_part

FACTS = CaptureFacts(32, ("cat", "dog", "ship"), "d" * 64, "a machine")
START = datetime(2026, 11, 30, 12, 59, 59, 900_000, UTC)


def draw_rows(number: int, start: datetime = START, seed: int = 0) -> list[CapturedImage]:
    generator = np.random.default_rng(seed)
    return [
        CapturedImage(
            time_us=round(start.timestamp() * 1e6) + row,
            request_id=f"request-{row // 2}",
            image_index=row % 2,
            caller=None if row % 3 else "ännie",
            model_version="3",
            batch_size=row + 1,
            pixels=generator.integers(0, 256, 3 * 32**2, np.uint8).tobytes(),
            probabilities=generator.random(3, np.float32).tolist(),
        )
        for row in range(number)
    ]


def build(rows: list[CapturedImage], facts: CaptureFacts = FACTS) -> tuple[str, bytes]:
    return build_capture(facts, *(part for part in (rows[:3], rows[3:]) if part))


@pytest.mark.parametrize("kind", ["folder", "file URL", "remote"])
def test_what_is_written_is_read_bit_for_bit(tmp_path: Path, kind: str) -> None:
    url = {"folder": str(tmp_path / "new/one"), "file URL": f"file://{tmp_path}", "remote": f"memory://{tmp_path}"}[
        kind
    ]
    rows = draw_rows(5)
    path, content = build(rows)
    assert path.startswith("date=2026-11-30/hour=12/20261130T125959.900000-")
    place = open_place(url)
    assert place.measure() == 0
    place.write(path, content)
    assert place.measure() == len(content) == place.list_files()[path]
    (captured,) = read_captures(url)
    assert (captured.path, captured.facts, len(captured)) == (path, FACTS, 5)
    assert captured.times.dtype == "datetime64[us]"
    assert captured.times.astype(np.int64).tolist() == [row.time_us for row in rows]
    assert captured.request_ids == [row.request_id for row in rows]
    assert captured.image_indices.tolist() == [0, 1, 0, 1, 0]
    assert captured.callers == ["ännie", None, None, "ännie", None]
    assert captured.model_versions == ["3"] * 5
    assert captured.batch_sizes.tolist() == [1, 2, 3, 4, 5]
    assert captured.pixels.shape == (5, 32, 32, 3)
    assert captured.pixels.tobytes() == b"".join(row.pixels for row in rows)
    assert captured.probabilities.dtype == np.float32
    assert captured.probabilities.tolist() == [row.probabilities for row in rows]


def test_other_tools_read_the_files(tmp_path: Path) -> None:
    path, content = build(draw_rows(5))
    LocalPlace(tmp_path).write(path, content)
    table = pyarrow.parquet.read_table(tmp_path)
    assert table.num_rows == 5
    assert table["date"].to_pylist()[0] == "2026-11-30" and table["hour"].to_pylist()[0] == 12


def test_files_come_in_the_order_of_their_times_and_within_the_bounds(tmp_path: Path) -> None:
    starts = [START + timedelta(hours=hours) for hours in (30, 0, 2, 1)]
    for start in starts:
        LocalPlace(tmp_path).write(*build(draw_rows(5, start)))
    captures = read_captures(tmp_path)
    assert [captured.times[0].item().replace(tzinfo=UTC) for captured in captures] == sorted(starts)
    since, until = START + timedelta(microseconds=3), START + timedelta(hours=2, microseconds=2)
    assert [len(captured) for captured in read_captures(tmp_path, since=since, until=until)] == [2, 5, 2]
    with pytest.raises(DataError, match="has no captures in this period"):
        list(read_captures(tmp_path, until=START - timedelta(days=1)))


def test_broken_files_are_named_and_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, content = build(draw_rows(5))
    whole = LocalPlace(tmp_path)
    whole.write(path, content)
    folder = (tmp_path / path).parent
    later = [build(draw_rows(5, START + timedelta(seconds=second), second)) for second in range(1, 5)]
    for number, (name, good) in enumerate(later):
        cut = [good[: len(good) // 2], b"", good[:9] + bytes([good[9] ^ 1]) + good[10:], good + b"\0"][number]
        (tmp_path / name).write_bytes(cut) if (tmp_path / name).parent.is_dir() else whole.write(name, cut)
    (folder / "a.parquet").write_bytes(content)
    (folder / ".tmp-being-written.parquet").write_bytes(b"")  # of a writer that is at work
    (folder / "b.parquet").mkdir()
    captures = read_captures(tmp_path)
    assert [captured.path for captured in captures] == [path]
    assert sorted(broken.path for broken in captures.broken) == sorted(
        [name for name, _ in later] + [f"{Path(path).parent}/{name}" for name in ("a.parquet", "b.parquet")]
    )
    assert all(f"{broken.path} is broken and is skipped" in caplog.text for broken in captures.broken)
    reasons = {broken.path: broken.reason for broken in captures.broken}
    assert (
        "truncated or changed" in reasons[later[0][0]] and "Is a directory" in reasons[f"{Path(path).parent}/b.parquet"]
    )


def rename(content: bytes) -> str:
    return f"20261130T125959.900000-{hashlib.sha256(content).hexdigest()[:16]}.parquet"


def test_files_of_another_form_are_refused() -> None:
    """They have the digest that their name says, as one has that somebody else wrote."""
    rows = draw_rows(5)
    schema = build_schema(FACTS)
    batch = build_part(rows, FACTS)

    def refuse(table: pyarrow.Table, match: str) -> None:
        sink = pyarrow.BufferOutputStream()
        pyarrow.parquet.write_table(table, sink)
        content = sink.getvalue().to_pybytes()
        with pytest.raises(ValueError, match=match):
            parse_captured(rename(content), content)

    table = pyarrow.Table.from_batches([batch], schema)
    refuse(table.drop_columns(["caller"]), "columns")
    refuse(table.replace_schema_metadata({}), "format_version")
    metadata = schema.metadata
    refuse(table.replace_schema_metadata({**metadata, b"image_classifier.format_version": b"2"}), "install a later one")
    refuse(table.replace_schema_metadata({**metadata, b"image_classifier.classes": b"{}"}), "no valid classes")
    refuse(table.replace_schema_metadata({**metadata, b"image_classifier.classes": b'["a"]'}), "columns")
    refuse(table.slice(0, 0), "no rows, or missing values")
    same = pyarrow.Table.from_batches([build_part([rows[0]] * 5000, FACTS)], schema)
    refuse(same, "5,000 rows in")  # whose pixels a dictionary has once
    junk = b"PAR1 and so on PAR1"
    with pytest.raises(ValueError):
        parse_captured(rename(junk), junk)


def test_a_place_that_is_none_is_explained(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No such folder"):
        list(read_captures(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="has no captures; name another place"):
        list(read_captures(tmp_path))
    with pytest.raises(DataError, match="^memory://nowhere-at-all has no captures"):
        list(read_captures("memory://nowhere-at-all"))
    with pytest.raises(SettingsError, match="^nope://bucket cannot be reached: Protocol not known: nope"):
        open_place("nope://bucket")


@pytest.mark.parametrize("scheme", ["s3", "nope"])
def test_a_place_with_a_password_is_refused_and_not_repeated(scheme: str) -> None:
    with pytest.raises(SettingsError, match="name or password") as caught:
        open_place(f"{scheme}://me:secret@bucket/folder")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("partly", [False, True])
def test_a_disk_that_fails_at_any_call_leaves_whole_files_alone(tmp_path: Path, partly: bool) -> None:
    first, second = build(draw_rows(5)), build(draw_rows(5, START + timedelta(hours=1)))

    def fail() -> None:
        raise OSError(28, "No space left on device")

    num_calls = 0
    for fault_at in range(1, 100):
        folder = tmp_path / str(fault_at)
        LocalPlace(folder).write(*first)
        disk = FaultyDisk(fail, fault_at, partly=partly)
        try:
            LocalPlace(folder, disk).write(*second)
        except StorageError as error:
            assert "No space left on device; free some space" in str(error)
        captures = read_captures(folder)
        found = [captured.path for captured in captures]
        assert found in ([first[0]], [first[0], second[0]]) and not captures.broken
        if len(disk.calls) < fault_at:
            num_calls = len(disk.calls)
            break
    assert num_calls >= 8 and found == [first[0], second[0]]


def test_facts_may_be_of_any_size_that_networks_take() -> None:
    facts = replace(FACTS, image_size=64)
    rows = [row._replace(pixels=bytes(3 * 64**2)) for row in draw_rows(5)]
    path, content = build(rows, facts)
    assert parse_captured(path, content).pixels.shape == (5, 64, 64, 3)
