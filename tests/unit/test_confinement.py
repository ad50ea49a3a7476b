"""A reader in a process of its own: whatever it does, who waits for it gets its frames and one reason."""

from __future__ import annotations

import json
import os
import time

import pytest

from image_classifier.confinement import ConfinedError, read_confined


def read(deed: str) -> list[bytes]:
    return list(read_confined("tests.misbehaving", deed, max_frame_bytes=100))


def test_frames_come_as_they_were_sent() -> None:
    assert read("nothing") == [b"first"]


@pytest.mark.parametrize(
    "deed, reason",
    [
        ("refuse", "is refused"),
        ("raise", "is damaged: of no use to anybody; get it again"),
        ("memory", "takes more than 1024 MB of memory to read; get it again"),
        ("pieces of memory", "takes more than 1024 MB of memory to read; get it again"),
        ("crash", "ended the process that read it with SIGSEGV; get it again"),
        ("leave", "ended the process that read it with exit status 3; get it again"),
        ("torn frame", "ended the process that read it with exit status 0; get it again"),
        ("large frame", "holds a value of more than the 100 bytes allowed"),
    ],
)
def test_what_goes_wrong_is_one_reason(deed: str, reason: str) -> None:
    frames = read_confined("tests.misbehaving", deed, max_frame_bytes=100)
    assert next(frames) == b"first"
    with pytest.raises(ConfinedError) as caught:
        next(frames)
    assert str(caught.value) == reason


def test_the_time_that_a_reader_may_take_begins_anew_with_each_frame() -> None:
    assert read("progress") == [b"first", *[b"more"] * 4]
    with pytest.raises(ConfinedError, match="^takes more computing time to read than any does; get it again$"):
        read("computing")


def test_a_reader_that_nobody_waits_for_is_ended() -> None:
    frames = read_confined("tests.misbehaving", "wait")
    assert next(frames) == b"first"
    pid = int(next(frames))
    os.kill(pid, 0)
    frames.close()
    deadline = time.monotonic() + 10
    while os.path.exists(f"/proc/{pid}") and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not os.path.exists(f"/proc/{pid}")


def test_a_reader_gets_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DB_PASSWORD", "secret")
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "secret")
    _, environment = read_confined("tests.misbehaving", "environment")
    assert "secret" not in json.loads(environment).values()
