"""Every option that decides weights does: changed by itself it changes them or is refused, or it says otherwise."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from docstring_parser import parse

from image_classifier.access import Reading
from image_classifier.data import blocks
from image_classifier.data.dataset import load_snapshot
from image_classifier.errors import SettingsError
from image_classifier.preparation import build_initial_classifier, build_loader, split_training_set
from image_classifier.recipe import RECIPES
from image_classifier.settings import TrainingSettings
from image_classifier.tracking.identity import compute_weights_digest
from image_classifier.training.average import build_average
from image_classifier.training.determinism import configure_torch, resolve_settings
from image_classifier.training.loop import train
from image_classifier.training.optimizer import build_optimizer
from tests.tiny import make_training, write_tiny_dataset

CHANGES: dict[str, list[Any]] = {
    "model": ["lenet", "resnet", "airbench_small"],
    "num_epochs": [3],
    "batch_size": [3],
    "shards": [2],
    "image_size": [64],
    "image_sizes": [(20,), (16, 20)],
    "optimizer": ["sgd", "muon"],
    "learning_rate": [0.0123],
    "body_learning_rate": [0.0123],
    "freeze": ["body"],
    "momentum": [0.0, 0.55],
    "nesterov": [True, False],
    "weight_decay": [0.0, 0.01],
    "schedule": ["constant", "triangular"],
    "warmup_fraction": [0.0, 0.4],
    "label_smoothing": [0.0, 0.3],
    "flip": ["none", "random", "alternating"],
    "translate": [0, 1],
    "cutout": [0, 1],
    "color_jitter": [0.3],
    "rand_augment": [9],
    "mixup": [0.3],
    "cutmix": [1.0],
    "sampler": ["balanced"],
    "shuffle_window": [2],
    "class_weights": ["balanced"],
    "input_mean": [(0.5, 0.4, 0.3)],
    "input_std": [(0.3, 0.2, 0.25)],
    "validation_fraction": [0.01, 0.25],
    "keep": ["best"],
    "ema_decay": [0.9],
    "early_stopping": [1],
    "seed": [5],
    "precision": ["fp32", "bf16"],
}
OF_THE_NETWORK = (
    "learning_rate",
    "body_learning_rate",
    "freeze",
    "momentum",
    "nesterov",
    "weight_decay",
    "schedule",
    "warmup_fraction",
)
"""What wide networks are tried with; what is done to images does not depend on the width."""

SAID_TO_DECIDE_NOTHING = {
    "views": "affects only the evaluation",
    "digest_every": "changes no weights",
    **{name: "changes weights only by rounding" for name in ("engine", "instruction_set")},
}

SHORT: dict[str, Any] = {
    **{"num_epochs": 2, "batch_size": 4, "device": "cpu", "engine": "eager", "precision": "fp32"},
}
SMALL: dict[str, Any] = {"model": "airbench_small", "image_sizes": (16,), "learning_rate": 0.1}
CONSTANT: dict[str, Any] = {"schedule": "constant", "warmup_fraction": 0.0}


def build_baselines() -> dict[str, TrainingSettings]:
    """Build settings of each network, optimizer and schedule that go together, and those of the recipes, shortened."""
    baselines = {}
    for schedule, values in {"triangular": {}, "constant": CONSTANT}.items():
        for model, optimizer in (
            ("resnet", "sgd"),
            ("lenet", "sgd"),
            ("airbench_small", "sgd"),
            ("airbench_small", "muon"),
        ):
            sizes = (32,) if model == "lenet" else (16,)
            settings: dict[str, Any] = {"model": model, "optimizer": optimizer, "image_sizes": sizes, **values, **SHORT}
            baselines[f"{model} {optimizer} {schedule}"] = make_training(**settings)
    without: dict[str, Any] = {"momentum": 0.0, "nesterov": False}
    baselines["resnet without momentum"] = make_training(model="resnet", image_sizes=(16,), **without, **SHORT)
    for recipe in RECIPES:
        settings = {"image_sizes": (32,) if recipe == "notebook" else (16,), **SHORT}
        baselines[recipe] = TrainingSettings.from_recipe(recipe, **settings)
    return baselines


BASELINES = build_baselines()


UNLIKE = (0, 0, 0, 0, 0, 1, 1, 2)
"""Labels to train on, of classes of unlike size."""


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of one image."""
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 3072)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_dataset(tmp_path_factory.mktemp("data") / "tiny", num_train=8, num_test=1)


def train_weights(settings: TrainingSettings, dataset: Path) -> str:
    """Train as a run does, without its folder, and return the digest of the weights."""
    settings = resolve_settings(settings)
    configure_torch()
    loaded = load_snapshot(dataset, reading=Reading(image_size=settings.image_size))
    snapshot = replace(loaded, labels=np.array([*UNLIKE, *loaded.labels[len(UNLIKE) :]]))
    indices, _ = split_training_set(snapshot, settings)
    classifier = build_initial_classifier(settings, snapshot, indices, None)
    loader = build_loader(snapshot, indices, settings, 0)
    num_steps = settings.num_epochs * loader.steps_per_epoch
    batches = loader.iterate(settings.num_epochs)
    optimizer, average = build_optimizer(classifier, settings), build_average(classifier, settings, nullcontext)
    for _ in train(classifier, batches, optimizer, settings, num_steps=num_steps, average=average):
        pass
    return compute_weights_digest(classifier if average is None else average.classifier)


def test_every_option_is_tried_or_says_what_it_does_not_decide() -> None:
    meanings = {entry.arg_name: entry.description or "" for entry in parse(TrainingSettings.__doc__ or "").params}
    for name, words in SAID_TO_DECIDE_NOTHING.items():
        assert words in " ".join(meanings[name].split()).lower()
    assert {*CHANGES, *SAID_TO_DECIDE_NOTHING, "device"} == {field.name for field in fields(TrainingSettings)}


@pytest.mark.parametrize("name", BASELINES)
def test_an_option_changed_by_itself_changes_the_weights_or_is_refused_by_name(name: str, dataset: Path) -> None:
    baseline = BASELINES[name]
    weights = train_weights(baseline, dataset)
    assert train_weights(replace(baseline, views="one", digest_every=3), dataset) == weights
    is_wide = baseline.model in ("airbench", "airbench_large")
    num_refused = 0
    for option in OF_THE_NETWORK if is_wide else CHANGES:
        for value in CHANGES[option]:
            if value == getattr(baseline, option):
                continue
            try:
                changed = train_weights(replace(baseline, **{option: value}), dataset)
            except SettingsError as error:
                num_refused += 1
                assert f"--{option}" in str(error), error
                continue
            assert changed != weights, f"--{option} {value} is without effect"
    assert num_refused
