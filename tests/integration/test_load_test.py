"""`python -m load_test`: its report, and that it notices a server that does not do as it should."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.load_test import build_table, read_kinds
from tests.conftest import PROJECT, run_program
from tests.serving import serving, write_model

NAMES = {"/model", "pixels", "file", "several", "tensor", "wrong file", "wrong key", "Aggregated"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "model.onnx")


def build_options(folder: Path, users: int, run_time: str) -> list[str]:
    places = ["--csv", str(folder / "load"), "--html", str(folder / "report.html")]
    return [*places, "--users", str(users), "--run-time", run_time]


def test_a_load_test_starts_its_server_loads_it_reports_and_ends_it(model: Path, tmp_path: Path) -> None:
    options = build_options(tmp_path, 8, "10s")
    run_program(sys.executable, "-m", "load_test", "--model", model, *options, cwd=PROJECT)
    with open(tmp_path / "load_stats.csv", newline="") as file:
        rows = {row["Name"]: row for row in csv.DictReader(file)}
    assert rows.keys() == NAMES
    for row in rows.values():
        assert int(row["Request Count"]) > 0 and row["Failure Count"] == "0", row
    with open(tmp_path / "load_stats_history.csv", newline="") as file:
        assert {row["Name"] for row in csv.DictReader(file)} >= NAMES - {"/model"}
    measured = {"recipe": "quick", "kinds": read_kinds(tmp_path / "load_stats.csv")}
    origin = {"processor": "p", "cores": 2, "commit": "0" * 40, "users": 8, "seconds": 10}
    table = build_table({"runs": [measured], **origin})
    assert all(f"| `quick` | {name} | " in table for name in (NAMES - {"Aggregated"}) | {"all"})
    assert table.count(" | 0 |\n") == len(NAMES) and "8 users, 10 s" in table
    assert "wrong file" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_server_that_refuses_is_noticed(model: Path, tmp_path: Path) -> None:
    with serving(model, tmp_path / "log", "--rate_limit", "5") as server:
        words = [sys.executable, "-m", "locust", "--config", "load_test/locust.conf", "--host", server.url]
        result = subprocess.run(
            [*words, *build_options(tmp_path, 2, "5s")], cwd=PROJECT, env=os.environ, capture_output=True, timeout=60
        )
    assert result.returncode == 1 and b"status 429" in result.stdout + result.stderr


def test_a_model_that_is_missing_is_an_error(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "load_test", "--model", str(tmp_path / "none")]
    result = subprocess.run(words, cwd=PROJECT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1 and "publish a run first" in result.stderr
