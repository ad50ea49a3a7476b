"""`image_classifier publish` as a user runs it."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from PIL import Image

from image_classifier.cli.verify import main as verify
from image_classifier.data.dataset import load_snapshot
from image_classifier.data.snapshot import Snapshot
from image_classifier.errors import StorageError
from image_classifier.published.folder import read_published
from image_classifier.published.predictor import load_predictor
from image_classifier.publishing import publish as publishing
from image_classifier.publishing import quantize as quantization
from image_classifier.storage import FaultyDisk
from image_classifier.tracking.checking import find_changed_files
from image_classifier.tracking.checkpoint import load_model
from image_classifier.training.evaluate import compute_probabilities
from tests import forked
from tests.attestations import put, sign, state
from tests.conftest import PROJECT, run_program
from tests.published import write_keys
from tests.runs import write_image_folder
from tests.tiny import write_tiny_dataset


def test_a_published_model_answers_as_the_run_does(published_run: Path, sample_dataset: Path) -> None:
    predictor = load_predictor(published_run, num_threads=1)
    images, _ = load_snapshot(sample_dataset).test
    model = load_model(published_run.parent / "model.pth")
    answers = predictor.predict(np.ascontiguousarray(images.transpose(0, 2, 3, 1)))
    np.testing.assert_allclose(answers, compute_probabilities(model.classifier, images), rtol=0, atol=1e-4)
    assert predictor.model.classes == model.classes
    assert predictor.model.run_name == "run"
    parity = json.loads((published_run / "parity.json").read_text())
    assert [line["batch_size"] for line in parity["fp32"]] == [1, 7, 64]
    assert all(line["agreement"] == 1 and line["largest_difference"] < 1e-5 for line in parity["fp32"])


def publish(run: Path, *options: str | Path, status: int = 0) -> str:
    """Publish a run; return stdout, or where it is to fail its one line on stderr."""
    result = forked.run("image_classifier", "publish", run, *options, timeout_s=200)
    assert result.returncode == status, result.stderr
    return result.stderr.splitlines()[-1] if status else result.stdout


def list_names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def check_samples(published: Path, snapshot: Snapshot) -> None:
    """Check that three test images are published, and that the manifest says which."""
    samples = json.loads((published / "manifest.json").read_text())["samples"]
    with Image.open(published / "samples.png") as strip:
        shown = np.split(np.asarray(strip), 3, axis=1)
    images, labels = snapshot.test
    for sample, pixels in zip(samples, shown, strict=True):
        np.testing.assert_array_equal(pixels, images[sample["test_image"]].transpose(1, 2, 0))
        assert sample["class"] == snapshot.classes[labels[sample["test_image"]]]
    assert load_predictor(published).model.samples == (published / "samples.png").read_bytes()


def test_verdicts_are_carried_along_and_no_signature_is_over_them(
    trained_run: Path, sample_dataset: Path, tmp_path: Path
) -> None:
    private, public = write_keys(tmp_path, "lab", ec.SECP256R1())
    run = shutil.copytree(trained_run, tmp_path / "run")
    path = put(run, sign(state(run), private))
    publish(run, "--sign_key", private, "--num_samples", "3")
    published = run / "published"
    check_samples(published, load_snapshot(sample_dataset))
    assert (published / "attestations" / path.name).read_bytes() == path.read_bytes()
    put(published, sign(state(run), private))
    read_published(published, public)
    assert verify([str(run), "--files_only"]) == 0


def test_a_published_run_is_still_the_run(published_run: Path) -> None:
    assert list_names(published_run) - {"model.int8.onnx"} == {
        "model.onnx",
        "parity.json",
        "drift_reference.json",
        "MODEL_CARD.md",
        "sbom.cdx.json",
        "manifest.json",
    }
    assert find_changed_files(published_run.parent) == []


def test_it_is_replaced_only_when_asked(published_run: Path) -> None:
    assert "exists already; remove it, or replace it with --overwrite" in publish(published_run.parent, status=2)


@pytest.mark.parametrize("damage", ["unfinished", "changed", "data", "key", "verdict", "samples"])
def test_what_cannot_be_published_leaves_nothing(damage: str, trained_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(trained_run, tmp_path / "run")
    options: list[str | Path] = []
    if damage == "unfinished":
        (run / "manifest.json").unlink()
    elif damage == "changed":
        content = bytearray((run / "predictions.npz").read_bytes())
        content[100] ^= 1
        (run / "predictions.npz").write_bytes(content)
    elif damage == "verdict":
        (run / "attestations").mkdir()
        (run / "attestations" / "a.json").symlink_to(run / "run.json")
    elif damage == "data":
        options = ["--dataset_folder", write_tiny_dataset(tmp_path / "other")]
    elif damage == "samples":
        options = ["--num_samples", "25"]
    else:
        options = ["--sign_key", tmp_path / "missing.pem"]
    before = list_names(run)
    line = publish(run, *options, status=2)
    expected = {"unfinished": "not a finished run", "changed": "predictions.npz does not match its manifest"}
    expected |= {"data": "has data with the digest", "key": "--sign_key", "verdict": "a.json cannot be copied"}
    expected["samples"] = "--num_samples takes 0 to 24, got: 25"
    assert line.startswith("error: ")
    assert expected[damage] in line
    assert list_names(run) == before


@pytest.mark.parametrize("fault_at", range(1, 24, 3))
def test_a_disk_that_refuses_leaves_nothing_half_published(
    fault_at: int, published_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the model that was exported before, so that each try takes little."""
    run = shutil.copytree(published_run.parent, tmp_path / "run", ignore=shutil.ignore_patterns("published"))
    content = (published_run / "model.onnx").read_bytes()
    monkeypatch.setattr(publishing, "export_model", lambda model, **options: content)
    monkeypatch.setattr(publishing, "quantize", lambda content, images: content)
    monkeypatch.setattr(quantization, "_ROUND_S", 0.001)

    def refuse() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    disk = FaultyDisk(refuse, fault_at, partly=True)
    try:
        publishing.publish(run, say=lambda line: None, disk=disk)
    except StorageError as error:
        assert "No space left on device" in str(error)
        assert disk.calls[-1][0] == "sync" or "published" not in list_names(run)  # only its name is not durable yet
    else:
        assert len(disk.calls) < fault_at or disk.calls[-1][0] == "remove"  # an emptied folder
    if (run / "published").exists():
        read_published(run / "published")
    assert find_changed_files(run) == []


