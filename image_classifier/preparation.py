"""What a run begins with: torch as it is to compute, data, weights, network, optimizer and batches."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from image_classifier.conformance import check_network, check_optimizer
from image_classifier.data.augment import Augmentation
from image_classifier.data.balance import compute_class_weights
from image_classifier.data.dataset import load_snapshot
from image_classifier.data.loader import Loader
from image_classifier.data.mixing import build_targets
from image_classifier.data.snapshot import Snapshot
from image_classifier.data.split import compute_validation_split
from image_classifier.errors import ModelError, SettingsError
from image_classifier.model.catalog import build_classifier
from image_classifier.model.classifier import Classifier
from image_classifier.plugins import is_own, load
from image_classifier.recipe import check_batch_size
from image_classifier.settings import RunSettings, TrainingSettings
from image_classifier.text import count, list_classes
from image_classifier.tracking.layout import RECORD
from image_classifier.tracking.pretrained import Pretrained, check_pretrained, load_pretrained, start_from
from image_classifier.tracking.reading import read_record
from image_classifier.training.determinism import cap_instruction_set, configure_torch, resolve_settings
from image_classifier.training.loop import compute_image_size
from image_classifier.training.memory import keep_freed_memory
from image_classifier.training.optimizer import build_optimizer
from image_classifier.training.portable_steps import choose_arithmetic
from image_classifier.training.threads import Threads

NUM_PIXELS_TO_INITIALIZE = 5000 * 32**2  # of Jordan's number of CIFAR's images to compute whitening from


def configure(settings: RunSettings) -> tuple[TrainingSettings, Threads]:
    """Configure torch; give the settings as they are on this machine, and the threads that compute."""
    cap_instruction_set(settings.training.instruction_set)
    training = resolve_settings(settings.training)
    configure_torch()
    num_threads = settings.num_threads if training.device == "cpu" else 1
    threads = Threads(num_threads, choose_arithmetic(training.instruction_set))
    keep_freed_memory()
    return training, threads


def load_data(settings: RunSettings, snapshot: Snapshot | None = None) -> Snapshot:
    """Load the data set, unless it was loaded before; a run that is resumed has it by the digest of its record.

    Raises:
        SettingsError: its images are of another size than the settings say.
    """
    if snapshot is None:
        snapshot = load_snapshot(settings.dataset, settings.database_access, settings.reading)
    if (settings.run_folder / RECORD).exists():
        snapshot = snapshot.recognize(read_record(settings.run_folder)["data"]["digest"])
    size = settings.training.image_size
    if snapshot.image_size != size:
        raise SettingsError(f"--image_size {size} is not that of the data set, {snapshot.image_size}; set it so")
    return snapshot


def split_training_set(snapshot: Snapshot, training: TrainingSettings) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Split into the indices of the images trained on and those validated on: the data's own part, or one set aside.

    Raises:
        SettingsError: too little is left to train on, or the settings do not go with the data's validation part.
    """
    trained, validated = compute_validation_split(training.seed, snapshot.num_train, training.validation_fraction)
    if training.validation_fraction > 0 and not (len(trained) and len(validated)):
        raise SettingsError(
            f"--validation_fraction takes 0, or a part of the {snapshot.num_train} images that leaves some to train "
            f"and some to validate on, got: {training.validation_fraction}"
        )
    if snapshot.num_validation:
        if len(validated):
            raise SettingsError(
                f"--validation_fraction {training.validation_fraction} sets images aside, but {snapshot.name} has a "
                f"validation part of {snapshot.num_validation:,} images: leave the option out, or remove that part"
            )
        validated = np.arange(snapshot.num_train, snapshot.num_train + snapshot.num_validation)
    asking = "--keep best" if training.keep == "best" else f"--early_stopping {training.early_stopping}"
    if (training.keep == "best" or training.early_stopping) and not len(validated):
        raise SettingsError(
            f"{asking} needs images on which to judge what is best: a --validation_fraction above 0, or data with a "
            "validation part"
        )
    if training.num_epochs > 0:
        check_batch_size(training.batch_size, len(trained))
    return trained, validated


