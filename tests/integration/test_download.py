"""The download against a real server that breaks off, lies, dawdles, refuses, or is not there."""

from __future__ import annotations

import fcntl
import hashlib
import http.server
import os
import re
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from image_classifier.data import download
from image_classifier.data.download import ARCHIVES, Archive, UnreachableError, fetch_archive
from image_classifier.errors import DownloadError, SettingsError, StorageError
from tests.conftest import PROJECT, find_port

CONTENT = bytes(range(256)) * 4000
MD5 = hashlib.md5(CONTENT).hexdigest()


@dataclass
class Behaviour:
    """What the server does, request by request; the last of a list goes for all that follow.

    Attributes:
        content: what it has.
        break_after: bytes after which it ends the connection.
        stall_after: bytes after which it sends no more and keeps the connection.
        statuses: what it answers with instead, 0 for what is right.
        ranges: whether it can continue in the middle.
        shift: by how many bytes it continues at the wrong place.
        lengths: whether it says how long the content is.
        requests: the Range header of each request so far.
    """

    content: bytes = CONTENT
    break_after: list[int | None] = field(default_factory=lambda: [None])
    stall_after: list[int | None] = field(default_factory=lambda: [None])
    statuses: list[int] = field(default_factory=lambda: [0])
    ranges: bool = True
    shift: int = 0
    lengths: bool = True
    requests: list[str | None] = field(default_factory=list)


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers as its server's behaviour says."""

    server: Server

    def do_GET(self) -> None:
        behaviour = self.server.behaviour
        number = len(behaviour.requests)
        wanted = self.headers.get("Range")
        behaviour.requests.append(wanted)
        status = behaviour.statuses[min(number, len(behaviour.statuses) - 1)]
        if status:
            return self.send_error(status)
        size = len(behaviour.content)
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and behaviour.ranges else 0
        if start >= size:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{size}")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start + behaviour.shift}-{size - 1}/{size}")
        if behaviour.lengths:
            self.send_header("Content-Length", str(size - start))
        self.end_headers()
        stall = behaviour.stall_after[min(number, len(behaviour.stall_after) - 1)]
        end = behaviour.break_after[min(number, len(behaviour.break_after) - 1)]
        self.wfile.write(behaviour.content[start : stall if end is None else end])
        if stall is not None:
            self.server.over.wait(10)

    def log_message(self, format: str, *words: object) -> None:
        pass


class Server(http.server.ThreadingHTTPServer):
    """A server on a port of the loopback interface."""

    def __init__(self, behaviour: Behaviour) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.behaviour = behaviour
        self.over = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/archive.tar.gz"


@pytest.fixture
def server() -> Iterator[Server]:
    """A server that does everything right until its behaviour is changed."""
    with Server(Behaviour()) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.over.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "archive.tar.gz"


def fetch(server: Server, target: Path, digest: str = MD5, num_tries: int = 3, timeout_s: float = 5) -> None:
    archive = Archive(server.url, target.name, digest)
    assert fetch_archive(archive, target.parent, num_tries=num_tries, timeout_s=timeout_s, backoff_s=0.01) == target


def list_names(target: Path) -> list[str]:
    return sorted(path.name for path in target.parent.iterdir())


@pytest.mark.parametrize("digest", [MD5, MD5.upper(), hashlib.sha256(CONTENT).hexdigest()])
def test_a_file_is_fetched_whole(server: Server, target: Path, digest: str) -> None:
    fetch(server, target, digest)
    assert target.read_bytes() == CONTENT
    assert list_names(target) == [target.name] and server.behaviour.requests == [None]


def test_a_server_that_breaks_off_is_continued(server: Server, target: Path) -> None:
    server.behaviour.break_after = [100_000, 700_000, None]
    fetch(server, target)
    assert target.read_bytes() == CONTENT
    assert server.behaviour.requests == [None, "bytes=100000-", "bytes=700000-"]


def test_a_server_that_always_breaks_off_is_given_up_and_continued_by_the_next_call(
    server: Server, target: Path
) -> None:
    server.behaviour.break_after = [100_000, 200_000, 300_000, None]
    with pytest.raises(
        DownloadError, match="failed 3 times, last with: the connection ended after 300,000 of 1,024,000"
    ) as caught:
        fetch(server, target)
    assert "start again to continue after 300,000 bytes" in str(caught.value)
    assert not isinstance(caught.value, UnreachableError)
    assert list_names(target) == ["archive.tar.gz.part"]
    fetch(server, target)
    assert server.behaviour.requests[-1] == "bytes=300000-"
    assert target.read_bytes() == CONTENT and list_names(target) == [target.name]


