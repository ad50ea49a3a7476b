"""`image_classifier drift` as a user runs it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from image_classifier.capture.files import CaptureFacts
from image_classifier.cli.drift import main
from image_classifier.data.dataset import load_snapshot
from image_classifier.published.folder import MANIFEST, MODEL, REFERENCE, describe_content, serialize_manifest
from image_classifier.published.predictor import load_predictor
from image_classifier.published.reference import build_reference, serialize_reference
from tests import forked
from tests.captures import write_captures, write_test_set


@pytest.fixture(scope="module")
def captures(tmp_path_factory: pytest.TempPathFactory, published_run: Path, sample_dataset: Path) -> Path:
    """A folder with captures of the test set as it is (`same`), and darker (`dark`), and labels of both."""
    folder = tmp_path_factory.mktemp("captures")
    write_test_set(folder / "dark", published_run, sample_dataset, darker=2)
    snapshot = write_test_set(folder / "same", published_run, sample_dataset)
    lines = [f"request-{number},0,{snapshot.classes[label]}" for number, label in enumerate(snapshot.test[1])]
    (folder / "labels.csv").write_text("\n".join(["request_id,image_index,label", *lines, "other,0,circle"]))
    return folder


def drift(*words: str | Path, status: int = 0) -> str:
    """Run the command in a process of its own; return stdout, or where it is to be refused its one line."""
    result = forked.run("image_classifier", "drift", *words, timeout_s=100)
    assert result.returncode == status, result.stderr
    assert status != 2 or result.stderr.count("\n") == 1
    return result.stderr if status == 2 else result.stdout


def test_images_like_those_of_the_test_set_are_no_drift(
    captures: Path, published_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(captures / "same"), str(published_run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["verdict"], found["num_images"], found["accuracy"]) == ("NONE", 200, None)
    assert [test["is_drift"] for test in found["tests"]] == [False] * 8
    by_name = {test["name"]: test for test in found["tests"]}
    assert by_name["classes"]["effect"] == by_name["brightness"]["effect"] == 0


def test_darker_images_are_found_and_shown(captures: Path, published_run: Path, tmp_path: Path) -> None:
    page = tmp_path / "drift.html"
    options = ("--page", page, "--labels", captures / "labels.csv", "--labels_by", "hour")
    output = drift(captures / "dark", published_run.parent, *options, status=3)
    assert re.search(r"(?m)^brightness +Kolmogorov-Smirnov +0\.\d+ .* DRIFT$", output)
    assert re.search(r"(?m)^2026-11-30T12 +200 ", output)
    assert "200 of 201 are of captured images" in output
    assert "brightness" in output.splitlines()[-1] and output.splitlines()[-1].startswith("DRIFT in ")
    text = page.read_text()
    assert text.count('<img src="data:image/png;base64,') > 30 and "Accuracy of labelled predictions" in text
    assert not re.findall(r"(?:src|href)=\"(?!data:)", text) and "<script" not in text
    assert list(tmp_path.iterdir()) == [page]


def test_names_of_others_are_escaped(captures: Path, published_run: Path, tmp_path: Path) -> None:
    folder = change(published_run, tmp_path, classes=["<script>alert(1)</script>", *"bcdefghij"])
    manifest = json.loads((folder / MANIFEST).read_text())
    images = np.zeros((100, 32, 32, 3), np.uint8)
    answers = np.tile(np.eye(1, 10, dtype=np.float32), (100, 1))
    facts = CaptureFacts(32, tuple(manifest["classes"]), manifest["files"][MODEL]["sha256"])
    write_captures(tmp_path / "captures", facts, images, answers)
    assert main([str(tmp_path / "captures"), str(folder), "--page", str(tmp_path / "page.html")]) == 3
    text = (tmp_path / "page.html").read_text()
    assert "&lt;script&gt;alert(1)" in text and "<script" not in text


def change(published_run: Path, tmp_path: Path, *, classes: list[str] | None = None) -> Path:
    """Copy a published model without its reference, as an earlier version published it, or with other classes."""
    folder = tmp_path / "changed"
    shutil.copytree(published_run, folder)
    manifest = json.loads((folder / MANIFEST).read_text())
    path = folder / REFERENCE
    if classes is None:
        path.unlink()
        del manifest["files"][REFERENCE]
    else:
        manifest["classes"] = classes
        content = json.dumps(json.loads(path.read_text()) | {"classes": classes}).encode()
        path.write_bytes(content)
        manifest["files"][REFERENCE] = describe_content(content)
    (folder / MANIFEST).write_bytes(serialize_manifest(manifest))
    return folder


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        ("no reference", "has no drift_reference.json: it was published by an earlier version"),
        ("other classes", "has predictions for other classes, or images of another size"),
        ("other model", "has predictions of another model than"),
        ("no capture", "has no captures"),
        ("few images", "has 0 images of version 9; drift needs 100"),
        ("labels of others", "none of the 1 labels belongs to a captured image"),
        ("no labels", "is not a valid label file: its header has no column"),
        ("no folder for the page", "check that its folder exists"),
        ("window", "--window takes a whole number of 100 or more, got: 99"),
        ("level", "--level takes a number between 0 and 1, got: 1.0"),
        ("time", "--since takes a time such as 2026-11-30T12:00, got: 'noon'"),
        ("later", "has no captures in this period"),
    ],
)
def test_what_cannot_be_compared_is_one_line(
    kind: str, line: str, captures: Path, published_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place, folder, options = captures / "same", published_run, []
    if kind == "no reference":
        folder = change(published_run, tmp_path)
        assert load_predictor(folder, num_threads=1).model.run_name == "run"  # it is served all the same
    elif kind == "other classes":
        folder = change(published_run, tmp_path, classes=list("abcdefghij"))
    elif kind == "other model":
        manifest = json.loads((published_run / MANIFEST).read_text())
        place = tmp_path / "other"
        facts = CaptureFacts(32, tuple(manifest["classes"]), "e" * 64)
        write_captures(place, facts, np.zeros((100, 32, 32, 3), np.uint8), np.zeros((100, 10), np.float32))
    elif kind == "no capture":
        place = tmp_path
    elif kind.endswith("labels") or kind.startswith("labels"):
        text = "request_id,label" if kind == "no labels" else "request_id,image_index,label\nother,0,circle\n"
        (tmp_path / "l.csv").write_text(text)
        options = ["--labels", str(tmp_path / "l.csv")]
    else:
        options = {
            "few images": ["--model_version", "9"],
            "no folder for the page": ["--page", str(tmp_path / "none" / "page.html")],
            "window": ["--window", "99"],
            "level": ["--level", "1"],
            "time": ["--since", "noon"],
            "later": ["--since", "2027-01-01"],
        }[kind]
    assert main([str(place), str(folder), *options]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("error: ") and line in error


def test_the_reference_is_published_with_the_same_bytes_again(published_run: Path, sample_dataset: Path) -> None:
    predictor, snapshot = load_predictor(published_run, num_threads=1), load_snapshot(sample_dataset)
    images = snapshot.test[0]
    answers = predictor.predict(np.ascontiguousarray(images.transpose(0, 2, 3, 1)))
    reference = build_reference(snapshot.classes, images, answers)
    assert serialize_reference(reference) == (published_run / REFERENCE).read_bytes()
    manifest = json.loads((published_run / MANIFEST).read_text())
    assert REFERENCE in manifest["files"]
