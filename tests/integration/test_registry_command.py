"""The registry as a user meets it: embedded and on a real MLflow server, with writers that come at once."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from image_classifier.data.dataset import load_snapshot
from image_classifier.data.snapshot import Snapshot
from image_classifier.errors import DataError, ModelError, RegistryError, SettingsError
from image_classifier.published.folder import MANIFEST, read_published, serialize_manifest
from image_classifier.published.predictor import Predictor, build_predictor
from image_classifier.publishing.registry import Proof, Registry, Version
from image_classifier.publishing.signing import build_signer
from tests import forked
from tests.conftest import run_program
from tests.published import claim, write_keys, write_published
from tests.tiny import write_tiny_dataset

NUM_IMAGES = 200


@pytest.fixture(scope="module")
def snapshot(sample_dataset: Path) -> Snapshot:
    return load_snapshot(sample_dataset)


@pytest.fixture(scope="module")
def models(published_run: Path, snapshot: Snapshot, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Published folders that differ in the test images that they have right: of 200 good 180, worse 150, close 178."""
    assert len(snapshot.test[1]) == NUM_IMAGES
    top = tmp_path_factory.mktemp("models")
    return {
        name: write_published(top / name / "published", published_run, snapshot, num_right, run_name=name)
        for name, num_right in {"good": 180, "worse": 150, "close": 178}.items()
    }


@pytest.fixture
def forged(models: dict[str, Path], tmp_path: Path) -> Path:
    """The model that has 150 images right, and claims to have 199."""
    folder = shutil.copytree(models["worse"], tmp_path / "forged" / "published")
    claim(folder, 199)
    return folder


@pytest.fixture(params=["embedded", "server"])
def options(request: pytest.FixtureRequest, tmp_path: Path) -> list[str]:
    """The options of a store: a new embedded one, or the server's."""
    if request.param == "embedded":
        return ["--experiments_folder", str(tmp_path / "experiments")]
    return ["--tracking_uri", request.getfixturevalue("mlflow_server")]


def run_registry(*words: str | Path, options: Sequence[str] = (), status: int = 0) -> str:
    """Run an action of the registry; return its stdout, or where it is to fail its one line on stderr."""
    result = forked.run("image_classifier", "registry", *words, *options, timeout_s=200)
    assert result.returncode == status, result.stderr
    lines = [line for line in result.stderr.splitlines() if not line.startswith("computing the answers of ")]
    if status:
        assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
        return lines[0]
    return result.stdout


