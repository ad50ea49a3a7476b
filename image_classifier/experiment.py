"""One run, from data source to run folder: connects all stages."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from image_classifier.config import RunSettings, TrainingSettings, load_recipe
from image_classifier.conformance import check_network, check_optimizer
from image_classifier.data.augment import Augmentation, compute_validation_split
from image_classifier.data.balance import compute_class_weights
from image_classifier.data.content import list_classes
from image_classifier.data.dataset import load_snapshot
from image_classifier.data.loader import Loader
from image_classifier.data.mixing import build_targets
from image_classifier.data.snapshot import Snapshot
from image_classifier.errors import Interrupted, ModelError, SettingsError
from image_classifier.model.catalog import build_classifier
from image_classifier.model.classifier import Classifier
from image_classifier.plugins import PlugIn, is_own, load
from image_classifier.storage import DISK, Disk, remove_leftovers
from image_classifier.tracking.checking import is_finished
from image_classifier.tracking.checkpoint import Model, serialize_model
from image_classifier.tracking.identity import compute_weights_digest
from image_classifier.tracking.layout import EVALUATION, FIGURE, MODEL, PREDICTIONS, PROFILE, RECORD
from image_classifier.tracking.pretrained import Pretrained, check_pretrained, load_pretrained, start_from
from image_classifier.tracking.reading import (
    read_epochs,
    read_evaluation,
    read_manifest,
    read_record,
    serialize_predictions,
)
from image_classifier.tracking.record import build_record, check_identity, check_settings
from image_classifier.tracking.run import open_run_folder, run_exists_error
from image_classifier.tracking.state import TrainingState
from image_classifier.training.average import build_average
from image_classifier.training.determinism import cap_instruction_set, configure_torch, resolve_settings
from image_classifier.training.engine import check_operations
from image_classifier.training.evaluate import compute_evaluation, compute_probabilities
from image_classifier.training.loop import Step, compute_image_size, train
from image_classifier.training.memory import keep_freed_memory
from image_classifier.training.optimizer import build_optimizer
from image_classifier.training.portable_steps import choose_arithmetic
from image_classifier.training.profiling import profile_steps
from image_classifier.training.ranks import Ranks
from image_classifier.training.threads import Threads
from image_classifier.training.watching import Watch

NUM_PIXELS_TO_INITIALIZE = 5000 * 32**2  # of Jordan's number of CIFAR's images to compute whitening from
IDENTITY = ("settings", "data", "code", "plugins", "environment", "machine")
"""Parts of a record that decide about a run's bits."""


@dataclass(frozen=True)
class RunResult:
    """A finished run."""

    folder: Path
    evaluation: dict[str, Any]
    weights_digest: str


class Reporter:
    """Told what happens while it happens; this one is silent. A terminal's is in `cli/progress.py`.

    Attributes:
        watch: shown what each step computes.
    """

    watch: Watch | None = None

    def note(self, text: str) -> None:
        """Something is as asked for, and may not be as expected."""

    def begin(self, record: dict[str, Any], num_steps: int, first_step: int) -> None:
        """The record is written; training begins after first_step steps."""

    def restore(self, step: int, state: dict[str, Tensor]) -> None:
        """The state of a checkpoint was taken up: that after this many steps."""

    def step(self, step: Step) -> None:
        """A step was taken."""

    def digest(self, line: dict[str, Any], state: dict[str, Tensor]) -> None:
        """A line was added to the digest chain."""

    def checkpoint(self, step: int) -> None:
        """A checkpoint was written: that after this many steps."""

    def epoch(self, line: dict[str, Any]) -> None:
        """An epoch ended, and this line was added to metrics.jsonl."""

    def evaluate(self, num_images: int) -> None:
        """The test set is being evaluated."""


