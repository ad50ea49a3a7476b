"""Sweeps of tiny runs: the same trials whatever the workers do, and what becomes of their storage, runs and recipe."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
import psycopg
import pytest

from image_classifier.cli.sweep import main
from image_classifier.cli.train import main as train
from image_classifier.cli.verify import main as verify
from image_classifier.tracking.checking import is_finished
from image_classifier.tracking.reading import read_chain, read_evaluation, read_manifest, read_record
from tests.conftest import PROJECT, leave_out_coverage, wait_until
from tests.postgres import PASSWORD, Cluster
from tests.terminal import run_on_terminal
from tests.tiny import write_tiny_dataset

SPACE = "learning_rate: {low: 0.002, high: 0.2, log: true}\nflip: {choices: [none, random]}\n"
NUM_TRIALS, NUM_PARALLEL = 6, 2
RUN = "--recipe notebook --batch_size 10 --num_epochs 4 --validation_fraction 0.2 --num_threads 1 --num_workers 0"
SWEEP = [*RUN.split(), *f"--num_trials {NUM_TRIALS} --parallel {NUM_PARALLEL} --pruner hyperband --seed 3".split()]

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_dataset(tmp_path_factory.mktemp("data") / "tiny")


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("space") / "space.yaml"
    path.write_text(SPACE)
    return path


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, dataset: Path, space: Path) -> Path:
    """The folder of a sweep by one worker that nobody disturbed, with two refits."""
    experiments = tmp_path_factory.mktemp("experiments")
    assert main([*list_words(experiments, dataset, space), *SWEEP, "--refit", "2"]) == 0
    return experiments / "shapes"


@pytest.fixture
def start(dataset: Path, space: Path) -> Iterator[Start]:
    """Start workers that end with the test."""
    processes = []

    def start_worker(experiments: Path, *options: str, **variables: str) -> subprocess.Popen[str]:
        words = [sys.executable, "-m", "image_classifier", "sweep", *list_words(experiments, dataset, space), *options]
        environment = {**leave_out_coverage(), **variables}
        pipe = subprocess.PIPE
        processes.append(subprocess.Popen(words, cwd=PROJECT, env=environment, stdout=pipe, stderr=pipe, text=True))
        return processes[-1]

    yield start_worker
    for process in processes:
        process.kill()
        process.communicate()


def list_words(experiments: Path, dataset: Path, space: Path) -> list[str]:
    words = ["--space", space, "--experiments_folder", experiments, "--experiment_name", "shapes"]
    return [str(word) for word in (*words, "--dataset_folder", dataset)]


def load_trials(storage: str) -> list[Any]:
    """Load what a storage has, as any other program that knows Optuna does."""
    study = optuna.load_study(study_name="shapes", storage=storage)
    assert study.user_attrs["running"] == {}
    return [
        (trial.number, trial.state, trial.value, trial.params, trial.intermediate_values, trial.user_attrs)
        for trial in study.trials
    ]


def load_file(folder: Path) -> list[Any]:
    return load_trials(f"sqlite:///{folder}/sweep.db")


def list_bits(folder: Path) -> list[Any]:
    """List what says of each run's bits all there is: the head of its chain, and the digest of its weights."""
    runs = sorted(folder.glob("trial-*"))
    assert len(runs) == NUM_TRIALS
    return [
        (
            read_chain(run)[-1:] if (run / "digests.jsonl").exists() else [],
            is_finished(run) and read_manifest(run)["weights_digest"],
        )
        for run in runs
    ]


def check_equal(folder: Path, reference: Path, trials: Sequence[Any] | None = None) -> None:
    """Check that a sweep has the trials, the bits and the winner of another one."""
    assert (load_file(folder) if trials is None else trials) == load_file(reference)
    assert list_bits(folder) == list_bits(reference)
    assert (folder / "best.yaml").read_text() == (reference / "best.yaml").read_text()


