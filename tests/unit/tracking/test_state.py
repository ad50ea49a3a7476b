"""The state of a run: what is restored goes on as if nothing had happened."""

from __future__ import annotations

import io
import zipfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from image_classifier.errors import RunError
from image_classifier.model.catalog import build_classifier
from image_classifier.tracking.layout import CHAIN, METRICS
from image_classifier.tracking.reading import read_chain, read_epochs
from image_classifier.tracking.run import RunFolder
from image_classifier.tracking.state import TrainingState
from image_classifier.training.average import build_average
from image_classifier.training.loop import Step
from image_classifier.training.optimizer import build_optimizer
from tests.tiny import make_training

STEPS_PER_EPOCH = 6
HERE: dict[str, Any] = {"digest": "here", "class": {"processor": "this"}}
ELSEWHERE: dict[str, Any] = {"digest": "elsewhere", "class": {"processor": "another"}}


def build_training_state(path: Path, machine: dict[str, Any] = HERE, **values: Any) -> TrainingState:
    values = {"num_epochs": 3, **values}
    training = make_training(model="lenet", device="cpu", precision="fp32", **values)
    classifier = build_classifier("lenet", 4, input_mean=(0.5,) * 3, input_std=(0.25,) * 3, seed=0)
    optimizer, average = build_optimizer(classifier, training), build_average(classifier, training, nullcontext)
    return TrainingState(RunFolder(path), classifier, optimizer, training, STEPS_PER_EPOCH, machine, average)