class Reporters(Reporter):
    """Tells several reporters, in their order."""

    def __init__(self, *reporters: Reporter) -> None:
        self._reporters = reporters

    def note(self, text: str) -> None:
        for reporter in self._reporters:
            reporter.note(text)

    def begin(self, record: dict[str, Any], num_steps: int, first_step: int) -> None:
        for reporter in self._reporters:
            reporter.begin(record, num_steps, first_step)

    def restore(self, step: int, state: dict[str, Tensor]) -> None:
        for reporter in self._reporters:
            reporter.restore(step, state)

    def step(self, step: Step) -> None:
        for reporter in self._reporters:
            reporter.step(step)

    def digest(self, line: dict[str, Any], state: dict[str, Tensor]) -> None:
        for reporter in self._reporters:
            reporter.digest(line, state)

    def checkpoint(self, step: int) -> None:
        for reporter in self._reporters:
            reporter.checkpoint(step)

    def epoch(self, line: dict[str, Any]) -> None:
        for reporter in self._reporters:
            reporter.epoch(line)

    def evaluate(self, num_images: int) -> None:
        for reporter in self._reporters:
            reporter.evaluate(num_images)


def run(
    settings: RunSettings,
    *,
    snapshot: Snapshot | None = None,
    reporter: Reporter | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    command: Sequence[str] = (),
    disk: Disk = DISK,
    ranks: Ranks | None = None,
) -> RunResult:
    """Train, evaluate and leave a finished run folder; or go on with an interrupted one.

    Args:
        snapshot: the data set of the settings, where it was loaded before.
        reporter: told of every step; decides nothing.
        should_stop: asked after each step; when true, the state is saved and Interrupted is raised.
        command: the command line, for the record.
        disk: the seam through which the run folder is written.
        ranks: the processes that train together; what those but the first write is thrown away.

    Raises:
        ImageClassifierError: a setting, the data, the pretrained model or the folder is not as it must be; up to
            the first step nothing has been written then.
        Interrupted: should_stop said so; `resume` continues.
    """
    reporter, ranks = reporter or Reporter(), ranks or Ranks()
    ranks.should_stop = should_stop
    path = settings.run_folder
    if os.path.lexists(path) and not settings.resume:
        raise run_exists_error(path)

    cap_instruction_set(settings.training.instruction_set)
    training = resolve_settings(settings.training)
    configure_torch()
    num_threads = settings.num_threads if training.device == "cpu" else 1
    threads = Threads(num_threads, choose_arithmetic(training.instruction_set))
    keep_freed_memory()
    if (finished := ranks.broadcast(find_result(settings, training, disk))) is not None:
        return finished

    if snapshot is None:
        snapshot = load_snapshot(settings.dataset, settings.database_access, settings.reading)
    if (path / RECORD).exists():
        snapshot = snapshot.recognize(read_record(path)["data"]["digest"])
    if snapshot.image_size != training.image_size:
        raise SettingsError(
            f"--image_size {training.image_size} is not that of the data set, {snapshot.image_size}; set it so"
        )
    settings = replace(settings, database=snapshot.database)  # the version that the newest one was
    train_indices, validation_indices = split_training_set(snapshot, training)
    pretrained = load_start(settings, training, snapshot)
    classifier = build_initial_classifier(training, snapshot, train_indices, pretrained)
    loader = build_loader(snapshot, train_indices, training, settings.num_workers)
    check_operations(classifier, training, None if loader.targets is None else torch.from_numpy(loader.targets))
    data = describe_data(snapshot, len(train_indices), len(validation_indices))
    record = build_record(settings, training, data, command, describe_pretrained(pretrained, snapshot, settings))
    ranks.check_agreement({part: describe_part(record, part) for part in IDENTITY})

    optimizer = build_checked_optimizer(classifier, training, threads)
    with open_run_folder(path, resume=settings.resume, disk=disk) as folder:
        average = build_average(classifier, training, threads.arithmetic)
        state = TrainingState(
            folder, classifier, optimizer, training, loader.steps_per_epoch, record["machine"], average
        )
        if (path / RECORD).exists():
            record = check_identity(read_record(path), record, settings)
            state.restore(settings.num_kept)
            if state.step:
                reporter.restore(state.step, state.get_tensors())
        if ranks.size > 1:
            state.load(ranks.broadcast(state.dump()))
        folder.write_json(RECORD, record)
        reporter.begin(record, state.num_steps, state.step)
        for text in list_notes(training, snapshot, pretrained, state.num_steps):
            reporter.note(text)
        compute_validation = partial(validate, state.judged, snapshot, validation_indices, threads, ranks)
        train_to_end(state, loader, settings, compute_validation, reporter, threads, ranks)
        return evaluate_and_finish(state, record, snapshot, settings, reporter, threads, ranks)


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


