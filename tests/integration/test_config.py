"""The trainer's settings through its command: printed, read again, resumed, and in the record as they were given."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from image_classifier.cli.train import main
from image_classifier.config import RECIPES
from image_classifier.tracking.run import read_manifest, read_record
from tests.conftest import PROJECT, run_program
from tests.tiny import write_tiny_dataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_dataset(tmp_path_factory.mktemp("data") / "tiny")


def find_parts(folder: Path) -> dict[str, Any]:
    """Find what a record says apart from when and by which words the run was started."""
    return {key: value for key, value in read_record(folder).items() if key not in ("started_at", "command")}


def print_config(path: Path, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    capsys.readouterr()
    assert main([*options, "--print_config"]) == 0
    path.write_text(capsys.readouterr().out)
    return str(path)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_run_from_its_printed_settings_has_the_same_record(
    recipe: str, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--dataset_folder", str(dataset), "--experiment_name", "e", "--run_name", "r", "--recipe", recipe]
    options += ["--num_epochs", "0", "--seed", "7", "--num_threads", "1", "--views", "one", "--num_workers", "0"]
    config = print_config(tmp_path / "c.yaml", capsys, *options)
    assert main(options) == 0
    direct = find_parts(Path("experiments/e/r"))
    Path("experiments/e").rename("first")
    assert main(["--config", config]) == 0
    assert find_parts(Path("experiments/e/r")) == direct
    assert direct["recipe"] == recipe and direct["settings"]["seed"] == 7


def test_an_interrupted_run_goes_on_with_or_without_its_printed_settings(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--experiments_folder", str(tmp_path), "--experiment_name", "e", "--run_name", "r"]
    settings = ["--dataset_folder", str(dataset), "--recipe", "notebook", "--batch_size", "20", "--num_workers", "0"]
    config = print_config(tmp_path / "c.yaml", capsys, *options, *settings)
    assert main([*options, *settings]) == 0
    folder = tmp_path / "e" / "r"
    digest = read_manifest(folder)["weights_digest"]

    resumed = print_config(tmp_path / "resumed.yaml", capsys, *options, "--resume")
    for words in ([*options, "--resume"], ["--config", config, "--resume"], ["--config", resumed, "--resume"]):
        (folder / "manifest.json").unlink()
        shutil.rmtree(max((folder / "checkpoints").iterdir()))
        assert main(words) == 0
        assert read_manifest(folder)["weights_digest"] == digest
    assert main([*options, "--resume", "--config", config, "--recipe", "quick"]) == 2
    assert "--recipe was notebook, is quick" in capsys.readouterr().err
    assert main([*options, "--resume", "--seed", "1"]) == 2
    assert "--seed was 0, is 1" in capsys.readouterr().err


def test_a_run_that_never_began_is_resumed_by_its_recipe(dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "e" / "r").mkdir(parents=True)  # as a kill before the record leaves it
    options = ["--experiments_folder", str(tmp_path), "--experiment_name", "e", "--run_name", "r", "--num_epochs", "0"]
    assert main([*options, "--dataset_folder", str(dataset), "--recipe", "notebook", "--resume"]) == 0
    record = read_record(tmp_path / "e" / "r")
    assert (record["recipe"], record["settings"]["model"], record["settings"]["batch_size"]) == ("notebook", "lenet", 4)


def test_the_printed_settings_of_a_process_train_in_another_one(dataset: Path, tmp_path: Path) -> None:
    trainer = (sys.executable, "-m", "image_classifier.main")
    options = ("--experiments_folder", tmp_path, "--experiment_name", "e", "--dataset_folder", dataset)
    settings = ("--recipe", "notebook", "--image_sizes", "32", "--num_epochs", "1", "--batch_size", "50")
    printed = run_program(*trainer, *options, *settings, "--run_name", "r", "--print_config", cwd=PROJECT)
    (tmp_path / "config.yaml").write_text(printed)
    run_program(*trainer, "--config", tmp_path / "config.yaml", cwd=PROJECT)
    run_program(*trainer, *options, *settings, "--run_name", "direct", cwd=PROJECT)
    first, second = (read_manifest(tmp_path / "e" / name) for name in ("r", "direct"))
    assert first["weights_digest"] == second["weights_digest"]
    assert json.loads((tmp_path / "e" / "r" / "run.json").read_text())["settings"]["image_sizes"] == [32]
