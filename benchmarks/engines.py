"""Milliseconds of a step and seconds of compiling, eager and compiled, where steps are small and where they are large.

    python -m benchmarks.engines [--runs 3]

Random images: the time of a step does not depend on what they show. Each measurement is a process of its own, the two
engines in turn; the first compilation of a process begins with an empty cache, the second with what the first left.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from itertools import islice
from typing import Any

from benchmarks.measure import PROJECT, save_result, summarize

CASES = {"notebook": (4, 4000), "notebook_batch_16": (16, 2000), "notebook_batch_64": (64, 1000)}
"""A recipe, perhaps with another batch size; the batch size; the steps that are measured."""


def measure_steps(case: str, engine: str) -> dict[str, float]:
    """Measure in this process the first step, and the median of those after it, in seconds."""
    import torch

    from image_classifier.config import load_recipe, restore_training_settings
    from image_classifier.data.loader import Batch
    from image_classifier.model.catalog import build_classifier
    from image_classifier.training.determinism import configure_torch, resolve_settings
    from image_classifier.training.loop import train
    from image_classifier.training.memory import keep_freed_memory
    from image_classifier.training.optimizer import build_optimizer

    batch_size, num_steps = CASES[case]
    recipe = restore_training_settings(load_recipe(case.partition("_")[0]))
    size = recipe.image_sizes[0]
    chosen = {"batch_size": batch_size, "image_sizes": (size,), "engine": engine, "num_epochs": 1}
    settings = resolve_settings(replace(recipe, **chosen))  # type: ignore[arg-type]  # of several types
    configure_torch(settings)
    keep_freed_memory()
    mean, std = settings.input_mean, settings.input_std
    classifier = build_classifier(settings.model, 10, input_mean=mean, input_std=std, seed=0, image_size=size)
    images = torch.randint(0, 256, (batch_size, 3, 32, 32), dtype=torch.uint8)
    batches = (Batch(images, torch.arange(batch_size) % 10) for _ in range(num_steps + 10))
    steps = train(classifier, batches, build_optimizer(classifier, settings), settings, num_steps=num_steps + 10)
    seconds = [step.seconds for step in steps]
    return {"first_step": seconds[0], "step": statistics.median(islice(seconds, 10, None))}


def main() -> None:
    """Measure each case and save the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--measure", nargs=2, metavar=("CASE", "ENGINE"), help="measure in this process and print")
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure_steps(*arguments.measure)))
        return
    result: dict[str, Any] = {}
    for case in CASES:
        rows: dict[str, list[dict[str, float]]] = {"eager": [], "compiled": [], "cached": []}
        for _ in range(arguments.runs):
            with tempfile.TemporaryDirectory() as cache:
                for name in rows:
                    engine = "eager" if name == "eager" else "compiled"
                    command = [sys.executable, "-m", "benchmarks.engines", "--measure", case, engine]
                    environment = {"TORCHINDUCTOR_CACHE_DIR": cache}
                    rows[name].append(run(command, environment))
        steps = {name: summarize([row["step"] * 1e3 for row in done]) for name, done in rows.items()}
        result[case] = {
            "batch_size": CASES[case][0],
            "step_ms": {name: steps[name] for name in ("eager", "compiled")},
            "ratio": steps["compiled"]["mean"] / steps["eager"]["mean"],
            "compile_seconds": summarize([row["first_step"] for row in rows["compiled"]]),
            "load_seconds": summarize([row["first_step"] for row in rows["cached"]]),
        }
        print(case, json.dumps(result[case]), flush=True)
    save_result("engines", result)


def run(command: list[str], environment: dict[str, str]) -> dict[str, float]:
    """Run a measurement in a process of its own."""
    answer = subprocess.run(
        command, cwd=PROJECT, env={**os.environ, **environment}, check=True, capture_output=True, text=True
    )
    figures: dict[str, float] = json.loads(answer.stdout.splitlines()[-1])
    return figures


if __name__ == "__main__":
    main()
