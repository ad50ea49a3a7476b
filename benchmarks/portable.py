"""What the same bits on every processor cost: recipes as portable runs, beside the capped and the native ones.

    python -m benchmarks.portable --dataset_folder DATA [--recipe fast quick notebook] [--runs 5] [--accuracy_only]

DATA holds real CIFAR-10. A run that is capped at AVX2 computes with the same kernels and torch's libraries. The
portable one beside it computes with the kernels for AVX2 alone. On a processor with AVX-512 a portable run takes the
kernels for that. This is measured, too, and has to give the same weights. All sides of a seed follow each other. The
seconds are those of the epochs alone. Accuracies are compared seed by seed. Recipe `fast` trains on the first 4,000
images, on which a step takes as long as on all; `--accuracy_only` trains it on all of them and compares accuracies.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import PROJECT, build_parser, load_result, measure_recipe, save_result, summarize, write_table
from benchmarks.subsets import write_subset
from image_classifier.data.dataset import load_snapshot
from image_classifier.training.determinism import FORCE_KERNELS, list_portable_kernels

NUM_IMAGES, NUM_TEST = {"fast": 4000}, 1000
"""Images that a recipe is measured on, if not all, and those that it is evaluated on then."""
DOCUMENT = PROJECT / "docs" / "portable.md"
FP32 = ["--precision", "fp32"]
SIDES: dict[str, tuple[str, dict[str, str]]] = {
    "capped": ("avx2", {}),
    "portable": ("portable", {FORCE_KERNELS: "avx2"}),
    "portable_avx512": ("portable", {FORCE_KERNELS: "avx512"}),
    "native": ("native", {}),
}
"""The instruction set of each side, and variables."""


def measure_sides(recipe: str, seed: int, dataset_folder: Path) -> dict[str, dict[str, Any]]:
    """Train a recipe once by each side that this processor has."""
    found: dict[str, dict[str, Any]] = {}
    for side, (instruction_set, variables) in SIDES.items():
        if variables.get(FORCE_KERNELS, "avx2") not in list_portable_kernels():
            continue
        options = [] if side == "native" else FP32
        found[side] = measure_recipe(recipe, seed, dataset_folder, instruction_set, options, **variables)
        print(f"{recipe} {side} seed {seed}: {found[side]['training_seconds']} s, {found[side]['accuracy']:.2%}")
    portable = {run["weights_digest"] for side, run in found.items() if side.startswith("portable")}
    assert len(portable) == 1, f"the bits of {recipe}, seed {seed}, are not the same: {portable}"
    return found


def measure_accuracy(recipe: str, seed: int, dataset_folder: Path) -> dict[str, dict[str, Any]]:
    """Train a recipe on all images, capped and portably, and return accuracies and digests."""
    names = ("seed", "accuracy", "instruction_set", "data_digest", "weights_digest")
    found = {
        side: measure_recipe(recipe, seed, dataset_folder, instruction_set, FP32)
        for side, instruction_set in (("capped", "avx2"), ("portable", "portable"))
    }
    for side, run in found.items():
        print(f"{recipe} {side} seed {seed}: {run['accuracy']:.2%}", flush=True)
    return {side: {name: run[name] for name in names} for side, run in found.items()}


def compare_accuracies(runs: dict[str, dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """Compare the accuracies of runs by seed and side."""
    portable = [of_seed["portable"]["accuracy"] for of_seed in runs.values()]
    less = [of_seed["portable"]["accuracy"] - of_seed["capped"]["accuracy"] for of_seed in runs.values()]
    return {"accuracy": summarize(portable), "accuracy_less_capped": summarize(less)}


def summarize_runs(runs: dict[str, dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """Summarize runs by seed and side: seconds and accuracies, and the portable side over the others."""
    sides = {side for of_seed in runs.values() for side in of_seed}

    def collect(side: str, name: str) -> list[float]:
        return [of_seed[side][name] for of_seed in runs.values() if side in of_seed]

    def divide(side: str, other: str) -> list[float]:
        return [
            of_seed[side]["training_seconds"] / of_seed[other]["training_seconds"]
            for of_seed in runs.values()
            if side in of_seed and other in of_seed
        ]

    figures = {side: {"training_seconds": summarize(collect(side, "training_seconds"))} for side in sides}
    ratios = {"over_capped": divide("portable", "capped"), "over_native": divide("portable_avx512", "native")}
    return {
        **figures,
        **{name: summarize(values) for name, values in ratios.items() if values},
        **compare_accuracies(runs),
    }


@contextmanager
def take_images(recipe: str, dataset_folder: Path) -> Iterator[Path]:
    """Take all images, or as many as a recipe is measured on."""
    if recipe not in NUM_IMAGES:
        yield dataset_folder
        return
    with tempfile.TemporaryDirectory() as scratch:
        snapshot = load_snapshot(dataset_folder)
        test = snapshot.num_train + np.arange(NUM_TEST)
        yield write_subset(snapshot, Path(scratch), np.arange(NUM_IMAGES[recipe]), test)


def build_table(result: dict[str, Any]) -> str:
    """Build the table of docs/portable.md."""
    lines = [
        "| recipe | time, relative to a run capped at AVX2 | time with AVX-512, relative to a native run "
        "| accuracy | difference to the capped run | runs |",
        "|---|---|---|---|---|---|",
    ]
    for recipe, of_recipe in result["recipes"].items():
        figures = of_recipe["figures"]
        cells = [
            f"{ratio['mean']:.2f} ({ratio['least']:.2f} to {ratio['most']:.2f})" if ratio else ""
            for ratio in (figures.get("over_capped"), figures.get("over_native"))
        ]
        # An accuracy after a part of the images says nothing.
        accuracies = figures if recipe not in NUM_IMAGES else of_recipe.get("whole", {}).get("figures")
        if accuracies:
            accuracy, less = accuracies["accuracy"], accuracies["accuracy_less_capped"]
            difference = f"{100 * less['mean']:+.2f} ± {100 * less['standard_deviation']:.2f} points"
            cells += [f"{accuracy['mean']:.1%}", difference]
        else:
            cells += ["", ""]
        seconds, whole = figures["over_capped"]["runs"], accuracies and accuracies["accuracy"]["runs"]
        cells.append(f"{seconds}" if whole in (seconds, None) else f"{seconds} (accuracy: {whole})")
        lines.append(f"| `{recipe}` | {' | '.join(cells)} |".replace("%", " %"))
    machine = f"{result['cores']} cores of an {result['processor']}"
    parts = [f"`{recipe}` on {number:,} images" for recipe, number in NUM_IMAGES.items() if recipe in result["recipes"]]
    seconds = f"Times are those of the epochs ({', '.join(parts)}), on {machine}. Runs of a seed alternated."
    return "\n".join([*lines, "", seconds, ""])


def main() -> None:
    """Measure, save and write the table."""
    parser = build_parser(__doc__)
    parser.add_argument("--recipe", nargs="+", default=["notebook", "quick", "fast"])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--accuracy_only", action="store_true", help="train on all images, and take no time")
    arguments = parser.parse_args()
    recipes: dict[str, Any] = load_result("portable").get("recipes", {})
    for seed in range(arguments.runs):
        for recipe in arguments.recipe:
            of_recipe = recipes.setdefault(recipe, {"runs": {}})
            of_recipe = of_recipe.setdefault("whole", {"runs": {}}) if arguments.accuracy_only else of_recipe
            runs = of_recipe["runs"]
            if str(seed) in runs:
                continue
            if arguments.accuracy_only:
                runs[str(seed)] = measure_accuracy(recipe, seed, arguments.dataset_folder)
                of_recipe["figures"] = compare_accuracies(runs)
            else:
                with take_images(recipe, arguments.dataset_folder) as folder:
                    runs[str(seed)] = measure_sides(recipe, seed, folder)
                of_recipe["figures"] = summarize_runs(runs)
            save_result("portable", {"recipes": recipes})
    write_table(DOCUMENT, "portable", build_table(load_result("portable")))


if __name__ == "__main__":
    main()
