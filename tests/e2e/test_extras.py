"""Each extra installed as its document says, into a clean environment, and used; and every command without torch."""

from __future__ import annotations

import functools
import json
import os
import re
import resource
import shutil
import subprocess
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.request import urlopen

import httpx
import pytest

from image_classifier.cli.commands import COMMANDS
from tests.captures import write_test_set
from tests.collector import Collector, collector
from tests.conftest import (
    PROJECT,
    find_dependencies,
    find_port,
    install_wheel,
    link_environment,
    report_lack,
    run_program,
)
from tests.datasets import PUBLISHED, make_arrays, write_parquet
from tests.documents import DOCUMENTS
from tests.repository import read_lock
from tests.serving import PIXELS, serving
from tests.stores import S3, running_s3

__all__ = ["collector"]
pytestmark = pytest.mark.timeout(600)  # an environment is made by links, of tens of thousands of files

INSTALLED = (
    "parquet",
    "database",
    "publish",
    "attest",
    "tracking",
    "hub",
    "client",
    "sweep",
    "drift",
    "workflow",
    "tensorboard",
    "remote",
    "gcs",
    "docs",
    "serve",
    "serve,capture",
    "serve,traces",
    "serve,tracking",
)
Install = Callable[[str], Path]


@pytest.fixture(scope="module")
def install(tmp_path_factory: pytest.TempPathFactory, distributions: dict[str, Path]) -> Install:
    """Make the environment that `pip install 'image-classifier[EXTRAS]'` makes, once; return the program in it."""

    @functools.cache
    def make(extras: str) -> Path:
        folder = tmp_path_factory.mktemp("installed") / ".venv"
        names = find_dependencies("image-classifier", extras.split(",") if extras else ())
        link_environment(folder, names - {"image-classifier"})
        install_wheel(folder, distributions["wheel"])
        return folder / "bin" / "image_classifier"

    return make


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    with running_s3(tmp_path_factory.mktemp("s3") / "log") as s3:
        yield s3


@pytest.fixture(scope="module")
def without_torch(tmp_path_factory: pytest.TempPathFactory, distributions: dict[str, Path]) -> Path:
    """The program in an environment of requirements/requirements-serve.sh and the wheel with --no-deps."""
    folder = tmp_path_factory.mktemp("serve") / ".venv"
    link_environment(folder, read_lock("serve"))
    install_wheel(folder, distributions["wheel"])
    assert not list(folder.rglob("torch"))
    return folder / "bin" / "image_classifier"


def refuse(*words: str | Path, cwd: Path) -> str:
    """Run a command that is to be refused; return its one line."""
    result = subprocess.run([str(word) for word in words], cwd=cwd, capture_output=True, text=True, timeout=300)
    assert result.returncode == 2, result.stdout + result.stderr
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    return result.stderr


def test_every_install_that_a_document_names_is_tried_here() -> None:
    texts = [path.read_text(encoding="utf-8") for path in DOCUMENTS if path.name != "CHANGELOG.md"]
    named = {extras for text in texts for extras in re.findall(r"pip install '?image-classifier\[([a-z,]+)\]", text)}
    assert all(extras in INSTALLED or set(extras.split(",")) <= set(INSTALLED) for extras in named)
    declared = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert {extra for extras in named for extra in extras.split(",")} == declared["optional-dependencies"].keys()


def test_parquet_is_read_with_its_extra(install: Install, tmp_path: Path) -> None:
    write_parquet(tmp_path / "data", make_arrays(), PUBLISHED)
    words = ("data", "info", "--dataset_folder", tmp_path / "data")
    assert "image-classifier[parquet]" in refuse(install(""), *words, cwd=tmp_path)
    assert "23     7   30" in run_program(install("parquet"), *words, cwd=tmp_path)


def test_a_database_is_used_with_its_extra(install: Install, sample_dataset: Path, tmp_path: Path) -> None:
    words = ("data", "ingest", sample_dataset, "--dataset", "shapes", "--dataset_folder", tmp_path / "home")
    assert "pip install 'image-classifier[database]'" in refuse(install(""), *words, cwd=tmp_path)
    assert run_program(install("database"), *words, cwd=tmp_path) == "shapes@1\n"
    assert run_program(install("database"), "data", "upgrade", "--dataset_folder", tmp_path / "x", cwd=tmp_path) == ""


