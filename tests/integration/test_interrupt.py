"""Trainers that are asked to stop, or started twice; and runs that end with the same bits however they were made."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from image_classifier.cli.progress import TerminalReporter
from image_classifier.cli.signals import StopRequest
from image_classifier.errors import Interrupted
from image_classifier.experiment import run
from image_classifier.reporter import Reporter
from image_classifier.settings import RunSettings, TrainingSettings
from image_classifier.storage import TEMPORARY_PREFIX, FaultyDisk
from image_classifier.tracking.checking import is_finished
from image_classifier.tracking.checkpoint import Checkpoints
from image_classifier.tracking.reading import read_chain, read_epochs, read_evaluation, read_manifest
from image_classifier.training.loop import Step
from tests.conftest import PROJECT, leave_out_coverage, require_real_data, wait_until
from tests.crash import Campaign, Child, Place, call, kill_process, resume_and_compare
from tests.tiny import write_tiny_dataset

NUM_EPOCHS = 80  # of 20 steps: seconds in which a signal finds the trainer in the middle of its work
OPTIONS = (
    "--recipe notebook --batch_size 10 --learning_rate 0.01 --device cpu --num_threads 1 --digest_every 50 "
    f"--num_epochs {NUM_EPOCHS} --checkpoint_every 100steps"
).split()

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_dataset(tmp_path_factory.mktemp("data") / "tiny")


@pytest.fixture
def start(dataset: Path) -> Iterator[Start]:
    """Start trainers that end with the test."""
    processes = []

    def start_trainer(experiments: Path, *options: str, dataset: Path = dataset) -> subprocess.Popen[str]:
        words = [sys.executable, "-m", "image_classifier.main", "--experiment_name", "experiment", "--run_name", "run"]
        words += ["--experiments_folder", str(experiments), "--dataset_folder", str(dataset), *options]
        pipe = subprocess.PIPE
        environment = leave_out_coverage()
        processes.append(subprocess.Popen(words, cwd=PROJECT, env=environment, stdout=pipe, stderr=pipe, text=True))
        return processes[-1]

    yield start_trainer
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> tuple[Path, list[str]]:
    """The folder of a run that nobody interrupted, and the lines of its stderr."""
    experiments = tmp_path_factory.mktemp("reference")
    words = [sys.executable, "-m", "image_classifier.main", "--experiment_name", "experiment", "--run_name", "run"]
    words += ["--experiments_folder", str(experiments), "--dataset_folder", str(dataset), *OPTIONS]
    result = subprocess.run(words, cwd=PROJECT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return experiments / "experiment" / "run", result.stderr.splitlines()


def wait_for_line(process: subprocess.Popen[str], words: str) -> None:
    """Read a trainer's stderr up to a line that begins with these words."""
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if line.startswith(words):
            return
    pytest.fail(f"no line began with {words!r}:\n{''.join(lines)}")


def has_open(pid: int, path: Path) -> bool:
    """Say whether a process has a file open."""
    links = Path(f"/proc/{pid}/fd").iterdir()
    with suppress(FileNotFoundError):  # one was closed meanwhile
        return any(os.readlink(link) == str(path) for link in links)
    return False


def assert_equal_runs(folder: Path, reference: Path) -> None:
    """Two runs ended with the same bits, and came there by the same way."""
    for key in ("weights_digest", "chain_head"):
        assert read_manifest(folder)[key] == read_manifest(reference)[key]
    assert read_chain(folder) == read_chain(reference)
    assert read_evaluation(folder) == read_evaluation(reference)
    epochs, expected = ([(line["epoch"], line["train_loss"]) for line in read_epochs(f)] for f in (folder, reference))
    assert epochs == expected


def test_without_a_terminal_there_is_one_line_an_epoch(reference: tuple[Path, list[str]]) -> None:
    _, lines = reference
    pattern = rf"epoch (\d+)/{NUM_EPOCHS}: loss \d\.\d{{4}}, training accuracy \d+\.\d\d%, .* images/s"
    epochs = [int(match[1]) for line in lines if (match := re.fullmatch(pattern, line))]
    assert epochs == list(range(1, NUM_EPOCHS + 1))
    assert len(lines) == NUM_EPOCHS + 2 and not any(
        "\r" in line for line in lines
    ), "more than begin, epochs, evaluation"


