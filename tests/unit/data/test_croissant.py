"""Croissant descriptions: valid by MLCommons' own reader, and true."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest

from image_classifier.access import DATABASE_FOLDER, DatabaseAccess
from image_classifier.cli.data import main
from image_classifier.data.croissant import write_croissant
from image_classifier.data.dataset import load_snapshot
from image_classifier.data.ingest import ingest
from image_classifier.data.snapshot import find_stores
from image_classifier.errors import DataError, StorageError
from tests.datasets import OURS, make_arrays, write_shards

VALIDATE = """
import json, sys, mlcroissant
for path in sys.argv[1:]:
    dataset = mlcroissant.Dataset(path)
    issues = dataset.metadata.ctx.issues
    records = {name: list(dataset.records(name)) for name in ("parts", "classes")}
    warnings = sorted(str(issue) for issue in issues.warnings)
    version = str(dataset.metadata.ctx.conforms_to.value)
    print(json.dumps([version, [str(issue) for issue in issues.errors], warnings, records]))
"""
"""In a process of its own, whose warnings are not this one's."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Descriptions of a snapshot of tars and of its version in a database."""
    folder = tmp_path_factory.mktemp("croissant")
    dataset = folder / "ünd so"
    write_shards(dataset, make_arrays(30, 12), OURS)
    ingest(dataset, "mine", DatabaseAccess(dataset_folder=folder / DATABASE_FOLDER))
    paths = [dataset / "croissant.json", folder / "database.json"]
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        for source, path in zip((str(dataset), "db:mine"), paths, strict=True):
            assert main(["info", "--dataset_folder", source, "--croissant", str(path)]) == 0
    return paths


def test_descriptions_are_valid_and_say_what_is_there(files: list[Path]) -> None:
    command = [sys.executable, "-W", "ignore", "-c", VALIDATE, *map(str, files)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    labels = make_arrays(30, 12).labels
    for line, has_version in zip(result.stdout.splitlines(), (False, True), strict=True):
        version, errors, warnings, records = json.loads(line)
        assert (version, errors) == ("http://mlcommons.org/croissant/1.1", [])
        missing = ["citeAs", "datePublished", "license", *([] if has_version else ["version"])]
        assert len(warnings) == len(missing) and all(
            f"/{name}" in warning and "is recommended" in warning
            for name, warning in zip(missing, warnings, strict=True)
        )
        assert {row["parts/name"]: (row["parts/first"], row["parts/num_images"]) for row in records["parts"]} == {
            "train": (0, 30),
            "test": (30, 12),
        }
        assert [row["classes/name"] for row in records["classes"]] == OURS
        counts = np.bincount(labels[:30], minlength=10).tolist()
        assert [row["classes/num_train"] for row in records["classes"]] == counts


def test_the_files_have_the_digests_that_are_said(files: list[Path]) -> None:
    for path in files:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        assert [file["name"] for file in content["distribution"]] == ["images.npy", "labels.npy", "snapshot.json"]
        for file in content["distribution"]:
            found = (path.parent / unquote(file["contentUrl"])).read_bytes()
            assert hashlib.sha256(found).hexdigest() == file["sha256"] and f"{len(found)} B" == file["contentSize"]
        images = np.load(path.parent / unquote(content["distribution"][0]["contentUrl"]))
        assert content["description"].startswith(f"{len(images)} RGB images of 32 x 32 pixels in 10 classes")
        assert str(path.parent) not in json.dumps(content)
    assert json.loads(files[1].read_text())["version"] == "1.0.0"


def test_what_cannot_be_written_is_said(files: list[Path], tmp_path: Path) -> None:
    snapshot = load_snapshot(files[0].parent)
    with pytest.raises(StorageError, match="cannot write .*none/x.json"):
        write_croissant(snapshot, find_stores(files[0].parent), tmp_path / "none" / "x.json")
    with pytest.raises(DataError, match="another process removed the snapshot .*; start again"):
        write_croissant(snapshot, [tmp_path], tmp_path / "x.json")
    assert not list(tmp_path.iterdir())
