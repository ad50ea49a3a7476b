"""Several processes, started by torchrun: the bits of one, whatever happens to them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from image_classifier.data.blocks import BLOCK_BYTES, compute_windows
from image_classifier.tracking.checking import is_finished
from image_classifier.tracking.layout import CHAIN, CHECKPOINTS, PREDICTIONS
from image_classifier.tracking.reading import read_epochs, read_manifest
from tests.conftest import PROJECT
from tests.tiny import write_tiny_dataset

OPTIONS = (
    "--experiment_name e --recipe small --model airbench_small --image_sizes 16 --batch_size 40 --shards 5 "
    "--translate 1 --num_epochs 4 --num_threads 1 --digest_every 1 --checkpoint_every 4steps --device cpu "
    "--precision fp32 --validation_fraction 0.1 --keep best --cutmix 1 --color_jitter 0.3 --class_weights balanced "
    "--ema_decay 0.9"
).split()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_dataset(tmp_path_factory.mktemp("data") / "set", num_train=230)


def start(folder: Path, dataset: Path, num_ranks: int, *options: str, max_restarts: int = 0) -> subprocess.Popen[str]:
    """Start a training of several processes, or of one."""
    launcher = f"-m torch.distributed.run --nproc_per_node {num_ranks} --max_restarts {max_restarts}".split()
    trainer = ["-m", "image_classifier.main", *OPTIONS, "--run_name", f"run{num_ranks}"]
    places = ["--experiments_folder", str(folder), "--dataset_folder", str(dataset)]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    command = [sys.executable, *(launcher if num_ranks > 1 else []), *trainer, *places, *options]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=subprocess.STDOUT, text=True, env=environment, cwd=folder)


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=300)
    return output


@pytest.fixture(scope="module")
def reference(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reference")
    process = start(folder, dataset, 1)
    output = finish(process)
    assert process.returncode == 0, output
    return folder / "e" / "run1"


def check_same(run: Path, reference: Path) -> None:
    assert is_finished(run)
    for name in (CHAIN, PREDICTIONS):
        assert (run / name).read_bytes() == (reference / name).read_bytes()
    assert read_manifest(run)["weights_digest"] == read_manifest(reference)["weights_digest"]


@pytest.mark.parametrize("num_ranks", [2, 3, 8])
def test_any_number_of_processes_gives_the_same_bits(
    num_ranks: int, dataset: Path, reference: Path, tmp_path: Path
) -> None:
    process = start(tmp_path, dataset, num_ranks)
    output = finish(process)
    assert process.returncode == 0, output
    assert output.count("test accuracy") == 1, "one process alone speaks"
    check_same(tmp_path / "e" / f"run{num_ranks}", reference)
    assert [path.name for path in (tmp_path / "e").iterdir()] == [f"run{num_ranks}"]


def test_a_window_of_the_order_is_that_of_one_process(tmp_path: Path) -> None:
    dataset = write_tiny_dataset(tmp_path / "large", num_train=1100)
    assert len(compute_windows(0, 0, np.arange(1000), BLOCK_BYTES // 3072, 1)) == 3
    for num_ranks in (1, 2):
        process = start(tmp_path, dataset, num_ranks, "--num_epochs", "1", "--shuffle_window", "1")
        output = finish(process)
        assert process.returncode == 0, output
    check_same(tmp_path / "e" / "run2", tmp_path / "e" / "run1")


def test_processes_stop_early_together(dataset: Path, tmp_path: Path) -> None:
    options = ("--early_stopping", "1", "--learning_rate", "1e-12", "--ema_decay", "0.999999", "--num_epochs", "9")
    for num_ranks in (1, 3):
        process = start(tmp_path, dataset, num_ranks, *options)
        output = finish(process)
        assert process.returncode == 0, output
        assert output.count("--early_stopping ended the run after epoch ") == 1
    assert len(read_epochs(tmp_path / "e" / "run3")) < 9
    check_same(tmp_path / "e" / "run3", tmp_path / "e" / "run1")


def wait_for_step(folder: Path, run_name: str, step: int) -> None:
    """Wait for the checkpoint of a step."""
    checkpoint = folder / "e" / run_name / CHECKPOINTS / f"step-{step:08}"
    deadline = time.monotonic() + 120
    while not checkpoint.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def kill_one(folder: Path, run_name: str, step: int, rank: int) -> None:
    """Kill a process of a run once it has this checkpoint."""
    wait_for_step(folder, run_name, step)
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            words = path.read_bytes().split(b"\0")
            command = (path.parent / "cmdline").read_bytes()
        except OSError:
            continue
        if f"RANK={rank}".encode() in words and str(folder).encode() in command:
            found.append(int(path.parent.name))
    assert len(found) == 1
    os.kill(found[0], signal.SIGKILL)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_is_killed_brings_all_back_to_the_same_bits(
    rank: int, dataset: Path, reference: Path, tmp_path: Path
) -> None:
    process = start(tmp_path, dataset, 3, max_restarts=2)
    kill_one(tmp_path, "run3", 8, rank)
    output = finish(process)
    assert process.returncode == 0, output
    assert "resumed after step" in output
    check_same(tmp_path / "e" / "run3", reference)


def test_without_restarts_a_loss_is_one_line_and_the_run_goes_on_with_another_number(
    dataset: Path, reference: Path, tmp_path: Path
) -> None:
    process = start(tmp_path, dataset, 2)
    kill_one(tmp_path, "run2", 8, 1)
    output = finish(process)
    assert process.returncode != 0
    (line,) = [line for line in output.splitlines() if line.startswith("error:")]
    assert "error: rank 1 was lost (" in line and "continue with --resume and any number of processes" in line
    again = start(tmp_path, dataset, 3, "--resume", "--run_name", "run2")
    output = finish(again)
    assert again.returncode == 0, output
    check_same(tmp_path / "e" / "run2", reference)


def test_a_signal_to_torchrun_saves_and_the_run_goes_on_in_one_process(
    dataset: Path, reference: Path, tmp_path: Path
) -> None:
    process = start(tmp_path, dataset, 3)
    wait_for_step(tmp_path, "run3", 4)
    process.terminate()
    output = finish(process)
    assert process.returncode != 0
    assert output.count("; --resume continues ") == 1 and "error:" not in output
    again = start(tmp_path, dataset, 1, "--resume", "--run_name", "run3", "--num_threads", "2")
    output = finish(again)
    assert again.returncode == 0, output
    check_same(tmp_path / "e" / "run3", reference)


def test_a_run_that_exists_is_refused_in_one_line(dataset: Path, reference: Path) -> None:
    process = start(reference.parents[1], dataset, 2, "--run_name", "run1")
    output = finish(process)
    assert process.returncode != 0
    (line,) = [line for line in output.splitlines() if line.startswith("error:")]
    assert "run1 exists" in line


def test_processes_with_other_data_are_refused(dataset: Path, tmp_path: Path) -> None:
    other = write_tiny_dataset(tmp_path / "other", num_train=230, seed=1)
    link = tmp_path / "rank-0"
    link.symlink_to(dataset)
    (tmp_path / "rank-1").symlink_to(other)
    script = tmp_path / "train.py"
    script.write_text(
        "import os, sys\nfrom image_classifier.main import main\n"
        f"sys.exit(main([*sys.argv[1:], '--dataset_folder', '{tmp_path}/rank-' + os.environ['RANK']]))\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(script), *OPTIONS]
    command += ["--run_name", "run", "--experiments_folder", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    answer = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200, check=False)
    assert answer.returncode != 0
    (line,) = [line for line in (answer.stdout + answer.stderr).splitlines() if line.startswith("error:")]
    assert line.startswith(
        "error: data of rank 1 differs from rank 0: all processes need the same data, code, libraries"
    )
    assert not (tmp_path / "e").exists()
