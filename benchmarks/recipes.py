"""Accuracy, time and memory of each recipe over several seeds, from the command to the finished run folder.

    python -m benchmarks.recipes --dataset_folder DATA [--recipe NAME] [--num_seeds 5]

DATA holds real CIFAR-10. Runs that an interrupted call has measured already are not made again.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.measure import load_result, measure_command, save_result, summarize, to_row
from image_classifier.config import RECIPES


def measure_run(recipe: str, seed: int, dataset_folder: Path) -> dict[str, Any]:
    """Train once and return accuracy, time, memory and the digest of data and weights."""
    with tempfile.TemporaryDirectory() as scratch:
        names = f"--experiments_folder {scratch} --experiment_name recipes --run_name run".split()
        command = [sys.executable, "-m", "image_classifier.main", *names]
        options = ["--recipe", recipe, "--seed", str(seed), "--dataset_folder", str(dataset_folder)]
        measurement = measure_command([*command, *options])
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
        "precision": record["settings"]["precision"],
        "num_threads": record["settings"]["num_threads"],
        "code_digest": record["code"]["digest"],
        "data_digest": record["data"]["digest"],
        "weights_digest": manifest["weights_digest"],
    }


def main() -> None:
    """Measure the recipes that are asked for, and save after each run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset_folder", type=Path, required=True)
    parser.add_argument("--recipe", choices=RECIPES, action="append")
    parser.add_argument("--num_seeds", type=int, default=5)
    arguments = parser.parse_args()
    for recipe in arguments.recipe or RECIPES:
        name = f"recipe_{recipe}"
        runs = load_result(name).get("runs", [])
        for seed in range(arguments.num_seeds):
            if seed in {run["seed"] for run in runs}:
                continue
            runs.append(measure_run(recipe, seed, arguments.dataset_folder))
            keys = ("accuracy", "accuracy_single_view", "seconds", "training_seconds", "peak_memory_mb")
            save_result(name, {**{key: summarize([run[key] for run in runs]) for key in keys}, "runs": runs})
            print(f"{recipe} seed {seed}: {runs[-1]['accuracy']:.2%} in {runs[-1]['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
