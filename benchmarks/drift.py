"""How often drift is found, by how much images have changed, and how often it is found where nothing has.

    python -m benchmarks.drift --dataset_folder DATA [--run RUN] [--num_windows 100] [--num_repeats 20]
    python -m benchmarks.drift --only tables

DATA holds real CIFAR-10; RUN is a published run on it, by default one of recipe `quick` that is trained for this. Each
window is of a random division of the test set: one half makes the reference, as `publish` makes it, and the window is
drawn from the other half. So no image is in both, and undisturbed windows differ from the reference by chance alone.
Each window is written as a capture and read again, as `drift` reads it. Images are changed before the network sees
them. Writes benchmarks/results/drift.json, the table in docs/drift.md, and docs/pictures/drift.png.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from scipy.stats import binomtest

from benchmarks.measure import PROJECT, load_result, measure_command, save_result, write_table
from image_classifier.capture.files import CaptureFacts
from image_classifier.data.dataset import load_snapshot
from image_classifier.monitoring.drift import DriftTest, compute_tests
from image_classifier.monitoring.window import Served, load_window
from image_classifier.published.folder import PUBLISHED, read_manifest
from image_classifier.published.predictor import Predictor, load_predictor
from image_classifier.published.reference import build_reference
from tests.captures import write_captures

DOCUMENT = PROJECT / "docs" / "drift.md"
PICTURE = PROJECT / "docs" / "pictures" / "drift.png"
LEVELS = (0.01, 0.05)
"""The first is the command's."""
WINDOW = 1000
UNDISTURBED_WINDOWS = (200, 1000, 4000)
STEPS: dict[str, tuple[float, ...]] = {
    "brightness": (2, 4, 8, 16, 32),
    "blur": (0.2, 0.3, 0.4, 0.5, 0.7),
    "JPEG quality": (95, 85, 70, 50, 30, 10),
    "class mix": (0.02, 0.05, 0.1, 0.2, 0.3),
}
UNITS = {
    "brightness": "levels added, of 255",
    "blur": "radius in pixels",
    "JPEG quality": "libjpeg's scale",
    "class mix": "part replaced by cats",
}
MORE_OF = 3
"""The class that comes more often, cats."""


@dataclass(frozen=True)
class Answered:
    """The test set and the answers to it: uint8 [N, S, S, 3], float32 [N, C], int64 [N]."""

    images: NDArray[np.uint8]
    probabilities: NDArray[np.float32]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]


def predict(predictor: Predictor, images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Predict images batch by batch."""
    starts = range(0, len(images), 100)
    return np.concatenate([predictor.predict(images[start : start + 100]) for start in starts])


def change_image(kind: str, step: float, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Change the brightness, sharpness or JPEG quality of an image [S, S, 3] by a step."""
    if kind == "brightness":
        return np.clip(image.astype(np.int16) + int(step), 0, 255).astype(np.uint8)
    picture = Image.fromarray(image)
    if kind == "blur":
        return np.asarray(picture.filter(ImageFilter.GaussianBlur(step)))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=int(step))
    return np.asarray(Image.open(buffer))


def change_images(predictor: Predictor, answered: Answered, kind: str, step: float) -> Answered:
    """Change all images, and have them answered again."""
    images = np.stack([change_image(kind, step, image) for image in answered.images])
    return Answered(images, predict(predictor, images), answered.labels, answered.classes)


def compare_window(
    answered: Answered, changed: Answered, rows: NDArray[np.int64], half: NDArray[np.int64]
) -> list[DriftTest]:
    """Test the rows of changed images, captured, against a reference of half of the unchanged ones."""
    reference = build_reference(
        answered.classes, answered.images[half].transpose(0, 3, 1, 2), answered.probabilities[half]
    )
    facts = CaptureFacts(answered.images.shape[1], answered.classes, "0" * 64)
    served = Served("the model", facts.classes, facts.image_size, frozenset((facts.model_digest,)))
    with tempfile.TemporaryDirectory() as folder:
        write_captures(Path(folder), facts, changed.images[rows], changed.probabilities[rows])
        window = load_window(folder, served, len(rows))
    return compute_tests(reference, window.images, window.probabilities)


