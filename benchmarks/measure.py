"""What all benchmarks share: whole commands measured from outside, and results that say where they come from."""

from __future__ import annotations

import argparse
import ctypes.util
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

from image_classifier.choices import InstructionSet
from image_classifier.training.determinism import CAPS

PROJECT = Path(__file__).resolve().parents[1]
RESULTS = PROJECT / "benchmarks" / "results"


@dataclass(frozen=True)
class Measurement:
    """One command, measured by the operating system when it ended."""

    seconds: float
    cpu_seconds: float
    peak_memory_mb: float
    last_line: str


def build_parser(description: str | None) -> argparse.ArgumentParser:
    """Build a benchmark's parser: which data, and the cap on the instruction set."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--dataset_folder", type=Path, required=True)
    parser.add_argument("--instruction_set", choices=get_args(InstructionSet), default="native")
    return parser


def measure_command(command: Sequence[str | Path], **environment: str) -> Measurement:
    """Run a command to its end and measure it; its output goes to a file that is shown if it fails."""
    with tempfile.TemporaryFile() as output:
        started = time.perf_counter()
        process = subprocess.Popen(
            [str(word) for word in command],
            stdout=output,
            stderr=output,
            cwd=PROJECT,
            env={**os.environ, **environment},
        )
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        printed = output.read().decode()
    if process.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}\nexit status {process.returncode}\n{printed}")
    cpu_seconds = round(usage.ru_utime + usage.ru_stime, 3)
    last_line = (printed.splitlines() or [""])[-1]
    return Measurement(round(seconds, 3), cpu_seconds, round(usage.ru_maxrss / 1024, 1), last_line)


def measure_recipe(
    recipe: str,
    seed: int,
    dataset_folder: Path,
    instruction_set: str = "native",
    options: Sequence[str] = (),
    **environment: str,
) -> dict[str, Any]:
    """Train a recipe by its command, with more options; return accuracy, time, memory and digests."""
    with tempfile.TemporaryDirectory() as scratch:
        names = f"--experiments_folder {scratch} --experiment_name recipes --run_name run".split()
        command = [sys.executable, "-m", "image_classifier.main", *names, "--instruction_set", instruction_set]
        chosen = ["--recipe", recipe, "--seed", str(seed), "--dataset_folder", str(dataset_folder)]
        measurement = measure_command([*command, *chosen, *options], **environment)
        folder = Path(scratch) / "recipes" / "run"
        evaluation, record, manifest = (
            json.loads((folder / name).read_text()) for name in ("evaluation.json", "run.json", "manifest.json")
        )
        epochs = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    per_class = evaluation["per_class"].values()
    return {
        "seed": seed,
        **to_row(measurement),
        "training_seconds": round(sum(epoch["seconds"] for epoch in epochs), 3),
        "accuracy": evaluation["accuracy"],
        "accuracy_single_view": evaluation["accuracy_single_view"],
        "images_per_class": sorted({facts["support"] for facts in per_class}),
        **{name: record["settings"][name] for name in ("precision", "engine", "shards", "instruction_set")},
        "num_threads": record["execution"]["num_threads"] or len(os.sched_getaffinity(0)),
        "code_digest": record["code"]["digest"],
        "data_digest": record["data"]["digest"],
        "weights_digest": manifest["weights_digest"],
    }


def measure_baseline(
    name: str,
    seed: int,
    dataset_folder: Path,
    instruction_set: InstructionSet = "native",
    options: Sequence[str] = (),
    **environment: str,
) -> dict[str, Any]:
    """Train one of benchmarks/baselines under the same cap; return time, memory and what its last line says."""
    module = [sys.executable, "-m", f"benchmarks.baselines.{name}"]
    command = [*module, "--dataset_folder", str(dataset_folder), "--seed", str(seed)]
    measurement = measure_command([*command, *options], **CAPS[instruction_set], **environment)
    return {"seed": seed, **to_row(measurement), **json.loads(measurement.last_line)}


def measure_in_turn(
    name: str, sides: Mapping[str, Callable[[int], dict[str, Any]]], num_runs: int, num_baseline_runs: int | None = None
) -> None:
    """Measure each side once for each seed, in turn, and save after each run, with the ratio of the sides' means.

    Args:
        sides: `trainer` and `baseline`, each a function from the seed to at least its `seconds` and `accuracy`.
        num_baseline_runs: how many of the runs the baseline takes part in; all where left out.
    """
    runs: dict[str, list[dict[str, Any]]] = load_result(name).get("runs", {})
    for seed in range(num_runs):
        for side, measure in sides.items():
            done = runs.setdefault(side, [])
            is_enough = side == "baseline" and num_baseline_runs is not None and seed >= num_baseline_runs
            if is_enough or seed in {run["seed"] for run in done}:
                continue
            done.append(measure(seed))
            print(f"{side} seed {seed}: {done[-1]['accuracy']:.2%} in {done[-1]['seconds']:.0f} s", flush=True)
            figures = {
                side: {key: summarize([run[key] for run in done]) for key in ("seconds", "accuracy", "peak_memory_mb")}
                for side, done in runs.items()
                if done
            }
            pairs = [
                (ours["seconds"] / theirs["seconds"])
                for ours in runs.get("trainer", [])
                for theirs in runs.get("baseline", [])
                if ours["seed"] == theirs["seed"]
            ]
            ratio = {"ratio": summarize(pairs)} if pairs else {}
            save_result(name, {**ratio, **figures, "runs": runs})


def find_jemalloc() -> dict[str, str]:
    """Find jemalloc on this system; the environment that preloads it with pages kept, or none where there is none."""
    library = ctypes.util.find_library("jemalloc")
    settings = "dirty_decay_ms:-1,muzzy_decay_ms:-1"
    return {"LD_PRELOAD": library, "MALLOC_CONF": settings} if library else {}


def describe_origin() -> dict[str, Any]:
    """Describe when, on what machine and from which code a result comes."""
    commit = subprocess.run(["git", "-C", PROJECT, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    processor = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    return {
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "processor": processor,
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "torch": version("torch"),
    }


def save_result(name: str, result: dict[str, Any]) -> None:
    """Write benchmarks/results/<name>.json."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps({**describe_origin(), **result}, indent=2) + "\n")


