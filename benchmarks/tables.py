"""The figures of the README, docs/benchmarks.md and the recipes, out of benchmarks/results.

`python -m benchmarks.tables` puts them there: a part of either document between `<!-- name -->` and `<!-- end -->` is
what `build_tables()` gives under that name.
"""

from __future__ import annotations

import argparse
from typing import Any

from benchmarks.measure import PROJECT, RESULTS, format_figure, load_result, summarize
from image_classifier.recipe import get_recipe_path

RECIPES = {
    "fast": "airbench's network and Muon, images that grow from 16 to 32 pixels, test-time augmentation",
    "best": "a wider network, longer, with cutout",
    "quick": "the network of `fast`, narrower and shorter",
    "small": "the network of `quick`, in smaller batches and more epochs, here on 5,000 of the images",
    "notebook": "LeNet of 62,006 parameters, SGD 0.001, momentum 0.9, batches of 4, 2 epochs",
}

COMPARISONS = {
    "time_to_accuracy_native": (
        "fast",
        "training to about 90%",
        "airbench94 with Muon",
    ),
    "capped_avx2": (
        "fast",
        "the same without AVX-512 and BF16, epochs of 4,000 images",
        "the same",
    ),
    "notebook_job_native": ("notebook", "LeNet of PyTorch's tutorial", "the tutorial's training loop"),
    "notebook_job_avx2": ("notebook", "the same without AVX-512", "the same"),
}
"""Results that have two sides: the recipe, what is compared, and the other side."""


README, DOCUMENT = PROJECT / "README.md", PROJECT / "docs" / "benchmarks.md"
PLACES = {"claims": README, "fast": README}
"""The parts that stand elsewhere than in docs/benchmarks.md."""


def build_tables() -> dict[str, str]:
    """Build each part of the documents that has figures, by its name."""
    return {
        "claims": _build_claims_table(),
        "fast": _build_fast_sentence(),
        "recipes": _build_recipes_table(),
        "speed": _build_speed_table(),
        "publishing": _build_publishing_table(),
        "record": _build_record_sentence(),
        "crashes": _build_crash_sentence(),
        "container": _build_container_sentence(),
        "ages": _build_ages_table(),
    }


def _build_claims_table() -> str:
    crashes, cost, scaling = load_result("crash_campaign"), load_result("record_cost"), load_result("scaling")
    kills, trials, failures = sum(crashes["kills_by_kind"].values()), crashes["trials"], len(crashes["failures"])
    slower = load_result("portable")["recipes"]["fast"]["figures"]["over_native"]["mean"]
    speed = load_result("time_to_accuracy_native")
    ours, others = speed["trainer"], speed["baseline"]
    parities = [line for model in load_result("publishing")["models"] for line in model["parity"]]
    agreement, apart = min(p["agreement"] for p in parities), max(p["largest_difference"] for p in parities)
    servers = load_result("serving")["networks"]["notebook"]["servers"]
    own, *rates = (
        f"{servers[name]['connections']['32']['requests_per_second']:,.0f}"
        for name in ("own", "mosec", "litserve", "bentoml")
    )
    rows = [
        (
            "A killed run resumes and ends with bit-identical weights",
            f"{kills:,} kills of {trials:,} runs; {failures} ended with other weights",
        ),
        (
            "`verify` repeats a recorded run and compares it step by step",
            f"recording costs {cost['cost']['mean']:.2%} of the training time; runs: {cost['cost']['runs']}",
        ),
        (
            "Any number of threads or processes gives the same bits",
            f"two processes reach {scaling['ranks']['mean']:.2f} times the speed of two threads",
        ),
        (
            "Any x86-64 with AVX2, and any aarch64, can give the same bits",
            f"`fast` takes {slower:.2f} times as long as with AVX-512; aarch64 was emulated",
        ),
        (
            "It trains faster on a CPU than the algorithm of the CIFAR-10 speed record",
            f"CIFAR-10 to {ours['accuracy']['mean']:.1%} in {_describe_range(ours['seconds'], unit=' s')} on "
            f"{speed['cores']} cores; airbench94 takes {others['seconds']['mean']:.0f} s to "
            f"{others['accuracy']['mean']:.1%}; runs: "
            f"{ours['seconds']['runs']} and {others['seconds']['runs']}",
        ),
        (
            "The published model is checked against the run on every test image",
            f"{agreement:.2%} of the predicted classes agree, probabilities within {apart:.1e}",
        ),
        (
            "The server needs no torch and handles more requests than general model servers",
            f"LeNet, 32 connections: {own} requests/s; mosec {rates[0]}, LitServe {rates[1]}, BentoML {rates[2]}",
        ),
    ]
    lines = ["| what it does | measured |", "|---|---|", *(f"| {what} | {figure} |" for what, figure in rows)]
    return "\n".join(lines).replace("%", " %")


