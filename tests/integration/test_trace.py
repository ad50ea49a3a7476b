"""The way back from an answer: every link is checked, and what is not what it should be is said."""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from image_classifier.cli.trace import main
from image_classifier.data.dataset import load_snapshot
from image_classifier.published.folder import describe_content, serialize_manifest
from image_classifier.tracking.identity import describe_code, describe_environment
from image_classifier.tracking.reading import read_manifest
from image_classifier.verification import Verdict
from tests.attestations import put, sign, state, write_policy
from tests.published import write_keys
from tests.runs import write_run
from tests.tiny import write_tiny_dataset

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_tiny_dataset(tmp_path / "data")


@pytest.fixture
def run(tmp_path: Path, data: Path) -> Path:
    """A run on the data, by the code of here, and a model that was published of it, beside others."""
    changes = {
        "data": {"digest": load_snapshot(data).digest},
        "execution": {"dataset_folder": str(data)},
        "code": describe_code(),
        "environment": describe_environment(),
    }
    write_run(tmp_path / "experiments", "experiment/another", seed=1)
    folder = write_run(tmp_path / "experiments", changes=changes)
    publish(folder)
    return folder


def publish(folder: Path) -> None:
    (folder / "published").mkdir()
    (folder / "published" / "model.onnx").write_bytes(b"a network")
    manifest = {
        **{"format_version": 1, "experiment_name": "experiment", "run_name": "run", "data_digest": "", "classes": []},
        "run_manifest_digest": read_manifest(folder)["digest"],
        "files": {"model.onnx": describe_content(b"a network")},
    }
    (folder / "published" / "manifest.json").write_bytes(serialize_manifest(manifest))


def trace(capsys: Capture, source: object, experiments: Path, *options: object) -> tuple[int, dict[str, str]]:
    """Trace, and return the exit status and the state of each link."""
    words = [str(source), "--experiments_folder", str(experiments), "--json", *map(str, options)]
    status = main(words)
    content: dict[str, Any] = json.loads(capsys.readouterr().out)
    return status, {link["name"]: link["state"] for link in content["links"]}


MODEL = {"model": "equal"}
RUN = {"run": "equal", "data": "equal", "code": "equal", "environment": "equal", "verdicts": "unchecked"}


def test_every_source_leads_to_the_run(run: Path, tmp_path: Path, capsys: Capture) -> None:
    version = hashlib.sha256(b"a network").hexdigest()[:12]
    answer = tmp_path / "answer.json"
    answer.write_text(json.dumps({"predictions": [], "model_version": version}))
    moved = run.rename(run.with_name("moved"))
    weights = tmp_path / "weights.pth"
    weights.write_bytes((moved / "model.pth").read_bytes())
    sources: dict[object, dict[str, str]] = {
        version: {"answer": "equal", **MODEL},
        answer: {"answer": "equal", **MODEL},
        moved / "published": MODEL,
        moved / "published" / "model.onnx": MODEL,
        weights: {"weights": "equal"},
    }
    for source, before in sources.items():
        assert trace(capsys, source, tmp_path / "experiments") == (0, before | RUN), source
    assert main([str(moved), "--experiments_folder", str(tmp_path / "experiments")]) == 0
    heading, *lines = capsys.readouterr().out.splitlines()
    assert heading.split()[:3] == ["link", "digest", "is"] and len(lines) == 6
    alone = (moved / "published").rename(tmp_path / "published")
    assert trace(capsys, alone, tmp_path / "none") == (0, {"model": "equal", "run": "unchecked"})


def test_what_is_not_what_it_should_be_is_named(run: Path, data: Path, tmp_path: Path, capsys: Capture) -> None:
    other = write_tiny_dataset(tmp_path / "other", seed=1)
    assert trace(capsys, run, tmp_path, "--dataset_folder", other) == (3, MODEL | RUN | {"data": "different"})
    nowhere = trace(capsys, run, tmp_path, "--dataset_folder", tmp_path / "nowhere")
    assert nowhere == (0, MODEL | RUN | {"data": "unchecked"})
    (run / "metrics.png").write_bytes(b"another picture")
    assert trace(capsys, run, tmp_path) == (3, MODEL | RUN | {"run": "different"})


def test_verdicts_are_held_against_a_policy(run: Path, tmp_path: Path, capsys: Capture) -> None:
    private, public = write_keys(tmp_path, "lab", ec.SECP256R1())
    policy = write_policy(tmp_path / "policy.yaml", {"lab": public})
    assert trace(capsys, run, tmp_path, "--policy", policy) == (2, MODEL | RUN | {"verdicts": "missing"})
    now = datetime.now(UTC)
    paths = [put(run, sign(state(run, at=now), private)) for _ in range(2)]  # a signature differs each time
    assert trace(capsys, run, tmp_path, "--policy", policy) == (0, MODEL | RUN | {"verdicts": "equal"})
    assert main([str(run), "--experiments_folder", str(tmp_path), "--policy", str(policy)]) == 0
    shown = capsys.readouterr().out
    assert "2 files in attestations/" in shown and shown.count("IDENTICAL") == 1
    for path in paths:
        path.unlink()
    put(run, sign(state(run, verdict=Verdict.DIFFERENT), private))
    assert trace(capsys, run, tmp_path, "--policy", policy) == (3, MODEL | RUN | {"verdicts": "different"})


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("123", "nor a model_version of 12 hexadecimal digits"),
        ("3", "first call: registry resolve NAME/VERSION"),
        ("0" * 12, "no model published under"),
        ("../..", "is not a finished run"),
        ("answer.json", "is not an answer of a server: it has no model_version"),
        ("list.json", "is not an answer of a server: it is a list"),
        ("strange.pth", "no run under"),
    ],
)
def test_what_nothing_is_known_of_is_refused_in_one_line(
    source: str, reason: str, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    for name, content in (("answer.json", "{}"), ("list.json", "[]"), ("strange.pth", "")):
        Path(name).write_text(content)
    assert main([source]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and reason in line
