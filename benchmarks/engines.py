"""Milliseconds of a step, eager and compiled, where steps are small and where they are large.

    python -m benchmarks.engines [--runs 3]

Random images: the time of a step does not depend on what they show. Each measurement is a process of its own, the two
engines in turn.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from itertools import islice
from typing import Any

from benchmarks.measure import PROJECT, format_figure, load_result, save_result, summarize, write_table

DOCUMENT = PROJECT / "benchmarks" / "README.md"

CASES = {
    "notebook_4": ("notebook", 4, 32, 4000),
    "notebook_16": ("notebook", 16, 32, 2000),
    "notebook_64": ("notebook", 64, 32, 1000),
    "quick_16": ("quick", 500, 16, 20),
    "fast_16": ("fast", 1000, 16, 12),
    "fast_24": ("fast", 1000, 24, 12),
    "fast_32": ("fast", 1000, 32, 12),
}
"""A recipe, the images of a step, their side in pixels, and the steps that are measured."""


def measure_step(case: str, engine: str) -> float:
    """Measure in this process the median of the steps, in seconds."""
    import torch

    from image_classifier.data.loader import Batch
    from image_classifier.model.catalog import build_classifier
    from image_classifier.settings import TrainingSettings
    from image_classifier.training.determinism import configure_torch, resolve_settings
    from image_classifier.training.loop import train
    from image_classifier.training.memory import keep_freed_memory
    from image_classifier.training.optimizer import build_optimizer

    recipe, batch_size, size, num_steps = CASES[case]
    chosen = {"batch_size": batch_size, "image_sizes": (size,), "engine": engine}
    settings = resolve_settings(TrainingSettings.from_recipe(recipe, **chosen))
    configure_torch()
    keep_freed_memory()
    mean, std = settings.input_mean, settings.input_std
    classifier = build_classifier(settings.model, 10, input_mean=mean, input_std=std, seed=0, image_size=size)
    images = torch.randint(0, 256, (batch_size, 3, 32, 32), dtype=torch.uint8)
    batches = (Batch(images, torch.arange(batch_size) % 10) for _ in range(num_steps + 4))
    steps = train(classifier, batches, build_optimizer(classifier, settings), settings, num_steps=num_steps + 4)
    seconds = [step.seconds for step in steps]
    return statistics.median(islice(seconds, 4, None))


def build_table(result: dict[str, Any]) -> str:
    """Build the table of benchmarks/README.md."""
    lines = ["| recipe | batch size | image size | eager, ms | compiled, ms | ratio |", "|---|---|---|---|---|---|"]
    for case, (recipe, batch_size, size, _) in CASES.items():
        figures = result["cases"][case]
        ratio = figures["ratio"]
        lines.append(
            f"| `{recipe}` | {batch_size:,} | {size} | {format_figure(figures['step_ms']['eager']['mean'])} "
            f"| {format_figure(figures['step_ms']['compiled']['mean'])} "
            f"| {ratio['mean']:.2f} ({ratio['least']:.2f} to {ratio['most']:.2f}) |"
        )
    return "\n".join(lines) + (
        f"\n\nOn {result['cores']} cores of an {result['processor']}, {ratio['runs']} alternating runs, "
        "including the optimizer.\n"
    )


def main() -> None:
    """Measure each case, save the figures and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--measure", nargs=2, metavar=("CASE", "ENGINE"), help="measure in this process and print")
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure_step(*arguments.measure)))
        return
    result: dict[str, Any] = {"cases": {}}
    for case in CASES:
        seconds: dict[str, list[float]] = {"eager": [], "compiled": []}
        for _ in range(arguments.runs):
            for engine, done in seconds.items():
                command = [sys.executable, "-m", "benchmarks.engines", "--measure", case, engine]
                answer = subprocess.run(command, cwd=PROJECT, check=True, capture_output=True, text=True)
                done.append(json.loads(answer.stdout.splitlines()[-1]))
        pairs = zip(seconds["compiled"], seconds["eager"], strict=True)
        result["cases"][case] = {
            "step_ms": {name: summarize([each * 1e3 for each in done]) for name, done in seconds.items()},
            "ratio": summarize([ours / theirs for ours, theirs in pairs]),
        }
        print(case, json.dumps(result["cases"][case]), flush=True)
    save_result("engines", result)
    write_table(DOCUMENT, "engines", build_table(load_result("engines")))


if __name__ == "__main__":
    main()