def _build_fast_sentence() -> str:
    fast, quick = load_recipe_result("fast"), load_recipe_result("quick")
    reached = [
        f"`{name}` reaches {_describe_accuracy(result['accuracy'])} in {_describe_range(result['seconds'], unit=' s')}."
        for name, result in (("fast", fast), ("quick", quick))
    ]
    return (
        f"{' '.join(reached)} Measured on {fast['cores']} cores of an {fast['processor']}, "
        "with a copy of CIFAR-10 that was compressed as JPEG once."
    ).replace("%", " %")


def _build_ages_table() -> str:
    """Build the table of when each result was measured, which says how old a figure is."""
    lines = ["| result | measured on | at commit | processor |", "|---|---|---|---|"]
    for path in sorted(RESULTS.glob("*.json")):
        result = load_result(path.stem)
        lines.append(
            f"| `{path.stem}` | {result['measured_at'][:10]} | `{result['commit'][:8]}` | {result['processor']} |"
        )
    return "\n".join(lines)


def _build_recipes_table() -> str:
    lines = [
        "| recipe | network and training | test accuracy | from the command to the finished run | peak memory |",
        "|---|---|---|---|---|",
    ]
    machines: set[str] = set()
    for name, title in RECIPES.items():
        result = load_recipe_result(name)
        if "accuracy" not in result:
            lines.append(f"| `{name}` | {title} | not measured yet | | |")
            continue
        machines.add(f"{result['cores']} cores of an {result['processor']}")
        accuracy, seconds, memory = result["accuracy"], result["seconds"], result["peak_memory_mb"]
        lines.append(
            f"| `{name}` | {title} | {_describe_accuracy(accuracy)} | {_describe_range(seconds, unit=' s')} "
            f"| {memory['most'] / 1000:.1f} GB |"
        )
    table = "\n".join(lines) + "\n\n" + _describe_capped()
    return table.replace("%", " %") + (
        "\n\nMeasured by `python -m benchmarks.recipes` (`fast`: `time_to_accuracy`) on "
        f"{' or '.join(sorted(machines))} without a GPU, on a copy of CIFAR-10 whose images went "
        "through JPEG once, which costs some accuracy: compare only with figures "
        "of the same copy. The ± is the standard deviation over the seeds."
    )


def _describe_capped() -> str:
    results = {path.stem: load_result(path.stem) for path in sorted(RESULTS.glob("recipe_*_avx2*.json"))}
    reached = []
    for name, result in results.items():
        length = f" with {result['num_epochs']} epochs" if "num_epochs" in result else ""
        length += f" on {result['num_images']:,} images" if "num_images" in result else ""
        accuracy, seconds = _describe_accuracy(result["accuracy"]), _describe_range(result["seconds"], unit=" s")
        reached.append(f"`{name.split('_')[1]}`{length} {accuracy} in {seconds}")
    processors = " or ".join(sorted({result["processor"] for result in results.values()}))
    lines = "\n".join(f"- {line}" for line in reached)
    return f"Without AVX-512 and BF16, on an {processors}:\n\n{lines}"


def load_recipe_result(name: str) -> dict[str, Any]:
    """Load what a recipe was measured at: by itself, or else beside a baseline."""
    compared = {recipe: result for result, (recipe, _, _) in COMPARISONS.items() if result.endswith("_native")}
    result = load_result(f"recipe_{name}") or load_result(compared.get(name, ""))
    return {**result, **result.get("trainer", {})}


def _describe_accuracy(accuracy: dict[str, float]) -> str:
    if accuracy["runs"] == 1:
        return f"{accuracy['mean']:.1%} (1 seed)"
    spread = f"{accuracy['runs']} seeds: {accuracy['least']:.1%} to {accuracy['most']:.1%}"
    return f"{accuracy['mean']:.1%} ± {accuracy['standard_deviation']:.1%} ({spread})"