def test_a_server_that_cannot_continue_sends_all_again(server: Server, target: Path) -> None:
    server.behaviour.ranges = False
    server.behaviour.break_after = [100_000, 50_000, None]
    fetch(server, target)
    assert target.read_bytes() == CONTENT
    assert server.behaviour.requests == [None, "bytes=100000-", "bytes=50000-"]


def test_a_server_that_continues_at_the_wrong_place_sends_all_again(server: Server, target: Path) -> None:
    server.behaviour.break_after = [100_000, None]
    server.behaviour.shift = 1
    fetch(server, target)
    assert target.read_bytes() == CONTENT
    assert server.behaviour.requests == [None, "bytes=100000-", None]


def test_a_server_that_does_not_say_the_length_is_believed_the_digest(server: Server, target: Path) -> None:
    server.behaviour.lengths = False
    fetch(server, target)
    assert target.read_bytes() == CONTENT
    server.behaviour.break_after = [1000]
    with pytest.raises(DownloadError, match="sent a file with the md5"):
        fetch(server, target.with_name("other"))


@pytest.mark.parametrize("algorithm", ["md5", "sha256"])
def test_another_file_is_removed_and_both_digests_are_named(server: Server, target: Path, algorithm: str) -> None:
    server.behaviour.content = CONTENT[::-1]
    digest = hashlib.new(algorithm, CONTENT).hexdigest()
    got = hashlib.new(algorithm, CONTENT[::-1]).hexdigest()
    with pytest.raises(
        DownloadError, match=f"sent a file with the {algorithm} {got} instead of {digest}: it was removed"
    ):
        fetch(server, target, digest)
    assert list_names(target) == [] and len(server.behaviour.requests) == 1


def test_a_part_of_another_file_is_found_out(server: Server, target: Path) -> None:
    target.with_name("archive.tar.gz.part").write_bytes(b"x" * 1000)
    with pytest.raises(DownloadError, match="it was removed; try again"):
        fetch(server, target)
    fetch(server, target)
    assert target.read_bytes() == CONTENT


@pytest.mark.parametrize("num_bytes", [len(CONTENT), len(CONTENT) + 5])
def test_a_part_that_is_complete_or_too_long_is_no_trouble(server: Server, target: Path, num_bytes: int) -> None:
    target.with_name("archive.tar.gz.part").write_bytes((CONTENT + b"12345")[:num_bytes])
    fetch(server, target)
    assert target.read_bytes() == CONTENT and list_names(target) == [target.name]


@pytest.mark.alone
def test_a_slow_server_times_out_and_is_continued(server: Server, target: Path) -> None:
    server.behaviour.stall_after = [50_000, None]
    start = time.monotonic()
    fetch(server, target, timeout_s=0.3)
    assert 0.3 <= time.monotonic() - start < 5
    assert target.read_bytes() == CONTENT
    assert server.behaviour.requests == [None, "bytes=50000-"]


def test_a_server_that_is_always_slow_is_given_up(server: Server, target: Path) -> None:
    server.behaviour.stall_after = [50_000]
    with pytest.raises(
        DownloadError, match="failed 2 times, last with: timed out; start again to continue after 50,000"
    ):
        fetch(server, target, timeout_s=0.2, num_tries=2)


@pytest.mark.parametrize("status", [400, 403, 404, 410])
def test_a_refusal_is_final(server: Server, target: Path, status: int) -> None:
    server.behaviour.statuses = [status]
    with pytest.raises(
        DownloadError, match=f"answers with HTTP status {status} .*give another address with --url"
    ) as caught:
        fetch(server, target)
    assert len(server.behaviour.requests) == 1 and not isinstance(caught.value, UnreachableError)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_server_in_trouble_is_tried_again(server: Server, target: Path, status: int) -> None:
    server.behaviour.statuses = [status, status, 0]
    fetch(server, target)
    assert target.read_bytes() == CONTENT
    server.behaviour.statuses = [status]
    with pytest.raises(DownloadError, match=f"failed 3 times, last with: HTTP status {status}") as caught:
        fetch(server, target.with_name("other"))
    assert not isinstance(caught.value, UnreachableError)


def test_no_server_is_unreachable(target: Path) -> None:
    url = f"http://127.0.0.1:{find_port()}/archive.tar.gz"
    with pytest.raises(
        UnreachableError, match=f"^{re.escape(url)} cannot be reached .Connection refused.; check the network"
    ):
        fetch_archive(Archive(url, target.name, MD5), target.parent, backoff_s=0.01)
    assert list_names(target) == []


def test_a_name_that_is_not_known_is_unreachable(target: Path) -> None:
    with pytest.raises(UnreachableError, match="cannot be reached"):
        fetch_archive(Archive("https://none.invalid/a", target.name, MD5), target.parent, backoff_s=0.01)