def draw_rows(
    answered: Answered, size: int, seed: int, more: float = 0.0
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Draw the rows of a window and of the reference; a part of the window is replaced by more images of one class."""
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(answered.images))
    half, pool = order[: len(order) // 2], order[len(order) // 2 :]
    rows, others = pool[:size].copy(), pool[size:]
    number = round(more * size)
    of_class = others[answered.labels[others] == MORE_OF][:number]
    if len(of_class) < number:
        sys.exit(f"there are {len(of_class)} images of class {MORE_OF} beside a window of {size}, and not {number}")
    rows[:number] = of_class
    return generator.permutation(rows), half


def measure_windows(
    answered: Answered, changed: Answered, seeds: Sequence[int], size: int, more: float = 0.0
) -> dict[str, Any]:
    """Test windows of one kind; count where drift was found at all, at each level, and by which test."""
    found = []
    for seed in seeds:
        rows, half = draw_rows(answered, size, seed, more)
        found.append({test.name: test.p_value for test in compare_window(answered, changed, rows, half)})
    least = [min(p_values.values()) for p_values in found]
    return {
        "num_windows": len(seeds),
        "found": {str(level): sum(p_value <= level for p_value in least) for level in LEVELS},
        "found_by": {name: sum(each[name] <= LEVELS[0] for each in found) for name in found[0]},
    }


@contextmanager
def published(run: Path | None, dataset_folder: Path) -> Iterator[Path]:
    """Yield a published folder: of the run, or of one of recipe `quick` that is trained first."""
    if run is not None:
        yield run / PUBLISHED
        return
    with tempfile.TemporaryDirectory() as scratch:
        names = ("--experiment_name", "benchmark", "--run_name", "quick", "--recipe", "quick")
        places = ("--experiments_folder", scratch, "--dataset_folder", dataset_folder)
        measure_command([sys.executable, "-m", "image_classifier.main", *names, *places])
        measure_command([sys.executable, "-m", "image_classifier", "publish", f"{scratch}/benchmark/quick"])
        yield Path(scratch, "benchmark", "quick", PUBLISHED)


def measure(folder: Path, dataset_folder: Path, num_windows: int, num_repeats: int) -> None:
    """Measure undisturbed windows, then each step of each change."""
    predictor, snapshot = load_predictor(folder), load_snapshot(dataset_folder)
    images = np.ascontiguousarray(snapshot.test[0].transpose(0, 2, 3, 1))
    labels = snapshot.test[1].astype(np.int64)
    answered = Answered(images, predict(predictor, images), labels, snapshot.classes)
    manifest = read_manifest(folder)
    result: dict[str, Any] = {
        "model": manifest["run_name"],
        "accuracy": float((answered.probabilities.argmax(axis=1) == labels).mean()),
        "weights_digest": manifest["weights_digest"],
        "num_reference": len(images) // 2,
        "window": WINDOW,
        "undisturbed": {},
        "changed": {},
    }
    seeds = range(num_windows)
    for size in UNDISTURBED_WINDOWS:
        windows = measure_windows(answered, answered, seeds, min(size, len(images) // 2))
        result["undisturbed"][str(size)] = windows
        print(f"undisturbed {size}: found in {windows['found'][str(LEVELS[0])]} of {num_windows}", flush=True)
    for kind, steps in STEPS.items():
        for step in steps:
            is_mix = kind == "class mix"
            changed = answered if is_mix else change_images(predictor, answered, kind, step)
            more = step if is_mix else 0.0
            windows = measure_windows(answered, changed, range(num_repeats), min(WINDOW, len(images) // 2), more)
            accuracy = None if is_mix else float((changed.probabilities.argmax(axis=1) == labels).mean())
            result["changed"].setdefault(kind, {})[f"{step:g}"] = windows | {"accuracy": accuracy}
            print(f"{kind} {step:g}: found in {windows['found'][str(LEVELS[0])]} of {num_repeats}", flush=True)
    save_result("drift", result)


def build_table(result: dict[str, Any]) -> str:
    """Build what docs/drift.md shows."""
    lines = ["| images of a window | false alarms at level 0.01 | at level 0.05 |", "|---|---|---|"]
    for size, windows in result["undisturbed"].items():
        cells = [_format_rate(windows, level) for level in LEVELS]
        lines.append(f"| {int(size):,} | {cells[0]} | {cells[1]} |")
    lines += ["", "| change | step | accuracy | drift found at level 0.01 | by |", "|---|---|---|---|---|"]
    for kind, steps in result["changed"].items():
        for step, windows in steps.items():
            by = sorted(windows["found_by"].items(), key=lambda item: -item[1])
            names = ", ".join(f"{name} {number}" for name, number in by if number)
            accuracy = "" if windows["accuracy"] is None else f"{100 * windows['accuracy']:.1f} %"
            lines.append(
                f"| {kind}, {UNITS[kind]} | {step} | {accuracy} | {_format_rate(windows, LEVELS[0])} | {names} |"
            )
    lines += ["", "![Windows in which drift was found, by how much the images have changed](pictures/drift.png)", ""]
    lines.append(
        f"Measured by `python -m benchmarks.drift` on {result['processor']}, commit {result['commit'][:12]}. The model "
        f"is `{result['model']}`, with {100 * result['accuracy']:.1f} % accuracy. Changed windows have "
        f"{result['window']:,} images, references {result['num_reference']:,}. In brackets: 95 % intervals (Wilson). "
        "This copy of CIFAR-10 went through JPEG once before, so some qualities change less than a higher one."
    )
    return "\n".join(lines) + "\n"


def _format_rate(windows: dict[str, Any], level: float) -> str:
    number, total = windows["found"][str(level)], windows["num_windows"]
    low, high = compute_interval(number, total)
    return f"{number} of {total} [{100 * low:.0f}, {100 * high:.0f}] %"


def compute_interval(number: int, total: int) -> tuple[float, float]:
    """Compute Wilson's 95 % interval of a rate."""
    interval = binomtest(number, total).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def draw(result: dict[str, Any]) -> Figure:
    """Draw the part of the windows in which drift was found, over the steps of each change."""
    figure = Figure(figsize=(10, 3), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    undisturbed = result["undisturbed"][str(result["window"])]
    columns = figure.subplots(1, len(result["changed"]), sharey=True)
    for axes, (kind, steps) in zip(columns, result["changed"].items(), strict=True):
        _draw_curve(axes, steps, undisturbed)
        axes.set(title=kind, xlabel=UNITS[kind], ylim=(-0.03, 1.03))
    figure.axes[0].set_ylabel(f"drift found, {result['window']:,} images")
    return figure


def _draw_curve(axes: Axes, steps: dict[str, Any], undisturbed: dict[str, Any]) -> None:
    level = str(LEVELS[0])
    points = [("none", undisturbed), *steps.items()]
    rates = [windows["found"][level] / windows["num_windows"] for _, windows in points]
    intervals = [compute_interval(windows["found"][level], windows["num_windows"]) for _, windows in points]
    whiskers = np.abs(np.array(intervals).T - rates)
    axes.errorbar(range(len(points)), rates, yerr=whiskers, fmt="o-", color="#1f5fa8", elinewidth=1.2, markersize=5)
    axes.set_xticks(range(len(points)), [name for name, _ in points])
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)


def compute_figures_digest(result: dict[str, Any]) -> str:
    """Compute a digest of the figures that the picture shows."""
    shown = json.dumps([result["undisturbed"], result["changed"]], sort_keys=True)
    return hashlib.sha256(shown.encode()).hexdigest()


def write_document(result: dict[str, Any]) -> None:
    """Draw the picture and write the table."""
    draw(result).savefig(PICTURE, metadata={"Description": compute_figures_digest(result)})
    write_table(DOCUMENT, "drift", build_table(result))


def main() -> None:
    """Measure, save, and write what the document shows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dataset_folder", type=Path)
    parser.add_argument("--run", type=Path, default=None)
    parser.add_argument("--num_windows", type=int, default=100)
    parser.add_argument("--num_repeats", type=int, default=20)
    parser.add_argument("--only", choices=["tables"], default=None)
    arguments = parser.parse_args()
    if arguments.only is None:
        if arguments.dataset_folder is None:
            parser.error("--dataset_folder is needed")
        with published(arguments.run, arguments.dataset_folder) as folder:
            measure(folder, arguments.dataset_folder, arguments.num_windows, arguments.num_repeats)
    write_document(load_result("drift"))


if __name__ == "__main__":
    main()
