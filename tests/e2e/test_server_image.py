"""The server's image, built and run for real: by any user, read-only, without rights, and stopped under load."""

from __future__ import annotations

import json
import subprocess
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import httpx
import numpy as np
import pytest

from image_classifier.data.dataset import load_snapshot
from image_classifier.published.predictor import load_predictor
from image_classifier.tracking.checkpoint import load_model
from image_classifier.training.evaluate import compute_probabilities
from tests.conftest import find_port, run_command, run_program
from tests.e2e.conftest import IMAGE_NAME, build_docker_words, make_open_folder
from tests.kubernetes import list_pods, read_options
from tests.serving import PIXELS, Clients, Running, draw_images, encode, wait_until_ready

pytestmark = pytest.mark.timeout(1200)  # the first test that asks for the image waits until it is built

MAX_BYTES = 490e6


@pytest.fixture(scope="module")
def server_image(docker: str, project_copy: Path) -> str:
    """The image that docker/build.sh serve makes of the project's copy."""
    words = (project_copy / "docker" / "build.sh", "serve")
    run_program(*words, cwd=project_copy, timeout_s=1000, IMAGE_NAME=IMAGE_NAME)
    return f"{IMAGE_NAME}-serve:latest"


@contextmanager
def running_container(docker: str, image: str, log: Path, *mounts: str, **variables: str) -> Iterator[Running]:
    """A container that serves with no more than it needs, as a user whom nobody knows, until the block ends."""
    port, name = find_port(), f"image-classifier-{uuid.uuid4().hex}"
    settings = {"PORT": str(port), "NO_AUTH": "true", "DRAIN_S": "0.5", **variables}
    options = ["--name", name, "--publish", f"127.0.0.1:{port}:{port}"]
    for variable, value in settings.items():
        options += ["--env", f"IMAGE_CLASSIFIER_{variable}={value}"]
    words = build_docker_words(docker, *mounts, options=tuple(options), user="54321:54321")
    with open(log, "wb") as file:
        process = subprocess.Popen([*words, image], stdout=file, stderr=file)
    running = Running(process, f"http://127.0.0.1:{port}", port, log)
    try:
        wait_until_ready(running, timeout_s=120)
        yield running
    finally:
        if process.poll() is None:
            subprocess.run([docker, "stop", "--time", "30", name], capture_output=True, timeout=120)
            process.wait(60)


@pytest.fixture
def server(docker: str, server_image: str, published_run: Path, tmp_path: Path) -> Iterator[Running]:
    """A container that serves a published run."""
    for path in published_run.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    with running_container(docker, server_image, tmp_path / "log", f"{published_run}:/model:ro") as running:
        yield running


def inspect(docker: str, image: str) -> dict[str, Any]:
    """Read what an image says about itself."""
    (facts,) = json.loads(run_program(docker, "inspect", image, cwd=Path("/")))
    return dict(facts)


def test_the_image_is_small_and_nobody_is_root(docker: str, server_image: str) -> None:
    facts = inspect(docker, server_image)
    assert facts["Size"] < MAX_BYTES
    assert int(facts["Config"]["User"].partition(":")[0]) > 0
    assert not facts["Config"].get("Entrypoint")
    check = facts["Config"].get("Healthcheck") or facts["Healthcheck"]  # Podman has it at another place than Docker
    assert "/health/ready" in " ".join(check["Test"])


def test_there_is_no_torch_in_it_and_nothing_of_the_building(docker: str, server_image: str, tmp_path: Path) -> None:
    leftovers = r"\( -name torch -o -name 'image_classifier*.whl' -o -path '/venv/*/pip' \)"
    script = f"(find / -xdev {leftovers}; command -v cc gcc) 2>/dev/null; true"
    assert run_program(*build_docker_words(docker), server_image, "sh", "-c", script, cwd=tmp_path) == ""


def test_it_answers_as_the_model_does_and_refuses_rubbish(server: Running, published_run: Path) -> None:
    predictor = load_predictor(published_run)
    images = draw_images(32)
    expected = [predictor.model.classes[best] for best in predictor.predict(images).argmax(axis=1)]
    answers = [httpx.post(f"{server.url}/predict", content=image.tobytes(), headers=PIXELS) for image in images]
    assert [answer.json()["predictions"][0]["class"] for answer in answers] == expected
    answer = httpx.post(f"{server.url}/predict", content=encode(images[0]), headers={"content-type": "image/png"})
    assert answer.json()["predictions"][0]["class"] == expected[0]
    for body, kind, status in ((b"x", "image/png", 422), (b"[" * 10_000, "application/json", 400), (b"x", "a/b", 415)):
        answer = httpx.post(f"{server.url}/predict", content=body, headers={"content-type": kind})
        assert answer.status_code == status
    assert httpx.get(f"{server.url}/health/live").status_code == 200
    assert json.loads(server.log.read_text().splitlines()[-1])["ecs.version"]


def test_it_classifies_as_the_run_did(server: Running, published_run: Path, sample_dataset: Path) -> None:
    images, _ = load_snapshot(sample_dataset).test
    model = load_model(published_run.parent / "model.pth")
    expected = compute_probabilities(model.classifier, np.asarray(images), views="one")
    pixels = np.ascontiguousarray(np.asarray(images).transpose(0, 2, 3, 1))
    for index in range(0, len(pixels), 32):
        body = pixels[index : index + 32].tobytes()
        predictions = httpx.post(f"{server.url}/predict", content=body, headers=PIXELS).json()["predictions"]
        names = [model.classes[best] for best in expected[index : index + 32].argmax(axis=1)]
        assert [prediction["class"] for prediction in predictions] == names


