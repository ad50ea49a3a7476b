"""Call a reader on many changed files, each within limits, in processes that may crash.

A file is good if its reader returns, or raises an expected error of one line. All else is a finding: another exception,
a crash, more computing time or memory than a reader may take. A file follows from the reader's name and two numbers.

Calls are made in forks of this process, so that what they import is there before; `forking` lets the readers that start
a process of their own for each file fork it, too, which takes milliseconds instead of a second.
"""

from __future__ import annotations

import io
import json
import os
import random
import resource
import select
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from image_classifier import confinement
from image_classifier.data import parquet
from image_classifier.errors import ImageClassifierError
from image_classifier.published import predictor
from image_classifier.serving.problems import Problem
from tests.mutate import Mutator

MEMORY_MB = 1024
CPU_S = 5
_STUCK_S = 120


@dataclass(frozen=True)
class Reader:
    """A reader of the package, and what to call it on.

    Attributes:
        seeds: valid files by name.
        mutate: changes one of them.
        read: reads a changed file, given its seed's name and a folder that `prepare` has filled.
        prepare: fills a folder once with what the file lies beside.
        share: how many files it gets for one of another reader; less where a file takes long.
    """

    name: str
    seeds: Mapping[str, bytes]
    mutate: Mutator
    read: Callable[[str, bytes, Path], object]
    prepare: Callable[[Path], object] = lambda folder: None
    share: float = 1.0


@dataclass(frozen=True)
class Outcome:
    """What came of one file.

    Attributes:
        kind: `read`, `refused`, or of a finding `exception`, `message`, `crash`, `stuck`, `time` or `memory`.
        detail: the message, or the trace.
        cpu_s: computing time, of the process that called or of those that it started, if that took longer.
        memory_mb: memory on top of what the process had before; not of one that was started, which has its own limit.
    """

    number: int
    seed: str
    kind: str
    detail: str = ""
    cpu_s: float = 0.0
    memory_mb: float = 0.0

    @property
    def is_good(self) -> bool:
        """Whether it is no finding."""
        return self.kind in ("read", "refused")


@dataclass
class _Children:
    """What the forked processes of one call took, at most."""

    cpu_s: float = 0.0
    memory_mb: float = 0.0


_children = _Children()


def build_file(reader: Reader, chance_seed: int, number: int) -> tuple[str, bytes]:
    """Build the changed file of a number; return the name of the seed that it was made of, and its content."""
    chance = random.Random(f"{reader.name} {chance_seed} {number}")
    name = chance.choice(list(reader.seeds))
    return name, reader.mutate(chance, reader.seeds[name])


def call_often(reader: Reader, chance_seed: int, numbers: Sequence[int], folder: Path) -> Iterator[Outcome]:
    """Call a reader on the files of these numbers, in a fork that is made anew after each crash.

    Args:
        folder: exists, and is written to.
    """
    position = 0
    while position < len(numbers):
        receiving, sending = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(receiving)
            _end_with(partial(_report, reader, chance_seed, numbers[position:], folder, sending))
        os.close(sending)
        is_stuck = False
        with open(receiving, "rb", buffering=0) as stream:
            for line in _read_lines(stream):
                if line is None:
                    os.kill(child, signal.SIGKILL)
                    is_stuck = True
                    break
                yield Outcome(**json.loads(line))
                position += 1
        _, status = os.waitpid(child, 0)
        if position < len(numbers):
            name, _ = build_file(reader, chance_seed, numbers[position])
            ended = os.waitstatus_to_exitcode(status)
            kind = "stuck" if is_stuck else "time" if ended == -signal.SIGXCPU else "crash"
            yield Outcome(numbers[position], name, kind, f"the process ended with {ended}")
            position += 1


def _end_with(function: Callable[[], None]) -> None:
    status = 1
    try:
        function()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def _read_lines(stream: io.FileIO) -> Iterator[bytes | None]:
    """Read lines until the end; None where nothing comes for long."""
    rest = b""
    while True:
        if not select.select([stream], [], [], _STUCK_S)[0]:
            yield None
            return
        part = stream.read(2**16)
        if not part:
            return
        *lines, rest = (rest + part).split(b"\n")
        yield from lines