def test_a_published_model_is_evaluated_and_predicts_without_torch(published_run: Path, tmp_path: Path) -> None:
    program = (
        "import sys; from image_classifier.__main__ import main; status = main(sys.argv[1:]);"
        "sys.exit(status or 9 * ('torch' in sys.modules))"
    )
    results = {}
    for name, model in {"published": published_run, "run": published_run.parent / "model.pth"}.items():
        command = [sys.executable, "-c", program] if name == "published" else [sys.executable, "-m", "image_classifier"]
        output = tmp_path / f"{name}.json"
        run_program(*command, "evaluate", model, "--output", output, cwd=PROJECT)
        results[name] = json.loads(output.read_text())
        write_image_folder(tmp_path / name, ["only"])
        run_program(
            *command, "predict", model, tmp_path / name / "test", "--output", tmp_path / f"{name}.csv", cwd=tmp_path
        )
    assert results["published"]["accuracy"] == results["run"]["accuracy_single_view"]
    assert results["published"]["num_images"] == results["run"]["num_images"]
    published, trained = ((tmp_path / f"{name}.csv").read_text().splitlines() for name in ("published", "run"))
    assert len(published) == len(trained) == 8
    assert published[0] == trained[0]


def test_options_of_the_other_kind_of_model_are_refused(published_run: Path) -> None:
    for words in (
        ["evaluate", published_run, "--device", "cuda"],
        ["evaluate", published_run.parent, "--precision", "int8"],
    ):
        result = forked.run("image_classifier", *words, timeout_s=100)
        assert result.returncode == 2
        assert result.stderr.startswith("error: --")
