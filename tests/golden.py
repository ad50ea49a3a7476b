"""Short portable runs of every network and recipe, and what they give on every machine: tests/data/golden.

    python -m tests.golden

writes the files anew, after a change that is meant to give other bits.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from image_classifier.experiment import run
from image_classifier.kernels.library import Arguments, load_kernels
from image_classifier.model.catalog import build_classifier
from image_classifier.settings import RunSettings, TrainingSettings
from image_classifier.tracking.layout import CHAIN
from image_classifier.tracking.reading import read_manifest, read_predictions
from image_classifier.training.determinism import choose_kernels
from image_classifier.training.engine import SMALL_BATCH, Eager
from image_classifier.training.portable_steps import PortableMode
from image_classifier.training.shards import Shard
from tests.tiny import write_tiny_dataset

FOLDER = Path(__file__).parent / "data" / "golden"
RUNS, OPERATIONS = FOLDER / "portable.json", FOLDER / "operations.json"

SHORT: dict[str, Any] = {"num_epochs": 1, "digest_every": 1, "instruction_set": "portable", "device": "cpu"}
RESIDUAL: dict[str, Any] = {"recipe": "quick", "optimizer": "sgd", "learning_rate": 0.1, "momentum": 0.9}
CASES: dict[str, dict[str, Any]] = {
    "notebook": {"batch_size": 20},
    "notebook, many images a step": {"recipe": "notebook", "batch_size": 100},
    "quick": {"batch_size": 90, "image_sizes": (16, 24)},
    "small": {"batch_size": 45, "shards": 3, "image_sizes": (16, 32)},
    "fast": {"batch_size": 90, "shards": 5, "image_sizes": (16, 32)},
    "best": {"batch_size": 90, "shards": 4, "image_sizes": (16, 24)},
    "resnet": RESIDUAL
    | {"model": "resnet", "batch_size": 70, "image_sizes": (24,), "validation_fraction": 0.1, "keep": "best"},
    "resnet18": RESIDUAL | {"model": "resnet18", "batch_size": 90, "shards": 2, "image_sizes": (16,)},
    "resnet18_imagenet": RESIDUAL | {"model": "resnet18_imagenet", "batch_size": 90, "shards": 2, "image_sizes": (32,)},
    "wide_resnet_16_4": RESIDUAL | {"model": "wide_resnet_16_4", "batch_size": 90, "image_sizes": (16,)},
    "quick, cut and averaged": {
        "recipe": "quick",
        "batch_size": 90,
        "image_sizes": (16, 24),
        "validation_fraction": 0.1,
    }
    | {"keep": "best", "cutmix": 1.0, "class_weights": "balanced", "rand_augment": 9, "ema_decay": 0.9},
    "notebook, mixed and averaged": {"recipe": "notebook", "batch_size": 20, "mixup": 0.4, "sampler": "balanced"}
    | {"color_jitter": 0.4, "ema_decay": 0.5},
}
"""By name, the settings that shorten a recipe."""


def make_case(case: str) -> TrainingSettings:
    """Make the training settings of a case."""
    settings = dict(CASES[case])
    return TrainingSettings.from_recipe(settings.pop("recipe", case), **{**SHORT, **settings})


def list_options(case: str) -> list[str]:
    """List the same as words of a command line."""
    settings = {**SHORT, **CASES[case]}
    words = ["--recipe", settings.pop("recipe", case)]
    for name, value in settings.items():
        words += [f"--{name}", ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
    return words


def write_dataset(folder: Path) -> Path:
    """Write what the runs train on."""
    return write_tiny_dataset(folder, num_train=180, num_test=40)


def read_digests(folder: Path) -> dict[str, str]:
    """Read what a finished run must have on every machine: the chain's head, the weights, and the predictions."""
    probabilities, _ = read_predictions(folder)
    return {
        "chain": json.loads((folder / CHAIN).read_text().splitlines()[-1])["digest"],
        "weights": read_manifest(folder)["weights_digest"],
        "predictions": hashlib.sha256(probabilities.tobytes()).hexdigest(),
    }


def compute_digests(case: str, dataset: Path, folder: Path, num_threads: int = 1) -> dict[str, str]:
    """Train a case in this process, and read what it gives."""
    settings = RunSettings(
        experiments_folder=folder,
        experiment_name="golden",
        run_name="run",
        dataset_folder=dataset,
        num_threads=num_threads,
        training=make_case(case),
    )
    return read_digests(run(settings).folder)


class _Listing(PortableMode):  # type: ignore[no-untyped-call]  # torch ships its base without types
    """Notes which kernels compute which operations, and which are torch's."""

    def __init__(self, *, is_small: bool) -> None:
        super().__init__(load_kernels(choose_kernels("portable")), is_small=is_small)
        self.found: dict[str, set[str]] = {}
        self._called = ""

    def call(
        self, kernel: str, arguments: Arguments, written: Mapping[str, Tensor], read: Mapping[str, Tensor]
    ) -> None:
        self.found[self._called].add(kernel)
        super().call(kernel, arguments, written, read)

    def __torch_dispatch__(self, called: Any, types: object, arguments: Any = (), options: Any = None) -> Any:
        self._called = str(called)
        self.found.setdefault(self._called, set())
        return super().__torch_dispatch__(called, types, arguments, options)


def list_operations(case: str) -> dict[str, str]:
    """List the operations of a step of a case and of an evaluation, with the kernels that compute them."""
    settings = make_case(case)
    mean, std = settings.input_mean, settings.input_std
    classifier = build_classifier(settings.model, 10, input_mean=mean, input_std=std, seed=0)
    size = settings.batch_size // settings.count_shards()
    images, labels = torch.zeros(size, 3, 32, 32, dtype=torch.uint8), torch.arange(size) % 10
    targets = torch.full((size, 10), 0.1) if settings.has_targets else None
    listing = _Listing(is_small=settings.batch_size <= SMALL_BATCH)
    with listing:
        Eager([classifier.train()], settings).compute(0, Shard(images, labels, settings.image_sizes[0], 0.5, targets))
    with torch.no_grad(), listing:
        classifier.eval()(images[:1]).softmax(dim=1)
    return {name: ", ".join(sorted(kernels)) or "torch" for name, kernels in sorted(listing.found.items())}


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        dataset = write_dataset(Path(scratch) / "data")
        digests = {case: compute_digests(case, dataset, Path(scratch) / str(at)) for at, case in enumerate(CASES)}
    for path, content in ((RUNS, digests), (OPERATIONS, {case: list_operations(case) for case in CASES})):
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