def take_steps(state: TrainingState, until: int) -> None:
    """Take steps whose gradients are a function of the step, and record them as a run does."""
    while state.step < until:
        number = state.step + 1
        for index, parameter in enumerate(state.classifier.parameters()):
            parameter.grad = torch.full_like(parameter, 0.01 * number + 0.001 * index)
        state.optimizer.step()
        if state.average is not None:
            state.average.update(state.classifier, number)
        state.record_step(Step(number, 0.1 / number, torch.tensor(3.0 / number), torch.tensor(number % 4), 4, 0.5))
        state.append_digest()
        if number % STEPS_PER_EPOCH == 0:
            accuracy = 0.9 if number == STEPS_PER_EPOCH else 0.5
            state.append_epoch({"validation_loss": 1.0, "validation_accuracy": accuracy})


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
@pytest.mark.parametrize("keep", ["last", "best"])
@pytest.mark.parametrize("saved_at", [1, 5, 6, 7, 12, 17])
def test_a_restored_state_goes_on_as_if_nothing_had_happened(
    keep: str, saved_at: int, ema_decay: float, tmp_path: Path
) -> None:
    values: dict[str, Any] = {"keep": keep, "validation_fraction": 0.5, "ema_decay": ema_decay}
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    unharmed = build_training_state(tmp_path / "a", **values)
    take_steps(unharmed, 18)
    unharmed.use_kept_weights()

    first = build_training_state(tmp_path / "b", **values)
    take_steps(first, saved_at)
    first.save(keep=1)
    take_steps(first, min(saved_at + 3, 18))  # steps that are forgotten
    second = build_training_state(tmp_path / "b", **values)
    second.restore(keep=1)
    assert (second.step, second.epoch) == (saved_at, saved_at // STEPS_PER_EPOCH)
    take_steps(second, 18)
    second.use_kept_weights()

    assert second.chain_head == unharmed.chain_head
    for name in (METRICS, CHAIN):
        assert (tmp_path / "b" / name).read_bytes() == (tmp_path / "a" / name).read_bytes()
    for name, tensor in unharmed.get_tensors().items():
        assert torch.equal(second.get_tensors()[name], tensor)


@pytest.mark.parametrize(("patience", "num_epochs"), [(1, 2), (2, 3), (3, None)])
def test_a_run_is_stopped_after_so_many_epochs_that_were_no_better(
    patience: int, num_epochs: int | None, tmp_path: Path
) -> None:
    values: dict[str, Any] = {"early_stopping": patience, "validation_fraction": 0.5, "num_epochs": 6}
    state = build_training_state(tmp_path, **values)  # whose first epoch is the best
    stopped = []
    for number in range(1, 4):
        take_steps(state, number * STEPS_PER_EPOCH)
        stopped += [number] * state.is_stopped_early
    assert stopped[:1] == ([] if num_epochs is None else [num_epochs]) and state.best_epoch == 1
    state.save(keep=1)
    restored = build_training_state(tmp_path, **values)
    restored.restore(keep=1)
    assert (restored.best_epoch, restored.is_stopped_early) == (1, state.is_stopped_early)


def test_the_average_is_what_is_judged_and_part_of_the_digests(tmp_path: Path) -> None:
    state = build_training_state(tmp_path, ema_decay=0.9)
    weights = state.classifier.state_dict()
    expected = {name: tensor.double() for name, tensor in weights.items()}
    for number in range(1, 9):
        take_steps(state, number)
        decay = min(0.9, (1 + number) / (10 + number))
        expected = {name: decay * expected[name] + (1 - decay) * weights[name] for name in expected}
    averages = state.judged.state_dict()
    for name, tensor in expected.items():
        assert torch.allclose(averages[name].double(), tensor, rtol=1e-5)
        assert name.startswith("input_") or not torch.equal(averages[name], weights[name])
    assert read_chain(tmp_path)[-1]["tensors"].keys() >= {f"average.{name}" for name in weights}


@pytest.mark.parametrize("value", [None, {}, 3])
def test_a_checkpoint_without_the_average_is_passed_over(value: Any, tmp_path: Path) -> None:
    state = build_training_state(tmp_path, ema_decay=0.9)
    take_steps(state, 3)
    content = {**state.dump(), "average": value, "lines": {}}
    state.checkpoints.save(3, content, keep=1)
    restored = build_training_state(tmp_path, ema_decay=0.9)
    restored.restore(keep=1)
    assert restored.step == 0


def test_without_a_checkpoint_a_run_begins_again(tmp_path: Path) -> None:
    take_steps(build_training_state(tmp_path), 8)
    state = build_training_state(tmp_path)
    state.restore(keep=2)
    assert state.step == 0 and read_epochs(tmp_path) == read_chain(tmp_path) == []


def test_a_checkpoint_whose_lines_were_changed_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = build_training_state(tmp_path)
    for step in (3, 8, 10):
        take_steps(state, step)
        state.save(keep=3)
    lines = (tmp_path / CHAIN).read_bytes().splitlines(keepends=True)
    (tmp_path / CHAIN).write_bytes(b"".join([*lines[:4], lines[4].replace(b"0", b"1"), *lines[5:]]))
    restored = build_training_state(tmp_path)
    restored.restore(keep=3)
    assert restored.step == 3 and len(read_chain(tmp_path)) == 3
    assert len(caplog.messages) == 2 and all("digests.jsonl has lost or changed lines" in m for m in caplog.messages)


def test_more_checkpoints_than_are_kept_are_removed_when_a_run_goes_on(tmp_path: Path) -> None:
    state = build_training_state(tmp_path)
    for step in (3, 8, 10):
        take_steps(state, step)
        state.save(keep=3)
    build_training_state(tmp_path).restore(keep=1)
    assert state.checkpoints.list_steps() == [10]


def test_a_run_that_goes_on_on_a_machine_of_another_class_breaks_the_chain_once(tmp_path: Path) -> None:
    state = build_training_state(tmp_path)
    take_steps(state, 3)
    state.save(keep=1)
    for _ in range(2):  # killed after the first, before it saved: the break is written again, and there is one
        elsewhere = build_training_state(tmp_path, ELSEWHERE)
        elsewhere.restore(keep=1)
        (line,) = (line for line in read_chain(tmp_path) if "break" in line)
        assert line["step"] == 3 and line["break"] == ELSEWHERE["class"] and line["digest"] == elsewhere.chain_head
    take_steps(elsewhere, 4)
    elsewhere.save(keep=1)
    build_training_state(tmp_path, ELSEWHERE).restore(keep=1)
    assert sum("break" in line for line in read_chain(tmp_path)) == 1


def test_a_long_epoch_does_not_make_a_checkpoint_of_many_parts(tmp_path: Path) -> None:
    state = build_training_state(tmp_path)
    state.steps_per_epoch = 10_000
    for number in range(1, 2001):
        state.record_step(Step(number, 0.1, torch.tensor(1.0), torch.tensor(1), 4, 0.001))
    state.save(keep=1)
    archive = zipfile.ZipFile(io.BytesIO((state.checkpoints.get_path(2000) / "state.pth").read_bytes()))
    assert len(archive.namelist()) < 100


def test_an_epoch_is_summed_up_over_its_images(tmp_path: Path) -> None:
    state = build_training_state(tmp_path)
    for number, (loss, num_correct, num_images) in enumerate([(1.0, 4, 4), (2.0, 0, 4), (4.0, 1, 2)], start=1):
        step = Step(number, 0.1, torch.tensor(loss), torch.tensor(num_correct), num_images, 0.25)
        state.record_step(step)
    state.steps_per_epoch = 3
    line = state.append_epoch({})
    assert line == read_epochs(tmp_path)[0]
    assert (line["epoch"], line["step"], line["train_accuracy"]) == (1, 3, 0.5)
    assert line["train_loss"] == pytest.approx((4 * 1 + 4 * 2 + 2 * 4) / 10)
    assert line["loss_by_part"] == [1.0, 2.0, 4.0]
    assert (line["seconds"], line["images_per_second"]) == (0.75, 13.3)


def test_a_loss_that_is_no_number_stops_the_run(tmp_path: Path) -> None:
    state = build_training_state(tmp_path)
    state.steps_per_epoch = 1
    state.record_step(Step(1, 0.1, torch.tensor(float("nan")), torch.tensor(0), 4, 0.1))
    with pytest.raises(RunError, match="the training diverged in epoch 1: the loss is nan; lower --learning_rate"):
        state.append_epoch({})
    assert read_epochs(tmp_path) == []
