"""The flow of `examples/own_workflow`, in processes of its own outside the project: killed, resumed, and to its end."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from image_classifier.cli.train import main as train
from image_classifier.publishing.registry import Registry
from image_classifier.tracking.reading import read_manifest, read_record
from image_classifier.workflow.document import load_document, parse_document
from image_classifier.workflow.steps import computing, promote, take_snapshot
from image_classifier.workflow.steps import train as train_run
from tests.conftest import PROJECT, leave_out_coverage, wait_until

GUARD = """
import socket

_connect = socket.socket.connect

def connect(self, address):
    if self.family != socket.AF_UNIX:
        open("connected", "a").write(f"{address}\\n")
    return _connect(self, address)

socket.socket.connect = connect
"""
"""A sitecustomize for each process of the flow, that writes down where it connects to."""

NUM_EPOCHS = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example's files, with trainings that are long enough to be killed."""
    folder = tmp_path_factory.mktemp("workflow")
    example = PROJECT / "examples" / "own_workflow"
    shutil.copy(example / "own_workflow.py", folder)
    content = yaml.safe_load((example / "workflow.yaml").read_text())
    content["training"] |= {"num_epochs": NUM_EPOCHS, "num_threads": 1, "num_workers": 0, "device": "cpu"}
    (folder / "workflow.yaml").write_text(yaml.safe_dump(content))
    (folder / "guard").mkdir()
    (folder / "guard" / "sitecustomize.py").write_text(GUARD)
    return folder


def start(folder: Path, *words: str) -> subprocess.Popen[Any]:
    """Start the flow where neither a user's name nor a folder of Metaflow's is known."""
    left_out = ("USER", "USERNAME", "SUDO_USER", "METAFLOW_USER", "METAFLOW_HOME", "METAFLOW_DATASTORE_SYSROOT_LOCAL")
    environment = {name: value for name, value in leave_out_coverage().items() if name not in left_out}
    environment |= {"HOME": str(folder / "home"), "IMAGE_CLASSIFIER_CACHE": str(folder / "cache")}
    environment["PYTHONPATH"] = os.pathsep.join([str(folder / "guard"), str(PROJECT), os.environ.get("PYTHONPATH", "")])
    with open(folder / "log", "w") as log:
        line = [sys.executable, "-m", "image_classifier.workflow", *words]
        return subprocess.Popen(line, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True)


def find_process(folder: Path, step: str) -> int | None:
    """Find in what Metaflow prints the process of a step's task."""
    found = re.search(rf"/{step}/\d+ \(pid (\d+)\)\] Task is starting", (folder / "log").read_text())
    return int(found[1]) if found else None


@pytest.fixture(scope="module")
def flow(folder: Path) -> Path:
    """The folder of a flow whose training was killed, and that was resumed to its end."""
    run = folder / "experiments" / "stripes" / "final"
    with start(folder, "run", "--config", "workflow.yaml") as process:
        wait_until(lambda: len(list(run.glob("checkpoints/step-*/manifest.json"))) > 1, process, 300)
        task = find_process(folder, "train")
        assert task is not None
        os.kill(task, signal.SIGKILL)
        assert process.wait(60) == 1, (folder / "log").read_text()
    assert not (run / "manifest.json").exists()
    first = (folder / "log").read_text()
    with start(folder, "resume") as process:
        assert process.wait(300) == 0, first + (folder / "log").read_text()
    second = (folder / "log").read_text()
    (folder / "logs").write_text(first + second)
    assert re.search(rf"resumed after step \d+ of {12 * NUM_EPOCHS}", second)
    for step in ("snapshot", "trial", "sweep"):
        assert find_process(folder, step) is None  # cloned
    return folder


def read_cards(folder: Path, step: str) -> list[str]:
    pattern = f".metaflow/mf.cards/ImageClassification/runs/*/steps/{step}/tasks/*/cards/*.html"
    return [path.read_text(encoding="utf-8") for path in folder.glob(pattern)]


def list_pictures(card: str) -> list[bytes]:
    """List the pictures of a card, which has its components as JSON in base64."""
    (content,) = re.findall(r'__MF_DATA__\["[^"]+"\] = "([^"]+)"', card)
    (page,) = json.loads(base64.b64decode(content))["components"]
    (section,) = page["contents"]
    sources = [part["src"] for part in section["contents"] if part["type"] == "image"]
    return [base64.b64decode(source.partition(",")[2]) for source in sources]


