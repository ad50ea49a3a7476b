"""A set of many gigabytes: how fast and in how much memory its snapshot is made, after a kill too, and trained on.

    python -m benchmarks.large_data --dataset_folder DATA [--gigabytes 10] [--scratch FOLDER] [--runs 3]

DATA holds real CIFAR-10. Its images are scaled to 224 pixels, with noise that no compression takes away, and packed as
JPEG into WebDataset tars, so many that both tars and snapshot have that size, and a tenth of them into Parquet files.
`data prepare` is measured with all processes that it starts: memory is the sum of their proportional set sizes, taken
ten times a second. It is then killed in the middle, with SIGKILL, and started again. Steps of ResNet-18 on the large
snapshot are measured in turn with steps on 500 of its images, with a cold page cache before each. How well
`--shuffle_window` shuffles is measured on CIFAR-10 sorted by class, and computed for a set of ImageNet's size. All that
is generated lies in the scratch folder, which needs 2.4 times that size, and is removed at the end.
"""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.measure import (
    PROJECT,
    build_parser,
    format_figure,
    load_result,
    measure_command,
    save_result,
    summarize,
    write_table,
)
from benchmarks.subsets import write_subset
from image_classifier.access import Reading
from image_classifier.data import webdataset
from image_classifier.data.blocks import BLOCK_BYTES, compute_windows
from image_classifier.data.dataset import load_snapshot
from image_classifier.data.snapshot import Snapshot
from image_classifier.image_sizes import ImageSize
from image_classifier.settings import TrainingSettings

DOCUMENT = PROJECT / "docs" / "scaling.md"
SIDE: ImageSize = 224
IMAGE_BYTES = 3 * SIDE * SIDE
NUM_SHARD, NUM_SMALL = 500, 500
"""Images of a shard, and of the small set."""
QUALITY, NOISE = 98, 64
BATCH_SIZE, NUM_STEPS, NUM_BEFORE = 32, 20, 3
NUM_LOADED = 4000
"""Images that the loader reads without training."""
WINDOWS = (512, 2048, 8192)
"""MiB; the shuffling of these is computed for a set of ImageNet's size."""
SORTED_WINDOWS = (0, 64, 16, 4)
"""MiB; CIFAR-10, sorted by class, is trained on in these orders."""
IMAGENET, IMAGENET_CLASSES, IMAGENET_BATCH = 1_281_167, 1000, 256
DISKS = {"disk with heads (8 ms, 150 MB/s)": (8e-3, 150e6), "SSD (0.1 ms, 500 MB/s)": (1e-4, 500e6)}
"""Seconds to get to a place and bytes a second; assumed."""
SAMPLE_S = 0.1


