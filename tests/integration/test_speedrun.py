"""The leaderboard: a real entry gets a row, and every doctored one is refused with its reason."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import measure
from benchmarks.measure import load_result, read_table
from benchmarks.speedrun import __main__ as speedrun
from benchmarks.speedrun import entries
from benchmarks.speedrun.entries import Refused, check_entry, get_clock_path
from image_classifier.tracking.reading import read_manifest, read_predictions, read_record, serialize_predictions
from tests.runs import reseal
from tests.tiny import write_tiny_dataset

OPTIONS = "--batch_size 10 --num_epochs 1 --learning_rate 0.01 --digest_every 10 --num_threads 1"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_dataset(tmp_path_factory.mktemp("data") / "tiny")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where results and the page go instead of the project's."""
    home = tmp_path_factory.mktemp("home")
    shutil.copy(speedrun.DOCUMENT, home / "speedrun.md")
    return home


@pytest.fixture(autouse=True)
def places(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "RESULTS", home)
    monkeypatch.setattr(speedrun, "DOCUMENT", home / "speedrun.md")


@pytest.fixture(scope="module")
def entry(dataset: Path, home: Path) -> Path:
    """An entry that the command has trained, verified and put into the table."""
    words = ["--dataset_folder", str(dataset), "--recipe", "notebook", "--experiments_folder", str(home / "e")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "RESULTS", home)
        patch.setattr(speedrun, "DOCUMENT", home / "speedrun.md")
        assert speedrun.main([*words, "--options", OPTIONS]) == 0
    return home / "e" / "speedrun" / "notebook-0"


def test_an_entry_that_is_verified_gets_a_row(entry: Path, home: Path) -> None:
    (row,) = load_result("speedrun")["rows"]
    probabilities, labels = read_predictions(entry)
    assert row["accuracy"] == float((probabilities.argmax(axis=1) == labels).mean())
    assert row["manifest_digest"] == read_manifest(entry)["digest"]
    assert 0 < row["seconds"] and 0 < row["seconds_again"]
    assert (row["data_digest"], row["num_train"]) == (read_record(entry)["data"]["digest"], 200)
    table = read_table(home / "speedrun.md", "speedrun")
    assert table == speedrun.build_table(load_result("speedrun"))
    assert row["changes"] == {"batch_size": 10, "learning_rate": 0.01, "num_epochs": 1, "digest_every": 10}
    assert "| `notebook`, seed 0, " in table and f"| {row['accuracy']:.2%} (one) |".replace("%", " %") in table
    assert f"| {row['seconds']:,.1f} s | " in table and "with the verdict IDENTICAL" in table


def reseal_entry(folder: Path) -> None:
    """Write manifest and clock anew, as somebody would who wants a changed entry to look whole."""
    reseal(folder)
    change_clock(folder, manifest_digest=read_manifest(folder)["digest"])


def change_clock(folder: Path, **values: Any) -> None:
    path = get_clock_path(folder)
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_json(folder: Path, name: str, **values: Any) -> None:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    reseal_entry(folder)


def claim_better_predictions(folder: Path) -> None:
    labels = read_predictions(folder)[1]
    probabilities = np.eye(10, dtype=np.float32)[labels]
    (folder / "predictions.npz").write_bytes(serialize_predictions(probabilities, labels))
    change_json(folder, "evaluation.json", accuracy=1.0, accuracy_single_view=1.0)


def change_labels(folder: Path) -> None:
    probabilities, _ = read_predictions(folder)
    labels = probabilities.argmax(axis=1)
    (folder / "predictions.npz").write_bytes(serialize_predictions(probabilities, labels))
    change_json(folder, "evaluation.json", accuracy=1.0)


DOCTORED: dict[str, tuple[Callable[[Path], None], str]] = {
    "a file": (lambda run: (run / "metrics.png").unlink(), "metrics.png is missing"),
    "accuracy": (lambda run: change_json(run, "evaluation.json", accuracy=0.99), "evaluation.json says 99.0000%"),
    "predictions": (claim_better_predictions, "verify says DIFFERENT: the probabilities of the test set differ"),
    "labels": (change_labels, "its predictions are not for the labels of the test set"),
    "clock": (lambda run: change_clock(run, seconds=0.0001), "its clock says 0.0 s, and its steps alone took"),
    "endless clock": (lambda run: change_clock(run, seconds=float("nan")), "clock.json is missing or damaged: it has"),
    "machine": (
        lambda run: change_clock(run, processor="A | B"),
        "its clock has a name of a processor, or a time, that",
    ),
    "recipe": (lambda run: change_json(run, "run.json", recipe="warp"), "it names no recipe of the package; they are "),
    "another's clock": (lambda run: change_clock(run, manifest_digest="0" * 64), "its clock is of another run"),
    "a later clock": (lambda run: change_clock(run, format_version=2), "its clock has the format 2"),
    "no run": (lambda run: shutil.rmtree(run), "is not a finished run"),
    "start": (
        lambda run: change_json(run, "run.json", pretrained={"path": "model.pth", "digest": "0" * 64}),
        "it starts from weights that were trained before",
    ),
    "data": (
        lambda run: change_json(run, "run.json", data=read_record(run)["data"] | {"digest": "1" * 64}),
        "its data is 111111111111; the leaderboard's is ",
    ),
    "change": (lambda run: change_json(run, "run.json", changes=[]), "it was resumed after a change"),
}


@pytest.mark.parametrize("what", DOCTORED)
def test_a_doctored_entry_is_refused(what: str, entry: Path, dataset: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(entry, tmp_path / entry.name))
    shutil.copy(get_clock_path(entry), tmp_path)
    doctor, reason = DOCTORED[what]
    doctor(copy)
    with pytest.raises(Refused) as caught:
        check_entry(copy, dataset)
    assert reason in str(caught.value)


def test_a_time_that_no_such_machine_needs_is_refused(
    entry: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = json.loads(get_clock_path(entry).read_text())["seconds"]
    monkeypatch.setattr(entries, "_verify", lambda run, dataset: 2.1 * seconds)
    with pytest.raises(Refused, match="s on such a machine"):
        check_entry(entry, dataset)
    monkeypatch.setattr(entries, "_verify", lambda run, dataset: 1.9 * seconds)
    assert check_entry(entry, dataset).seconds == seconds


def test_a_copy_of_an_entry_is_none(
    entry: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(entries, "_verify", lambda run, dataset: 1.0)
    for name in ("first", "second"):
        shutil.copytree(entry, tmp_path / name)
        shutil.copy(get_clock_path(entry), get_clock_path(tmp_path / name))
    rows, refused = speedrun.accept_entries(tmp_path, dataset)
    assert len(rows) == 1 and refused == {"second": "it is a copy of another entry"}


def test_a_row_that_was_written_by_hand_is_gone_with_the_next_call(
    entry: Path, dataset: Path, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(entry, tmp_path / "speedrun" / entry.name))
    shutil.copy(get_clock_path(entry), copy.parent)
    change_clock(copy, seconds=0.0001)
    result = load_result("speedrun")
    measure.save_result("speedrun", {"rows": [result["rows"][0] | {"seconds": 0.1, "accuracy": 1.0}]})
    assert speedrun.main(["--dataset_folder", str(dataset), "--experiments_folder", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("refused: notebook-0: its clock says 0.0 s, and its steps alone took")
    assert load_result("speedrun")["rows"] == []
    assert read_table(home / "speedrun.md", "speedrun").startswith("No entry yet")