def test_signals_in_training_save_the_state_and_the_run_goes_on_to_the_same_bits(
    start: Start, reference: tuple[Path, list[str]], tmp_path: Path
) -> None:
    folder = tmp_path / "experiment" / "run"
    options, steps = OPTIONS, []
    for number, epoch in ((signal.SIGTERM, 2), (signal.SIGINT, 30)):
        process = start(tmp_path, *options)
        wait_for_line(process, f"epoch {epoch}/")
        process.send_signal(number)
        message = process.communicate()[1].splitlines()[-1]
        assert process.returncode == 128 + number
        match = re.fullmatch(rf"stopped after step (\d+) of {NUM_EPOCHS * 20}; --resume continues {folder}", message)
        assert match, message
        steps.append(int(match[1]))
        assert Checkpoints(folder / "checkpoints").list_steps()[-1] == steps[-1] >= 20 * epoch
        assert not is_finished(folder)
        options = ["--resume"]  # the record knows the rest
    assert steps[0] < steps[1]
    process = start(tmp_path, "--resume")
    wait_for_line(process, f"resumed after step {steps[1]} of {NUM_EPOCHS * 20}")
    assert process.communicate() and process.returncode == 0
    assert_equal_runs(folder, reference[0])


def test_a_signal_in_the_evaluation_ends_it_at_once_and_the_run_can_go_on(
    start: Start, reference: tuple[Path, list[str]], tmp_path: Path
) -> None:
    folder = tmp_path / "experiment" / "run"
    shutil.copytree(reference[0], folder)
    for name in ("manifest.json", "model.pth", "predictions.npz", "evaluation.json", "metrics.png"):
        (folder / name).unlink()
    process = start(tmp_path, "--resume")
    wait_for_line(process, "evaluating on 60 test images")
    process.terminate()
    assert process.communicate()[1] == "stopped by SIGTERM; --resume continues\n"
    assert process.returncode == 143 and not is_finished(folder)
    process = start(tmp_path, "--resume")
    assert process.communicate() and process.returncode == 0
    assert_equal_runs(folder, reference[0])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_the_data_is_read_ends_the_trainer_at_once_with_nothing_written(
    number: signal.Signals, start: Start, tmp_path: Path
) -> None:
    dataset = write_tiny_dataset(tmp_path / "data")
    lock = dataset / ".snapshots" / ".lock"
    lock.parent.mkdir()
    with open(lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # the trainer waits for it, in the middle of reading
        process = start(tmp_path / "experiments", *OPTIONS, dataset=dataset)
        wait_until(lambda: has_open(process.pid, lock), process)
        process.send_signal(number)
        output = process.communicate()
    assert (process.returncode, *output) == (128 + number, "", f"stopped by {number.name}\n")
    assert not (tmp_path / "experiments").exists()


def test_a_second_signal_ends_the_trainer_where_it_stands(start: Start, tmp_path: Path) -> None:
    process = start(tmp_path, *OPTIONS)
    wait_for_line(process, "epoch 7/")
    for number in (signal.SIGSTOP, signal.SIGTERM, signal.SIGINT, signal.SIGCONT):  # so that both come together
        process.send_signal(number)
    assert "stopped after" not in process.communicate()[1]
    assert process.returncode in (130, 143)
    steps = Checkpoints(tmp_path / "experiment" / "run" / "checkpoints").list_steps()
    assert steps and all(step % 100 == 0 for step in steps), "a checkpoint was saved after the second signal"


def test_a_second_trainer_stays_out_and_the_first_is_unharmed(
    start: Start, reference: tuple[Path, list[str]], tmp_path: Path
) -> None:
    first = start(tmp_path, *OPTIONS)
    wait_for_line(first, "epoch 2/")
    first.send_signal(signal.SIGSTOP)
    folder = tmp_path / "experiment" / "run"
    files = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for options, words in ((["--resume"], "another process is training into"), (OPTIONS, "exists already")):
        second = start(tmp_path, *options)
        message = second.communicate()[1]
        assert second.returncode == 2
        assert re.fullmatch(f"error: .*{re.escape(words)}.*\n", message), message
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == files
    first.send_signal(signal.SIGCONT)
    assert first.communicate() and first.returncode == 0
    assert_equal_runs(folder, reference[0])


def train_and_signal(place: Place, at_call: int) -> tuple[int, str]:
    """Train, as a child, be asked to stop at a call to the disk; return the exit status and the message."""
    disk = FaultyDisk(lambda: os.kill(os.getpid(), signal.SIGTERM), at_call)
    sys.stderr = open(os.devnull, "w")
    with StopRequest() as stop, pytest.raises(Interrupted) as caught:
        settings = place.build_settings(resume=False)
        run(settings, reporter=TerminalReporter(stop), should_stop=stop.is_set, disk=disk)
    return stop.exit_status, str(caught.value)


def try_signal(place: Place, reference: Path, at_call: int) -> str:
    status, message = call(train_and_signal, place, at_call)
    assert status == 143
    assert list(place.experiments.rglob(f"{TEMPORARY_PREFIX}*")) == []
    step = call(resume_and_compare, place, reference)
    saved = re.fullmatch(r"stopped after step (\d+) of 26; --resume continues .*", message)
    if saved:
        assert step == int(saved[1])
    return str(message)


def test_a_signal_at_any_call_of_a_save_is_deferred_to_the_end_of_the_next_step(campaign: Campaign) -> None:
    paths = [str(path) for _, path in campaign.calls]
    begin, end = (
        next(i for i, path in enumerate(paths) if step in path) for step in ("step-00000020", "step-00000026")
    )
    numbers = [begin + 1 + i for i, path in enumerate(paths[begin:end]) if "step-000000" in path]
    assert len(numbers) >= 9  # of the new checkpoint and of the removal of the old one
    futures = [campaign.submit(try_signal, campaign.make_place(), campaign.reference, number) for number in numbers]
    assert {future.result().partition(";")[0] for future in futures} == {"stopped after step 21 of 26"}


def test_a_signal_at_any_time_leaves_a_run_that_goes_on_to_the_same_bits(campaign: Campaign) -> None:
    numbers = range(1, len(campaign.calls) + 1, 10)
    futures = [campaign.submit(try_signal, campaign.make_place(), campaign.reference, number) for number in numbers]
    messages = {re.sub(r"\d+", "N", future.result().partition(";")[0]) for future in futures}
    assert {"stopped by SIGTERM", "stopped after step N of N"} <= messages


# The same bits, on real data.

SHORTENED: dict[str, dict[str, Any]] = {
    "notebook": {"num_epochs": 1, "digest_every": 100},
    "fast": {"num_epochs": 1, "digest_every": 1, "batch_size": 500},
}
KILLED_AT = {"notebook": (331, 702, 1111), "fast": (3, 6, 9)}


def build_shortened(experiments: Path, recipe: str, num_workers: int, dataset: Path, *, resume: bool) -> RunSettings:
    training = TrainingSettings.from_recipe(recipe, device="cpu", **SHORTENED[recipe])
    return RunSettings(
        experiments_folder=experiments,
        experiment_name=recipe,
        run_name="run",
        dataset_folder=dataset,
        num_threads=1,
        num_workers=num_workers,
        checkpoint_every="250steps" if recipe == "notebook" else "2steps",
        resume=resume,
        recipe=recipe,
        training=training,
    )


def train_shortened(experiments: Path, recipe: str, num_workers: int, dataset: Path, kill_at: int) -> None:
    class Killer(Reporter):
        def step(self, step: Step) -> None:
            if step.number == kill_at:
                kill_process()

    resume = (experiments / recipe / "run").exists()
    run(build_shortened(experiments, recipe, num_workers, dataset, resume=resume), reporter=Killer())


def train_through_kills(
    experiments: Path, recipe: str, num_workers: int, dataset: Path, kills: tuple[int, ...]
) -> None:
    """Train a shortened recipe in children that are killed after these steps, and in one that is not."""
    for step in kills:
        status, trace = Child(train_shortened, experiments, recipe, num_workers, dataset, step).wait()
        assert status == -signal.SIGKILL, trace
    call(train_shortened, experiments, recipe, num_workers, dataset, 0)


@pytest.mark.parametrize("recipe", ["notebook", "fast"])
def test_runs_on_real_data_end_with_the_same_bits_with_any_workers_and_when_killed(
    recipe: str, campaign: Campaign, tmp_path: Path
) -> None:
    dataset = require_real_data("IMAGE_CLASSIFIER_CIFAR10_ORIGINAL")
    cases: list[tuple[int, tuple[int, ...]]] = [(0, ()), (1, ()), (1, KILLED_AT[recipe]), (4, ())]
    folders = [tmp_path / f"{number}" for number in range(len(cases))]
    futures = [
        campaign.submit(train_through_kills, folder, recipe, num_workers, dataset, kills)
        for folder, (num_workers, kills) in zip(folders, cases, strict=True)
    ]
    for future in futures:
        future.result()
    first, *others = (folder / recipe / "run" for folder in folders)
    for other in others:
        assert_equal_runs(other, first)