def load_result(name: str) -> dict[str, Any]:
    """Read an earlier result, or nothing."""
    path = RESULTS / f"{name}.json"
    result: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return result


def write_table(document: Path, name: str, table: str) -> None:
    """Write what a document has between `<!-- from …results/<name>.json -->` and the next `<!-- end -->`."""
    text = document.read_text(encoding="utf-8")
    pattern = rf"(<!-- from \S*results/{name}\.json -->\n).*?(?=<!-- end -->)"
    new, count = re.subn(pattern, lambda match: match[1] + table, text, count=1, flags=re.DOTALL)
    if not count:
        sys.exit(f"{document} has no place for the table of results/{name}.json")
    document.write_text(new, encoding="utf-8")


def read_table(document: Path, name: str) -> str:
    """Read what `write_table` wrote."""
    text = document.read_text(encoding="utf-8")
    return text.partition(f"results/{name}.json -->\n")[2].partition("<!-- end -->")[0]


def format_figure(value: float) -> str:
    """Write a figure with three significant digits, or all that are before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def summarize(values: Sequence[float]) -> dict[str, float]:
    """Compute mean, spread and range."""
    return {
        "mean": statistics.fmean(values),
        "standard_deviation": statistics.stdev(values) if len(values) > 1 else 0.0,
        "least": min(values),
        "most": max(values),
        "runs": len(values),
    }


def to_row(measurement: Measurement) -> dict[str, float]:
    """Turn a measurement into JSON."""
    return {name: value for name, value in asdict(measurement).items() if name != "last_line"}
