"""Milliseconds of a step of ResNet-18 on images of 64 and 224 pixels, beside torchvision's in plain PyTorch.

    python -m benchmarks.image_sizes [--runs 5]

Both sides train the same network in single precision by SGD with momentum and weight decay, on all cores, on random
uint8 images whose values they scale. Torch's side is measured in both memory formats, and the quicker one counts. Ours
computes shards with batch norm of their own, as a run does. Each measurement is a process of its own, in turn.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

from benchmarks.measure import PROJECT, format_figure, load_result, save_result, summarize, write_table

DOCUMENT = PROJECT / "benchmarks" / "README.md"
CASES = {64: (128, 12), 224: (32, 8)}
"""Images of a step, and the steps that are measured, by their side in pixels."""

NUM_CLASSES, NUM_BEFORE = 10, 3
SIDES = ("ours", "contiguous", "channels_last")


def measure_ours(side: int) -> Iterator[float]:
    """Yield the seconds of the steps of a run."""
    from image_classifier.data.loader import Batch
    from image_classifier.model.catalog import build_classifier
    from image_classifier.settings import TrainingSettings
    from image_classifier.training.determinism import configure_torch, resolve_settings
    from image_classifier.training.loop import train
    from image_classifier.training.memory import keep_freed_memory
    from image_classifier.training.optimizer import build_optimizer

    batch_size, num_steps = CASES[side]
    options: dict[str, Any] = {"model": "resnet18_imagenet", "optimizer": "sgd", "learning_rate": 0.01, "momentum": 0.9}
    options |= {"batch_size": batch_size, "image_size": side, "image_sizes": (side,), "precision": "fp32"}
    settings = resolve_settings(TrainingSettings.from_recipe("small", **options))
    configure_torch()
    keep_freed_memory()
    scaling = {"input_mean": settings.input_mean, "input_std": settings.input_std}
    classifier = build_classifier(settings.model, NUM_CLASSES, **scaling, seed=0, image_size=side)
    images, labels = draw_batch(side)
    batches = (Batch(images, labels) for _ in range(NUM_BEFORE + num_steps))
    total = NUM_BEFORE + num_steps
    for step in train(classifier, batches, build_optimizer(classifier, settings), settings, num_steps=total):
        yield step.seconds


def measure_torch(side: int, memory_format: str) -> Iterator[float]:
    """Yield the seconds of the steps of a plain loop."""
    import torch
    import torchvision

    layout = getattr(torch, f"{memory_format}_format" if memory_format == "contiguous" else memory_format)
    network = torchvision.models.resnet18(num_classes=NUM_CLASSES).to(memory_format=layout)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=5e-4)
    images, labels = draw_batch(side)
    for _ in range(NUM_BEFORE + CASES[side][1]):
        started = time.perf_counter()
        pixels = (images.float().div(255) - 0.5).div(0.25).contiguous(memory_format=layout)
        loss = torch.nn.functional.cross_entropy(network(pixels), labels, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch ships it without types
        optimizer.step()
        yield time.perf_counter() - started


def draw_batch(side: int) -> tuple[Any, Any]:
    """Draw the images uint8 [B, 3, S, S] and labels int64 [B] of a step."""
    import torch

    batch_size = CASES[side][0]
    images = torch.randint(0, 256, (batch_size, 3, side, side), dtype=torch.uint8)
    return images, torch.arange(batch_size) % NUM_CLASSES


def build_table(result: dict[str, Any]) -> str:
    """Build the table of benchmarks/README.md."""
    lines = ["| image size | batch size | this package, ms | PyTorch, ms | ratio |", "|---|---|---|---|---|"]
    for side, (batch_size, _) in CASES.items():
        figures = result["cases"][str(side)]
        ratio = figures["ratio"]
        lines.append(
            f"| {side} | {batch_size} | {format_figure(figures['step_ms']['ours']['mean'])} "
            f"| {format_figure(figures['step_ms'][figures['quicker']]['mean'])} ({figures['quicker']}) "
            f"| {ratio['mean']:.2f} ({ratio['least']:.2f} to {ratio['most']:.2f}) |"
        )
    return (
        "\n".join(lines)
        + f"\n\nOn {result['cores']} cores of an {result['processor']}, {ratio['runs']} alternating runs.\n"
    )


def main() -> None:
    """Measure each side, save the figures and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--measure", nargs=2, metavar=("SIDE", "NAME"), help="measure in this process and print")
    arguments = parser.parse_args()
    if arguments.measure:
        side, name = int(arguments.measure[0]), arguments.measure[1]
        seconds = list(measure_ours(side) if name == "ours" else measure_torch(side, name))
        print(json.dumps(statistics.median(seconds[NUM_BEFORE:])))
        return
    result: dict[str, Any] = {"cases": {}}
    for side in CASES:
        times: dict[str, list[float]] = {name: [] for name in SIDES}
        for _ in range(arguments.runs):
            for name, done in times.items():
                command = [sys.executable, "-m", "benchmarks.image_sizes", "--measure", str(side), name]
                answer = subprocess.run(command, cwd=PROJECT, check=True, capture_output=True, text=True)
                done.append(json.loads(answer.stdout.splitlines()[-1]))
        quicker = min(SIDES[1:], key=lambda name: statistics.mean(times[name]))
        result["cases"][str(side)] = {
            "step_ms": {name: summarize([each * 1e3 for each in done]) for name, done in times.items()},
            "quicker": quicker,
            "ratio": summarize([ours / theirs for ours, theirs in zip(times["ours"], times[quicker], strict=True)]),
        }
        print(side, json.dumps(result["cases"][str(side)]), flush=True)
    save_result("image_sizes", result)
    write_table(DOCUMENT, "image_sizes", build_table(load_result("image_sizes")))


if __name__ == "__main__":
    main()
