"""What each kernel gives: a step with it left to torch, over the step with all kernels, recipe by recipe.

    python -m benchmarks.kernels [--rounds 5] [--instruction_set avx2]

Random images: the time of a step does not depend on what they show. All variants of a case train in one process, some
steps of each in turn. A variant that is not in a table changes nothing: the recipe's steps have no such operation.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from itertools import repeat
from typing import Any, get_args

import torch

from benchmarks.measure import PROJECT, format_figure, load_result, save_result, summarize, write_table
from image_classifier.choices import InstructionSet
from image_classifier.data.loader import Batch
from image_classifier.model.catalog import build_classifier
from image_classifier.settings import TrainingSettings
from image_classifier.training import large_steps, small_steps
from image_classifier.training.determinism import CAPS, cap_instruction_set, configure_torch, resolve_settings
from image_classifier.training.engine import SMALL_BATCH
from image_classifier.training.loop import train
from image_classifier.training.memory import keep_freed_memory
from image_classifier.training.optimizer import build_optimizer

DOCUMENT = PROJECT / "benchmarks" / "README.md"
WARM_UP = 4
"""Steps in which operations are written down, compared with autograd, and repeated the first times."""
LENGTH = 1_000_000
"""Steps of the whole training, so that none of those measured is one from which on a part of the network is frozen."""

CASES = {
    "notebook": ("notebook", 4, 32, 500),
    "small": ("small", 125, 32, 10),
    "quick": ("quick", 500, 24, 8),
    "fast_16": ("fast", 1000, 16, 3),
    "fast_32": ("fast", 1000, 32, 2),
    "best": ("best", 1000, 32, 1),
}
"""A recipe, the images of a step, their side in pixels, and the steps of a variant in each round."""

FAMILIES = {
    "convolution": ("convolution.default",),
    "gradient of a convolution": ("convolution_backward.default",),
    "max pooling": ("max_pool2d_with_indices.default", "max_pool2d_with_indices_backward.default"),
    "batch norm": ("native_batch_norm.default", "native_batch_norm_backward.default"),
    "GELU": ("gelu.default", "gelu_backward.default"),
    "ReLU": ("relu.default", "threshold_backward.default"),
    "product of matrices": ("mm.default", "addmm.default"),
    "sum of rows": ("sum.dim_IntList",),
    "copy": ("clone.default",),
    "scaling of pixels": ("_to_copy.default", "sub.Tensor", "div.Tensor"),
    "log softmax": ("_log_softmax.default", "_log_softmax_backward_data.default"),
    "loss": ("nll_loss_forward.default", "nll_loss_backward.default"),
    "hits": ("argmax.default", "eq.Tensor", "sum.default"),
    "ones": ("ones_like.default",),
}
"""Operations of torch that are left to it together."""


def measure_case(case: str, instruction_set: InstructionSet, rounds: int) -> dict[str, list[float]]:
    """Measure in this process the seconds of a step of each variant, round by round; "all" has all kernels."""
    recipe, batch_size, size, num_steps = CASES[case]
    cap_instruction_set(instruction_set)
    chosen = {"batch_size": batch_size, "image_sizes": (size,), "instruction_set": instruction_set}
    settings = resolve_settings(TrainingSettings.from_recipe(recipe, **chosen))
    configure_torch()
    keep_freed_memory()
    images = torch.randint(0, 256, (batch_size, 3, 32, 32), dtype=torch.uint8)
    batch = Batch(images, torch.arange(batch_size) % 10)

    def begin() -> Iterator[float]:
        mean, std = settings.input_mean, settings.input_std
        classifier = build_classifier(settings.model, 10, input_mean=mean, input_std=std, seed=0, image_size=size)
        optimizer = build_optimizer(classifier, settings)
        steps = train(classifier, repeat(batch), optimizer, settings, num_steps=LENGTH)
        return (step.seconds for step in steps)

    table: dict[Any, Any] = small_steps.COMPUTE if settings.batch_size <= SMALL_BATCH else large_steps.COMPUTE
    variants: dict[str, Iterator[float]] = {}
    for name, operations in {"all": (), **FAMILIES}.items():
        removed = {key: value for key, value in table.items() if str(key).removeprefix("aten.") in operations}
        if name != "all" and not removed:
            continue
        for key in removed:
            del table[key]
        variants[name] = begin()
        for _ in range(WARM_UP):
            next(variants[name])
        table |= removed
    return {
        name: [statistics.median(done) for done in rounds_of]
        for name, rounds_of in _take_in_turn(variants, rounds, num_steps).items()
    }


def _take_in_turn(variants: dict[str, Iterator[float]], rounds: int, num_steps: int) -> dict[str, list[list[float]]]:
    taken: dict[str, list[list[float]]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, steps in variants.items():
            taken[name].append([next(steps) for _ in range(num_steps)])
    return taken


def build_table(result: dict[str, Any]) -> str:
    """Build the table of benchmarks/README.md."""
    lines = [
        "| computed by torch | " + " | ".join(f"`{case}`" for case in CASES) + " |",
        "|---" * (len(CASES) + 1) + "|",
    ]
    for family in FAMILIES:
        cells = []
        for case in CASES:
            ratio = result["cases"][case]["ratio"].get(family)
            cells.append(f"{ratio['mean']:.2f} ({ratio['least']:.2f} to {ratio['most']:.2f})" if ratio else "")
        if any(cells):
            lines.append(f"| {family} | " + " | ".join(cells) + " |")
    steps = (format_figure(result["cases"][case]["step_ms"]) for case in CASES)
    lines.append("| none: time of a step, ms | " + " | ".join(steps) + " |")
    return "\n".join(lines) + f"\n\nOn {result['cores']} cores of an {result['processor']}.\n"


def main() -> None:
    """Measure each case in a process of its own, save the figures and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--instruction_set", choices=get_args(InstructionSet), default="native")
    parser.add_argument("--measure", metavar="CASE", help="measure in this process and print")
    arguments = parser.parse_args()
    cap = arguments.instruction_set
    if arguments.measure:
        print(json.dumps(measure_case(arguments.measure, cap, arguments.rounds)))
        return
    result: dict[str, Any] = {"cases": {}}
    for case in CASES:
        options = ["--measure", case, "--rounds", str(arguments.rounds), "--instruction_set", cap]
        command = [sys.executable, "-m", "benchmarks.kernels", *options]
        environment = {**os.environ, **CAPS[cap]}
        answer = subprocess.run(command, cwd=PROJECT, env=environment, check=True, stdout=subprocess.PIPE, text=True)
        seconds: dict[str, list[float]] = json.loads(answer.stdout.splitlines()[-1])
        everything = seconds.pop("all")
        result["cases"][case] = {
            "step_ms": statistics.median(everything) * 1e3,
            "ratio": {
                name: summarize([one / other for one, other in zip(without, everything, strict=True)])
                for name, without in seconds.items()
            },
        }
        print(case, json.dumps(result["cases"][case]), flush=True)
    name = "kernels" if cap == "native" else f"kernels_{cap}"
    save_result(name, result)
    if cap == "native":
        write_table(DOCUMENT, name, build_table(load_result(name)))


if __name__ == "__main__":
    main()