def _describe_range(figure: dict[str, float], digits: int = 0, unit: str = "") -> str:
    mean = f"{figure['mean']:.{digits}f}{unit}"
    return mean if figure["runs"] == 1 else f"{mean} ({figure['least']:.{digits}f} to {figure['most']:.{digits}f})"


def _build_speed_table() -> str:
    lines = [
        "| training | this trainer | baseline | ratio of the times, number of pairs | processor |",
        "|---|---|---|---|---|",
    ]
    for name, (recipe, what, other) in COMPARISONS.items():
        result = load_result(name)
        if "ratio" not in result:  # not measured yet
            continue
        is_whole = not name.startswith("capped")  # the accuracy after a part of the images says nothing
        sides = [_describe_side(result[side], is_whole) for side in ("trainer", "baseline")]
        ratio = f"{_describe_range(result['ratio'], 2)}, {result['ratio']['runs']}"
        lines.append(f"| {what} | `{recipe}`: {sides[0]} | {other}: {sides[1]} | {ratio} | {result['processor']} |")
    notebook = load_result("notebook_job_native")
    eager = summarize([run["seconds"] for run in notebook["runs"]["eager"]])
    floors, start = load_result("floor"), load_result("start")
    return "\n".join(lines).replace("%", " %") + (
        f"\n\nWithout kernels (`--engine eager`), `notebook` takes "
        f"{_describe_range(eager, unit=' s')}.\n\n"
        f"On an {floors['processor']}, commit {floors['commit'][:8]}: "
        f"{'. '.join(_describe_floor(recipe, floors[recipe]) for recipe in ('fast', 'notebook', 'best'))} "
        f"(`python -m benchmarks.floor`). The first step ends "
        f"{start['first_step']['mean']:.1f} s after the command on an {start['processor']} "
        f"({start['first_step']['least']:.1f} to "
        f"{start['first_step']['most']:.1f} s; `python -m benchmarks.start`)."
    )


def _describe_floor(recipe: str, floor: dict[str, Any]) -> str:
    cap = " without AVX-512 and BF16" * (floor["instruction_set"] == "avx2")
    threads = f"{floor['num_threads']} thread{'s' * (floor['num_threads'] > 1)}"
    operations, rate = format_figure(floor["operations"] / 1e12), format_figure(floor["operations_per_second"] / 1e9)
    return (
        f"Direct convolutions of `{recipe}` need {operations} TFLOP, or {format_figure(floor['floor_seconds'])} s at "
        f"this machine's peak of {rate} GFLOP/s ({floor['precision']} GEMM, {threads}). The training{cap} takes "
        f"{floor['training_over_floor']:.1f} times as long"
    )


def _describe_side(side: dict[str, Any], with_accuracy: bool) -> str:
    accuracy = [f"{side['accuracy']['mean']:.1%}"] * with_accuracy
    runs = side["seconds"]["runs"]
    return ", ".join([f"{side['seconds']['mean']:.0f} s", *accuracy, f"{runs} run{'s' * (runs > 1)}"])


def build_recipe_line(name: str) -> str:
    """Build the line at a recipe's head that says what it was measured at."""
    result = load_recipe_result(name)
    if "accuracy" not in result:
        return "# Not measured yet."
    accuracy = result["accuracy"]
    part = f"{result['num_images']:,} images of " if "num_images" in result else ""
    text = (
        f"# Measured: {result['cores']} cores of an {result['processor']}, {result['seconds']['mean']:.0f} s, "
        f"{accuracy['mean']:.1%} test accuracy (mean of {accuracy['runs']} run{'s' * (accuracy['runs'] > 1)}, "
        f"on {part}the JPEG copy of CIFAR-10)."
    )
    return text.replace("%", " %")