def test_a_sweep_leaves_runs_a_page_a_recipe_and_refits(
    reference: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trials = load_file(reference)
    states = [state.name for _, state, *_ in trials]
    assert states.count("COMPLETE") > 3 and "PRUNED" in states
    best = max((value, -number) for number, state, value, *_ in trials if state.name == "COMPLETE")
    run = reference / f"trial-{-best[1]:04}"
    assert read_record(run)["command"][:2] == ["image_classifier", "sweep"]
    assert verify([str(run), "--num_threads", "1"]) == 0
    assert capsys.readouterr().out.startswith("IDENTICAL")
    assert "Plotly.newPlot" in (reference / "sweep.html").read_text()
    words = ["--config", str(reference / "best.yaml"), "--experiments_folder", str(tmp_path), "--num_threads", "1"]
    words += ["--experiment_name", "e", "--run_name", "r", "--dataset_folder", str(dataset), "--seed", "4"]
    assert train(words) == 0
    record = read_record(tmp_path / "e" / "r")
    searched = {name: read_record(run)["settings"][name] for name in ("learning_rate", "flip")}
    assert searched.items() <= record["settings"].items() and record["data"]["num_validation"] == 0
    refits = json.loads((reference / "refits.json").read_text())
    assert [refit["seed"] for refit in refits] == [3, 4]
    assert refits[1]["weights_digest"] == read_manifest(tmp_path / "e" / "r")["weights_digest"]
    assert refits[1]["accuracy"] == read_evaluation(reference / "refit-4")["accuracy"]


def test_a_pruned_trial_can_be_resumed_by_itself(reference: Path, dataset: Path, tmp_path: Path) -> None:
    number = next(number for number, state, *_ in load_file(reference) if state.name == "PRUNED")
    name = f"trial-{number:04}"
    shutil.copytree(reference / name, tmp_path / "shapes" / name)
    words = ["--experiments_folder", str(tmp_path), "--experiment_name", "shapes", "--run_name", name, "--resume"]
    assert train(words) == 0
    assert verify([str(tmp_path / "shapes" / name), "--num_threads", "1"]) == 0


def test_a_sweep_that_is_done_is_found_done_and_goes_on_with_more_trials(
    reference: Path, dataset: Path, space: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(reference, tmp_path / "shapes")
    words = [*list_words(tmp_path, dataset, space), *SWEEP]
    assert main(words) == 0
    check_equal(tmp_path / "shapes", reference)
    assert f"goes on after {NUM_TRIALS} of {NUM_TRIALS} trials" in capsys.readouterr().err
    assert main([*words, "--num_trials", str(NUM_TRIALS + 1)]) == 0
    assert load_file(tmp_path / "shapes")[:NUM_TRIALS] == load_file(reference)
    assert f"trial {NUM_TRIALS} of {NUM_TRIALS + 1} " in capsys.readouterr().err


def test_two_workers_of_which_one_is_killed_come_to_the_same(
    reference: Path, start: Start, dataset: Path, space: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "shapes"
    killed = start(tmp_path, *SWEEP)

    def has_begun() -> bool:
        runs = [run for run in folder.glob("trial-*") if not is_finished(run) and list(run.glob("checkpoints/*"))]
        return any(worker_of(folder, run) == killed.pid for run in runs)

    def kill() -> None:
        wait_until(has_begun, killed)
        killed.send_signal(signal.SIGKILL)

    with meanwhile(kill):
        wait_until(lambda: (folder / "trial-0000").exists(), killed)
        assert main([*list_words(tmp_path, dataset, space), *SWEEP]) == 0
    assert killed.wait(30) == -signal.SIGKILL
    check_equal(folder, reference)


@contextmanager
def meanwhile(work: Callable[[], None]) -> Iterator[None]:
    """Do work beside the block, and fail where it fails."""
    with ThreadPoolExecutor(1) as executor:
        done = executor.submit(work)
        yield
        done.result(60)


def worker_of(folder: Path, run: Path) -> int | None:
    """Find the process that trains a trial."""
    study = optuna.load_study(study_name="shapes", storage=f"sqlite:///{folder}/sweep.db")
    entry = study.user_attrs["running"].get(str(int(run.name.removeprefix("trial-"))))
    return entry["worker"]["pid"] if entry and not entry["result"] else None


def test_a_worker_that_is_stopped_gives_its_trial_back(
    reference: Path, start: Start, dataset: Path, space: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "shapes"
    stopped = start(tmp_path, *SWEEP)
    wait_until(lambda: (folder / "trial-0001" / "checkpoints").exists(), stopped)
    stopped.send_signal(signal.SIGTERM)
    _, errors = stopped.communicate(timeout=60)
    assert stopped.returncode == 143, errors
    study = optuna.load_study(study_name="shapes", storage=f"sqlite:///{folder}/sweep.db")
    assert all(entry["worker"] is None for entry in study.user_attrs["running"].values())
    assert main([*list_words(tmp_path, dataset, space), *SWEEP]) == 0
    check_equal(folder, reference)


def test_postgresql_is_stopped_and_started_in_the_middle(
    reference: Path, start: Start, tmp_path: Path, postgresql: Cluster
) -> None:
    postgresql.execute("postgres", "DROP DATABASE IF EXISTS sweep", "CREATE DATABASE sweep")
    address = f"postgresql://owner@127.0.0.1:{postgresql.port}/sweep"
    workers = [start(tmp_path, *SWEEP, "--storage", address, DB_PASSWORD=PASSWORD) for _ in range(2)]
    folder = tmp_path / "shapes"
    wait_until(lambda: (folder / "trial-0001").exists(), workers[0])
    postgresql.stop()
    with pytest.raises(psycopg.OperationalError):
        postgresql.connect("sweep")
    time.sleep(1)
    assert all(worker.poll() is None for worker in workers)
    postgresql.start()
    for worker in workers:
        output, errors = worker.communicate(timeout=120)
        assert worker.returncode == 0, output + errors
    storage = optuna.storages.RDBStorage(
        address.replace("postgresql:", "postgresql+psycopg:"), {"connect_args": {"password": PASSWORD}}
    )
    study = optuna.load_study(study_name="shapes", storage=storage)
    trials = [(t.number, t.state, t.value, t.params, t.intermediate_values, t.user_attrs) for t in study.trials]
    storage.engine.dispose()
    check_equal(folder, reference, trials)
    assert not (folder / "sweep.db").exists()
    content = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    assert PASSWORD.encode() not in content


@pytest.mark.parametrize(
    ("options", "refusal"),
    [
        (["--validation_fraction", "0"], "a sweep is judged on a validation part, never on the test set"),
        (["--learning_rate", "0.1"], "--learning_rate is in the --space, too"),
        (["--storage", "postgresql://me:secret-word@host/db"], "--storage must not contain a password"),
        (["--storage", "postgresql://me@127.0.0.1:1/db"], "--storage: db at 127.0.0.1:1 cannot be used"),
        (["--search", "grid"], "--search grid takes choices, whole numbers, or a range with a step"),
        (["--max_failures", "-1"], "--max_failures takes a whole number of 0 or more, got: -1"),
        (["--parallel", "0"], "--parallel takes a whole number of 1 or more, got: 0"),
        (["--num_epochs", "x"], "--num_epochs takes a whole number, got: x"),
        (["--num_epochs", "0"], "num_epochs takes 1 or more in a sweep"),
        (["--run_name", "x"], "--run_name is no option"),
        (["--search", "best"], "--search takes one of tpe, random, grid, got: best"),
        (["--batch_size", "0"], "--batch_size takes a whole number of 1 or more, got: 0"),
        (["--batch_size", "5000"], "images that are trained on, got: 5000; choose --recipe "),
    ],
)
def test_bad_input_is_refused_in_one_line_and_nothing_is_written(
    dataset: Path, space: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], refusal: str
) -> None:
    assert main([*list_words(tmp_path, dataset, space), *SWEEP, *options]) == 2
    errors = capsys.readouterr().err
    assert refusal in errors and errors.startswith("error: ") and errors.count("\n") == 1
    assert "secret-word" not in errors
    assert not list(tmp_path.iterdir())


def test_what_a_setting_never_takes_is_refused_before_the_first_trial(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "space.yaml"
    path.write_text("momentum: {low: 0.5, high: 1}\nflip: {choices: [none, random]}\n")
    assert main([*list_words(tmp_path, dataset, path), *SWEEP]) == 2
    errors = capsys.readouterr().err
    assert "error: --space: momentum takes a number from 0 up to but not including 1, got: 1.0\n" == errors
    assert [entry.name for entry in tmp_path.iterdir()] == ["space.yaml"]


def test_another_sweep_under_the_same_name_is_refused(
    reference: Path, dataset: Path, space: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(reference, tmp_path / "shapes")
    words = [*list_words(tmp_path, dataset, space), *SWEEP]
    other = tmp_path / "other.yaml"
    other.write_text(SPACE.replace("0.002", "0.001"))
    for options, change in (
        (["--space", str(other)], "its learning_rate: low was 0.002, is 0.001"),
        (["--parallel", "3"], "its parallel was 2, is 3"),
        (["--momentum", "0.5"], "its settings: momentum was 0.9, is 0.5"),
    ):
        assert main([*words, *options]) == 2
        assert f"cannot continue, because {change}; choose another --experiment_name" in capsys.readouterr().err
    check_equal(tmp_path / "shapes", reference)


def test_a_trial_that_fails_is_recorded_and_too_many_end_the_sweep(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "space.yaml"
    path.write_text("mixup: {choices: [0, 0.2]}\ncutmix: {choices: [0.3, 0]}\n")
    words = [*list_words(tmp_path, dataset, path), *RUN.split(), "--search", "grid", "--num_epochs", "1"]
    assert main([*words, "--max_failures", "0"]) == 2
    refusal = "1 of 2 trials failed, more than --max_failures 0; the last: --mixup and --cutmix cannot be combined"
    errors = capsys.readouterr().err
    assert refusal in errors and errors.count("error: ") == 1
    assert main(words) == 0
    trials = load_file(tmp_path / "shapes")
    assert [state.name for _, state, *_ in trials] == ["COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]
    assert trials[1][5]["error"].startswith("--mixup and --cutmix cannot be combined")
    assert not (tmp_path / "shapes" / "trial-0001").exists()
    assert "trial 1 of 4 failed (cutmix 0.3, mixup 0.2): --mixup and" in errors


def test_a_terminal_shows_a_table_that_is_drawn_anew(
    reference: Path, dataset: Path, space: Path, tmp_path: Path
) -> None:
    words = [sys.executable, "-m", "image_classifier", "sweep", *list_words(tmp_path, dataset, space), *SWEEP]
    words += ["--num_trials", "2"]
    text, summary = run_on_terminal(words, lines=30, columns=110)
    last = text.rpartition("\x1b[J")[2]
    assert re.search(r"2 of 2 trials are done; \* best: \d+\.\d\d %", last)
    assert re.search(r"^trial +state +accuracy +epochs +time +flip +learning_rate", last, flags=re.MULTILINE)
    assert re.search(r"^0( \*)? +complete +\d+\.\d\d % +4 ", last, flags=re.MULTILINE)
    assert "\x1b[4A\x1b[J" in text
    assert re.search(r"^validation +\d+\.\d\d %$", summary, flags=re.MULTILINE)
