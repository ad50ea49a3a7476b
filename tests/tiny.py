"""Real runs small enough to make dozens of: LeNet on a few hundred sample images, one thread."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from image_classifier.config import RunSettings, TrainingSettings, load_recipe, restore_training_settings
from image_classifier.data.sample import write_sample

TRAINING = replace(
    restore_training_settings(load_recipe("notebook")),
    batch_size=10,
    learning_rate=0.01,
    device="cpu",
    num_threads=1,
    digest_every=10,
)


def write_tiny_dataset(folder: Path, *, num_train: int = 200, num_test: int = 60, seed: int = 0) -> Path:
    """Write a sample set of 200 training and 60 test images."""
    write_sample(folder, num_train=num_train, num_test=num_test, seed=seed)
    return folder


def make_settings(experiments: Path, dataset: Path, run_name: str = "run", **values: Any) -> RunSettings:
    """Make the settings of a tiny run: 2 epochs of 20 steps; values may be of either kind."""
    training = {name: value for name, value in values.items() if name in TrainingSettings.__dataclass_fields__}
    others = {name: value for name, value in values.items() if name not in training}
    return RunSettings(
        experiments_folder=experiments,
        experiment_name="tiny",
        run_name=run_name,
        dataset_folder=dataset,
        training=replace(TRAINING, **training),
        **{"num_workers": 0, **others},
    )