def test_a_model_of_the_registry_is_served_by_its_alias(
    docker: str, server_image: str, published_run: Path, sample_dataset: Path, tmp_path: Path
) -> None:
    """The folder lies at the same place inside, because MLflow keeps the whole paths of a model's files."""
    experiments = make_open_folder(tmp_path / "experiments")
    words = ("registry", "add", published_run.parent, "--name", "cifar", "--alias", "tried")
    options = ("--dataset_folder", sample_dataset, "--experiments_folder", experiments)
    run_command("image_classifier", *words, *options, cwd=tmp_path)
    for path in experiments.rglob("*"):
        path.chmod(0o777 if path.is_dir() else 0o666)
    settings = {"MODEL": "models:/cifar@tried", "EXPERIMENTS_FOLDER": str(experiments)}
    mount = f"{experiments}:{experiments}"
    with running_container(docker, server_image, tmp_path / "log", mount, **settings) as server:
        images = draw_images(4)
        answers = [httpx.post(f"{server.url}/predict", content=image.tobytes(), headers=PIXELS) for image in images]
        assert {answer.json()["model_version"] for answer in answers} == {"1"}
        predictor = load_predictor(published_run)
        expected = [predictor.model.classes[best] for best in predictor.predict(images).argmax(axis=1)]
        assert [answer.json()["predictions"][0]["class"] for answer in answers] == expected
        assert httpx.get(f"{server.url}/v2/models/cifar").json()["versions"] == ["1"]


def test_docker_stop_loses_nothing(docker: str, server: Running) -> None:
    clients = Clients(server, 8)
    time.sleep(1)
    words = [str(word) for word in cast("list[str]", server.process.args)]
    run_program(docker, "stop", "--time", "30", words[words.index("--name") + 1], cwd=Path("/"))
    assert server.process.wait(60) == 0
    clients.join()
    assert clients.lost == [] and set(clients.answered) == {200}


def build_pod_words(docker: str, pod: dict[str, Any], options: dict[str, str], model: Path, port: int) -> list[str]:
    """Build the `docker run` of a pod's one container, with all that the pod says about rights, limits and places."""
    (container,) = pod["containers"]
    own, context, limits = pod["securityContext"], container["securityContext"], container["resources"]["limits"]
    assert own["runAsNonRoot"] and context["readOnlyRootFilesystem"] and not context["allowPrivilegeEscalation"]
    words = [docker, "run", "--rm", "--read-only", "--security-opt", "no-new-privileges"]
    words += ["--user", f"{own['runAsUser']}:{own['runAsGroup']}"]
    words += ["--cpus", limits["cpu"], "--memory", limits["memory"].replace("Mi", "m")]
    words += [word for name in context["capabilities"]["drop"] for word in ("--cap-drop", name)]
    words += [word for name, value in options.items() for word in ("--env", f"{name}={value}")]
    places = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    (scratch,) = (volume["emptyDir"] for volume in pod["volumes"] if volume["name"] == "tmp")
    words += ["--tmpfs", f"{places['tmp']}:mode=1777,size={scratch['sizeLimit'].replace('Mi', 'm')}"]
    return [*words, "--volume", f"{model}:{places['model']}:ro", "--publish", f"127.0.0.1:{port}:{port}"]


def test_a_pod_of_kubernetes_starts_answers_its_probes_and_ends_in_its_time(
    docker: str, server_image: str, published_run: Path, tmp_path: Path
) -> None:
    """As rendered; the port alone is another, for the container shares this machine's network where Docker is none."""
    for path in published_run.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    (pod,) = list_pods("base")
    (container,) = pod["containers"]
    port, name, log = find_port(), f"image-classifier-{uuid.uuid4().hex}", tmp_path / "log"
    options = read_options("base", container) | {"IMAGE_CLASSIFIER_PORT": str(port)}
    words = build_pod_words(docker, dict(pod), options, published_run, port)
    with open(log, "wb") as file:
        process = subprocess.Popen([*words, "--name", name, server_image], stdout=file, stderr=file)
    try:
        startup = container["startupProbe"]
        wait_until_ready(
            Running(process, f"http://127.0.0.1:{port}", port, log),
            timeout_s=startup["periodSeconds"] * startup["failureThreshold"],
        )
        for probe in ("readinessProbe", "livenessProbe"):
            path, limit_s = container[probe]["httpGet"]["path"], container[probe]["timeoutSeconds"]
            assert httpx.get(f"http://127.0.0.1:{port}{path}", timeout=limit_s).status_code == 200
        clients = Clients(Running(process, f"http://127.0.0.1:{port}", port, log), 4)
        time.sleep(1)
        left_s = pod["terminationGracePeriodSeconds"] - container["lifecycle"]["preStop"]["sleep"]["seconds"]
        began = time.monotonic()
        run_program(docker, "stop", "--time", str(left_s), name, cwd=Path("/"))
        assert process.wait(60) == 0, log.read_text()
        assert float(options["IMAGE_CLASSIFIER_DRAIN_S"]) <= time.monotonic() - began < left_s
        clients.join()
        assert clients.lost == [] and set(clients.answered) == {200}
    finally:
        if process.poll() is None:
            subprocess.run([docker, "stop", "--time", "5", name], capture_output=True, timeout=60)
            process.wait(60)


def test_without_a_word_about_who_may_ask_it_does_not_listen(
    docker: str, server_image: str, published_run: Path
) -> None:
    words = build_docker_words(docker, f"{published_run}:/model:ro")
    result = subprocess.run([*words, server_image], capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    assert "--no_auth" in result.stderr
