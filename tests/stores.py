"""A real S3 server in a process of its own, and a proxy before it that breaks connections, is slow, and lies."""

from __future__ import annotations

import os
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import fsspec

from image_classifier.remote.store import Patience
from tests.conftest import find_port

FAST = Patience(num_tries=3, backoff_s=0.001, timeout_s=10)
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "a-key",
    "AWS_SECRET_ACCESS_KEY": "a-secret",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",  # else its address would be asked for credentials
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
}
Fault = Callable[[socket.socket, bytes, bytes], None]
"""Answers a client instead of the proxy, with what the server's head and body were."""


def cut(after: int) -> Fault:
    """Reset the connection after so many bytes of the body."""

    def answer(client: socket.socket, head: bytes, body: bytes) -> None:
        client.sendall(head + body[:after])
        time.sleep(0.002)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    return answer


def lie(change: Callable[[bytes], bytes]) -> Fault:
    """Send another body, and say that it is as long as it is, and nothing of the checksum that botocore looks at."""

    def answer(client: socket.socket, head: bytes, body: bytes) -> None:
        changed = change(body)
        head = re.sub(rb"(?i)\r\nx-amz-checksum-[^\r]*", b"", head)
        client.sendall(re.sub(rb"(?i)(content-length: )\d+", rb"\g<1>%d" % len(changed), head) + changed)

    return answer


