"""Reads untrusted files in a separate process with limited memory and computing time.

For formats whose decoder is a library that takes what a file asks for, or that a damaged file may crash: whatever
happens in there, the process that asked goes on. What is read comes over a pipe, in frames of a kind and bytes.
"""

from __future__ import annotations

import os
import resource
import signal
import struct
import subprocess
import sys
from collections.abc import Generator, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO

from image_classifier.errors import ImageClassifierError

MEMORY_BYTES = 2**30
COMPUTING_S = 5

_ENVIRONMENT = ("PATH", "LANG", "LC_ALL", "HOME", "LD_LIBRARY_PATH", "COVERAGE_")
"""Beginnings of the variables that are passed on: no secret is."""
_HEAD = struct.Struct("<cI")
_DATA, _ERROR, _END = b"D", b"E", b"."


class ConfinedError(Exception):
    """Reading was refused, or did not come to its end; the message goes on after the file's name."""


def read_confined(
    module: str, *words: str, content: bytes | None = None, max_frame_bytes: int = 2**26
) -> Generator[bytes]:
    """Run a module of this package that makes a `Confinement`, and iterate over what it sends.

    Args:
        module: its full name.
        words: its arguments.
        content: its standard input, which it reads whole before it sends anything.
        max_frame_bytes: a larger frame is refused.

    Raises:
        ConfinedError: it refused, or was ended at a limit, or crashed.
    """
    environment = {name: value for name, value in os.environ.items() if name.startswith(_ENVIRONMENT)}
    places = [str(Path(__file__).resolve().parents[1]), *filter(None, sys.path)]
    single = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", module, *words],
        stdin=subprocess.DEVNULL if content is None else subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**environment, **single, "PYTHONPATH": os.pathsep.join(places)},
    )
    assert process.stdout is not None
    with process, process.stdout as stream:
        try:
            if process.stdin is not None:
                _write(process.stdin, content or b"")
            yield from _receive(stream, max_frame_bytes)
            process.wait()
        except EOFError:
            raise ConfinedError(_explain(process.wait())) from None
        finally:
            process.kill()  # unless it has ended, nobody wants the rest


def _write(stream: IO[bytes], content: bytes) -> None:
    with suppress(BrokenPipeError), stream:  # a process that has ended says why, or how
        stream.write(content)


def _receive(stream: IO[bytes], max_frame_bytes: int) -> Iterator[bytes]:
    while True:
        head = stream.read(_HEAD.size)
        if len(head) < _HEAD.size:
            raise EOFError
        kind, size = _HEAD.unpack(head)
        if kind == _END:
            return
        if size > max_frame_bytes:
            raise ConfinedError(f"holds a value of more than the {max_frame_bytes:,} bytes allowed")
        content = stream.read(size)
        if len(content) < size:
            raise EOFError
        if kind == _ERROR:
            raise ConfinedError(content.decode("utf-8", "replace"))
        yield content


def _explain(status: int) -> str:
    if status == -signal.SIGXCPU:
        return "takes more computing time to read than any does; get it again"
    end = signal.Signals(-status).name if status < 0 else f"exit status {status}"
    return f"ended the process that read it with {end}; get it again"


class Confinement:
    """The inside of the process: what is sent, and the limits, which hold from when this is made.

    Each frame that is sent is a sign of progress. Used as a context, it sends the error that ends the block, too.

    Args:
        memory_bytes: memory on top of what the process has now.
        computing_s: computing time between two signs of progress.
    """

    def __init__(self, memory_bytes: int = MEMORY_BYTES, computing_s: int = COMPUTING_S) -> None:
        self._stream = sys.stdout.buffer
        self._memory_bytes = memory_bytes
        self._computing_s = computing_s
        if (statm := Path("/proc/self/statm")).exists():  # without it nobody says how much memory there is now
            present = int(statm.read_text(encoding="ascii").split()[0]) * resource.getpagesize()
            _limit(resource.RLIMIT_AS, present + memory_bytes)
        _limit(resource.RLIMIT_CORE, 0)
        self._allow_time()

    def __enter__(self) -> Confinement:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        _limit(resource.RLIMIT_AS, resource.RLIM_INFINITY)  # to say that there was too little takes some
        if error is None:
            self._send(_END, b"")
        elif isinstance(error, MemoryError):
            self._send(_ERROR, b"takes more than %d MB of memory to read; get it again" % (self._memory_bytes // 2**20))
        else:
            reason = " ".join(str(error).split()) or type(error).__name__
            reason = reason if isinstance(error, ImageClassifierError) else f"is damaged: {reason}; get it again"
            self._send(_ERROR, reason[:2000].encode("utf-8", "replace"))
        self._stream.flush()
        return True

    def send(self, content: bytes) -> None:
        """Send a frame."""
        self._send(_DATA, content)
        self._allow_time()

    def _send(self, kind: bytes, content: bytes) -> None:
        self._stream.write(_HEAD.pack(kind, len(content)))
        self._stream.write(content)

    def _allow_time(self) -> None:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        _limit(resource.RLIMIT_CPU, int(usage.ru_utime + usage.ru_stime) + self._computing_s)


def _limit(kind: int, value: int) -> None:
    _, hard = resource.getrlimit(kind)
    is_free = hard == resource.RLIM_INFINITY
    resource.setrlimit(
        kind, (value if is_free else hard if value == resource.RLIM_INFINITY else min(value, hard), hard)
    )
