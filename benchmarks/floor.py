"""The floor of recipes: the operations of their training over the fastest rate of this machine.

    python -m benchmarks.floor

The operations are counted by torch's counter on a step of each image size; the rate is that of large matrices in the
precision of the runs, with all of the processor's instructions. Compared with the training seconds that
benchmarks/results has.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import load_result, save_result
from image_classifier.model.catalog import build_classifier
from image_classifier.settings import TrainingSettings
from image_classifier.training.determinism import configure_torch, resolve_settings

NUM_IMAGES = 50_000
SIDE = 4096

MEASURED = {"fast": "time_to_accuracy_native", "notebook": "notebook_job_native", "best": "recipe_best_avx2"}
"""Where the runs of a recipe are."""


def count_operations(settings: TrainingSettings, image_size: int, progress: float) -> float:
    """Count the floating-point operations of forward and backward pass for one image, at a point of a run."""
    mean, std = settings.input_mean, settings.input_std
    classifier = build_classifier(settings.model, 10, input_mean=mean, input_std=std, seed=0).train()
    classifier.begin_step(progress)
    images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    with FlopCounterMode(display=False) as counter:
        loss = F.cross_entropy(classifier(images, image_size), torch.tensor([0, 1]))
        loss.backward()  # type: ignore[no-untyped-call]  # torch ships it without types
    return float(counter.get_total_flops()) / 2


def count_training(settings: TrainingSettings, num_images: int) -> float:
    """Count the operations of a whole training, whose epochs are taken to be of one image size each."""
    epochs = range(settings.num_epochs)
    sizes = [settings.image_sizes[epoch * len(settings.image_sizes) // settings.num_epochs] for epoch in epochs]
    counted = [count_operations(settings, size, epoch / settings.num_epochs) for epoch, size in enumerate(sizes)]
    return num_images * sum(counted)


def measure_rate(dtype: torch.dtype, repeats: int = 20) -> float:
    """Measure the floating-point operations a second of a product of two large matrices: the best of several."""
    left, right = (torch.randn(SIDE, SIDE).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        left @ right
        seconds.append(time.perf_counter() - started)
    return 2 * SIDE**3 / min(seconds)


def measure_floor(recipe: str) -> dict[str, Any]:
    """Count a recipe's operations, and compare the seconds that they would take with those that its training takes."""
    runs = load_result(MEASURED[recipe])["runs"]
    runs = runs["trainer"] if "trainer" in runs else runs
    asked = TrainingSettings.from_recipe(recipe)
    settings = resolve_settings(replace(asked, precision=runs[0]["precision"]))
    configure_torch()
    operations = count_training(settings, NUM_IMAGES)
    rate = measure_rate(torch.bfloat16 if settings.precision == "bf16" else torch.float32)
    training = sum(run["training_seconds"] for run in runs) / len(runs)
    floor = operations / rate
    return {
        "operations": operations,
        "precision": settings.precision,
        "instruction_set": runs[0]["instruction_set"],
        "num_threads": torch.get_num_threads(),
        "operations_per_second": rate,
        "floor_seconds": floor,
        "training_seconds": training,
        "training_over_floor": training / floor,
    }


def main() -> None:
    """Count, measure and save."""
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()
    result = {recipe: measure_floor(recipe) for recipe in MEASURED}
    save_result("floor", result)
    for recipe, facts in result.items():
        print(
            f"{recipe}: {facts['operations'] / 1e12:.1f} TFLOP at {facts['operations_per_second'] / 1e9:.0f} GFLOP/s: "
            f"{facts['floor_seconds']:.1f} s; the training takes {facts['training_seconds']:.0f} s"
        )


if __name__ == "__main__":
    main()