def load_start(settings: RunSettings, training: TrainingSettings, snapshot: Snapshot) -> Pretrained | None:
    """Load the weights to start from, if there are any.

    Raises:
        ModelError: they cannot be read, do not go with the settings, or would be evaluated with rows of the head that
            nobody has trained.
    """
    if settings.pretrained_path is None:
        return None
    pretrained = load_pretrained(settings.pretrained_path, named=training.model)
    check_pretrained(pretrained, training)
    kept = pretrained.list_kept_classes(snapshot.classes)
    if training.num_epochs == 0 and len(kept) < len(snapshot.classes):
        raise ModelError(
            f"--num_epochs 0 evaluates, but --pretrained_model {pretrained.path} has no class of the name of each of "
            f"the data set's: it has {list_classes(pretrained.classes) or 'none'}; here they are "
            f"{list_classes(snapshot.classes)}. Name them alike, or train"
        )
    return pretrained


def build_initial_classifier(
    training: TrainingSettings, snapshot: Snapshot, indices: NDArray[np.int64], pretrained: Pretrained | None
) -> Classifier:
    """Build the network with weights from the seed and the first of the images trained on, or a pretrained model's.

    Raises:
        ModelError: a network of another package does not keep to what training relies on.
    """
    build = partial(
        build_classifier,
        training.model,
        len(snapshot.classes),
        input_mean=training.input_mean,
        input_std=training.input_std,
        seed=training.seed,
        image_size=training.image_sizes[-1],
    )
    if not is_own("model", training.model):
        check_network(build, training, len(snapshot.classes))
    classifier = build()
    if pretrained is None:
        num_images = max(1, NUM_PIXELS_TO_INITIALIZE // snapshot.image_size**2)
        classifier.initialize_from(snapshot.images[indices[:num_images]])
    else:
        start_from(classifier, pretrained, snapshot.classes)
    if training.freeze == "body":
        classifier.freeze_body()
    return classifier.to(training.device)


def build_loader(
    snapshot: Snapshot, indices: NDArray[np.int64], training: TrainingSettings, num_workers: int
) -> Loader:
    """Build the loader of the images that are trained on."""
    num_classes = len(snapshot.classes)
    weights = np.ones(num_classes)
    if training.class_weights == "balanced":
        weights = compute_class_weights(snapshot.labels[indices], num_classes)
    return Loader(
        images=snapshot.images,
        labels=snapshot.labels,
        indices=indices,
        batch_size=training.batch_size,
        seed=training.seed,
        augmentation=Augmentation(
            training.flip, training.translate, training.cutout, training.color_jitter, training.rand_augment
        ),
        num_workers=num_workers,
        sampler=training.sampler,
        shuffle_window=training.shuffle_window,
        targets=build_targets(num_classes, training.label_smoothing, weights) if training.has_targets else None,
        mixup=training.mixup,
        cutmix=training.cutmix,
    )


def build_checked_optimizer(
    classifier: Classifier, training: TrainingSettings, threads: Threads
) -> torch.optim.Optimizer:
    """Build the optimizer; one of another package is tried before.

    Raises:
        SettingsError: it does not keep to what training relies on.
    """
    if not is_own("optimizer", training.optimizer):
        check_optimizer(load("optimizer", training.optimizer), training)
    return build_optimizer(classifier, training, threads)


def list_notes(
    training: TrainingSettings, snapshot: Snapshot, pretrained: Pretrained | None, num_steps: int
) -> Iterator[str]:
    """List what is as asked for, and may not be as expected."""
    if pretrained is not None:
        size = pretrained.image_size or training.image_sizes[-1]
        if size != training.image_sizes[-1]:
            yield f"the weights of --pretrained_model are of images of {size} pixels, not {training.image_sizes[-1]}"
    if 0 < num_steps < len(training.image_sizes):
        used = [compute_image_size(training, number, num_steps) for number in range(1, num_steps + 1)]
        yield (
            f"the run has {count(num_steps, 'step')}, fewer than --image_sizes has sizes: it trains at "
            f"{','.join(map(str, used))}, and evaluates at {training.image_sizes[-1]}"
        )
