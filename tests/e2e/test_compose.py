"""Each service of docker-compose.yaml, with exactly the settings that Docker Compose renders.

PostgreSQL's own image cannot be had without a registry: its settings are tried on a server of this machine.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
import yaml

from image_classifier.tracking.checking import is_finished, verify_files
from image_classifier.tracking.reading import read_record
from tests.compose import build_run_words, find_compose, read_duration, render
from tests.conftest import find_port, run_program, wait_until
from tests.e2e.conftest import IMAGE_NAME, make_open_folder
from tests.postgres import PASSWORD, Cluster
from tests.serving import PIXELS

pytestmark = pytest.mark.timeout(1800)  # the first test that asks for an image waits until it is built

TRAIN = (
    *("image_classifier_trainer", "--experiments_folder", "/experiments", "--experiment_name", "compose"),
    *("--dataset_folder", "/data/sample", "--recipe", "notebook", "--batch_size", "50"),
)


@pytest.fixture
def folder(tmp_path: Path, project_copy: Path) -> Path:
    """A folder that holds docker-compose.yaml, and what it mounts."""
    (tmp_path / "docker-compose.yaml").write_bytes((project_copy / "docker-compose.yaml").read_bytes())
    for name in ("data", "experiments"):
        make_open_folder(tmp_path / name)
    return tmp_path


def build_words(docker: str, rendered: dict[str, Any], name: str, folder: Path, image: str, *more: str) -> list[str]:
    """Build the words that start a service from the image that the tests have built."""
    *words, named = build_run_words(rendered, name, folder)
    assert named.split(":")[0] == image.split(":")[0].replace(IMAGE_NAME, "image-classifier")
    return [docker, "run", "--rm", *words, *more, image]


def test_every_service_is_known(folder: Path) -> None:
    rendered = render(folder)
    for name in rendered["services"]:
        assert build_run_words(rendered, name, folder)
    watching = {"prometheus", "alertmanager", "grafana", "elasticsearch", "filebeat"}
    assert rendered["services"].keys() == {"trainer", "postgres", "ml-api-service", *watching}
    for name in watching:
        assert rendered["services"][name]["profiles"] == ["monitoring"]


def test_no_service_has_rights_that_it_does_not_need(folder: Path) -> None:
    services = render(folder)["services"]
    for name, service in services.items():
        assert service.get("read_only", False) is (name != "elasticsearch") and service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert {"cpus", "mem_limit", "pids_limit"} <= service.keys(), name
    assert [name for name, service in services.items() if "cap_add" in service] == ["filebeat", "postgres"]
    ports = [port for service in services.values() for port in service.get("ports", ())]
    assert len(ports) == 5 and {port["host_ip"] for port in ports} == {"127.0.0.1"}


def test_every_image_that_is_not_built_here_is_pinned_by_its_digest(folder: Path) -> None:
    images = [service["image"] for service in render(folder)["services"].values()]
    strangers = [image for image in images if not image.startswith("image-classifier")]
    assert len(strangers) == 6
    assert all(re.fullmatch(r"[a-z./]+:[0-9a-z.-]+@sha256:[0-9a-f]{64}", image) for image in strangers)


def test_the_environment_chooses_user_limits_and_ports(folder: Path) -> None:
    variables = {"TRAINER_USER": "7:8", "TRAINER_CPUS": "1.5", "TRAINER_MEMORY": "2g", "IMAGE_TAG": "x"}
    services = render(folder, **variables, IMAGE_CLASSIFIER_PORT="81", IMAGE_CLASSIFIER_NO_AUTH="false")["services"]
    trainer, server = services["trainer"], services["ml-api-service"]
    assert (trainer["user"], trainer["cpus"], trainer["mem_limit"]) == ("7:8", 1.5, str(2 << 30))
    assert trainer["image"] == "image-classifier:x"
    assert server["ports"][0]["published"] == "81" and server["environment"]["IMAGE_CLASSIFIER_NO_AUTH"] == "false"


def test_the_server_is_open_to_others_only_where_somebody_said_who_may_ask(folder: Path) -> None:
    def read(**variables: str) -> tuple[str, str]:
        server = render(folder, **variables)["services"]["ml-api-service"]
        return server["ports"][0]["host_ip"], server["environment"]["IMAGE_CLASSIFIER_NO_AUTH"]

    assert read() == read(IMAGE_CLASSIFIER_BIND="") == ("127.0.0.1", "true")
    for said in ("false", "true"):
        variables = {"IMAGE_CLASSIFIER_BIND": "0.0.0.0", "IMAGE_CLASSIFIER_NO_AUTH": said}
        assert read(**variables) == ("0.0.0.0", said)
    (folder / ".env").write_text("IMAGE_CLASSIFIER_BIND=0.0.0.0\n")
    words = ("env", "-i", f"HOME={folder}", f"PATH={os.environ['PATH']}", str(find_compose()), "config")
    result = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=60)
    assert result.returncode != 0 and result.stdout == "" and len(result.stderr.strip().splitlines()) == 1
    assert "IMAGE_CLASSIFIER_NO_AUTH must say true or false because the port is published at 0.0.0.0" in result.stderr


def test_the_trainer_trains_with_its_kernels(docker: str, training_image: str, folder: Path) -> None:
    """They are compiled into /tmp, which must let them be loaded."""
    rendered = render(folder)
    words = build_words(docker, rendered, "trainer", folder, training_image)
    prepare = (
        "image_classifier data prepare --source sample --num_train 500 --num_test 100 --dataset_folder /data/sample"
    )
    run_program(*words, *prepare.split(), cwd=folder)
    options = ("--run_name", "first", "--num_epochs", "1", "--engine", "compiled")
    run_program(*words, *TRAIN, *options, cwd=folder)
    run = folder / "experiments" / "compose" / "first"
    assert is_finished(run) and verify_files(run) == ()
    assert read_record(run)["settings"]["engine"] == "compiled"
    assert {path.stat().st_uid for path in run.rglob("*")} == {
        int(rendered["services"]["trainer"]["user"].split(":")[0])
    }


def test_the_trainer_has_the_places_and_limits_that_it_says(docker: str, training_image: str, folder: Path) -> None:
    script = """
