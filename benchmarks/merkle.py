"""What a digest that proves single images costs: beside one over all images at once, and for one more image.

    python -m benchmarks.merkle --dataset_folder DATA [--runs 10]

Both digests are computed in turn over the mapped images of the snapshot, as when a run begins. Then the data set is
ingested into a database of SQLite, and after that one more image.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.measure import PROJECT, save_result, summarize, write_table
from image_classifier.access import DatabaseAccess
from image_classifier.data.database import find_dataset
from image_classifier.data.dataset import load_snapshot
from image_classifier.data.freezing import freeze_newest
from image_classifier.data.ingest import Chunk, Ingest, ingest
from image_classifier.data.revision import open_database
from image_classifier.data.snapshot import Snapshot, compute_digest, compute_flat_digest

NAME = "merkle"
DOCUMENT = PROJECT / "docs" / "formats.md"


def time_call(call: Callable[[], object]) -> float:
    """Time one call, in seconds."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def measure_ingest(dataset_folder: Path, snapshot: Snapshot) -> tuple[float, float]:
    """Time the ingest of a data set, and of one more image, each with the version that it freezes."""
    with tempfile.TemporaryDirectory() as scratch:
        access = DatabaseAccess(dataset_folder=Path(scratch))
        whole = time_call(lambda: ingest(dataset_folder, NAME, access))
        image = 255 - snapshot.images[:1]

        def add_one() -> None:
            with open_database(access) as database:
                dataset = find_dataset(database, NAME)
                Ingest(database, dataset, NAME).add(Chunk("train", image, snapshot.labels[:1]))
                freeze_newest(database, dataset)

        return whole, time_call(add_one)


def build_table(result: dict[str, Any]) -> str:
    """Build the sentence of docs/formats.md."""
    ratio = result["ratio"]
    return (
        f"Over {result['num_images']:,} images this digest takes {ratio['mean']:.2f} times the time of format 1 "
        f"({ratio['least']:.2f} to {ratio['most']:.2f}, {ratio['runs']} runs).\n"
    )


def main() -> None:
    """Measure and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset_folder", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=10)
    arguments = parser.parse_args()
    snapshot = load_snapshot(arguments.dataset_folder)
    content = snapshot.images, snapshot.labels, snapshot.classes, snapshot.num_train, snapshot.num_validation
    flat, merkle = list[float](), list[float]()
    for _ in range(arguments.runs):
        flat.append(time_call(lambda: compute_flat_digest(*content)))
        merkle.append(time_call(lambda: compute_digest(*content)))
    whole, one = measure_ingest(arguments.dataset_folder, snapshot)
    result = {
        "unit": "seconds",
        "num_images": len(snapshot.labels),
        "flat": summarize(flat),
        "merkle": summarize(merkle),
        "ratio": summarize([second / first for first, second in zip(flat, merkle, strict=True)]),
        "ingest": round(whole, 4),
        "ingest_one_more": round(one, 4),
    }
    save_result(NAME, result)
    write_table(DOCUMENT, NAME, build_table(result))
    print(build_table(result), end="")
    print(f"their ingest takes {whole:.3f} s, that of one more image {one:.3f} s")


if __name__ == "__main__":
    main()
