"""The registry as a user meets it: embedded and on a real MLflow server, with writers that come at once."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from image_classifier.errors import RegistryError, SettingsError
from image_classifier.publishing.registry import Registry
from image_classifier.serving.published import MANIFEST, serialize_manifest
from tests.conftest import PROJECT, run_program

COMMAND = (sys.executable, "-m", "image_classifier", "registry")
NUM_IMAGES = 200


@pytest.fixture(scope="module")
def models(published_run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Published folders that differ in the test images that they have right: of 200 good 180, worse 150, close 178."""
    folders = {}
    for name, num_right in {"good": 180, "worse": 150, "close": 178}.items():
        run = tmp_path_factory.mktemp("models") / name
        folders[name] = shutil.copytree(published_run, run / "published")
        manifest = json.loads((folders[name] / MANIFEST).read_text())
        is_right = np.arange(NUM_IMAGES) < num_right
        manifest["right"] = np.packbits(is_right).tobytes().hex()
        manifest["metrics"] |= {"accuracy": num_right / NUM_IMAGES, "num_images": NUM_IMAGES}
        (folders[name] / MANIFEST).write_bytes(serialize_manifest(manifest | {"run_name": name}))
    return folders


@pytest.fixture(params=["embedded", "server"])
def options(request: pytest.FixtureRequest, tmp_path: Path) -> list[str]:
    """The options of a store: a new embedded one, or the server's."""
    if request.param == "embedded":
        return ["--experiments_folder", str(tmp_path / "experiments")]
    return ["--tracking_uri", request.getfixturevalue("mlflow_server")]


def run_registry(*words: str | Path, options: Sequence[str] = (), status: int = 0) -> str:
    """Run an action of the registry; return its stdout, or where it is to fail its one line on stderr."""
    line = [*COMMAND, *map(str, words), *options]
    result = subprocess.run(line, cwd=PROJECT, capture_output=True, text=True, timeout=120)
    assert result.returncode == status, result.stderr
    if status:
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1
    return result.stderr if status else result.stdout


def test_versions_are_added_promoted_refused_and_resolved(
    models: dict[str, Path], options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IMAGE_CLASSIFIER_CACHE", str(tmp_path / "cache"))
    name = f"cifar-{tmp_path.name}"
    assert run_registry("add", models["good"].parent, "--name", name, options=options) == f"{name}/1\n"
    run_registry("promote", f"{name}/1", options=options)
    run_registry("add", models["worse"], "--name", name, "--alias", "challenger", options=options)
    refusal = run_registry("promote", f"{name}@challenger", options=options, status=2)
    assert "version 2 is worse than the champion, version 1, by 15.00 points" in refusal
    assert "@champion is version 2" in run_registry("promote", f"{name}/2", "--allow_loss", options=options)

    uri = options[1] if options[0] == "--tracking_uri" else f"sqlite:///{options[1]}/.mlflow/mlflow.db"
    program = (
        "import json, mlflow; client = mlflow.MlflowClient({0!r}, {0!r}); model = client.get_registered_model({1!r});"
        "version = client.get_model_version_by_alias({1!r}, 'champion'); run = client.get_run(version.run_id);"
        "files = sorted(file.path for file in client.list_artifacts(version.run_id, 'model'));"
        "print(json.dumps([model.aliases, version.tags, run.data.metrics, files]))"
    ).format(uri, name)
    aliases, tags, metrics, files = json.loads(run_program(sys.executable, "-c", program, cwd=tmp_path))
    # MLflow's own client reads what was written; a number comes as text from a server.
    assert {alias: int(number) for alias, number in aliases.items()} == {"champion": 2, "challenger": 2}
    assert tags["run"] == "experiment/worse"
    assert metrics["accuracy"] == 0.75
    assert files == sorted(f"model/{path.name}" for path in models["worse"].iterdir())

    folder = Path(run_registry("resolve", f"{name}@champion", options=options).strip())
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        path.name: path.read_bytes() for path in models["worse"].iterdir()
    }
    (folder / "model.onnx").write_bytes(b"changed")
    assert "was changed after it was published" in run_registry("resolve", f"{name}/2", options=options, status=2)


def test_writers_at_once_lose_nothing(models: dict[str, Path], options: list[str], tmp_path: Path) -> None:
    name = f"many-{tmp_path.name}"
    words = [*COMMAND, "add", str(models["good"]), "--name", name, *options]
    writers = [subprocess.Popen(words, cwd=PROJECT, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    answers = [writer.communicate(timeout=120)[0] for writer in writers]
    assert sorted(answers) == [f"{name}/{number}\n" for number in (1, 2, 3)]
    rows = json.loads(run_registry("list", "--name", name, "--json", options=options))
    assert [(row["version"], row["accuracy"]) for row in rows] == [(number, "0.9") for number in ("1", "2", "3")]


@pytest.fixture(scope="module")
def registry(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Registry:
    """An embedded registry in which the good model is the champion."""
    folder = tmp_path_factory.mktemp("registry")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IMAGE_CLASSIFIER_CACHE", str(folder / "cache"))
        registry = Registry(None, folder)
        registry.add(models["good"], "cifar")
        registry.promote("cifar/1")
    return registry


def test_a_difference_that_may_be_chance_is_no_loss(registry: Registry, models: dict[str, Path]) -> None:
    version = registry.add(models["close"], "cifar")
    promotion = registry.promote(f"cifar/{version.number}", alias="candidate")
    assert promotion.former is None
    promotion = registry.promote("cifar/1", alias="candidate")
    assert promotion.difference == pytest.approx(0.01)
    registry.promote(f"cifar/{version.number}", alias="candidate")
    assert registry.find("cifar@candidate").number == version.number


def test_models_tested_on_other_data_are_not_compared(
    registry: Registry, models: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(models["good"], tmp_path / "other")
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_bytes(serialize_manifest(manifest | {"data_digest": "f" * 64}))
    version = registry.add(folder, "cifar")
    with pytest.raises(RegistryError, match="were tested on different data"):
        registry.promote(f"cifar/{version.number}")


@pytest.mark.parametrize(
    ("reference", "error", "message"),
    [
        ("cifar@nobody", RegistryError, "does not have the alias 'nobody': it has the aliases .*champion"),
        ("cifar/99", RegistryError, "does not have a version 99"),
        ("other@champion", RegistryError, "no model is called 'other'"),
        ("cifar", SettingsError, "NAME@ALIAS or NAME/VERSION"),
    ],
)
def test_what_does_not_exist_is_refused(
    registry: Registry, reference: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        registry.find(reference)


def test_check_tells_what_is_wrong(models: dict[str, Path], tmp_path: Path) -> None:
    assert run_registry("check", models["good"].parent).startswith("INTACT\n")
    folder = shutil.copytree(models["good"], tmp_path / "changed")
    (folder / "MODEL_CARD.md").write_text("better")
    assert "MODEL_CARD.md was changed" in run_registry("check", folder, status=2)