def test_a_server_that_never_answers_is_unreachable(target: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/archive.tar.gz"
        with pytest.raises(UnreachableError, match="cannot be reached .timed out."):
            fetch_archive(Archive(url, target.name, MD5), target.parent, timeout_s=0.1, num_tries=2, backoff_s=0.01)


def test_a_server_without_a_trusted_certificate_is_not_read(server: Server, target: Path) -> None:
    with pytest.raises(UnreachableError):
        fetch_archive(Archive(server.url.replace("http:", "https:"), target.name, MD5), target.parent, num_tries=1)
    assert list_names(target) == []


@pytest.mark.parametrize("url", ["ftp://example.org/a", "file:///etc/passwd", "archive.tar.gz", ""])
def test_other_addresses_are_refused(url: str) -> None:
    with pytest.raises(SettingsError, match="--url takes a URL that begins with https:// or http://, got: "):
        Archive(url, "a", MD5)


@pytest.mark.parametrize("digest", ["", "abc", "g" * 32, "0" * 40])
def test_other_digests_are_refused(digest: str) -> None:
    with pytest.raises(SettingsError, match="--digest takes 32 .md5. or 64 .sha256. hexadecimal digits"):
        Archive("https://example.org/a", "a", digest)


def test_folders_are_made_and_go_with_a_failure(server: Server, tmp_path: Path) -> None:
    target = tmp_path / "a" / "b" / "archive.tar.gz"
    server.behaviour.statuses = [404, 0]
    with pytest.raises(DownloadError):
        fetch(server, target)
    assert list(tmp_path.iterdir()) == []
    fetch(server, target)
    assert target.read_bytes() == CONTENT


def test_two_at_once_do_not_mix(server: Server, target: Path) -> None:
    server.behaviour.stall_after = [50_000, None]
    first = threading.Thread(target=fetch, args=(server, target), kwargs={"timeout_s": 3})
    first.start()
    while not server.behaviour.requests:
        time.sleep(0.01)
    with pytest.raises(DownloadError, match="another process is downloading to .*part; wait for it"):
        fetch(server, target)
    first.join()
    assert target.read_bytes() == CONTENT


def test_who_comes_second_leaves_the_beginning_of_the_first_one(server: Server, target: Path) -> None:
    part = target.with_name(f"{target.name}.part")
    with open(part, "ab") as file:  # opened by the first one, and empty so far
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(DownloadError, match="another process is downloading to"):
            fetch(server, target)
        assert part.exists() and os.path.samestat(part.stat(), os.fstat(file.fileno()))


def test_who_opened_the_part_of_one_that_has_ended_takes_its_file(
    server: Server, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that cannot continue would have it cut off, and the finished file with it."""
    server.behaviour.ranges = False

    def finish(descriptor: int, part: Path, *words: Any) -> None:
        part.write_bytes(CONTENT)
        part.rename(target)

    monkeypatch.setattr(download, "lock", finish)
    fetch(server, target)
    assert target.read_bytes() == CONTENT and server.behaviour.requests == []


def test_a_full_disk_leaves_nothing(server: Server, target: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))
    try:
        with pytest.raises(StorageError, match="cannot write .*File too large"):
            fetch(server, target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list_names(target) == []


def test_a_command_shows_a_download_and_the_library_is_silent(server: Server, target: Path) -> None:
    script = (
        "import sys; from contextlib import nullcontext; from pathlib import Path\n"
        "from image_classifier import progress\n"
        "from image_classifier.data.download import Archive, fetch_archive\n"
        "progress.INTERVAL_S = 0.0001\n"
        "with progress.shown('prepare') if sys.argv[5] == 'shown' else nullcontext():\n"
        "    fetch_archive(Archive(*sys.argv[1:4]), Path(sys.argv[4]))"
    )
    command = [sys.executable, "-W", "error", "-c", script, server.url, target.name, MD5, str(target.parent)]
    for mode in ("shown", "silent"):
        target.unlink(missing_ok=True)
        result = subprocess.run([*command, mode], cwd=PROJECT, capture_output=True, check=True, text=True, timeout=60)
        assert ("downloading: " in result.stderr) == (mode == "shown")
        assert result.stderr == "" or mode == "shown"


@pytest.mark.parametrize("name, attribute", [("cifar10", "CIFAR10"), ("cifar100", "CIFAR100")])
def test_addresses_and_digests_are_torchvision_s(name: str, attribute: str) -> None:
    import torchvision

    published = getattr(torchvision.datasets, attribute)
    archive = ARCHIVES[name]
    assert (archive.url, archive.name, archive.digest) == (published.url, published.filename, published.tgz_md5)