def test_versions_are_added_promoted_refused_and_resolved(
    models: dict[str, Path],
    options: list[str],
    sample_dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("IMAGE_CLASSIFIER_CACHE", str(tmp_path / "cache"))
    data = ("--dataset_folder", sample_dataset)
    name = f"cifar-{tmp_path.name}"
    assert run_registry("add", models["good"].parent, "--name", name, *data, options=options) == f"{name}/1\n"
    run_registry("promote", f"{name}/1", *data, options=options)
    run_registry("add", models["worse"], "--name", name, "--alias", "challenger", *data, options=options)
    refusal = run_registry("promote", f"{name}@challenger", *data, options=options, status=2)
    assert "version 2 is worse than the champion, version 1, by 15.00 points" in refusal
    assert "@champion is version 2" in run_registry("promote", f"{name}/2", "--allow_loss", *data, options=options)

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


def test_writers_at_once_lose_nothing(
    models: dict[str, Path], options: list[str], sample_dataset: Path, tmp_path: Path
) -> None:
    name = f"many-{tmp_path.name}"
    words = ["registry", "add", models["good"], "--name", name, "--dataset_folder", sample_dataset, *options]
    writers = [forked.Command("image_classifier", *words) for _ in range(3)]
    answers = [writer.finish(timeout_s=120).stdout for writer in writers]
    assert sorted(answers) == [f"{name}/{number}\n" for number in (1, 2, 3)]
    rows = json.loads(run_registry("list", "--name", name, "--json", options=options))
    assert [(row["version"], row["accuracy"]) for row in rows] == [(number, "0.9") for number in ("1", "2", "3")]


@pytest.fixture(scope="module")
def proof(sample_dataset: Path) -> Proof:
    """Evidence from the data."""
    return Proof(dataset_folder=sample_dataset)


@pytest.fixture(scope="module")
def registry(models: dict[str, Path], proof: Proof, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """An embedded registry in which the good model is the champion."""
    folder = tmp_path_factory.mktemp("registry")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IMAGE_CLASSIFIER_CACHE", str(folder / "cache"))
        registry = Registry(None, folder)
        assert registry.add(models["good"], "cifar", proof=proof).accuracy == 0.9
        registry.promote("cifar/1", proof=proof)
        yield registry


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder without the usual data set."""
    monkeypatch.chdir(tmp_path)


def test_a_model_is_loaded_once_to_be_registered(
    registry: Registry, models: dict[str, Path], proof: Proof, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = []

    def count(content: bytes, path: Path) -> Predictor:
        loaded.append(path)
        return build_predictor(content, path)

    monkeypatch.setattr("image_classifier.publishing.registry.build_predictor", count)
    registry.add(models["good"], "shapes", proof=proof)
    assert loaded == [models["good"]]


def test_a_difference_that_may_be_chance_is_no_loss(registry: Registry, models: dict[str, Path], proof: Proof) -> None:
    version = registry.add(models["close"], "cifar", proof=proof)
    promotion = registry.promote(f"cifar/{version.number}", alias="candidate", proof=proof)
    assert promotion.former is None
    promotion = registry.promote("cifar/1", alias="candidate", proof=proof)
    assert promotion.difference == pytest.approx(0.01)
    registry.promote(f"cifar/{version.number}", alias="candidate", proof=proof)
    assert registry.find("cifar@candidate").number == version.number


def test_models_tested_on_other_data_are_not_compared(
    registry: Registry, models: dict[str, Path], proof: Proof, tmp_path: Path
) -> None:
    dataset = write_tiny_dataset(tmp_path / "other", num_train=10, num_test=200, seed=1)
    other = load_snapshot(dataset)
    folder = write_published(tmp_path / "model", models["good"], other, 190, data_digest=other.digest)
    others = Proof(dataset_folder=dataset)
    version = registry.add(folder, "cifar", proof=others)
    with pytest.raises(RegistryError, match="were tested on different data, so it is unknown which is better"):
        registry.promote(f"cifar/{version.number}", proof=others)
    changes = {"data_digest": other.digest, "image_size": 64}
    larger = registry.add(
        write_published(tmp_path / "larger", models["good"], other, 190, **changes), "cifar", proof=others
    )
    with pytest.raises(RegistryError, match=r"different data \(images of 64 and of 32 pixels\), so it is unknown"):
        registry.promote(f"cifar/{larger.number}", proof=others)
    with pytest.raises(
        DataError, match="model was tested on data with the digest .*; name the right data with --dataset_folder"
    ):
        registry.add(folder, "cifar", proof=proof)


# What a folder says about itself.


def test_several_that_fetch_a_version_at_once_fetch_it_once(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    download, fetched = Registry._download, []

    def download_slowly(self: Registry, version: Version, folder: Path) -> None:
        fetched.append(folder)
        time.sleep(0.5)
        download(self, version, folder)

    monkeypatch.setattr(Registry, "_download", download_slowly)
    with ThreadPoolExecutor(4) as threads:  # whose locks keep each other out as those of processes do
        answers = [threads.submit(registry.resolve, "cifar/1", tmp_path / "cold") for _ in range(4)]
        (folder,) = {answer.result()[0] for answer in answers}
    assert fetched == [folder]
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_model_that_claims_what_it_is_not_is_refused_where_the_data_is(
    registry: Registry, forged: Path, proof: Proof
) -> None:
    before = registry.list("cifar")
    with pytest.raises(ModelError, match=r"claims 99.50 % accuracy, but has 75.00 %, and 49 of 200 predictions differ"):
        registry.add(forged, "cifar", proof=proof)
    assert registry.list("cifar") == before


def test_a_model_that_claims_what_it_is_not_becomes_no_champion(
    registry: Registry, forged: Path, proof: Proof, sample_dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = registry.add(forged, "cifar")  # there is no data here, so that nothing can be said
    assert version.unchecked == "no data set at data/cifar_dataset: there is neither a folder nor a file"
    (listed,) = [found for found in registry.list("cifar") if found.number == version.number]
    assert listed.accuracy is version.accuracy is None and "accuracy" not in listed.tags
    with pytest.raises(RegistryError, match="cannot be checked: no data set at .* --dataset_folder, .* --public_key"):
        registry.promote(f"cifar/{version.number}")
    for allow_loss in (False, True):  # that is for losses, and not for lies
        with pytest.raises(ModelError, match="claims 99.50 % accuracy, but has 75.00 %"):
            registry.promote(f"cifar/{version.number}", proof=proof, allow_loss=allow_loss)
    Path("data").mkdir()
    Path("data/cifar_dataset").symlink_to(sample_dataset)  # by now it is there
    with pytest.raises(ModelError, match="claims 99.50 % accuracy, but has 75.00 %"):
        registry.promote(f"cifar/{version.number}")
    assert registry.find("cifar@champion").number == "1"


def test_a_champion_is_compared_by_its_answers_whatever_it_claims(
    registry: Registry, models: dict[str, Path], forged: Path, proof: Proof, caplog: pytest.LogCaptureFixture
) -> None:
    version = registry.add(forged, "boast")
    promotion = registry.promote("boast/1", allow_loss=True)
    assert promotion.unchecked.startswith("no data set at") and promotion.difference is None
    registry.add(models["good"], "boast", proof=proof)
    assert registry.promote("boast/2", proof=proof).difference == pytest.approx(0.15)
    assert f"{version.title} claims 99.50 % accuracy, but has 75.00 %" in caplog.text


def test_what_is_promoted_with_the_data_is_known_from_then_on(
    registry: Registry, models: dict[str, Path], proof: Proof
) -> None:
    registry.add(models["close"], "later")
    assert registry.find("later/1").accuracy is None
    registry.promote("later/1", proof=proof)
    assert registry.find("later/1").accuracy == 0.89


def test_a_manifest_and_a_model_that_disagree_are_refused(
    registry: Registry, models: dict[str, Path], proof: Proof, tmp_path: Path
) -> None:
    for name in ("run_name", "experiment_name", "views", "classes"):
        folder = shutil.copytree(models["good"], tmp_path / name)
        manifest = json.loads((folder / MANIFEST).read_text())
        value = manifest[name][::-1] if name == "classes" else "other"
        (folder / MANIFEST).write_bytes(serialize_manifest(manifest | {name: value}))
        with pytest.raises(ModelError, match=f"contradicts itself about its {name}"):
            registry.add(folder, "cifar", proof=proof)


@pytest.mark.parametrize("figures", [{}, {"right": "zz"}, {"right": "00"}, {"metrics": {}}, {"metrics": None}])
def test_figures_that_are_none_are_refused(
    figures: dict[str, object], registry: Registry, models: dict[str, Path], proof: Proof, tmp_path: Path
) -> None:
    folder = shutil.copytree(models["good"], tmp_path / "model")
    manifest = json.loads((folder / MANIFEST).read_text()) | figures
    if not figures:
        del manifest["right"], manifest["metrics"]
    (folder / MANIFEST).write_bytes(serialize_manifest(manifest))
    with pytest.raises(ModelError, match="has no valid figures"):
        registry.add(folder, "cifar", proof=proof)


def test_a_trusted_signer_is_believed_and_nobody_else(
    registry: Registry, models: dict[str, Path], forged: Path, proof: Proof, tmp_path: Path
) -> None:
    private, public = write_keys(tmp_path, "ours", ec.SECP256R1())
    other_private, _ = write_keys(tmp_path, "another", ec.SECP256R1())
    signed = {name: shutil.copytree(models[name], tmp_path / "signed" / name) for name in ("good", "worse", "close")}
    for folder in signed.values():
        build_signer(str(private))(folder)
    trusted = Proof(public_key=public)

    assert registry.add(signed["worse"], "signed", proof=trusted).accuracy == 0.75
    registry.promote("signed/1", proof=trusted)
    registry.add(signed["good"], "signed", proof=trusted)
    assert registry.promote("signed/2", proof=trusted).difference == pytest.approx(0.15)
    with pytest.raises(RegistryError, match="is worse than the champion"):
        registry.promote("signed/1", proof=trusted)

    build_signer(str(other_private))(forged)
    with pytest.raises(ModelError, match="is not signed by"):
        registry.add(forged, "signed", proof=trusted)
    registry.add(forged, "signed")
    with pytest.raises(ModelError, match="is not signed by"):
        registry.promote("signed/3", proof=trusted)

    registry.add(models["good"], "mixed", proof=proof)
    registry.promote("mixed/1", proof=proof)
    registry.add(signed["close"], "mixed", proof=trusted)
    with pytest.raises(
        ModelError, match="mixed version 1, to compare with: .* is not signed: .*; --allow_loss promotes"
    ):
        registry.promote("mixed/2", proof=trusted)
    both = Proof(public_key=public, dataset_folder=proof.dataset_folder)  # the new one signed, both computed
    assert registry.promote("mixed/2", proof=both).difference == pytest.approx(-0.01)


# The champion, and what is registered.


@pytest.mark.parametrize("alias", ["champion", "Champion", "CHAMPION", "", "a b", "../x", "a" * 101, "ä", "a@b"])
def test_an_alias_that_is_the_champions_or_none_is_not_given_by_adding(
    alias: str, registry: Registry, models: dict[str, Path]
) -> None:
    before = registry.list()
    with pytest.raises(SettingsError, match="--alias"):
        registry.add(models["worse"], "cifar", alias=alias)
    if alias != "champion":
        with pytest.raises(SettingsError, match="--alias"):
            registry.promote("cifar/1", alias=alias)
    assert registry.list() == before


def test_a_champion_that_another_process_moves_meanwhile_is_left_to_it(
    registry: Registry, models: dict[str, Path], proof: Proof
) -> None:
    for name in ("worse", "close", "good"):
        registry.add(models[name], "moved", proof=proof)
    registry.promote("moved/1", proof=proof)

    def move(line: str) -> None:
        registry.promote("moved/3", proof=proof)

    with pytest.raises(RegistryError, match="moved@champion was moved by another process; start again"):
        registry.promote("moved/2", proof=replace(proof, say=move))
    assert registry.find("moved@champion").number == "3"


def test_nothing_is_registered_that_was_not_checked(
    registry: Registry, models: dict[str, Path], proof: Proof, tmp_path: Path
) -> None:
    folder = shutil.copytree(models["good"], tmp_path / "model")
    (folder / "notes.txt").write_text("whatever")
    with pytest.raises(ModelError, match="has 'notes.txt', which its manifest.json does not list"):
        registry.add(folder, "checked", proof=proof)
    (folder / "notes.txt").unlink()
    contents = read_published(folder).files

    def change(line: str) -> None:  # after it was read
        (folder / "model.onnx").write_bytes(b"another")
        (folder / "notes.txt").write_text("whatever")

    registry.add(folder, "checked", proof=replace(proof, say=change))
    resolved, _ = registry.resolve("checked/1")
    assert {path.name: path.read_bytes() for path in resolved.iterdir()} == contents


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
