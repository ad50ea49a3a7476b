"""What several tests of this tier share."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.request import urlopen

import pytest

from tests.conftest import find_port, report_lack
from tests.crash import Campaign
from tests.databases import Home, make_home
from tests.postgres import Cluster
from tests.stores import S3, Bucket, running_s3


@pytest.fixture(scope="session")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Campaign]:
    """Processes that fork trainers, and a finished run to hold theirs against."""
    campaign = Campaign(tmp_path_factory.mktemp("campaign"), num_workers=len(os.sched_getaffinity(0)))
    yield campaign
    campaign.close()


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a real MLflow server on loopback."""
    program = os.environ.get("IMAGE_CLASSIFIER_MLFLOW")
    if not program:
        report_lack("IMAGE_CLASSIFIER_MLFLOW is not set: the program mlflow of an environment with all of MLflow")
    folder = tmp_path_factory.mktemp("mlflow")
    port = find_port()
    words = [program, "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    words += [
        "--backend-store-uri",
        f"sqlite:///{folder / 'mlflow.db'}",
        "--artifacts-destination",
        str(folder / "files"),
    ]
    log = folder / "log"
    environment = os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true"}
    with open(log, "wb") as file:
        process = subprocess.Popen(words, cwd=folder, stdout=file, stderr=file, env=environment, start_new_session=True)
    try:
        for _ in range(600):
            try:
                with urlopen(f"http://127.0.0.1:{port}/health", timeout=1):
                    break
            except OSError:
                if process.poll() is not None:
                    pytest.fail(f"the MLflow server ended: {log.read_text()[-2000:]}")
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # its workers wait for each other on SIGTERM
        process.wait(30)


@pytest.fixture(scope="session")
def postgresql() -> Iterator[Cluster]:
    """A running PostgreSQL; each test has a database of its own there."""
    cluster = Cluster()
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.remove()


@pytest.fixture(params=["sqlite", "postgresql"])
def home(request: pytest.FixtureRequest, tmp_path: Path) -> Home:
    """An empty database of each kind."""
    return make_home(request.param, tmp_path, request)


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    """A real S3 server, behind a proxy that can break connections, be slow, and lie."""
    with running_s3(tmp_path_factory.mktemp("s3") / "log") as s3:
        yield s3


@pytest.fixture
def bucket(s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """An empty bucket, in an environment that leads there, with a cache of its own."""
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("IMAGE_CLASSIFIER_CACHE", str(tmp_path / "cache"))
    return s3.make_bucket()
