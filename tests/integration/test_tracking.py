"""A training that is written to MLflow too: `--tracking_uri` on a real server, and on one that is not there."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tests import forked
from tests.conftest import run_command, run_program


def build_options(experiments: Path, dataset: Path, uri: str) -> list[str]:
    """Build the command line of a run of two epochs."""
    names = ["--experiments_folder", str(experiments), "--experiment_name", experiments.name, "--run_name", "run"]
    settings = ["--recipe", "notebook", "--batch_size", "50", "--num_threads", "1", "--learning_rate", "0.01"]
    return ["image_classifier.main", *names, "--dataset_folder", str(dataset), *settings, "--tracking_uri", uri]


def read_back(uri: str, experiment: str, folder: Path) -> dict[str, Any]:
    """Read with MLflow's own client what was written of the only run of an experiment."""
    program = (
        "import json, mlflow; client = mlflow.MlflowClient({0!r});"
        "(run,) = client.search_runs([client.get_experiment_by_name({1!r}).experiment_id]); number = run.info.run_id;"
        "history = [(m.step, m.value) for m in client.get_metric_history(number, 'train_accuracy')];"
        "print(json.dumps(dict(name=run.info.run_name, status=run.info.status, params=run.data.params,"
        "metrics=run.data.metrics, history=history, files=[f.path for f in client.list_artifacts(number)])))"
    ).format(uri, experiment)
    written: dict[str, Any] = json.loads(run_program(sys.executable, "-c", program, cwd=folder))
    return written


def test_settings_epochs_and_files_are_on_the_server(mlflow_server: str, sample_dataset: Path, tmp_path: Path) -> None:
    run_command(*build_options(tmp_path, sample_dataset, mlflow_server))
    folder = tmp_path / tmp_path.name / "run"
    written = read_back(mlflow_server, tmp_path.name, tmp_path)
    record, evaluation = (json.loads((folder / name).read_text()) for name in ("run.json", "evaluation.json"))
    assert (written["name"], written["status"]) == ("run", "FINISHED")
    assert written["params"] == {name: str(value) for name, value in record["settings"].items()}
    epochs = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert written["history"] == [[epoch["epoch"], epoch["train_accuracy"]] for epoch in epochs]
    assert written["metrics"]["test_accuracy"] == evaluation["accuracy"]
    assert set(written["files"]) == {path.name for path in folder.iterdir()} - {"checkpoints"}
    assert record["execution"]["tracking_uri"] == mlflow_server


def test_a_sqlite_file_and_its_files_are_beside_each_other_and_nothing_is_in_the_current_folder(
    sample_dataset: Path, tmp_path: Path
) -> None:
    here, store = tmp_path / "here", tmp_path / "team"
    here.mkdir()
    uri = f"sqlite:///{store}/mlflow.db"
    run_command(*build_options(tmp_path / "experiments", sample_dataset, uri), cwd=here)
    assert list(here.iterdir()) == []
    assert sorted(path.name for path in store.iterdir()) == ["artifacts", "mlflow.db"]
    assert len(list((store / "artifacts").rglob("model.pth"))) == 1
    written = read_back(uri, "experiments", here)
    assert written["status"] == "FINISHED" and {"model.pth", "run.json"} < set(written["files"])


def test_a_store_that_cannot_be_reached_stops_the_run_before_it_begins(sample_dataset: Path, tmp_path: Path) -> None:
    words = build_options(tmp_path, sample_dataset, "http://127.0.0.1:9")
    result = forked.run(*words, timeout_s=100)
    assert result.returncode == 2
    assert result.stderr.startswith("error: cannot open the experiment ")
    assert result.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