def test_a_run_is_published_signed_and_checked_with_its_extra(
    install: Install, trained_run: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(trained_run, tmp_path / "run")
    assert "pip install 'image-classifier[publish]'" in refuse(install(""), "publish", run, cwd=tmp_path)
    assert not (run / "published").exists()
    key = "ecparam -genkey -name prime256v1 -noout -out key.pem"
    run_program("openssl", *key.split(), cwd=tmp_path)
    run_program("openssl", *"ec -in key.pem -pubout -out key.pub".split(), cwd=tmp_path)
    program = install("publish")
    run_program(program, "publish", run, "--sign_key", "key.pem", cwd=tmp_path)
    assert "signed by key.pub" in run_program(
        program, "registry", "check", run, "--public_key", "key.pub", cwd=tmp_path
    )
    assert run_program(program, "predict", run / "published", PROJECT / "docs" / "example.png", cwd=tmp_path)


def test_verdicts_are_signed_and_counted_with_its_extra(install: Install, trained_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(trained_run, tmp_path / "run")
    run_program("openssl", *"ecparam -genkey -name prime256v1 -noout -out key.pem".split(), cwd=tmp_path)
    run_program("openssl", *"ec -in key.pem -pubout -out key.pub".split(), cwd=tmp_path)
    signing = ("verify", run, "--attest", "--sign_key", "key.pem")
    counting = ("verify", run, "--threshold", "1-of-1", "--public_key", "key.pub")
    for words in (signing, counting):
        assert "pip install 'image-classifier[attest]'" in refuse(install(""), *words, cwd=tmp_path)
    assert not (run / "attestations").exists()
    program = install("attest")
    assert "  signed: " in run_program(program, *signing, "--allow_code_change", cwd=tmp_path)
    assert run_program(program, *counting, cwd=tmp_path).startswith("ACCEPTED")


def test_runs_are_tracked_and_models_registered_with_its_extra(
    install: Install, published_run: Path, sample_dataset: Path, tmp_path: Path
) -> None:
    registry = ("--experiments_folder", tmp_path, "--dataset_folder", sample_dataset)
    words = ("registry", "add", published_run, "--name", "shapes", *registry)
    assert "pip install 'image-classifier[tracking]'" in refuse(install(""), *words, cwd=tmp_path)
    program = install("tracking")
    assert "pip install 'image-classifier[serve]'" in refuse(program, *words, cwd=tmp_path)
    both = install("publish,tracking")  # the registry computes a model's answers
    assert run_program(both, *words, cwd=tmp_path) == "shapes/1\n"
    run_program(both, "registry", "promote", "shapes/1", *registry, cwd=tmp_path)
    options = ("--experiment_name", "tracked", "--run_name", "first", "--num_epochs", "0", "--recipe", "notebook")
    folders = ("--experiments_folder", tmp_path / "runs", "--dataset_folder", sample_dataset)
    uri = f"sqlite:///{tmp_path / 'tracking.db'}"
    run_program(program, "train", *options, *folders, "--tracking_uri", uri, cwd=tmp_path)
    assert (tmp_path / "tracking.db").stat().st_size


def test_a_push_to_the_hub_needs_its_extra(install: Install, published_run: Path, tmp_path: Path) -> None:
    words = ("push", "hub", "me/shapes", published_run)
    assert "pip install 'image-classifier[hub]'" in refuse(install(""), *words, cwd=tmp_path)
    environment = os.environ | {"HF_ENDPOINT": f"http://127.0.0.1:{find_port()}", "HF_TOKEN": "none"}
    program = [str(word) for word in (install("hub"), *words)]
    result = subprocess.run(program, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 2 and "error: cannot push to me/shapes" in result.stderr


def test_the_client_needs_its_extra_alone_and_no_torch(
    install: Install, distributions: dict[str, Path], published_run: Path, tmp_path: Path
) -> None:
    script = tmp_path / "ask.py"
    script.write_text(
        "import sys\nfrom pathlib import Path\nfrom image_classifier.client import Client\n"
        "print(Client(sys.argv[1]).predict(Path(sys.argv[2])).predictions[0].label, 'torch' in sys.modules)\n"
    )
    python = install("").with_name("python")
    result = subprocess.run([python, "-P", script], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert result.returncode and "pip install 'image-classifier[client]'" in result.stderr
    small = tmp_path / "small" / ".venv"  # as docs/client.md has it, without the base
    link_environment(small, find_dependencies("httpx"))
    install_wheel(small, distributions["wheel"])
    with serving(published_run, tmp_path / "log") as server:
        for python in (install("client").with_name("python"), small / "bin" / "python"):
            output = run_program(python, "-P", script, server.url, PROJECT / "docs" / "example.png", cwd=tmp_path)
            assert output.endswith(" False\n")


def test_a_sweep_runs_with_its_extra(install: Install, sample_dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "space.yaml").write_text("flip: {choices: [none, random]}\n")
    options = ("--experiment_name", "searched", "--num_epochs", "1", "--recipe", "notebook", "--batch_size", "50")
    words = ("sweep", "--space", "space.yaml", "--search", "grid", *options, "--validation_fraction", "0.1")
    assert "pip install 'image-classifier[sweep]'" in refuse(install(""), *words, cwd=tmp_path)
    program = install("sweep")
    assert "2 complete" in run_program(program, *words, "--dataset_folder", sample_dataset, cwd=tmp_path)
    folder = tmp_path / "experiments" / "searched"
    assert (folder / "sweep.html").stat().st_size and (folder / "best.yaml").stat().st_size


def test_drift_is_looked_for_with_its_extra(
    install: Install, published_run: Path, sample_dataset: Path, tmp_path: Path
) -> None:
    write_test_set(tmp_path / "captures", published_run, sample_dataset)
    words = ("drift", tmp_path / "captures", published_run)
    assert "pip install 'image-classifier[drift]'" in refuse(install(""), *words, cwd=tmp_path)
    assert "no drift found" in run_program(install("drift"), *words, cwd=tmp_path)


OWN_WORKFLOW = """
from image_classifier.workflow.base import register
from image_classifier.workflow.classification import Classification

@register("own")
class Own(Classification):
    def save(self, run):
        return run / "model.pth"
"""


def test_a_workflow_runs_with_its_extra_and_names_those_of_its_steps(
    install: Install, sample_dataset: Path, tmp_path: Path
) -> None:
    (tmp_path / "own.py").write_text(OWN_WORKFLOW)
    training = {"experiment_name": "e", "run_name": "r", "recipe": "notebook", "num_epochs": 0}
    own = {"import": "own", "workflow": "own", "training": {**training, "dataset_folder": str(sample_dataset)}}
    sweep = {"space": {"momentum": {"choices": [0.1, 0.2]}}, "search": "grid"}
    (tmp_path / "workflow.yaml").write_text(json.dumps(own))
    words = ("-m", "image_classifier.workflow", "run", "--config", "workflow.yaml")
    missing = refuse(install("").with_name("python"), *words, cwd=tmp_path)
    assert "pip install 'image-classifier[workflow]'" in missing
    python = install("workflow").with_name("python")
    for content, extra in (
        ({**own, "sweep": sweep}, "sweep"),
        ({**own, "promote": {}}, "tracking"),
        ({**own, "workflow": "classification"}, "publish"),
    ):
        (tmp_path / "lacking.yaml").write_text(json.dumps(content))
        line = refuse(python, *words[:3], "--config", "lacking.yaml", cwd=tmp_path)
        assert f"pip install 'image-classifier[{extra}]'" in line
    assert not (tmp_path / ".metaflow").exists()
    assert "Done!" in run_program(python, *words, cwd=tmp_path)
    assert (tmp_path / "experiments" / "e" / "r" / "manifest.json").is_file()


def test_a_log_for_tensorboard_needs_its_extra(install: Install, sample_dataset: Path, tmp_path: Path) -> None:
    options = ("--experiment_name", "logged", "--run_name", "first", "--num_epochs", "0", "--recipe", "notebook")
    words = ("train", *options, "--dataset_folder", sample_dataset, "--log", "tensorboard")
    assert "pip install 'image-classifier[tensorboard]'" in refuse(install(""), *words, cwd=tmp_path)
    assert not (tmp_path / "experiments").exists()
    run_program(install("tensorboard"), *words, cwd=tmp_path)
    assert list((tmp_path / "experiments" / "logged" / "first" / "tensorboard").iterdir())


def test_a_url_is_read_with_its_extra(
    install: Install, sample_dataset: Path, tmp_path: Path, s3: S3, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = s3.make_bucket().upload_folder("sample", sample_dataset)
    words = ("data", "info", "--dataset_folder")
    assert "pip install 'image-classifier[remote]'" in refuse(install(""), *words, url, cwd=tmp_path)
    program = install("remote")
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    assert "1,000" in run_program(program, *words, url, cwd=tmp_path)
    assert "pip install 'image-classifier[gcs]'" in refuse(program, *words, "gs://bucket/x", cwd=tmp_path)


def test_the_site_is_built_strictly_and_loads_nothing_from_elsewhere(install: Install, tmp_path: Path) -> None:
    """The site is built strictly, in under a minute of computing, and its pages load nothing from other hosts."""
    python = install("docs").with_name("python")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    words = ("-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path)
    run_program(python, *words, cwd=PROJECT, NO_MKDOCS_2_WARNING="1")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 60
    pages = {path.relative_to(tmp_path).as_posix(): path.read_text() for path in tmp_path.rglob("*.html")}
    assert pages.keys() >= {"index.html", "getting_started.html", "reference/options.html", "project/SECURITY.html"}
    assert "--learning_rate" in pages["reference/options.html"] and "load_predictor" in pages["reference/python.html"]
    for name, text in pages.items():
        assert not re.findall(
            r"<(?:script|link|img|iframe|source)\b[^>]*(?:src|href)=\"?(?:https?:)?//[^>]*", text
        ), name


def test_a_server_runs_with_its_extra(install: Install, published_run: Path, tmp_path: Path) -> None:
    assert "pip install 'image-classifier[serve]'" in refuse(install(""), "serve", published_run, cwd=tmp_path)
    python, program = install("serve").with_name("python"), ("-P", "-m", "image_classifier")
    with serving(published_run, tmp_path / "log", python=python, program=program) as server:
        assert httpx.post(f"{server.url}/predict", content=bytes(3072), headers=PIXELS).status_code == 200
        assert server.stop() == 0


def test_serve_from_the_registry(install: Install, published_run: Path, sample_dataset: Path, tmp_path: Path) -> None:
    name, folder = "models:/shapes@champion", ("--experiments_folder", tmp_path)
    assert "pip install 'image-classifier[tracking]'" in refuse(install("serve"), "serve", name, *folder, cwd=tmp_path)
    program = install("serve,tracking")
    data = ("--dataset_folder", sample_dataset)
    run_program(program, "registry", "add", published_run, "--name", "shapes", *folder, *data, cwd=tmp_path)
    run_program(program, "registry", "promote", "shapes/1", *folder, *data, cwd=tmp_path)
    python, module = program.with_name("python"), ("-P", "-m", "image_classifier")
    with serving(name, tmp_path / "log", *folder, python=python, program=module) as server:
        assert httpx.get(f"{server.url}/model").json()
        assert server.stop() == 0


def test_serve_with_traces(
    install: Install, collector: Collector, published_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("serve", published_run, "--traces", "true")
    assert "pip install 'image-classifier[traces]'" in refuse(install("serve"), *words, cwd=tmp_path)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{collector.server_port}")
    python, program = install("serve,traces").with_name("python"), ("-P", "-m", "image_classifier")
    with serving(published_run, tmp_path / "log", *words[2:], python=python, program=program) as server:
        assert httpx.post(f"{server.url}/predict", content=bytes(3072), headers=PIXELS).status_code == 200
        assert server.stop() == 0
    assert "POST /predict" in {span.name for span in collector.spans}


def test_serve_with_capture(install: Install, published_run: Path, tmp_path: Path) -> None:
    words = ("serve", published_run, "--capture", "captured", "--capture_fraction", "1")
    assert "pip install 'image-classifier[capture]'" in refuse(install("serve"), *words, cwd=tmp_path)
    replay = ("replay", "captured", published_run.parent)
    assert "pip install 'image-classifier[capture]'" in refuse(install("serve"), *replay, cwd=tmp_path)
    python, program = install("serve,capture").with_name("python"), ("-P", "-m", "image_classifier")
    options = ("--capture", tmp_path / "captured", "--capture_fraction", "1")
    with serving(published_run, tmp_path / "log", *options, python=python, program=program) as server:
        assert httpx.post(f"{server.url}/predict", content=bytes(3072), headers=PIXELS).status_code == 200
        assert server.stop() == 0
    assert run_program(install("serve,capture"), *replay, cwd=tmp_path).startswith("IDENTICAL")


def test_serving_predicting_and_evaluating_need_no_torch(
    without_torch: Path, published_run: Path, tmp_path: Path
) -> None:
    python, program = without_torch.with_name("python"), ("-P", "-m", "image_classifier")
    with serving(published_run, tmp_path / "log", python=python, program=program) as server:
        assert httpx.post(f"{server.url}/predict", content=bytes(3072), headers=PIXELS).status_code == 200
        assert server.stop() == 0
    assert run_program(without_torch, "predict", published_run, PROJECT / "docs" / "example.png", cwd=tmp_path)
    run_program(without_torch, "evaluate", published_run, "--output", "evaluation.json", cwd=tmp_path)
    evaluation = json.loads((tmp_path / "evaluation.json").read_text())
    run = json.loads((published_run.parent / "evaluation.json").read_text())
    assert evaluation["accuracy"] == run["accuracy_single_view"]
    assert run_program(without_torch, "registry", "check", published_run, cwd=tmp_path).startswith("INTACT\n")


BASE = "pip install image-classifier\n"
WITHOUT_TORCH = {
    "train --experiment_name a --run_name b --dataset_folder SAMPLE": BASE,
    "sweep --space space.yaml --num_trials 1 --experiment_name a": "pip install 'image-classifier[sweep]'\n",
    "verify RUN": BASE,
    "verify RUN --files_only": "",
    "verify RUN --threshold 1-of-1 --public_key none": "usable public key: No such file or directory\n",
    "trace RUN": BASE,
    "data prepare --source sample --dataset_folder new": "",
    "data info --dataset_folder SAMPLE": "",
    "data info --dataset_folder SAMPLE --output sheet.png": BASE,
    "data prune --dataset_folder new": "",
    "data ingest SAMPLE --dataset shapes": "",
    "data list": "or name another in --db_config\n",
    "evaluate RUN": "pip install image-classifier; without torch name the published model of a run, see: "
    "image_classifier publish\n",
    "predict RUN IMAGE": "see: image_classifier publish\n",
    "predict RUN/model.pth IMAGE": "see: image_classifier publish\n",
    "compare RUN OTHER": "",
    "bisect RUN OTHER": BASE,
    "report RUN": BASE,
    "publish RUN --overwrite": BASE,
    "push hub ME/MODEL RUN": "pip install 'image-classifier[hub]'\n",
    "registry list": "",
    "registry add RUN": "",
    "registry check RUN": "",
    "attest RUN none --sign_key none": "the statement none cannot be read: No such file or directory\n",
    "replay captures RUN": "pip install 'image-classifier[capture]'\n",
    "drift captures RUN": "pip install 'image-classifier[drift]'\n",
    "serve none": "publish a run first\n",
}


def test_every_command_is_tried_without_torch() -> None:
    assert {line.split()[0] for line in WITHOUT_TORCH} == COMMANDS.keys()


@pytest.mark.parametrize("line", WITHOUT_TORCH)
def test_without_torch_a_command_works_or_says_what_to_install(
    without_torch: Path, published_run: Path, sample_dataset: Path, tmp_path: Path, line: str
) -> None:
    run = shutil.copytree(published_run.parent, tmp_path / "run")
    other = shutil.copytree(run, tmp_path / "other")
    places = {"RUN": run, "OTHER": other, "SAMPLE": sample_dataset, "IMAGE": PROJECT / "docs" / "example.png"}
    words = [
        functools.reduce(lambda word, name: word.replace(name, str(places[name])), places, w) for w in line.split()
    ]
    if WITHOUT_TORCH[line]:
        assert refuse(without_torch, *words, cwd=tmp_path).endswith(WITHOUT_TORCH[line])
    else:
        run_program(without_torch, *words, cwd=tmp_path)


def test_mlflow_shows_the_registry(install: Install, published_run: Path, tmp_path: Path) -> None:
    """As docs/publishing.md has it: with all of MLflow, in an environment of its own."""
    mlflow = os.environ.get("IMAGE_CLASSIFIER_MLFLOW")
    if not mlflow:
        report_lack("IMAGE_CLASSIFIER_MLFLOW is not set: the program mlflow of an environment with all of MLflow")
    program = install("tracking")
    run_program(program, "registry", "add", published_run, "--name", "shapes", cwd=tmp_path)
    document = (PROJECT / "docs" / "publishing.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"^\S+/(mlflow ui .+)$", document, flags=re.MULTILINE)
    assert f"pip install mlflow=={read_lock('publish')['mlflow-skinny']}\n" in document
    port = str(find_port())
    words = [mlflow, *command.split()[1:], "--port", port]
    lacking = subprocess.run([program.with_name("mlflow"), *words[1:]], cwd=tmp_path, capture_output=True, text=True)
    assert lacking.returncode != 0 and "flask" in (lacking.stdout + lacking.stderr).lower()
    with open(tmp_path / "log", "wb") as log:
        process = subprocess.Popen(words, cwd=tmp_path, stdout=log, stderr=log, start_new_session=True)
    try:
        address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 120
        while True:
            try:
                with urlopen(f"{address}/", timeout=5) as page:
                    assert b"<title>MLflow</title>" in page.read()
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
                time.sleep(0.2)
        with urlopen(f"{address}/api/2.0/mlflow/registered-models/search", timeout=60) as answer:
            (model,) = json.load(answer)["registered_models"]
        assert model["name"] == "shapes"
    finally:
        os.killpg(process.pid, 9)  # its workers wait for each other on SIGTERM
        process.wait(30)
