"""What proving a run costs: the time that record, digests, checkpoints and manifest take of a `fast` run.

    python -m benchmarks.record_cost --dataset_folder DATA [--runs 3]

Each call that belongs to the record is timed inside the run, which is far more exact than the difference of two runs.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.measure import save_result, summarize
from image_classifier import experiment
from image_classifier.settings import RunSettings, TrainingSettings
from image_classifier.tracking.run import RunFolder
from image_classifier.tracking.state import TrainingState

CALLS: list[tuple[Any, str]] = [
    (experiment, "build_record"),
    (experiment, "build_environment"),
    (TrainingState, "append_digest"),
    (TrainingState, "get_tensors"),
    (TrainingState, "append_epoch"),
    (TrainingState, "save"),
    (RunFolder, "write_json"),
    (RunFolder, "finish"),
]


def time_calls(spent: dict[str, float]) -> None:
    """Make each call add its own time; what one of them calls counts once, for the outer one."""
    inside: list[str] = []

    def wrap(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*arguments: Any, **options: Any) -> Any:
            inside.append(name)
            started = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                inside.pop()
                if not inside:
                    spent[name] += time.perf_counter() - started

        return timed

    for owner, name in CALLS:
        setattr(owner, name, wrap(name, getattr(owner, name)))


def main() -> None:
    """Train the recipe a few times and save what the record took of each run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset_folder", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    spent: dict[str, float] = defaultdict(float)
    time_calls(spent)
    rows: list[dict[str, Any]] = []
    for seed in range(arguments.runs):
        spent.clear()
        with tempfile.TemporaryDirectory() as scratch:
            started = time.perf_counter()
            experiment.run(
                RunSettings(
                    experiments_folder=Path(scratch),
                    experiment_name="cost",
                    run_name=f"run-{seed}",
                    dataset_folder=arguments.dataset_folder,
                    training=TrainingSettings.from_recipe("fast"),
                )
            )
            seconds = time.perf_counter() - started
        rows.append({"seconds": seconds, "cost": sum(spent.values()) / seconds, "seconds_by_call": dict(spent)})
        print(f"run {seed}: {rows[-1]['cost']:.2%} of {seconds:.0f} s", flush=True)
    digests = [
        (row["seconds_by_call"]["append_digest"] + row["seconds_by_call"]["get_tensors"]) / row["seconds"]
        for row in rows
    ]
    costs = [row["cost"] for row in rows]
    save_result("record_cost", {"cost": summarize(costs), "cost_of_digests": summarize(digests), "runs": rows})


if __name__ == "__main__":
    main()
