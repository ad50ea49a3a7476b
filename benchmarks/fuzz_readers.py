"""Call every reader on files that were changed at random, and count what it did with them.

    python -m benchmarks.fuzz_readers [--files 200000] [--real 300] [--jobs 2]
    python -m benchmarks.fuzz_readers --repeat READER NUMBER

A file is good if its reader returns, or raises an expected error of one line, with no more than 5 s of computing time
and 1 GB of memory (tests/fuzz.py). Every other is written to a folder with what came of it; its number makes it again.
Readers that start a process for each file fork it here, but for `--real` files.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.measure import save_result
from tests.fuzz import Outcome, Reader, build_file, call_often, forking

_CHUNK = 250
_CONFINED = ("Parquet", "ONNX")
_LIBRARIES = ("numpy", "onnxruntime", "pillow", "pyarrow", "PyYAML", "model-signing")

_readers: dict[str, Reader] = {}


def main() -> int:
    """Call the readers, write the result, and return 1 if there was a finding."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--files", type=int, default=200_000, help="of all readers together, at least")
    parser.add_argument("--real", type=int, default=300, help="more, which are read in processes as users start them")
    parser.add_argument("--seed", type=int, default=0, help="other files")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--findings", type=Path, default=Path("findings"), help="folder that is made for findings")
    parser.add_argument(
        "--output", type=Path, help="JSON file to write instead of benchmarks/results/fuzz_readers.json"
    )
    parser.add_argument("--readers", default="tests.readers:build_readers", help="MODULE:FUNCTION that builds them")
    parser.add_argument("--repeat", nargs=2, metavar=("READER", "NUMBER"), help="call one reader on one file, and say")
    options = parser.parse_args()
    prepare_process()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
        folder = Path(scratch)
        module, _, function = options.readers.partition(":")
        _readers.update({reader.name: reader for reader in getattr(import_module(module), function)(folder)})
        if options.repeat:
            with forking():
                (outcome,) = call_often(_readers[options.repeat[0]], options.seed, [int(options.repeat[1])], folder)
            print(json.dumps(asdict(outcome), indent=2))
            return 0 if outcome.is_good else 1
        started = time.perf_counter()
        chunks = list(plan(options.files))
        confined = [name for name in _CONFINED if name in _readers]
        real = [(name, range(options.real // len(confined))) for name in confined if options.real]
        outcomes = {
            "forked": run(chunks, options.seed, folder, options.jobs, is_real=False),
            "real": run(real, options.seed, folder, options.jobs, is_real=True),
        }
    findings = [write_finding(options.findings, options.seed, *found) for found in find_bad(outcomes)]
    result = {
        "seed": options.seed,
        "num_files": sum(map(len, outcomes["forked"].values())),
        "num_real": sum(map(len, outcomes["real"].values())),
        "seconds": round(time.perf_counter() - started, 1),
        "versions": {name: version(name) for name in _LIBRARIES},
        "readers": {name: summarize(done) for name, done in outcomes["forked"].items()},
        "in_processes_of_their_own": {name: summarize(done) for name, done in outcomes["real"].items()},
        "findings": findings,
    }
    if options.output is None:
        save_result("fuzz_readers", result)
    else:
        options.output.write_text(json.dumps(result, indent=2) + "\n")
    print(f"{result['num_files']:,} files, {len(findings)} findings, {result['seconds']} s")
    return 1 if findings else 0


def prepare_process() -> None:
    """Import what forks are to have, in a process that has one thread."""
    os.environ |= {"ARROW_DEFAULT_MEMORY_POOL": "system", "OMP_NUM_THREADS": "1"}

    import onnxruntime  # noqa: F401  # for the forks
    import pyarrow.parquet  # noqa: F401  # likewise
    import torch

    torch.set_num_threads(1)


def plan(num_files: int) -> Iterator[tuple[str, range]]:
    """Plan which files each reader is called on, by its share, in pieces."""
    shares = sum(reader.share for reader in _readers.values())
    for reader in _readers.values():
        count = -int(-num_files * reader.share // shares)
        for start in range(0, count, _CHUNK):
            yield reader.name, range(start, min(start + _CHUNK, count))


def run(
    chunks: Sequence[tuple[str, range]], seed: int, folder: Path, num_jobs: int, *, is_real: bool
) -> dict[str, list[Outcome]]:
    """Call the readers on pieces of their files in several processes; return what came of it by reader."""
    done: dict[str, list[Outcome]] = {}
    with multiprocessing.get_context("fork").Pool(num_jobs) as pool:
        call = partial(_call_chunk, seed=seed, folder=folder, is_real=is_real)
        for number, (name, outcomes) in enumerate(pool.imap_unordered(call, chunks), start=1):
            done.setdefault(name, []).extend(outcomes)
            if sys.stderr.isatty():
                print(f"\r{number} of {len(chunks)} pieces", end="", file=sys.stderr)
    return {name: done[name] for name in _readers if name in done}


def _call_chunk(chunk: tuple[str, range], *, seed: int, folder: Path, is_real: bool) -> tuple[str, list[Outcome]]:
    name, numbers = chunk
    with nullcontext() if is_real else forking():
        return name, list(call_often(_readers[name], seed, numbers, folder))


def find_bad(outcomes: dict[str, dict[str, list[Outcome]]]) -> Iterator[tuple[str, Outcome]]:
    """Find what is no good."""
    for of_readers in outcomes.values():
        for name, done in of_readers.items():
            yield from ((name, outcome) for outcome in done if not outcome.is_good)


def write_finding(folder: Path, seed: int, name: str, outcome: Outcome) -> dict[str, Any]:
    """Write a file that is no good, and what came of it; describe it for the result."""
    folder.mkdir(exist_ok=True)
    place = folder / f"{name.replace(' ', '_')}-{seed}-{outcome.number}"
    place.with_name(f"{place.name}.file").write_bytes(build_file(_readers[name], seed, outcome.number)[1])
    place.with_name(f"{place.name}.json").write_text(json.dumps(asdict(outcome), indent=2) + "\n")
    return {"reader": name, "number": outcome.number, "seed": outcome.seed, "kind": outcome.kind}


def summarize(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Count what a reader did, with the most that a file took."""
    counts = Counter(outcome.kind for outcome in outcomes)
    return {
        "files": len(outcomes),
        **{kind: counts[kind] for kind in sorted({"read", "refused", *counts})},
        "slowest_s": round(max(outcome.cpu_s for outcome in outcomes), 3),
        "largest_memory_mb": round(max(outcome.memory_mb for outcome in outcomes), 1),
    }


if __name__ == "__main__":
    sys.exit(main())
