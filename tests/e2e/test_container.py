"""The training image, built and run for real: by any user, without rights, and stopped in the middle."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from image_classifier import __version__
from image_classifier.kernels.library import get_kernels_digest
from image_classifier.tracking.checking import is_finished, verify_files
from image_classifier.tracking.reading import read_chain, read_record
from tests.conftest import require_program, require_real_data, run_program, wait_until
from tests.e2e.conftest import IMAGE_NAME, build_docker_words, build_image, inspect, make_open_folder

pytestmark = pytest.mark.timeout(1800)  # the first test that asks for the image waits until it is built

SETTINGS = (
    *("--recipe", "notebook", "--batch_size", "50", "--num_epochs", "8", "--learning_rate", "0.02"),
    *("--instruction_set", "avx2", "--num_threads", "1", "--digest_every", "10"),
    *("--engine", "eager"),  # the compiler outside may be another one, and a machine of another class then
)


@pytest.fixture(scope="module")
def dataset() -> Path:
    """Real images, as published."""
    return require_real_data("IMAGE_CLASSIFIER_CIFAR10_ORIGINAL")


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory, project_copy: Path, dataset: Path) -> Path:
    """A finished run of the same code, outside any container."""
    experiments = tmp_path_factory.mktemp("outside")
    words = (*build_trainer_words(experiments, "outside"), "--dataset_folder", str(dataset), *SETTINGS)
    run_program(sys.executable, "-m", "image_classifier.main", *words[1:], cwd=project_copy)
    return experiments / "container" / "outside"


@pytest.fixture(scope="module")
def experiments(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the containers write their runs to."""
    return make_open_folder(tmp_path_factory.mktemp("inside") / "experiments")


@pytest.fixture(scope="module")
def inside(docker: str, training_image: str, experiments: Path, dataset: Path) -> Path:
    """A finished run, trained in a container."""
    words = (*build_trainer_words(Path("/experiments"), "inside"), "--dataset_folder", "/data", *SETTINGS)
    docker_words = build_docker_words(docker, f"{dataset}:/data:ro", f"{experiments}:/experiments")
    run_program(*docker_words, training_image, *words, cwd=experiments)
    return experiments / "container" / "inside"


def build_trainer_words(experiments: Path, run: str) -> tuple[str, ...]:
    """Build the trainer's words that name a run."""
    names = ("--experiment_name", "container", "--run_name", run)
    return ("image_classifier_trainer", "--experiments_folder", str(experiments), *names)


def read_digests(run: Path) -> tuple[str, str]:
    """Read what two runs share only if every bit of every recorded state is equal."""
    manifest = json.loads((run / "manifest.json").read_text())
    return manifest["weights_digest"], manifest["chain_head"]


def test_the_image_says_what_it_is(docker: str, training_image: str, project_copy: Path) -> None:
    facts = inspect(docker, training_image)
    commit = run_program(require_program("git"), "rev-parse", "HEAD", cwd=project_copy).strip()
    labels = {key.rpartition(".")[2]: value for key, value in facts["Config"]["Labels"].items()}
    assert (labels["version"], labels["revision"].removesuffix("-dirty")) == (__version__, commit)
    assert inspect(docker, f"{IMAGE_NAME}:{__version__}")["Id"] == facts["Id"]


def test_nobody_is_root_and_nothing_stands_between_a_signal_and_the_command(docker: str, training_image: str) -> None:
    config = inspect(docker, training_image)["Config"]
    user, _, group = config["User"].partition(":")
    assert int(user) > 0 and int(group) > 0
    assert not config.get("Entrypoint")


def test_a_container_writes_a_finished_run(inside: Path) -> None:
    assert is_finished(inside)
    assert verify_files(inside) == ()
    owners = {path.stat().st_uid for path in inside.rglob("*")}
    assert owners == {os.getuid() or 12345}


def test_the_run_in_the_container_is_the_run_outside_to_the_bit(inside: Path, outside: Path) -> None:
    assert read_digests(inside) == read_digests(outside)


def test_the_container_is_of_the_same_code_environment_and_machine_class(inside: Path, outside: Path) -> None:
    records = [read_record(run) for run in (inside, outside)]
    for part in ("data", "code", "machine"):
        assert records[0][part]["digest"] == records[1][part]["digest"], part
    assert records[0]["environment"]["distributions"] == records[1]["environment"]["distributions"]


def test_a_container_computes_with_the_kernels_of_its_own_wheel(
    docker: str, training_image: str, experiments: Path, dataset: Path
) -> None:
    words = (*build_trainer_words(Path("/experiments"), "compiled"), "--dataset_folder", "/data", *SETTINGS)
    docker_words = build_docker_words(docker, f"{dataset}:/data:ro", f"{experiments}:/experiments")
    run_program(*docker_words, training_image, *words, "--engine", "compiled", "--num_epochs", "1", cwd=experiments)
    record = read_record(experiments / "container" / "compiled")
    assert record["settings"]["engine"] == "compiled"
    assert record["machine"]["class"]["kernels"] == get_kernels_digest(record["machine"]["class"]["instruction_set"])
    run_program(*docker_words, training_image, "sh", "-c", "! command -v cc gcc clang", cwd=experiments)


