"""Trains and evaluates one run: connects all stages, from the data source to the run folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from image_classifier.data.loader import Loader
from image_classifier.data.snapshot import Snapshot
from image_classifier.errors import Interrupted
from image_classifier.model.classifier import Classifier
from image_classifier.plugins import PlugIn
from image_classifier.preparation import (
    build_checked_optimizer,
    build_initial_classifier,
    build_loader,
    configure,
    list_notes,
    load_data,
    load_start,
    split_training_set,
)
from image_classifier.reporter import Reporter
from image_classifier.settings import RunSettings, TrainingSettings
from image_classifier.storage import DISK, Disk, remove_leftovers
from image_classifier.tracking.checking import is_finished
from image_classifier.tracking.checkpoint import Model, serialize_model
from image_classifier.tracking.identity import compute_weights_digest
from image_classifier.tracking.layout import ENVIRONMENT, EVALUATION, FIGURE, MODEL, PREDICTIONS, PROFILE, RECORD
from image_classifier.tracking.reading import (
    read_epochs,
    read_evaluation,
    read_manifest,
    read_record,
    serialize_predictions,
)
from image_classifier.tracking.record import (
    build_environment,
    build_record,
    check_identity,
    check_settings,
    describe_data,
    describe_identity,
    describe_origin,
)
from image_classifier.tracking.run import open_run_folder, run_exists_error
from image_classifier.tracking.state import TrainingState
from image_classifier.training.average import build_average
from image_classifier.training.engine import check_operations
from image_classifier.training.evaluate import compute_evaluation, compute_probabilities
from image_classifier.training.loop import train
from image_classifier.training.profiling import profile_steps
from image_classifier.training.ranks import Ranks
from image_classifier.training.threads import Threads


@dataclass(frozen=True)
class RunResult:
    """A finished run."""

    folder: Path
    evaluation: dict[str, Any]
    weights_digest: str


# Over 50 lines: the stages of a run in their order.
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
    """Train, evaluate and write a finished run folder; or continue an interrupted run.

    Args:
        snapshot: the data set, if it is already loaded.
        reporter: receives every step.
        should_stop: called after each step; if it returns True, the state is saved and Interrupted is raised.
        command: command line, for the record.
        disk: writes the run folder; tests inject faults here.
        ranks: processes that train together. Only rank 0 keeps what it writes.

    Raises:
        ImageClassifierError: a setting, the data, the pretrained model or the folder is invalid. Nothing was written
            if this happens before the first step.
        Interrupted: `should_stop` returned True; `resume` continues the run.
    """
    reporter, ranks = reporter or Reporter(), ranks or Ranks()
    ranks.should_stop = should_stop
    path = settings.run_folder
    if os.path.lexists(path) and not settings.resume:
        raise run_exists_error(path)

    training, threads = configure(settings)
    if (finished := ranks.broadcast(find_result(settings, training, disk))) is not None:
        return finished

    snapshot = load_data(settings, snapshot)
    settings = replace(settings, database=snapshot.database)  # with the version that was the newest
    train_indices, validation_indices = split_training_set(snapshot, training)
    pretrained = load_start(settings, training, snapshot)
    classifier = build_initial_classifier(training, snapshot, train_indices, pretrained)
    loader = build_loader(snapshot, train_indices, training, settings.num_workers)
    check_operations(classifier, training, None if loader.targets is None else torch.from_numpy(loader.targets))
    data = describe_data(snapshot, len(train_indices), len(validation_indices))
    start = None if pretrained is None else pretrained.describe(snapshot.classes, settings.settings_from_weights)
    record = build_record(settings, training, data, command, start)
    ranks.check_agreement(describe_identity(record))

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
        folder.write_json(ENVIRONMENT, build_environment(record))
        reporter.begin(record, state.num_steps, state.step)
        for text in list_notes(training, snapshot, pretrained, state.num_steps):
            reporter.note(text)
        compute_validation = partial(validate, state.judged, snapshot, validation_indices, threads, ranks)
        train_to_end(state, loader, settings, compute_validation, reporter, threads, ranks)
        return evaluate_and_finish(state, record, snapshot, settings, reporter, threads, ranks)


def train_to_end(
    state: TrainingState,
    loader: Loader,
    settings: RunSettings,
    compute_validation: Callable[[], dict[str, float]],
    reporter: Reporter,
    threads: Threads,
    ranks: Ranks,
) -> None:
    """Train the remaining steps, and record each.

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
    """Evaluate on the test set, and write the files of a finished run."""
    from image_classifier.visualization.figures import draw_run_figure  # imported late: it takes 0.6 s

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
    return ranks.broadcast(result)  # other ranks wait until rank 0 has written the files


def find_result(settings: RunSettings, training: TrainingSettings, disk: Disk) -> RunResult | None:
    """Return the result of a run to resume if it is already finished, after checking its settings."""
    path = settings.run_folder
    if not settings.resume or not is_finished(path):
        return None
    check_settings(read_record(path), training, path)
    remove_leftovers(path, disk)
    return RunResult(path, read_evaluation(path), read_manifest(path)["weights_digest"])


def describe_early_stop(state: TrainingState) -> str:
    """Describe where and why early stopping ended a run."""
    line = (
        f"--early_stopping ended the run after epoch {state.epoch} of {state.training.num_epochs}: "
        f"the validation accuracy has not improved since epoch {state.best_epoch}"
    )
    if state.training.schedule == "constant":
        return line
    return f"{line}; the schedule ended at a learning rate of {state.learning_rate:.4g}"


def validate(
    classifier: Classifier, snapshot: Snapshot, indices: NDArray[np.int64], threads: Threads, ranks: Ranks
) -> dict[str, float]:
    """Compute loss and accuracy on the validation images without test-time augmentation; {} if there are none."""
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
