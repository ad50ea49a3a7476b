"""A folder of own images, of different sizes and with a broken file: what a run reads, every later command reads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests import forked

READING = ("--skip_bad", "--fit", "pad")


def draw(path: Path, sides: tuple[int, int], generator: np.random.Generator) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(generator.integers(0, 256, (*sides, 3), np.uint8)).save(path)


@pytest.fixture(scope="module")
def own_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, generator = tmp_path_factory.mktemp("own"), np.random.default_rng(0)
    for name in ("red circle", "Öl"):
        for number in range(24):
            draw(folder / "images" / name / f"{number}.png", (20 + number, 50 - number), generator)
    (folder / "images" / "Öl" / "broken.png").write_bytes(b"no image")
    places = ("--dataset_folder", "images", "--experiment_name", "mine", "--run_name", "first")
    words = ("--num_epochs", 1, "--seed", 0)
    call("image_classifier.main", *places, *words, *READING, cwd=folder)
    call("image_classifier", "publish", "experiments/mine/first", cwd=folder)
    return folder


def call(*words: object, cwd: Path) -> str:
    done = forked.run(*words, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_a_moved_data_set_is_read_as_the_run_read_it(own_images: Path) -> None:
    for model in ("experiments/mine/first", "experiments/mine/first/published"):
        words = ("image_classifier", "evaluate", model, "--dataset_folder", "images")
        refused = forked.run(*words, cwd=own_images)
        assert refused.returncode == 2 and "leave them out with --skip_bad" in refused.stderr
        assert "is not the data" not in call(*words, "--skip_bad", cwd=own_images)


def test_the_registry_reads_it_as_the_model_does(own_images: Path) -> None:
    words = ("image_classifier", "registry", "add", "experiments/mine/first", "--dataset_folder", "images")
    refused = forked.run(*words, cwd=own_images)
    assert refused.returncode == 2 and "leave them out with --skip_bad" in refused.stderr
    assert "mine/1" in call(*words, "--skip_bad", cwd=own_images)
    promote = ("image_classifier", "registry", "promote", "mine/1", "--dataset_folder", "images", "--skip_bad")
    assert "champion" in call(*promote, cwd=own_images)


def test_a_run_folder_is_not_served_and_the_message_names_what_is(own_images: Path) -> None:
    served = forked.run("image_classifier", "serve", "experiments/mine/first", "--no_auth", "true", cwd=own_images)
    assert (served.returncode, served.stdout) == (2, "")
    assert "first is a run, not a published model: use " in served.stderr and served.stderr.count("\n") == 1
