"""The trainer's settings through its command: printed, read again, resumed, and in the record as they were given."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from image_classifier.cli.train import main
from image_classifier.cli.verify import main as verify
from image_classifier.data import snapshot
from image_classifier.data.dataset import load_snapshot
from image_classifier.recipe import RECIPES
from image_classifier.tracking.reading import read_epochs, read_manifest, read_record
from tests.conftest import run_command
from tests.datasets import make_arrays, write_image_folder
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
    trainer = "image_classifier.main"
    options = ("--experiments_folder", tmp_path, "--experiment_name", "e", "--dataset_folder", dataset)
    settings = ("--recipe", "notebook", "--image_sizes", "32", "--num_epochs", "1", "--batch_size", "50")
    printed = run_command(trainer, *options, *settings, "--run_name", "r", "--print_config")
    (tmp_path / "config.yaml").write_text(printed)
    run_command(trainer, "--config", tmp_path / "config.yaml")
    run_command(trainer, *options, *settings, "--run_name", "direct")
    first, second = (read_manifest(tmp_path / "e" / name) for name in ("r", "direct"))
    assert first["weights_digest"] == second["weights_digest"]
    assert json.loads((tmp_path / "e" / "r" / "run.json").read_text())["settings"]["image_sizes"] == [32]


def train_own_images(folder: Path, num_images: int, *options: str) -> tuple[int, Path]:
    """Train on images of one's own, two classes; return the exit status and the run folder."""
    if not (folder / "data").exists():
        write_image_folder(folder / "data", make_arrays(num_images, 4, 2), ("cat", "dog"))
    names = ["--experiments_folder", str(folder), "--experiment_name", "e", "--run_name", "r"]
    words = [*names, "--dataset_folder", str(folder / "data"), "--num_threads", "1", *options]
    return main(words), folder / "e" / "r"


@pytest.mark.parametrize("num_images", [2, 12, 50])
def test_the_first_command_trains_on_a_few_images_of_ones_own(
    num_images: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    length = [] if num_images == 12 else ["--num_epochs", "2"]
    status, folder = train_own_images(tmp_path, num_images, *length)
    output = capsys.readouterr()
    assert status == 0, output.err
    record = read_record(folder)
    reason = f"{num_images} images to train on are fewer than 10,000; its batch_size of 125 is cut to {num_images}"
    assert (record["recipe"], record["recipe_reason"]) == ("small", reason)
    assert output.err.startswith(f"recipe small: {reason}\n")
    assert record["settings"]["batch_size"] == num_images
    assert len(read_epochs(folder)) == record["settings"]["num_epochs"]


def test_what_is_asked_for_by_name_is_not_cut_and_the_remedy_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for options, remedy in (
        (["--recipe", "fast"], "choose --recipe small, or --batch_size 130 or less"),
        (["--batch_size", "1000"], "choose --recipe small, or --batch_size 130 or less"),
        (["--recipe", "small", "--validation_fraction", "0.5"], "choose --recipe default, or --batch_size 65 or less"),
    ):
        status, folder = train_own_images(tmp_path, 130, *options)
        message = capsys.readouterr().err
        assert status == 2 and message.endswith(f"{remedy}\n") and message.count("\n") == 1
        assert not folder.exists()


def test_the_rule_counts_the_images_that_are_trained_on_and_reads_them_once(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("image_classifier.recipe.NUM_IMAGES_FOR_FAST", 200)
    load_snapshot(dataset)
    digests = []
    compute = snapshot.compute_digest

    def compute_and_count(*arguments: Any) -> str:
        digests.append(arguments)
        return compute(*arguments)

    monkeypatch.setattr(snapshot, "compute_digest", compute_and_count)
    common = ["--experiments_folder", str(tmp_path), "--experiment_name", "e", "--dataset_folder", str(dataset)]
    common += ["--num_epochs", "0", "--num_threads", "1", "--views", "one"]
    for run_name, options, recipe in (("a", [], "fast"), ("b", ["--validation_fraction", "0.01"], "small")):
        digests.clear()
        assert main([*common, "--run_name", run_name, *options]) == 0
        assert read_record(tmp_path / "e" / run_name)["recipe"] == recipe
        assert len(digests) == 1


def test_a_run_of_the_default_recipe_is_printed_resumed_and_verified_as_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = ["--num_epochs", "2"]
    status, folder = train_own_images(tmp_path, 20, *short)
    assert status == 0
    record, digest = find_parts(folder), read_manifest(folder)["weights_digest"]
    assert verify([str(folder)]) == 0 and capsys.readouterr().out.endswith("are equal\n")
    for words in (["--resume"], ["--resume", "--recipe", "default"], ["--resume", "--recipe", "small"]):
        (folder / "manifest.json").unlink()
        shutil.rmtree(max((folder / "checkpoints").iterdir()))
        assert train_own_images(tmp_path, 20, *words)[0] == 0
        assert (find_parts(folder), read_manifest(folder)["weights_digest"]) == (record, digest)
    assert train_own_images(tmp_path, 20, "--resume", "--recipe", "fast")[0] == 2
    assert "--recipe was small, is fast" in capsys.readouterr().err
    names = ["--experiments_folder", str(tmp_path), "--experiment_name", "e", "--run_name", "r"]
    direct = ["--dataset_folder", str(tmp_path / "data"), "--num_threads", "1", *short]
    for options in ([*names, *direct], [*names, "--resume"]):
        printed = print_config(tmp_path / "c.yaml", capsys, *options)
        kept = folder.rename(tmp_path / "kept")
        assert main(["--config", printed]) == 0
        again = find_parts(folder)
        resumed = "--resume" in options  # whose settings are all in the file, and its recipe by name
        assert again["settings"] == record["settings"] and again["recipe"] == "small"
        assert again == {**record, "recipe_reason": None} if resumed else again == record
        shutil.rmtree(folder)
        kept.rename(folder)