def stall(seconds: float) -> Fault:
    """Send half of the body, and no more for a while."""

    def answer(client: socket.socket, head: bytes, body: bytes) -> None:
        client.sendall(head + body[: len(body) // 2])
        time.sleep(seconds)

    return answer


@dataclass
class Proxy:
    """A proxy of one request a connection.

    Attributes:
        choose: gives the fault for a request for an object, by its line; None for none.
        choose_upload: the same for one that puts an object, which does not get through then.
        faults: lines of the requests that met one.
        objects: name and Range of each request for an object.
        uploads: lines of the requests that put one.
    """

    upstream: int
    port: int = 0
    choose: Callable[[str], Fault | None] = lambda line: None
    choose_upload: Callable[[str], Fault | None] = lambda line: None
    faults: list[str] = field(default_factory=list)
    objects: list[tuple[str, str]] = field(default_factory=list)
    uploads: list[str] = field(default_factory=list)

    def reset(self) -> None:
        """Answer as the server does from now on, and forget what was."""
        self.choose = self.choose_upload = lambda line: None
        self.faults, self.objects, self.uploads = [], [], []

    @contextmanager
    def running(self) -> Iterator[Proxy]:
        """Listen, in a thread for each connection."""
        with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
            self.port = listener.getsockname()[1]
            thread = threading.Thread(target=self._listen, args=(listener,))
            thread.start()
            try:
                yield self
            finally:
                listener.shutdown(socket.SHUT_RDWR)
                thread.join()

    def _listen(self, listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                client, _ = listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, suppress(OSError):
            client.settimeout(30)
            head, body = _read_message(client)
            if not head:
                return
            line = head.split(b"\r\n", 1)[0].decode()
            if line.startswith("PUT "):
                self.uploads.append(line)
                if (fault := self.choose_upload(line)) is not None:
                    return fault(client, b"", b"")
            with socket.create_connection(("127.0.0.1", self.upstream), timeout=30) as server:
                is_object = line.startswith("GET ") and "list-type" not in line and line.count("/") > 2
                if is_object:
                    ranges = re.search(rb"(?i)\r\nrange: ([^\r]*)", head)
                    self.objects.append((unquote(line.split()[1]), ranges[1].decode() if ranges else ""))
                    fault = self.choose(line)
                server.sendall(
                    re.sub(rb"(?i)\r\nconnection: [^\r]*", b"", head)[:-2] + b"Connection: close\r\n\r\n" + body
                )
                is_head = line.startswith("HEAD ")
                head, body = _read_message(server, is_answer=True, has_body=not is_head)
            if is_object and fault is not None and b" 20" in head[:12]:
                self.faults.append(line)
                fault(client, head, body)
            else:
                client.sendall(head + body)


def _read_message(connection: socket.socket, *, is_answer: bool = False, has_body: bool = True) -> tuple[bytes, bytes]:
    """Read the head of a message, with its empty line, and the body."""
    content = b""
    while b"\r\n\r\n" not in content:
        if not (piece := connection.recv(2**16)):
            return b"", b""
        content += piece
    head, _, body = content.partition(b"\r\n\r\n")
    if not is_answer and b"100-continue" in head.lower():
        connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
    length = re.search(rb"(?i)\r\ncontent-length: (\d+)", head)
    wanted = int(length[1]) if length and has_body else 0
    is_open = is_answer and has_body and not length
    while (len(body) < wanted or is_open) and (piece := connection.recv(2**16)):
        body += piece
    return head + b"\r\n\r\n", body


@dataclass
class Bucket:
    """A bucket of a real S3 server.

    Attributes:
        url: s3://NAME.
        proxy: through which the package reaches it.
        fs: which reaches it past the proxy.
    """

    url: str
    proxy: Proxy
    fs: Any

    def upload(self, name: str, files: dict[str, bytes]) -> str:
        """Put files below a name, or one by the name itself; return their URL."""
        for file, content in files.items():
            self.fs.pipe_file(f"{self.url}/{name}/{file}" if file else f"{self.url}/{name}", content)
        return f"{self.url}/{name}"

    def upload_folder(self, name: str, folder: Path) -> str:
        """Put the files of a folder, but for its snapshots, below a name; return their URL."""
        paths = [path for path in folder.rglob("*") if path.is_file() and ".snapshots" not in path.parts]
        return self.upload(name, {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths})

    def read(self, name: str = "") -> dict[str, bytes]:
        """Read all that is below a name."""
        top = f"{self.url}/{name}".removeprefix("s3://").rstrip("/")
        self.fs.invalidate_cache()
        return {path.removeprefix(f"{top}/"): self.fs.cat_file(path) for path in self.fs.find(top)}

    def sign(self, name: str) -> str:
        """Give the signed address at which the proxy's clients get an object."""
        address: str = self.fs.sign(f"{self.url}/{name}")
        return address.replace(f":{self.proxy.upstream}/", f":{self.proxy.port}/")


@dataclass
class S3:
    """A real S3 server in a process of its own, and the proxy before it.

    Attributes:
        environment: variables by which the package reaches it, through the proxy.
    """

    proxy: Proxy
    fs: Any
    num_buckets: int = 0

    @property
    def environment(self) -> dict[str, str]:
        return {**CREDENTIALS, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.proxy.port}"}

    def make_bucket(self) -> Bucket:
        """Make a bucket, and let the proxy forget what was."""
        self.proxy.reset()
        self.num_buckets += 1
        self.fs.mkdir(f"bucket-{self.num_buckets}")
        return Bucket(f"s3://bucket-{self.num_buckets}", self.proxy, self.fs)


@contextmanager
def running_s3(log: Path) -> Iterator[S3]:
    """Run moto's server, with a proxy before it."""
    port = find_port()
    words = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with open(log, "wb") as file:
        process = subprocess.Popen(words, stdout=file, stderr=file, env=os.environ | CREDENTIALS)
    try:
        for _ in range(600):
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            assert process.poll() is None, log.read_text()
            time.sleep(0.05)
        login = {"key": CREDENTIALS["AWS_ACCESS_KEY_ID"], "secret": CREDENTIALS["AWS_SECRET_ACCESS_KEY"]}
        url = f"http://127.0.0.1:{port}"
        fs = fsspec.filesystem("s3", skip_instance_cache=True, endpoint_url=url, **login)
        with Proxy(port).running() as proxy:
            yield S3(proxy, fs)
    finally:
        process.kill()
        process.wait(30)