def train_to_end(
    state: TrainingState,
    loader: Loader,
    settings: RunSettings,
    compute_validation: Callable[[], dict[str, float]],
    reporter: Reporter,
    threads: Threads,
    ranks: Ranks,
) -> None:
    """Take the steps that are left, and write down what each did.

    Raises:
        Interrupted: a process was asked to stop; the state is saved.
    """
    training = state.training
    batches = loader.iterate(training.num_epochs, first_step=state.step)
    steps = train(
        state.classifier,
        takewhile(lambda batch: not state.is_stopped_early, batches),
        state.optimizer,
        training,
        num_steps=state.num_steps,
        first_step=state.step,
        threads=threads,
        ranks=ranks,
        average=state.average,
        watch=reporter.watch,
    )
    if settings.profile:
        steps = profile_steps(steps, lambda files: state.folder.write_folder(PROFILE, files))
    checkpoint_steps = settings.compute_checkpoint_steps(loader.steps_per_epoch)
    for step in steps:
        state.record_step(step)
        reporter.step(step)
        if step.number % loader.steps_per_epoch == 0:
            reporter.epoch(state.append_epoch(compute_validation()))
        at_end = step.number == state.num_steps or state.is_stopped_early
        if at_end or step.number % training.digest_every == 0:
            line = state.append_digest()
            ranks.check_agreement(line["tensors"])
            reporter.digest(line, state.get_tensors())
        stopping = ranks.stopping and not at_end
        if at_end or stopping or step.number % checkpoint_steps == 0:
            state.save(settings.num_kept)
            reporter.checkpoint(step.number)
        if stopping:
            done = f"stopped after step {step.number} of {state.num_steps}"
            raise Interrupted(f"{done}; --resume continues {settings.run_folder}")
    if state.is_stopped_early:
        reporter.note(describe_early_stop(state))


def evaluate_and_finish(
    state: TrainingState,
    record: dict[str, Any],
    snapshot: Snapshot,
    settings: RunSettings,
    reporter: Reporter,
    threads: Threads,
    ranks: Ranks,
) -> RunResult:
    """Evaluate on the test set, and write what a finished run folder holds."""
    from image_classifier.visualization.figures import draw_run_figure  # 0.6 s that no step need wait for

    classifier, folder, training = state.judged, state.folder, state.training
    state.use_kept_weights()
    reporter.evaluate(snapshot.num_test)
    evaluation, probabilities = compute_evaluation(
        classifier,
        *snapshot.test,
        snapshot.classes,
        views=training.views,
        device=torch.device(training.device),
        threads=threads,
        ranks=ranks,
    )
    weights_digest = compute_weights_digest(classifier)
    result = RunResult(settings.run_folder, evaluation, weights_digest)
    if ranks.rank == 0:
        fit = "squeeze" if settings.fit == "refuse" else settings.fit
        plugin = record["plugins"].get("model") if "plugins" in record else None
        model = Model(
            classifier,
            training.model,
            snapshot.classes,
            training.views,
            describe_origin(record),
            fit,
            training.image_size,
            plugin and PlugIn(**plugin),
        )
        folder.write(MODEL, serialize_model(model))
        folder.write(PREDICTIONS, serialize_predictions(probabilities, snapshot.test[1]))
        folder.write_json(EVALUATION, evaluation)
        title = f"{settings.experiment_name} / {settings.run_name}"
        folder.write(FIGURE, draw_run_figure(evaluation, read_epochs(settings.run_folder), title))
        folder.finish(weights_digest=weights_digest, chain_head=state.chain_head)
    return ranks.broadcast(result)  # which the others have when the first one has written it