def test_a_container_verifies_a_run(
    docker: str, training_image: str, inside: Path, experiments: Path, dataset: Path
) -> None:
    words = build_docker_words(docker, f"{dataset}:/data:ro", f"{experiments}:/experiments:ro", user="54321:54321")
    run = f"/experiments/container/{inside.name}"
    output = run_program(*words, training_image, "image_classifier", "verify", run, cwd=experiments)
    assert output.startswith("IDENTICAL")


def test_sigterm_saves_and_a_new_container_goes_on(
    docker: str, training_image: str, experiments: Path, dataset: Path, outside: Path
) -> None:
    name = f"image-classifier-{uuid.uuid4().hex}"
    words = (*build_trainer_words(Path("/experiments"), "stopped"), "--dataset_folder", "/data", *SETTINGS)
    mounts = (f"{dataset}:/data:ro", f"{experiments}:/experiments")
    run = experiments / "container" / "stopped"
    docker_words = build_docker_words(docker, *mounts, options=("--name", name))
    with subprocess.Popen([*docker_words, training_image, *words], stderr=subprocess.PIPE, text=True) as trainer:
        digests = run / "digests.jsonl"
        wait_until(lambda: digests.exists() and digests.stat().st_size > 0, trainer)
        run_program(docker, "stop", "--time", "60", name, cwd=experiments)
        _, errors = trainer.communicate(timeout=120)
    assert trainer.returncode == 143, errors
    assert not is_finished(run)
    assert any((run / "checkpoints").iterdir())
    num_digests = len(read_chain(run))
    assert 0 < num_digests < len(read_chain(outside))

    words = (*build_trainer_words(Path("/experiments"), "stopped"), "--resume")
    run_program(*build_docker_words(docker, *mounts), training_image, *words, cwd=experiments)
    assert read_digests(run) == read_digests(outside)


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ((), "usage: image_classifier_trainer"),
        (("image_classifier", "--version"), f"image_classifier {__version__}"),
        (("image_classifier", "train", "--help"), "usage: image_classifier"),
        (("python", "-m", "image_classifier.main", "--help"), "usage: image_classifier_trainer"),
        (("python", "-c", "import os; print(os.getpid())"), "1\n"),
    ],
)
def test_any_command_takes_the_place_of_the_trainer(
    docker: str, training_image: str, tmp_path: Path, command: tuple[str, ...], expected: str
) -> None:
    assert run_program(*build_docker_words(docker), training_image, *command, cwd=tmp_path).startswith(expected)


def test_any_user_finds_a_place_for_caches(docker: str, training_image: str, tmp_path: Path) -> None:
    script = """
import os, pathlib, tempfile
import matplotlib
for place in [os.environ["HOME"], matplotlib.get_cachedir(), tempfile.gettempdir()]:
    pathlib.Path(place).mkdir(exist_ok=True)
    (pathlib.Path(place) / "written").write_text("by me")
try:
    pathlib.Path("/venv/written").write_text("by me")
except OSError as error:
    print(os.getuid(), error.strerror)
"""
    words = build_docker_words(docker, user="54321:54321")
    output = run_program(*words, training_image, "python", "-W", "error", "-c", script, cwd=tmp_path)
    assert output == "54321 Read-only file system\n"


def test_nothing_of_the_building_stays_in_the_image(docker: str, training_image: str, tmp_path: Path) -> None:
    leftovers = r"\( -name 'image_classifier*.whl' -o -path '*/.cache/pip' -o -path '/venv/*/pip' \)"
    script = f"find / -xdev {leftovers} 2>/dev/null; true"
    assert run_program(*build_docker_words(docker), training_image, "sh", "-c", script, cwd=tmp_path) == ""


def test_an_image_names_its_own_commit_where_the_code_is_that_of_another(
    docker: str, training_image: str, project_copy: Path, tmp_path: Path
) -> None:
    git, copy = require_program("git"), tmp_path / "copy"
    run_program(git, "clone", "--quiet", project_copy, copy, cwd=tmp_path)
    run_program(git, "commit", "--quiet", "--allow-empty", "--message=Empty", cwd=copy)
    commit = run_program(git, "rev-parse", "HEAD", cwd=copy).strip()
    try:
        build_image(copy)
        config = inspect(docker, training_image)["Config"]
    finally:
        build_image(project_copy)
    assert config["Labels"]["org.opencontainers.image.revision"] == commit
    assert f"IMAGE_CLASSIFIER_REVISION={commit}" in config["Env"]


def test_a_change_in_the_code_makes_only_the_last_layer_anew(
    docker: str, training_image: str, project_copy: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "a copy"  # the scripts must not trip over a space
    run_program(require_program("git"), "clone", "--quiet", project_copy, copy, cwd=tmp_path)
    module = copy / "image_classifier" / "errors.py"
    module.write_text(module.read_text(encoding="utf-8") + "\n# changed\n", encoding="utf-8")
    before = inspect(docker, training_image)["RootFS"]["Layers"]
    try:
        build_image(copy)
        facts = inspect(docker, training_image)
    finally:
        build_image(project_copy)
    assert facts["RootFS"]["Layers"][:-1] == before[:-1]
    assert facts["RootFS"]["Layers"][-1] != before[-1]
    assert facts["Config"]["Labels"]["org.opencontainers.image.revision"].endswith("-dirty")
    assert inspect(docker, training_image)["RootFS"]["Layers"] == before