def encode_image(image: NDArray[np.uint8], number: int) -> bytes:
    """Encode a CIFAR image [3, 32, 32], scaled up and noisy, as JPEG."""
    from PIL import Image

    large = Image.fromarray(image.transpose(1, 2, 0)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    noise = np.random.default_rng(number).integers(-NOISE, NOISE + 1, (SIDE, SIDE, 3), np.int16)
    pixels = np.clip(np.asarray(large, np.int16) + noise, 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=QUALITY, subsampling=0)
    return buffer.getvalue()


@cache
def load_source(source: Path) -> Snapshot:
    """Load CIFAR-10, once in each process."""
    return load_snapshot(source)


def encode_shard(source: Path, start: int, stop: int) -> Iterator[tuple[str, bytes, int]]:
    """Encode the images of a shard: key, bytes and label."""
    snapshot = load_source(source)
    for number in range(start, stop):
        row = number % len(snapshot.labels)
        yield f"{number:08d}", encode_image(np.asarray(snapshot.images[row]), number), int(snapshot.labels[row])


def write_tar(path: Path, source: Path, start: int, stop: int) -> None:
    """Write a shard of WebDataset."""
    with tarfile.open(path, "w") as archive:
        for key, image, label in encode_shard(source, start, stop):
            for suffix, content in (("jpg", image), ("cls", b"%d" % label)):
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


def write_parquet(path: Path, source: Path, start: int, stop: int) -> None:
    """Write a shard of Parquet."""
    import pyarrow
    import pyarrow.parquet

    rows = list(encode_shard(source, start, stop))
    images = [{"bytes": image, "path": f"{key}.jpg"} for key, image, _ in rows]
    table = pyarrow.table({"image": images, "label": [label for _, _, label in rows]})
    pyarrow.parquet.write_table(table, path, row_group_size=100, compression="none")


def generate(folder: Path, source: Path, num_images: int, kind: str) -> int:
    """Generate a set, a tenth of it to test with; return its size in bytes."""
    folder.mkdir()
    (folder / "metadata.json").write_text(json.dumps({"classes": load_source(source).classes}))
    num_test = max(1, num_images // 10)
    write = write_tar if kind == "tar" else write_parquet
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for part, first, last in (("test", 0, num_test), ("train", num_test, num_images)):
            starts = range(first, last, NUM_SHARD)
            paths = [folder / f"{part}-{number:05d}-of-{len(starts):05d}.{kind}" for number in range(len(starts))]
            stops = [min(start + NUM_SHARD, last) for start in starts]
            list(pool.map(write, paths, [source] * len(paths), starts, stops))
    return sum(path.stat().st_size for path in folder.iterdir())


@dataclass
class Memory:
    """The memory of a process group, taken by a thread of this process until it is stopped."""

    group: int
    peak_mb: float = 0.0
    samples: int = 0
    stopped: threading.Event = field(default_factory=threading.Event)

    def watch(self) -> None:
        """Take samples."""
        while not self.stopped.wait(SAMPLE_S):
            kilobytes = sum(map(self._read, os.listdir("/proc")))
            self.peak_mb = max(self.peak_mb, kilobytes / 1024)
            self.samples += 1

    def _read(self, name: str) -> int:
        try:
            if not name.isdigit() or os.getpgid(int(name)) != self.group:
                return 0
            lines = Path(f"/proc/{name}/smaps_rollup").read_text(encoding="utf-8").splitlines()
            return next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
        except (OSError, StopIteration):  # it has ended meanwhile
            return 0


@contextmanager
def prepare(folder: Path) -> Iterator[tuple[subprocess.Popen[bytes], Memory]]:
    """Start `data prepare` in a process group of its own, and take its memory; what it says is beside the folder."""
    command = [sys.executable, "-m", "image_classifier", "data", "prepare", "--dataset_folder", str(folder)]
    with open(folder.with_suffix(".log"), "wb") as log:
        process = subprocess.Popen(
            [*command, "--image_size", str(SIDE)], cwd=PROJECT, stdout=log, stderr=log, start_new_session=True
        )
    memory = Memory(process.pid)
    thread = threading.Thread(target=memory.watch)
    thread.start()
    try:
        yield process, memory
    finally:
        memory.stopped.set()
        thread.join()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def measure_snapshot(folder: Path, num_images: int) -> dict[str, Any]:
    """Measure how long a snapshot takes that is made without interruption, and its memory."""
    started = time.perf_counter()
    with prepare(folder) as (process, memory):
        process.wait()
        seconds = time.perf_counter() - started
    said = folder.with_suffix(".log").read_text(encoding="utf-8")
    if process.returncode != 0:
        sys.exit(said)
    return {
        "digest": find_digest(said),
        "seconds": round(seconds, 1),
        "images_per_second": num_images / seconds,
        "peak_memory_mb": round(memory.peak_mb, 1),
        "samples": memory.samples,
    }


def find_digest(said: str) -> str:
    """Find the digest in what `data prepare` said."""
    return next(line.split()[1] for line in said.splitlines() if line.startswith("digest "))


def measure_killed(folder: Path, num_images: int, whole: dict[str, Any]) -> dict[str, Any]:
    """Kill the making of a snapshot when about half of it is saved, and measure how the next one goes on."""
    started = time.perf_counter()
    with prepare(folder) as (process, _):
        num_saved = 0
        while num_saved < num_images * 0.4 and process.poll() is None:
            time.sleep(0.05)
            num_saved = count_saved(folder)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    seconds = time.perf_counter() - started
    if process.returncode != -signal.SIGKILL:
        sys.exit("the snapshot was made before it could be killed: choose more --gigabytes")
    num_saved = count_saved(folder)
    resumed = measure_snapshot(folder, num_images - num_saved)
    return {
        "saved": num_saved,
        "seconds_before": round(seconds, 1),
        "seconds_after": resumed["seconds"],
        "over_whole": (seconds + resumed["seconds"]) / whole["seconds"],
        "peak_memory_mb": resumed["peak_memory_mb"],
        "is_same": resumed["digest"] == whole["digest"],
    }


def count_saved(folder: Path) -> int:
    """Count the images of the unfinished snapshot in a folder that are saved."""
    for path in (folder / ".snapshots").glob("unfinished-*/progress.json"):
        try:
            parts = json.loads(path.read_text())["parts"]
        except (OSError, ValueError):  # it is being replaced
            continue
        return sum(counts["kept"] for counts in parts.values())
    return 0


def cool_down(folder: Path) -> None:
    """Have the page cache give a snapshot up."""
    for path in (folder / ".snapshots").glob("*/images.npy"):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def build_settings(window: int) -> TrainingSettings:
    """Build the settings of the training that is measured."""
    options: dict[str, Any] = {"model": "resnet18_imagenet", "optimizer": "sgd", "learning_rate": 0.01, "momentum": 0.9}
    options |= {"batch_size": BATCH_SIZE, "image_size": SIDE, "image_sizes": (SIDE,), "num_epochs": 100}
    return TrainingSettings.from_recipe("small", **options, flip="random", shuffle_window=window)


def measure_steps(folder: Path, window: int) -> list[float]:
    """Measure the seconds of steps of a run, the images' way from the cold disk included."""
    from image_classifier.preparation import build_initial_classifier, build_loader, split_training_set
    from image_classifier.training.determinism import configure_torch, resolve_settings
    from image_classifier.training.loop import train
    from image_classifier.training.memory import keep_freed_memory
    from image_classifier.training.optimizer import build_optimizer

    settings = resolve_settings(build_settings(window))
    configure_torch()
    keep_freed_memory()
    snapshot = load_snapshot(folder, reading=Reading(image_size=SIDE))
    indices, _ = split_training_set(snapshot, settings)
    classifier = build_initial_classifier(settings, snapshot, indices, None)
    cool_down(folder)
    total = NUM_BEFORE + NUM_STEPS
    batches = islice(build_loader(snapshot, indices, settings, 1).iterate(settings.num_epochs), total)
    steps = train(classifier, batches, build_optimizer(classifier, settings), settings, num_steps=total)
    seconds, before = [], time.perf_counter()
    for _ in steps:
        now = time.perf_counter()
        seconds.append(now - before)
        before = now
    return seconds[NUM_BEFORE:]


def measure_loading(folder: Path, window: int) -> float:
    """Measure how many images a second the loader reads from the cold disk."""
    from image_classifier.preparation import build_loader, split_training_set

    settings = build_settings(window)
    snapshot = load_snapshot(folder, reading=Reading(image_size=SIDE))
    indices, _ = split_training_set(snapshot, settings)
    cool_down(folder)
    started, num_images = time.perf_counter(), 0
    for batch in build_loader(snapshot, indices, settings, 1).iterate(1):
        num_images += len(batch.labels)
        if num_images >= NUM_LOADED:
            break
    return num_images / (time.perf_counter() - started)


def measure_apart(name: str, folder: Path, window: int) -> Any:
    """Measure in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.large_data", "--dataset_folder", str(folder)]
    command += ["--measure", name, str(window)]
    answer = subprocess.run(command, cwd=PROJECT, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(answer.stdout.splitlines()[-1])


def measure_training(large: Path, small: Path, window: int, runs: int) -> dict[str, Any]:
    """Measure steps on the large set, in both orders, and on the small one, in turn, and what the loader reads."""
    cases = {"large": (large, 0), "window": (large, window), "small": (small, 0)}
    steps: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(runs):
        for name, (folder, of_window) in cases.items():
            steps[name].append(float(np.mean(measure_apart("steps", folder, of_window))))
            print(f"a step on {name}: {steps[name][-1] * 1e3:.0f} ms", flush=True)
    ratios = {name: [one / other for one, other in zip(steps[name], steps["small"], strict=True)] for name in steps}
    loaded = {name: [measure_apart("loading", large, of) for _ in range(runs)] for name, (_, of) in cases.items()}
    return {
        "window_mib": window,
        "step_ms": {name: summarize([value * 1e3 for value in values]) for name, values in steps.items()},
        "over_small": {name: summarize(ratios[name]) for name in ("large", "window")},
        "images_per_second": {name: summarize(loaded[name]) for name in ("large", "window")},
    }


def measure_sorted(source: Path, scratch: Path, runs: int, recipe: str) -> dict[str, Any]:
    """Measure the accuracy of a recipe on CIFAR-10 sorted by class, in the order of each window."""
    snapshot = load_snapshot(source)
    by_class = np.argsort(snapshot.labels[snapshot.parts["train"]], kind="stable")
    test = np.arange(snapshot.parts["test"].start, snapshot.parts["test"].stop)
    folder = scratch / "sorted"
    folder.mkdir()
    write_subset(snapshot, folder, by_class, test)
    accuracies: dict[int, list[float]] = {window: [] for window in SORTED_WINDOWS}
    for seed in range(runs):
        for window, done in accuracies.items():
            run = scratch / "runs" / f"{seed}_{window}"
            names = f"--experiments_folder {run} --experiment_name sorted --run_name run --dataset_folder {folder}"
            options = f"--recipe {recipe} --seed {seed} --shuffle_window {window}"
            measure_command([sys.executable, "-m", "image_classifier.main", *names.split(), *options.split()])
            done.append(json.loads((run / "sorted" / "run" / "evaluation.json").read_text())["accuracy"])
            print(f"sorted, seed {seed}, window {window}: {done[-1]:.2%}", flush=True)
    return {"recipe": recipe, "accuracy": {str(window): summarize(done) for window, done in accuracies.items()}}


def compute_shuffling() -> list[dict[str, Any]]:
    """Compute how an epoch of a set of ImageNet's size, sorted by class, is shuffled in the order of each window."""
    num_block = BLOCK_BYTES // IMAGE_BYTES
    labels = np.arange(IMAGENET) * IMAGENET_CLASSES // IMAGENET
    rows = []
    for window in (*WINDOWS, 0):
        num_window = window or IMAGENET
        windows = compute_windows(0, 0, np.arange(IMAGENET), num_block, num_window)
        order = labels[np.concatenate(windows)]
        batches = order[: len(order) // IMAGENET_BATCH * IMAGENET_BATCH].reshape(-1, IMAGENET_BATCH)
        rows.append(
            {
                "window_mib": window,
                "images": float(np.mean([len(part) for part in windows])),
                "windows": len(windows),
                "classes_of_window": float(np.mean([len(np.unique(labels[part])) for part in windows])),
                "classes_of_batch": float(np.mean([len(np.unique(batch)) for batch in batches])),
            }
        )
    return rows


def compute_scales(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Compute what larger sets of such images take, from what was measured."""
    num_block = BLOCK_BYTES // IMAGE_BYTES
    whole = result["snapshot"]
    rows = []
    for num_images in (result["images"], 200_000, 500_000, IMAGENET):
        read = {
            name: {
                "full": num_images * (seek + IMAGE_BYTES / rate),
                "window": num_images / num_block * (seek + num_block * IMAGE_BYTES / rate),
            }
            for name, (seek, rate) in DISKS.items()
        }
        more = max(0, num_images - result["images"]) * result["index_bytes_per_image"]
        rows.append(
            {
                "images": num_images,
                "source_gb": num_images * result["source_bytes"] / result["images"] / 1e9,
                "snapshot_gb": num_images * IMAGE_BYTES / 1e9,
                "minutes": num_images / whole["images_per_second"] / 60,
                "memory_mb": whole["peak_memory_mb"] + more / 2**20,
                "epoch_seconds": read,
            }
        )
    return rows


def measure_index(folder: Path) -> float:
    """Measure the memory that the index of tars takes for each image."""
    from image_classifier.data.metadata import load_metadata

    listing = webdataset.list_folder(folder)
    assert listing is not None
    tracemalloc.start()
    content = webdataset.read_shards(listing, load_metadata(folder), Reading(image_size=SIDE))
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert content.num_images
    return taken / content.num_images


def build_table(result: dict[str, Any]) -> str:
    """Build what docs/scaling.md says of large sets."""
    whole, killed, training, parquet = (result[name] for name in ("snapshot", "killed", "training", "parquet"))
    over, read = training["over_small"], training["images_per_second"]
    lines = [
        f"Measured on {result['images']:,} images of {SIDE} pixels: images of CIFAR-10, scaled up with added noise. "
        f"They "
        f"take {result['source_bytes'] / 1e9:.1f} GB as tars, and {result['snapshot_bytes'] / 1e9:.1f} GB as a "
        f"snapshot.",
        "",
        "| creating the snapshot | |",
        "|---|---|",
        f"| images per second, from tars | {format_figure(whole['images_per_second'])} |",
        f"| images per second, from Parquet, a tenth of the set | {format_figure(parquet['images_per_second'])} |",
        f"| peak memory of all processes, from tars | {whole['peak_memory_mb']:.0f} MB |",
        f"| peak memory of all processes, from Parquet | {parquet['peak_memory_mb']:.0f} MB |",
        f"| killed after {killed['saved'] / result['images']:.0%}, then continued: total time, relative to no kill | "
        f"{killed['over_whole']:.2f} |",
        f"| digest after the kill | {'the same' if killed['is_same'] else 'DIFFERENT'} |",
        "",
        f"| training, with a cold page cache | all images | `--shuffle_window {training['window_mib']}` |",
        "|---|---|---|",
        f"| time of a ResNet-18 step, relative to {NUM_SMALL} images in memory | {_describe(over['large'])} | "
        f"{_describe(over['window'])} |",
        f"| images per second, reading only | {format_figure(read['large']['mean'])} | "
        f"{format_figure(read['window']['mean'])} |",
        "",
        f"Accuracy with windows, on CIFAR-10 sorted by class, recipe `{result['sorted']['recipe']}`:",
        "",
        "| `--shuffle_window` | accuracy |",
        "|---|---|",
    ]
    for window, accuracy in result["sorted"]["accuracy"].items():
        title = "0, all images" if window == "0" else f"{window}, of 147 MiB"
        spread = f"{accuracy['standard_deviation'] * 100:.1f} % ({accuracy['runs']} seeds)"
        lines.append(f"| {title} | {accuracy['mean'] * 100:.1f} % ± {spread} |")
    lines += [
        "",
        f"Computed for {IMAGENET:,} images of {SIDE} pixels in {IMAGENET_CLASSES:,} classes, sorted by class (the "
        "worst case):",
        "",
        "| `--shuffle_window` | windows per epoch | images per window | classes per window | classes in a batch of "
        f"{IMAGENET_BATCH} |",
        "|---|---|---|---|---|",
    ]
    for row in result["shuffling"]:
        title = str(row["window_mib"]) if row["window_mib"] else "0, all images"
        lines.append(
            f"| {title} | {row['windows']:,} | {row['images']:,.0f} | {row['classes_of_window']:.0f} | "
            f"{row['classes_of_batch']:.0f} |"
        )
    lines += [
        "",
        "Computed from the above for more images. The last two columns are the time to read an epoch from disk: all "
        "images shuffled, and by windows. Nothing is in memory before:",
        "",
        "| images | tars | snapshot | time to create it | memory | " + " | ".join(DISKS) + " |",
        "|---" * (5 + len(DISKS)) + "|",
    ]
    for row in result["scales"]:
        reads = (
            f"{row['epoch_seconds'][name]['full'] / 60:,.0f} and {row['epoch_seconds'][name]['window'] / 60:,.0f} min"
            for name in DISKS
        )
        lines.append(
            f"| {row['images']:,} | {row['source_gb']:.0f} GB | {row['snapshot_gb']:.0f} GB | {row['minutes']:,.0f} "
            f"min | {row['memory_mb']:,.0f} MB | " + " | ".join(reads) + " |"
        )
    return "\n".join(lines) + f"\n\nOn {result['cores']} cores of an {result['processor']}.\n"


def _describe(figure: dict[str, float]) -> str:
    return f"{figure['mean']:.3f} ({figure['least']:.3f} to {figure['most']:.3f})"


def measure_training_alone(source: Path, scratch: Path, runs: int) -> dict[str, Any]:
    """Measure training anew, on sets as the saved result is of; keep the rest of it."""
    result = load_result("large_data")
    load_source(source)
    large, small = scratch / "large", scratch / "small"
    generate(large, source, result["images"], "tar")
    measure_snapshot(large, result["images"])
    generate(small, source, round(NUM_SMALL / 0.9), "tar")
    return {**result, "training": measure_training(large, small, result["training"]["window_mib"], runs)}


def measure_all(source: Path, scratch: Path, gigabytes: float, runs: int, recipe: str, window: int) -> dict[str, Any]:
    """Generate the sets and measure everything, one after the other, so that no more is on the disk than needs be."""
    load_source(source)  # before the workers, so that one makes its snapshot
    sizes = [len(image) for _, image, _ in encode_shard(source, 0, 20)]
    num_images = round(gigabytes * 1e9 / min(IMAGE_BYTES, sum(sizes) / len(sizes)))
    large, small, parquet = (scratch / name for name in ("large", "small", "parquet"))
    result: dict[str, Any] = {"images": num_images, "source_bytes": generate(large, source, num_images, "tar")}
    print(f"{num_images:,} images, {result['source_bytes'] / 1e9:.2f} GB of tars", flush=True)
    result["index_bytes_per_image"] = measure_index(large)
    result["snapshot"] = measure_snapshot(large, num_images)
    result["snapshot_bytes"] = sum(path.stat().st_size for path in (large / ".snapshots").rglob("*"))
    print(json.dumps(result), flush=True)
    measure_command([sys.executable, "-m", "image_classifier", "data", "prune", "--dataset_folder", large])
    result["killed"] = measure_killed(large, num_images, result["snapshot"])
    print(json.dumps(result["killed"]), flush=True)
    generate(small, source, round(NUM_SMALL / 0.9), "tar")
    result["training"] = measure_training(large, small, window, runs)
    print(json.dumps(result["training"]), flush=True)
    measure_command([sys.executable, "-m", "image_classifier", "data", "prune", "--dataset_folder", large])
    num_parquet = max(20, num_images // 10)
    generate(parquet, source, num_parquet, "parquet")
    result["parquet"] = measure_snapshot(parquet, num_parquet)
    print(json.dumps(result["parquet"]), flush=True)
    result["sorted"] = measure_sorted(source, scratch, runs, recipe)
    return {**result, "shuffling": compute_shuffling(), "scales": compute_scales(result)}


def main() -> None:
    """Measure, save the figures and write them into the document."""
    parser = build_parser(__doc__)
    parser.add_argument("--gigabytes", type=float, default=10.0)
    parser.add_argument("--scratch", type=Path, help="where to generate the sets; by default where temporary files go")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--recipe", default="quick", help="that is trained on CIFAR-10 sorted by class")
    parser.add_argument("--window", type=int, default=2048, help="MiB of the order that is measured")
    parser.add_argument("--training_only", action="store_true", help="measure training anew, and keep the rest")
    parser.add_argument("--dry_run", action="store_true", help="print the result and the table, and write neither")
    parser.add_argument("--measure", nargs=2, metavar=("NAME", "MIB"), help="measure in this process and print")
    arguments = parser.parse_args()
    if arguments.measure:
        measure: Callable[[Path, int], Any] = {"steps": measure_steps, "loading": measure_loading}[arguments.measure[0]]
        print(json.dumps(measure(arguments.dataset_folder, int(arguments.measure[1]))))
        return
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that what was generated is removed
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        if arguments.training_only:
            result = measure_training_alone(arguments.dataset_folder, Path(scratch), arguments.runs)
        else:
            values = (arguments.gigabytes, arguments.runs, arguments.recipe, arguments.window)
            result = measure_all(arguments.dataset_folder, Path(scratch), *values)
    if arguments.dry_run:
        print(json.dumps(result), build_table({"cores": "?", "processor": "?", **result}), sep="\n")
        return
    save_result("large_data", result)
    write_table(DOCUMENT, "large_data", build_table(load_result("large_data")))


if __name__ == "__main__":
    main()