def test_a_killed_training_resumes_to_the_bits_of_one_that_was_not(
    flow: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = flow / "experiments" / "stripes"
    record = read_record(experiment / "final")
    assert record["command"][:4] == ["python", "-m", "image_classifier.workflow", "run"]
    assert record["settings"]["validation_fraction"] == record["data"]["num_validation"] == 0
    monkeypatch.chdir(flow)
    words = ["--config", str(experiment / "best.yaml"), "--dataset_folder", "stripes", "--num_threads", "1"]
    words += ["--experiments_folder", str(tmp_path), "--experiment_name", "e", "--run_name", "r"]
    assert train(words) == 0
    expected = read_manifest(tmp_path / "e" / "r")
    assert read_manifest(experiment / "final")["weights_digest"] == expected["weights_digest"]
    assert read_manifest(experiment / "final")["chain_head"] == expected["chain_head"]


def test_the_flow_publishes_and_promotes(flow: Path) -> None:
    experiments = flow / "experiments"
    assert (experiments / "stripes" / "final" / "published" / "model.onnx").is_file()
    (version,) = Registry(None, experiments).list()
    assert (version.name, version.number, version.aliases) == ("stripes", "1", ("champion",))
    assert version.accuracy is not None and version.accuracy > 0.9


def test_the_cards_show_the_pictures(flow: Path) -> None:
    figure = (flow / "experiments" / "stripes" / "final" / "metrics.png").read_bytes()
    for step in ("train", "evaluate"):
        assert [list_pictures(card) for card in read_cards(flow, step)] == [[figure]]
    trials = [path.read_bytes() for path in (flow / "experiments" / "stripes").glob("trial-*/metrics.png")]
    assert sorted(sum(map(list_pictures, read_cards(flow, "trial")), [])) == sorted(trials)
    for step, number in {"snapshot": 1, "sweep": 4}.items():
        (card,) = read_cards(flow, step)
        assert len(list_pictures(card)) == number
    assert "Plotly.newPlot" in (flow / "experiments" / "stripes" / "sweep.html").read_text()


def test_metaflow_keeps_small_values_and_connects_nowhere(flow: Path) -> None:
    sizes = [path.stat().st_size for path in (flow / ".metaflow" / "ImageClassification" / "data").rglob("*")]
    assert len(sizes) > 20 and max(sizes) < 10_000
    assert not (flow / "connected").exists()
    assert not (flow / "home" / ".metaflowconfig").exists()
    assert "for user:uid-" in (flow / "logs").read_text()


def test_a_promotion_that_is_repeated_registers_nothing_twice(flow: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a kill between the registration and the end of the step."""
    monkeypatch.chdir(flow)
    monkeypatch.syspath_prepend(flow)
    document = parse_document(load_document(Path("workflow.yaml")))
    with computing(AssertionError) as stop:
        data, _ = take_snapshot(document)
        promotion = promote(document, data, Path("experiments/stripes/final/published"))
        assert promotion is not None and (promotion["version"], promotion["former"]) == ("1", "1")
        assert train_run(document, data, {"learning_rate": 0.01}, stop)["folder"] == "experiments/stripes/final"
    assert len(Registry(None, Path("experiments")).list()) == 1


def test_a_promotion_leaves_out_what_the_training_left_out(flow: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(flow)
    monkeypatch.syspath_prepend(flow)
    content = load_document(Path("workflow.yaml"))
    document = parse_document({**content, "training": {**content["training"], "skip_bad": True}})
    bad = Path("stripes/test/down/bad.png")
    bad.write_bytes(b"no image")
    try:
        with computing(AssertionError):
            data, _ = take_snapshot(document)
            promotion = promote(document, data, Path("experiments/stripes/final/published"))
    finally:
        bad.unlink()
    assert promotion is not None and promotion["version"] == "1"


def test_data_that_changed_since_the_snapshot_is_refused(flow: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(flow)
    monkeypatch.syspath_prepend(flow)
    document = parse_document(load_document(Path("workflow.yaml")))
    with pytest.raises(AssertionError, match="stripes has changed since the snapshot: its digest was 000"):
        with computing(AssertionError) as stop:
            data, _ = take_snapshot(document)
            train_run(document, {**data, "digest": "0" * 64}, {"learning_rate": 0.01}, stop)


def test_without_a_sweep_the_training_follows_the_snapshot(tmp_path: Path) -> None:
    with start(tmp_path, "output-dot") as process:
        assert process.wait(60) == 0
    edges = set(re.findall(r"^(\w+ -> \w+)", (tmp_path / "log").read_text(), flags=re.MULTILINE))
    assert {"snapshot -> plan", "snapshot -> train", "sweep -> train", "publish -> promote"} <= edges