def _build_publishing_table() -> str:
    result = load_result("publishing")
    lines = [
        "| recipe, test views | largest difference | size, fp32 and int8 | accuracy, fp32 and int8 "
        "| images/s: torch, fp32, int8 |",
        "|---|---|---|---|---|",
    ]
    for model in result["models"]:
        int8, speed = model["int8"], model["images_per_second"]
        difference = max(line["largest_difference"] for line in model["parity"])
        has_int8 = int8["published"]
        sizes = [f"{int8['bytes'][name] / 1e6:.2f} MB" for name in ("fp32", "int8")[: 1 + has_int8]]
        accuracy = [f"{int8['accuracy'][name]:.2%}" for name in ("fp32", "int8")[: 1 + has_int8]]
        rates = [_describe_rate(speed[name]) for name in ("torch", "fp32", "int8")[: 2 + has_int8]]
        lines.append(
            f"| `{model['recipe']}`, {model['views']} | {difference:.1e} | {', '.join(sizes)} | {', '.join(accuracy)} "
            f"| {'; '.join(rates)} |"
        )
    lines_of_all = [line for model in result["models"] for line in model["parity"]]
    batch_sizes = ", ".join(str(size) for size in dict.fromkeys(line["batch_size"] for line in lines_of_all))
    agreement = min(line["agreement"] for line in lines_of_all)
    return "\n".join(lines).replace("%", " %") + (
        f"\n\nThe difference is the largest of a probability over all {result['models'][0]['num_images']:,} test "
        f"images, in "
        f"batches of {batch_sizes}; {agreement:.2%} of the predicted classes agree. Speed is measured with batches of "
        f"64 "
        f"on {result['cores']} cores, alternating with torch eager; mean and range (`python -m "
        f"benchmarks.publishing`). No "
        "int8 figures: quantization did not pay off for this model."
    ).replace("%", " %")


def _describe_rate(rate: dict[str, float]) -> str:
    return f"{rate['mean']:,.0f} ({rate['least']:,.0f} to {rate['most']:,.0f})"


def _build_record_sentence() -> str:
    cost, start = load_result("record_cost"), load_result("start")
    runs = cost["cost"]["runs"]
    return (
        f"Record, checkpoints and digests together take {cost['cost']['mean']:.2%} of a `fast` run's time, the "
        f"digests alone {cost['cost_of_digests']['mean']:.2%} (`python -m benchmarks.record_cost`, {runs} "
        f"run{'s' * (runs > 1)}). `verify --files_only` takes {start['verify_files_only']['mean']:.2f} s, "
        f"`--help` {start['help']['mean']:.2f} s, and loading the snapshot of CIFAR-10, with a check of its digest, "
        f"{start['read_again']['mean']:.2f} s (`python -m benchmarks.start`)."
    ).replace("%", " %")


def _build_crash_sentence() -> str:
    result, races = load_result("crash_campaign"), load_result("races")
    kills = sum(result["kills_by_kind"].values())
    file, commands = races["file"], races["commands"]
    return (
        f"{result['trials']:,} tiny runs were killed with SIGKILL {kills:,} times: before and during every call to the "
        f"disk, and at random moments. {len(result['failures'])} of them ended with other bits than an "
        "uninterrupted run (`python -m benchmarks.crash_campaign`). Four processes wrote one file "
        f"{file['num_writes']:,} times while two read it and {file['num_kills']} more writers were killed: "
        f"{file['num_torn']} of {file['num_reads']:,} reads were torn. Commands raced for the same name "
        f"{sum(commands['rounds'].values())} times, and {len(commands['failures'])} failed (`python -m "
        f"benchmarks.races`)."
    )


def _build_container_sentence() -> str:
    result = load_result("container")
    return (
        f"The image takes {result['image_bytes'] / 1e9:.1f} GB, including {result['torch_bytes'] / 1e9:.1f} GB of "
        f"torch and "
        "its GPU libraries. After a code change, it is rebuilt in "
        f"{result['rebuild_seconds']['mean']:.1f} s (`python -m benchmarks.container`)."
    )


def main() -> None:
    """Put the figures into the documents and the recipes."""
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()
    for name, content in build_tables().items():
        document = PLACES.get(name, DOCUMENT)
        text = document.read_text(encoding="utf-8")
        before, found, rest = text.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition("<!-- end -->")
        if not found or not end:
            raise SystemExit(f"{document.relative_to(PROJECT)} has no part <!-- {name} -->")
        document.write_text(f"{before}{found}{content}\n{end}{after}", encoding="utf-8")
    for name in RECIPES:
        recipe = get_recipe_path(name)
        lines = recipe.read_text(encoding="utf-8").splitlines()
        lines[2] = build_recipe_line(name)
        recipe.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