def find_result(settings: RunSettings, training: TrainingSettings, disk: Disk) -> RunResult | None:
    """Find the result of a run that is to be resumed and is finished; check that it had the same settings."""
    path = settings.run_folder
    if not settings.resume or not is_finished(path):
        return None
    check_settings(read_record(path), training, path)
    remove_leftovers(path, disk)
    return RunResult(path, read_evaluation(path), read_manifest(path)["weights_digest"])


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
        yield f"of the --image_sizes the {num_steps} steps have {','.join(map(str, used))} alone"


def describe_early_stop(state: TrainingState) -> str:
    """Describe where a run ended, and why before its last epoch."""
    line = (
        f"--early_stopping ended the run after epoch {state.epoch} of {state.training.num_epochs}: "
        f"no validation accuracy since epoch {state.best_epoch} was better"
    )
    if state.training.schedule == "constant":
        return line
    return f"{line}; the schedule is cut at a learning rate of {state.learning_rate:.4g}"


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
    if training.num_epochs > 0 and training.batch_size > len(trained):
        fitting = "--recipe small" if len(trained) >= load_recipe("small")["batch_size"] else "--recipe default"
        raise SettingsError(
            f"--batch_size takes at most the {len(trained)} images that are trained on, got: {training.batch_size}; "
            f"choose {fitting}, or --batch_size {len(trained)} or less"
        )
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


def describe_pretrained(
    pretrained: Pretrained | None, snapshot: Snapshot, settings: RunSettings
) -> dict[str, Any] | None:
    """Describe for the record the weights to start from, if there are any."""
    return None if pretrained is None else pretrained.describe(snapshot.classes, settings.settings_from_weights)


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


def describe_part(record: dict[str, Any], part: str) -> str:
    """Describe a part of a run's identity so that processes can compare it."""
    return str(record[part].get("digest") or record[part])


def describe_data(snapshot: Snapshot, num_train: int, num_validation: int) -> dict[str, Any]:
    """Describe for the record what is trained, validated and tested on."""
    return {
        "name": snapshot.name,
        "digest": snapshot.digest,
        "digest_format": snapshot.digest_format,
        "database": snapshot.database,
        "classes": list(snapshot.classes),
        "num_train": num_train,
        "num_validation": num_validation,
        "num_test": snapshot.num_test,
        "findings": snapshot.findings and snapshot.findings.to_json(),
        "notes": snapshot.describe_notes(),
    }


def describe_origin(record: dict[str, Any]) -> dict[str, str]:
    """Describe for model.pth which run its weights come from."""
    return {
        "experiment_name": record["experiment_name"],
        "run_name": record["run_name"],
        "data_digest": record["data"]["digest"],
        "code_digest": record["code"]["digest"],
        "instruction_set": record["settings"]["instruction_set"],
    }


def validate(
    classifier: Classifier, snapshot: Snapshot, indices: NDArray[np.int64], threads: Threads, ranks: Ranks
) -> dict[str, float]:
    """Compute loss and accuracy on the validation images, by single views; nothing if there are none."""
    if not len(indices):
        return {}
    probabilities = compute_probabilities(
        classifier, snapshot.images, indices, device=classifier.input_mean.device, threads=threads, ranks=ranks
    )
    labels = snapshot.labels[indices]
    chosen = probabilities[np.arange(len(labels)), labels].astype(np.float64)
    return {
        "validation_loss": float(-np.log(np.maximum(chosen, np.finfo(np.float32).tiny)).mean()),
        "validation_accuracy": float((probabilities.argmax(axis=1) == labels).mean()),
    }
