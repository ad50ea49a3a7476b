"""The command that checks a workflow's file and hands over to Metaflow."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml

from image_classifier.workflow.__main__ import build_environment, build_run, main
from tests.workflows import GOOD, SWEEP


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "workflow.yaml"
    path.write_text(yaml.safe_dump({**GOOD, "sweep": {**SWEEP, "num_trials": 120}}))
    return path


def test_metaflow_gets_the_content_of_the_file_and_limits_that_fit_the_sweep(file: Path) -> None:
    words = build_run(["--datastore=local", "run", "--tag", "x", "--config", str(file), "--with", "retry"])
    assert words[:3] == ["--datastore=local", "run", "--document"] and str(file) not in words
    assert json.loads(words[3])["file"] == str(file)
    assert words[4:] == ["--max-workers", "2", "--max-num-splits", "120", "--tag", "x", "--with", "retry"]
    words = build_run(["run", f"--config={file}", "--max-workers", "7"])
    assert words[3:] == ["--max-num-splits", "120", "--max-workers", "7"]


def test_a_fault_is_one_line_with_status_2_and_nothing_is_written(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file.write_text("workflow: nothing\ntraining: {experiment_name: e, run_name: r}\n")
    for words in (["run", "--config", str(file)], ["run"], ["run", "--config"], ["--metadata=local", "run"]):
        assert main(words) == 2
        output = capsys.readouterr()
        assert output.out == "" and output.err.startswith("error: --config") and output.err.count("\n") == 1
    assert list(file.parent.iterdir()) == [file]
    assert main([]) == 0 and "resume" in capsys.readouterr().out


def test_the_processes_of_metaflow_find_what_this_one_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    given = {"PYTHONPATH": os.pathsep.join(["a", "b"]), "USER": "somebody"}
    expected = {"PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join([str(tmp_path), "a", "b"])}
    assert build_environment(given) == {**expected, "METAFLOW_DATASTORE_SYSROOT_LOCAL": str(tmp_path)}
    place = {"METAFLOW_DATASTORE_SYSROOT_LOCAL": "elsewhere"}
    assert build_environment({**given, **place}) == {**expected, **place}


@pytest.mark.parametrize("given", [{}, {"USER": "root"}])
def test_metaflow_gets_the_name_of_a_user_where_there_is_none(given: dict[str, str]) -> None:
    assert build_environment(given)["METAFLOW_USER"] == f"uid-{os.getuid()}"
    assert "METAFLOW_USER" not in build_environment({**given, "METAFLOW_USER": "me"})
    assert "METAFLOW_USER" not in build_environment({**given, "USERNAME": "me"})
