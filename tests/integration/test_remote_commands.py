"""Commands whose data, runs and models lie on a real S3 server."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest

from image_classifier.__main__ import main
from image_classifier.cli.mirror import open_mirror
from image_classifier.cli.serve import find_resolver
from image_classifier.errors import ImageClassifierError, Interrupted, ModelError, RemoteError, SettingsError
from image_classifier.experiment import run
from image_classifier.remote.cache import localize
from image_classifier.reporter import Reporter, Reporters
from image_classifier.serving.settings import ServerSettings
from image_classifier.serving.source import ModelSource
from image_classifier.tracking.checking import is_finished
from image_classifier.tracking.reading import read_manifest, read_record
from tests.conftest import PROJECT, run_command
from tests.datasets import make_arrays, write_archive, write_cifar10_python
from tests.serving import write_model
from tests.stores import FAST, Bucket, cut
from tests.tiny import make_settings, write_tiny_dataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_dataset(tmp_path_factory.mktemp("data") / "tiny")


def refuse(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """Run a command that is to be refused; return its one line."""
    assert main([str(word) for word in words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    return error


def test_a_run_trained_from_s3_is_the_local_one_and_its_mirror_is_whole(
    bucket: Bucket, sample_dataset: Path, trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, mirror = bucket.upload_folder("sample", sample_dataset), f"{bucket.url}/runs"
    run_command(
        *("image_classifier.main", "--experiments_folder", tmp_path),
        *("--experiment_name", "experiment", "--run_name", "run", "--dataset_folder", data, "--mirror", mirror),
        *("--recipe", "notebook", "--views", "mirror", "--batch_size", "20", "--learning_rate", "0.02"),
        *("--num_threads", "1"),
    )
    here = tmp_path / "experiment" / "run"
    ours, local = read_manifest(here), read_manifest(trained_run)
    for part in ("weights_digest", "chain_head"):
        assert ours[part] == local[part]
    record, reference = read_record(here), read_record(trained_run)
    assert record["data"] == reference["data"]
    assert record["execution"]["dataset_folder"] == data and record["execution"]["mirror"] == mirror

    copy = f"{mirror}/experiment/run"
    copied = bucket.read("runs/experiment/run")
    assert copied == {
        path.relative_to(here).as_posix(): path.read_bytes() for path in here.rglob("*") if path.is_file()
    }
    shutil.rmtree(tmp_path / "experiment")
    assert main(["verify", copy, "--files_only"]) == 0
    assert capsys.readouterr().out.startswith("INTACT\n")
    assert main(["evaluate", copy]) == 0  # on the data that the record names
    assert f"(data {record['data']['digest'][:12]})" in capsys.readouterr().out
    assert main(["compare", copy, str(trained_run)]) == 0
    assert "--attest writes beside the run" in refuse(capsys, "verify", copy, "--attest", "--sign_key", "key.pem")
    assert "the report is written into the run's folder" in refuse(capsys, "report", copy)


def test_a_run_goes_on_elsewhere_from_the_checkpoints_of_its_mirror(
    bucket: Bucket,
    dataset: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = run(make_settings(tmp_path / "whole", dataset))
    data = Path(bucket.upload_folder("tiny", dataset))
    mirror: dict[str, Any] = {
        "mirror": Path(f"{bucket.url}/runs"),
        "mirror_checkpoints": True,
        "checkpoint_every": "10steps",
    }
    settings = make_settings(tmp_path / "here", data, **mirror)
    steps = iter(range(40))

    class Breaker(Reporter):
        """Lets the second copy fail."""

        def checkpoint(self, step: int) -> None:
            bucket.proxy.choose_upload = lambda line: cut(0) if step == 10 and "step-00000020" in line else None

    with pytest.raises(Interrupted), open_mirror(settings) as copier:
        run(settings, reporter=Reporters(copier, Breaker()), should_stop=lambda: next(steps) == 29)
    assert "the checkpoint of step 20 was not copied, and the training goes on" in caplog.text
    names = bucket.read("runs/tiny/run").keys()
    assert "manifest.json" not in names and "checkpoints/step-00000030/state.pth" in names
    assert not any("step-00000010" in name for name in names)  # no more are kept there than here
    assert is_finished(localize(f"{bucket.url}/runs/tiny/run", FAST)) is False

    words = ["train", "--experiments_folder", str(tmp_path / "there"), "--experiment_name", "tiny", "--run_name", "run"]
    assert main([*words, "--resume", "--mirror", f"{bucket.url}/runs"]) == 0
    assert f"copied to {bucket.url}/runs/tiny/run\n" in capsys.readouterr().err
    there = tmp_path / "there" / "tiny" / "run"
    assert read_manifest(there)["weights_digest"] == whole.weights_digest
    assert bucket.read("runs/tiny/run")["manifest.json"] == (there / "manifest.json").read_bytes()
    assert main([*words, "--resume"]) == 0  # finished, and copied
    capsys.readouterr()
    assert main(["verify", f"{bucket.url}/runs/tiny/run", "--num_threads", "1"]) == 0
    assert capsys.readouterr().out.startswith("IDENTICAL\n")


def test_a_mirror_that_cannot_take_the_run_stops_it_before_the_first_step(
    bucket: Bucket, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["train", "--experiments_folder", tmp_path / "runs", "--experiment_name", "a", "--run_name", "b"]
    words += ["--dataset_folder", dataset, "--recipe", "notebook"]
    bucket.upload("taken/a/b", {"run.json": b'{"started_at": "before"}'})
    for mirror, reason in {
        f"{bucket.url}/taken": "holds another run; choose another --run_name, or continue that one with --resume",
        "https://localhost/runs": "--mirror takes a folder, s3:// or gs://: https://localhost/runs/a/b is read-only",
        str(tmp_path / "runs"): "--mirror takes another folder than --experiments_folder",
        "s3://no-such-bucket/runs": "there is nothing at s3://no-such-bucket/runs/a/b",
        "gs://bucket/runs": "pip install 'image-classifier[gcs]'",
        "s3://key:hunter2@bucket/runs": "no name or password",
    }.items():
        error = refuse(capsys, *words, "--mirror", mirror)
        assert reason in error and "hunter2" not in error
    assert "needs a --mirror to copy them to" in refuse(capsys, *words, "--mirror_checkpoints")
    assert f"and none at {bucket.url}/none/a/b; leave out --resume" in refuse(
        capsys, *words, "--resume", "--mirror", f"{bucket.url}/none"
    )
    assert not (tmp_path / "runs").exists()


def test_a_run_whose_copy_fails_is_finished_and_resume_copies_it(
    bucket: Bucket, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = make_settings(tmp_path, dataset, num_epochs=0, mirror=Path(f"{bucket.url}/runs"))
    monkeypatch.setattr("image_classifier.cli.mirror.Patience", lambda **values: FAST)
    with pytest.raises(RemoteError, match=r"tiny/run is finished and whole; its copy is not: .*; --resume copies it"):
        with open_mirror(settings):
            run(settings)
            bucket.fs.rm(bucket.url, recursive=True)
    assert is_finished(tmp_path / "tiny" / "run")
    bucket.fs.mkdir(bucket.url)
    with open_mirror(settings):
        pass
    assert "manifest.json" in bucket.read("runs/tiny/run")


def test_a_signed_address_is_used_and_never_shown_or_recorded(
    bucket: Bucket, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_cifar10_python(tmp_path / "cifar" / "cifar-10-batches-py", make_arrays(120, 20))
    write_archive(tmp_path / "cifar-10-python.tar.gz", tmp_path / "cifar" / "cifar-10-batches-py")
    bucket.upload("cifar-10-python.tar.gz", {"": (tmp_path / "cifar-10-python.tar.gz").read_bytes()})
    address = bucket.sign("cifar-10-python.tar.gz")
    query = urlsplit(address).query
    secrets = re.findall(r"ignature=([^&]+)", query)
    assert secrets
    words = ["train", "--experiments_folder", str(tmp_path / "runs"), "--experiment_name", "a", "--run_name", "b"]
    words += ["--recipe", "notebook", "--batch_size", "50", "--num_epochs", "0", "--dataset_folder", address]
    assert main([*words, "--print_config"]) == main(words) == 0
    assert f"dataset_folder: {address.partition('?')[0]}\n" in (shown := capsys.readouterr().out)
    record = (tmp_path / "runs" / "a" / "b" / "run.json").read_text()
    assert json.loads(record)["execution"]["dataset_folder"] == address.partition("?")[0]
    bucket.fs.rm(f"{bucket.url}/cifar-10-python.tar.gz")
    shown += refuse(capsys, *words[:-1], f"{address}") + refuse(capsys, "verify", address, "surplus")
    shown += refuse(capsys, "verify", tmp_path, address)
    for secret in secrets:
        assert secret not in shown and secret not in record
    assert not any(secret in path.name for path in tmp_path.rglob("*") for secret in secrets)


def test_a_model_is_published_to_s3_and_served_from_there(
    bucket: Bucket, trained_run: Path, sample_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = bucket.upload_folder("runs/run", trained_run), f"{bucket.url}/models/shapes"
    assert "is published with --target" in refuse(capsys, "publish", source)
    assert refuse(capsys, "registry", "check", source).startswith(f"error: {source} has no published model")
    words = ["publish", source, "--target", target, "--dataset_folder", str(sample_dataset)]
    assert main(words) == 0
    assert capsys.readouterr().out == f"{target}\n"
    assert "exists already; remove it, or replace it with --overwrite" in refuse(capsys, *words)
    assert bucket.read("runs/run").keys() == {
        path.relative_to(trained_run).as_posix() for path in trained_run.rglob("*") if path.is_file()
    }
    assert main(["registry", "check", target]) == 0
    assert capsys.readouterr().out.startswith("INTACT\n")
    assert main(["predict", target, str(PROJECT / "docs" / "example.png")]) == 0
    settings = ServerSettings(model=target)
    served = ModelSource(settings, find_resolver(settings)).load()
    assert served.predict(np.zeros((1, 32, 32, 3), np.uint8)).shape == (1, 10)


def test_a_server_takes_up_what_changes_and_nothing_wrong(bucket: Bucket, tmp_path: Path) -> None:
    models = [write_model(tmp_path / f"{seed}.onnx", seed=seed).read_bytes() for seed in (0, 1)]
    url = bucket.upload("model.onnx", {"": models[0]})
    settings = ServerSettings(model=url)
    source = ModelSource(settings, find_resolver(settings))
    assert source.name == "image_classifier"
    first = source.load()
    assert source.load_if_moved() is None
    bucket.upload("model.onnx", {"": models[1]})
    second = source.load_if_moved()
    assert second is not None and second.model.version != first.model.version
    bucket.upload("model.onnx", {"": b"no model"})
    with pytest.raises(ModelError):
        source.load_if_moved()


def test_a_url_is_refused_where_a_place_here_is_needed(
    bucket: Bucket, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = ("--experiment_name", "a", "--run_name", "b")
    url = f"{bucket.url}/x"
    for words, reason in (
        (
            ("train", *names, "--experiments_folder", url),
            "--experiments_folder takes a path on this machine, got a URL",
        ),
        (("train", *names, "--dataset_folder", f"{bucket.url}//x"), "must not hold //, /./ or /../; write it without"),
        (("train", *names, "--dataset_folder", url, "--database", "a"), "must lie on this machine, got a URL"),
        (("data", "prune", "--dataset_folder", url), "must be a folder on this machine, got a URL"),
        (("data", "list", "--dataset_folder", url), "must be a folder on this machine, got a URL"),
        (("data", "info", "--dataset_folder", url), f"there is nothing at {url}; correct the URL"),
        (("evaluate", url), f"there is nothing at {url}; correct the URL"),
    ):
        assert reason in refuse(capsys, *words)
    (tmp_path / "config.yaml").write_text(f"experiments_folder: {url}\n")
    assert "got a URL" in refuse(capsys, "train", *names, "--config", "config.yaml")
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]
    with pytest.raises(SettingsError, match="must lie on this machine"):
        make_settings(tmp_path, Path(url), database="a")


def test_data_on_s3_are_prepared_ingested_and_pruned(
    bucket: Bucket, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url, home = bucket.upload_folder("tiny", dataset), str(tmp_path / "home")
    assert main(["data", "prepare", "--dataset_folder", url]) == 0
    folder = Path(capsys.readouterr().out.strip())
    assert folder.is_relative_to(tmp_path / "cache") and folder.name == "tiny"
    assert main(["data", "ingest", url, "--dataset", "tiny", "--dataset_folder", home]) == 0
    assert main(["data", "diff", "db:tiny", url, "--dataset_folder", home]) == 0
    capsys.readouterr()
    assert main(["data", "prune", "--dataset_folder", str(tmp_path)]) == 0
    assert re.search(r"removed [\d,]+ bytes of copies of what lies elsewhere\n", capsys.readouterr().out)
    assert not folder.exists()
    with pytest.raises(ImageClassifierError, match="there is nothing at"):
        localize(f"{url}/none", FAST)
