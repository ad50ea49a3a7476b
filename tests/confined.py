"""Call a function in a process of its own, within limits of memory and computing time: for files that are bombs."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from image_classifier.errors import ImageClassifierError
from tests.conftest import PROJECT


@dataclass(frozen=True)
class Outcome:
    """What came of a call.

    Attributes:
        error: message of the expected error that it raised; None where it returned.
        memory_mb: memory that it took, at most; or a process that it started, if that took more.
        cpu_s: computing time that it and those processes took.
    """

    error: str | None
    memory_mb: float
    cpu_s: float


def call_confined(function: str, *paths: Path, memory_mb: int = 1024, cpu_s: int = 20) -> Outcome:
    """Call MODULE:FUNCTION with paths; the limit of memory comes on top of what the process has after its imports.

    An error that is not expected, and a limit that is reached, fail the test.
    """
    words = [sys.executable, "-m", "tests.confined", function, str(memory_mb), str(cpu_s), *map(str, paths)]
    result = subprocess.run(words, cwd=PROJECT, capture_output=True, text=True, timeout=250)
    assert result.returncode == 0, f"{function}: exit status {result.returncode}\n{result.stderr[-2000:]}"
    return Outcome(**json.loads(result.stdout))


def limit_memory(num_bytes: int) -> None:
    """Limit the address space of this process to so much more than it has now."""
    present = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (present + num_bytes,) * 2)


def read_peak_kb() -> int:
    """Read how much memory this process had, at most, in KB; `ru_maxrss` begins with that of the parent."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))


def read_dataset(path: Path) -> None:
    """Read the data set at a path whole."""
    from image_classifier.data.metadata import load_metadata
    from image_classifier.data.source import find_source

    content = find_source(path).read(load_metadata(path if path.is_dir() else path.parent))
    for batches in content.parts.values():
        for _ in batches:
            pass


def count_verdicts(folder: Path) -> None:
    """Count the verdicts beside a run, by a key that has signed none of them."""
    from cryptography.hazmat.primitives.asymmetric import ec

    from image_classifier.published.policy import build_policy, check_run
    from tests.published import write_keys

    _, public = write_keys(folder, "key", ec.SECP256R1())
    check_run(folder, {"digest": "0" * 64, "files": {}}, build_policy(1, [public]))


def read_labels(path: Path) -> None:
    """Read labels of captured images."""
    from image_classifier.capture.labels import load_labels

    load_labels(path, ("cat", "dog"))


def check_proof(path: Path) -> None:
    """Check a proof that an image is in a data set."""
    from image_classifier.data.proof import load_proof

    load_proof(path, "0" * 64)


def open_snapshot(folder: Path) -> None:
    """Open a snapshot of which single images are to be read; a file that is missing is there, and empty."""
    from image_classifier.data.partial_snapshot import PartialSnapshot
    from image_classifier.remote.ranges import RangeReader

    for name in ("snapshot.json", "images.npy", "labels.npy", "tree.bin"):
        (folder / name).touch()
    PartialSnapshot(RangeReader(folder))


def decode_as_server(*paths: Path) -> None:
    """Decode image files within the server's limits, four at a time."""
    from concurrent.futures import ThreadPoolExecutor

    from image_classifier.imaging import decode_image, give_memory_back
    from image_classifier.serving.settings import ServerSettings

    give_memory_back()
    limit = ServerSettings(model="m").max_pixels
    contents = [path.read_bytes() for path in paths]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda content: decode_image(content, max_pixels=limit), contents))


def read_config(path: Path) -> None:
    """Read a file with settings of the trainer."""
    from image_classifier.cli.train import build_trainer_parser, load_config

    load_config(build_trainer_parser(), path)


def read_card(folder: Path) -> None:
    """Read what a data set says about its sizes."""
    from image_classifier.data.card import check_sizes

    check_sizes({"train": 1, "test": 1}, [folder])


def unpack_artifact(path: Path) -> None:
    """Unpack the artifact of a workflow."""
    from tests.limits import load_script

    if load_script("unpack_run").main([str(path), str(path.with_name("target"))]) != 0:
        raise ImageClassifierError("it is refused")


def main() -> None:
    """Call a function as the command line says, and print what came of it."""
    function, memory_mb, cpu_s, *paths = sys.argv[1:]
    module, _, name = function.partition(":")
    call = getattr(import_module(module), name)
    limit_memory(int(memory_mb) * 2**20)
    before, peak_kb = resource.getrusage(resource.RUSAGE_SELF), read_peak_kb()
    resource.setrlimit(resource.RLIMIT_CPU, (int(before.ru_utime + before.ru_stime) + int(cpu_s),) * 2)
    error = None
    try:
        returned = call(*map(Path, paths))
        if isinstance(returned, Iterable):
            for _ in returned:
                pass
    except ImageClassifierError as caught:
        error = str(caught)
    after, others = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    memory_kb = max(read_peak_kb() - peak_kb, others.ru_maxrss)
    seconds = sum(usage.ru_utime + usage.ru_stime for usage in (after, others)) - before.ru_utime - before.ru_stime
    print(json.dumps(vars(Outcome(error, memory_kb / 1024, seconds))))


if __name__ == "__main__":
    main()