def _report(reader: Reader, chance_seed: int, numbers: Sequence[int], folder: Path, sending: int) -> None:
    warnings.simplefilter("error", append=True)  # a warning would be another line for the user
    place = Path(tempfile.mkdtemp(dir=folder))
    reader.prepare(place)
    present = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    for kind, value in ((resource.RLIMIT_AS, present + MEMORY_MB * 2**20), (resource.RLIMIT_CORE, 0)):
        resource.setrlimit(kind, (value, resource.getrlimit(kind)[1]))
    for number in numbers:
        outcome = call_once(reader, number, *build_file(reader, chance_seed, number), place)
        os.write(sending, json.dumps(asdict(outcome)).encode() + b"\n")


def call_once(reader: Reader, number: int, name: str, content: bytes, folder: Path) -> Outcome:
    """Call a reader on one file, in this process."""
    began = time.process_time()
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (int(began) + CPU_S + 3, hard))
    memory_before = _read_status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak of its memory is that from now on
    _children.cpu_s = _children.memory_mb = 0.0
    others = resource.getrusage(resource.RUSAGE_CHILDREN)
    kind, detail = "read", ""
    try:
        reader.read(name, content, folder)
    except (ImageClassifierError, Problem) as error:
        detail = error.detail if isinstance(error, Problem) else str(error)
        kind = "refused" if detail.strip() and len(f"{detail}.".splitlines()) == 1 else "message"
        if _is_lack_of_memory(error):
            kind = "memory"
    except MemoryError:
        kind, detail = "memory", traceback.format_exc(limit=-8)
    except Exception:
        kind, detail = "exception", traceback.format_exc(limit=-8)
    if not _children.cpu_s:  # those that were started and not forked
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        _children.cpu_s = after.ru_utime + after.ru_stime - others.ru_utime - others.ru_stime
    resource.setrlimit(resource.RLIMIT_CPU, (hard, hard))  # what makes the next file may take as long as it likes
    cpu_s = max(time.process_time() - began, _children.cpu_s)
    memory_mb = max((_read_status("VmHWM") - memory_before) / 1024, _children.memory_mb)
    if kind in ("read", "refused"):
        kind = "time" if cpu_s > CPU_S + 1 else "memory" if memory_mb > MEMORY_MB * 1.1 else kind
    return Outcome(number, name, kind, detail[:3000], round(cpu_s, 4), round(memory_mb, 1))


def _is_lack_of_memory(error: BaseException | None) -> bool:
    """Say whether an error came of one that says that there was not enough memory, in this process."""
    while error is not None:
        if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _read_status(name: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(name):
            return int(line.split()[1])
    raise ValueError(name)


@contextmanager
def forking() -> Iterator[None]:
    """Let readers that start a process for each file fork it; its limits stay."""
    modules: tuple[Any, ...] = (parquet, predictor)
    for module in modules:
        module.read_confined = _read_forked
    try:
        yield
    finally:
        for module in modules:
            module.read_confined = confinement.read_confined


def _read_forked(
    module: str, *words: str, content: bytes | None = None, max_frame_bytes: int = 2**26
) -> Generator[bytes]:
    """Do what `confinement.read_confined` does, in a fork."""
    receiving, sending = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(sending, 1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        os.closerange(3, 256)
        sys.stdout = os.fdopen(1, "w", closefd=False)
        sys.stdin = io.TextIOWrapper(io.BytesIO(content or b""))
        _end_with(lambda: import_module(module).main(*([words] if words else [])))
    os.close(sending)
    before = _read_status("VmRSS")
    with open(receiving, "rb") as stream:
        try:
            yield from confinement._receive(stream, max_frame_bytes)
            _wait(child, before)
        except EOFError:
            raise confinement.ConfinedError(confinement._explain(_wait(child, before))) from None
        except GeneratorExit:
            os.kill(child, signal.SIGKILL)
            _wait(child, before)
            raise
        except confinement.ConfinedError:
            _wait(child, before)
            raise


def _wait(child: int, kb_before: int) -> int:
    _, status, usage = os.wait4(child, 0)
    _children.cpu_s = max(_children.cpu_s, usage.ru_utime + usage.ru_stime)
    _children.memory_mb = max(_children.memory_mb, (usage.ru_maxrss - kb_before) / 1024)
    return os.waitstatus_to_exitcode(status)