import os, shutil
for place in ("/tmp", "/data", "/experiments"):
    open(f"{place}/written", "w").close()
try:
    open("/venv/written", "w").close()
except OSError as error:
    print(error.strerror)
print(shutil.disk_usage("/tmp").total, shutil.disk_usage("/dev/shm").total)
print([line.split()[1] for line in open("/proc/self/status") if line.startswith(("CapEff", "NoNewPrivs"))])
"""
    words = build_words(docker, render(folder), "trainer", folder, training_image)
    output = run_program(*words, "python", "-c", script, cwd=folder).splitlines()
    assert output == ["Read-only file system", f"{1 << 30} {64 << 20}", "['0000000000000000', '1']"]


def test_stopping_the_trainer_saves_within_its_grace_period(docker: str, training_image: str, folder: Path) -> None:
    rendered, name = render(folder), f"image-classifier-{uuid.uuid4().hex}"
    words = build_words(docker, rendered, "trainer", folder, training_image)
    prepare = (
        "image_classifier data prepare --source sample --num_train 500 --num_test 100 --dataset_folder /data/sample"
    )
    run_program(*words, *prepare.split(), cwd=folder)
    words = build_words(docker, rendered, "trainer", folder, training_image, "--name", name)
    long = ("--run_name", "stopped", "--num_epochs", "100000", "--digest_every", "10", "--engine", "eager")
    run = folder / "experiments" / "compose" / "stopped"
    with subprocess.Popen([*words, *TRAIN, *long], stderr=subprocess.PIPE, text=True) as trainer:
        digests = run / "digests.jsonl"
        wait_until(lambda: digests.exists() and digests.stat().st_size > 0, trainer)
        run_program(docker, "stop", name, cwd=folder)  # with the grace period that the container was given
        _, errors = trainer.communicate(timeout=120)
    assert trainer.returncode == 143, errors
    assert any((run / "checkpoints").iterdir())


@pytest.fixture
def server(docker: str, folder: Path, project_copy: Path, published_run: Path) -> Iterator[tuple[str, str]]:
    """The address and the name of a container that serves a model as the service says.

    A container that shares this machine's network listens where others may: the port inside is the one outside.
    """
    run_program(project_copy / "docker" / "build.sh", "serve", cwd=folder, timeout_s=1000, IMAGE_NAME=IMAGE_NAME)
    for path in (published_run, *published_run.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    port, name = str(find_port()), f"image-classifier-{uuid.uuid4().hex}"
    rendered = render(folder, IMAGE_CLASSIFIER_MODEL=str(published_run), IMAGE_CLASSIFIER_PORT=port)
    service = rendered["services"]["ml-api-service"]
    assert (service["ports"][0]["published"], str(service["ports"][0]["target"])) == (port, "8000")
    service["ports"][0]["target"] = service["environment"]["IMAGE_CLASSIFIER_PORT"] = port
    image = f"{IMAGE_NAME}-serve:latest"
    words = build_words(docker, rendered, "ml-api-service", folder, image, "--name", name)
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(words, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                if httpx.get(f"http://127.0.0.1:{port}/health/ready").status_code == 200:
                    break
            except httpx.TransportError:
                pass
            assert process.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}", name
    finally:
        if process.poll() is None:
            subprocess.run([docker, "stop", name], capture_output=True, timeout=120)
        process.wait(60)


def test_the_server_serves_the_mounted_model_and_stops(docker: str, server: tuple[str, str], folder: Path) -> None:
    url, name = server
    answer = httpx.post(f"{url}/predict", content=bytes(3072), headers=PIXELS)
    assert answer.status_code == 200 and answer.json()["predictions"][0]["class"]
    for host, status in (("ml-api-service:8000", 200), ("another.example", 421)):
        assert httpx.get(f"{url}/health/ready", headers={"host": host}).status_code == status
    script = "open('/tmp/written', 'w').close(); print(open('/proc/self/limits').read())"
    limits = run_program(docker, "exec", name, "python", "-c", script, cwd=folder)
    assert [line.split()[3] for line in limits.splitlines() if line.startswith("Max open files")] == ["4096"]
    began = time.monotonic()
    run_program(docker, "stop", name, cwd=folder)
    assert time.monotonic() - began < read_duration(render(folder)["services"]["ml-api-service"]["stop_grace_period"])


def test_postgresql_takes_what_the_service_says(folder: Path, tmp_path: Path, sample_dataset: Path) -> None:
    """What its image does with these settings: the cluster's options, the role, the database, the check, the end."""
    rendered = render(folder, DB_PASSWORD=PASSWORD)
    service = rendered["services"]["postgres"]
    environment = service["environment"]
    assert environment["POSTGRES_PASSWORD"] == rendered["services"]["trainer"]["environment"]["DB_PASSWORD"] == PASSWORD
    cluster = Cluster(initdb_options=environment["POSTGRES_INITDB_ARGS"].split())
    try:
        cluster.start()
        role, database = environment["POSTGRES_USER"], environment["POSTGRES_DB"]
        cluster.execute("postgres", f"CREATE ROLE {role} SUPERUSER LOGIN PASSWORD '{PASSWORD}'")
        cluster.execute("postgres", f"CREATE DATABASE {database} OWNER {role}")
        check = service["healthcheck"]
        word, program, *options = check["test"]
        assert word == "CMD"
        place = ("--host=127.0.0.1", f"--port={cluster.port}")  # in the container it is the default one
        run_program(cluster.programs / program, *options, *place, cwd=tmp_path)

        config = yaml.safe_load(rendered["configs"]["db_connect.yaml"]["content"])
        assert config["host"] == "postgres"  # the service's name
        path = tmp_path / "db_connect.yaml"
        path.write_text(yaml.safe_dump({**config, "host": "127.0.0.1", "port": cluster.port}))
        words = ("data", "ingest", sample_dataset, "--dataset", "shapes", "--db_config", path)
        program = (sys.executable, "-m", "image_classifier")
        assert run_program(*program, *words, cwd=tmp_path, DB_PASSWORD=PASSWORD) == "shapes@1\n"
        with psycopg.connect(
            host="127.0.0.1", port=cluster.port, dbname=config["database"], user=config["user"], password=PASSWORD
        ) as connection:
            assert connection.execute("SHOW data_checksums").fetchone() == ("on",)
            methods = connection.execute("SELECT DISTINCT auth_method FROM pg_hba_file_rules").fetchall()
            assert methods == [("scram-sha-256",)]
        assert service["stop_signal"] == "SIGINT"
        began = time.monotonic()
        cluster.stop()  # by SIGINT
        assert time.monotonic() - began < read_duration(service["stop_grace_period"])
    finally:
        cluster.remove()
    assert os.path.isabs(service["volumes"][0]["target"])
