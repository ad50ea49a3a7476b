"""What all tests stand on: the same start for each, real data and programs by name, and what is costly made once."""

from __future__ import annotations

import fcntl
import importlib.metadata
import os
import platform
import random
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
import venv
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, NoReturn

import hypothesis
import numpy as np
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from image_classifier.training.determinism import list_portable_kernels, read_processor
from tests import forked

PROJECT = Path(__file__).resolve().parents[1]
REAL_DATA = ("IMAGE_CLASSIFIER_CIFAR10", "IMAGE_CLASSIFIER_CIFAR10_ORIGINAL")
"""Variables that name folders with real CIFAR-10: all 60,000 images that JPEG changed a little, and 6,102 unchanged."""

PROGRAMS = ("IMAGE_CLASSIFIER_MLFLOW",)
"""Variables that name programs which do not lie on the PATH: mlflow with its server, which needs other libraries."""

hypothesis.settings.register_profile("any speed", deadline=None)
hypothesis.settings.load_profile("any speed")

GIT_CONFIG = """
[user]
    name = A Developer
    email = developer@localhost
[init]
    defaultBranch = main
[safe]
    directory = *
"""


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say on which processor the golden digests were compared."""
    facts = read_processor()
    name = facts.get("model name") or platform.processor() or "unknown"
    family = ", ".join(f"{key} {facts[key]}" for key in ("cpu family", "model") if key in facts)
    terminalreporter.write_line(f"processor: {name}, {family}; kernels: {', '.join(list_portable_kernels())}")


def require_real_data(variable: str) -> Path:
    """Return the folder that holds `cifar-10-batches-py`, or skip the test; with CI=true fail it."""
    if variable not in REAL_DATA:
        raise ValueError(f"{variable} is none of {', '.join(REAL_DATA)}")
    folder = os.environ.get(variable)
    if not folder:
        report_lack(f"{variable} is not set: the folder that holds real data as cifar-10-batches-py")
    if not (Path(folder) / "cifar-10-batches-py" / "test_batch").is_file():
        pytest.fail(f"{variable} names {folder}, which holds no cifar-10-batches-py")
    return Path(folder)


def require_program(name: str) -> str:
    """Return the path of a program, or skip the test; with CI=true fail it."""
    path = shutil.which(name)
    if path is None:
        report_lack(f"the program {name} is not installed")
    return path


def report_lack(what: str) -> NoReturn:
    """Skip the test for something that this machine lacks; with CI=true fail it."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"{what}; with CI=true nothing is skipped")
    pytest.skip(what)


def leave_out_coverage() -> dict[str, str]:
    """Copy the environment without what makes coverage measure the processes that are started in it.

    For those that a signal ends with an exception: coverage takes a lock in the functions that it watches, which such
    an exception can leave taken, and then the process hangs. And for those that may not write coverage's file.
    """
    return {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}


def run_program(*words: str | Path, cwd: Path, timeout_s: float = 300, **variables: str) -> str:
    """Run a program in a folder with variables added to the environment; return its stdout, fail where it fails."""
    result = subprocess.run(
        [str(word) for word in words],
        cwd=cwd,
        env=os.environ | variables,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
    return _get_stdout(words, result)


def run_command(*words: str | Path, cwd: Path = PROJECT, timeout_s: float = 300, **variables: str) -> str:
    """Run a module of the package as `run_program` runs `python -m`, forked: tests/forked.py says what that spares."""
    return _get_stdout(words, forked.run(*words, cwd=cwd, variables=variables, timeout_s=timeout_s))


def _get_stdout(words: tuple[str | Path, ...], result: subprocess.CompletedProcess[str]) -> str:
    if result.returncode != 0:
        line = " ".join(str(word) for word in words)
        pytest.fail(f"{line}: exit status {result.returncode}\n{result.stdout}\n{result.stderr}", pytrace=False)
    return result.stdout


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[Any], timeout_s: float = 120) -> None:
    """Wait for a condition that a running process brings about, and read its pipes meanwhile: a full one stops it."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"nothing came of it in {timeout_s:g} s"
        try:
            outputs = process.communicate(timeout=0.01)
        except subprocess.TimeoutExpired:
            continue
        pytest.fail(f"the process ended before, with exit status {process.returncode}: {outputs}")


@pytest.fixture
def without_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As where the package was installed without its kernels."""
    from image_classifier.kernels import library

    monkeypatch.setattr(library, "FOLDER", tmp_path)
    library.load_kernels.cache_clear()
    yield
    library.load_kernels.cache_clear()


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all workers of this session have in common."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


def make_once(folder: Path, make: Callable[[Path], object]) -> Path:
    """Make a folder, unless another worker has made it or makes it now; return it when it is made."""
    made = folder.with_name(f"{folder.name}-is-made")
    with open(folder.with_name(f"{folder.name}-lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if not made.exists():
            shutil.rmtree(folder, ignore_errors=True)  # what a failure has left
            folder.mkdir()
            make(folder)
            made.touch()
    return folder


@pytest.fixture(autouse=True)
def _room(request: pytest.FixtureRequest, shared_folder: Path) -> Iterator[None]:
    """Let tests run beside each other, but one that is marked `alone` only when no other worker has a test.

    Whoever wants to be alone keeps the door, through which all others must come, until the room is empty.
    """
    is_alone = request.node.get_closest_marker("alone") is not None
    with open(shared_folder / "door", "w") as door, open(shared_folder / "room", "w") as room:
        fcntl.flock(door, fcntl.LOCK_EX)
        fcntl.flock(room, fcntl.LOCK_EX if is_alone else fcntl.LOCK_SH)
        if not is_alone:
            fcntl.flock(door, fcntl.LOCK_UN)
        yield


@pytest.fixture(scope="session", autouse=True)
def _same_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Take out of the environment what would change a result, for this process and those that it starts."""
    git_config = tmp_path_factory.mktemp("git") / "config"
    git_config.write_text(GIT_CONFIG)
    with pytest.MonkeyPatch.context() as patch:
        for name in os.environ:
            if name.startswith(("IMAGE_CLASSIFIER_", "GIT_", "MAKE")) and name not in REAL_DATA + PROGRAMS:
                patch.delenv(name)
        for name, value in {
            "IMAGE_CLASSIFIER_CACHE": str(tmp_path_factory.mktemp("cache")),
            "XDG_CACHE_HOME": str(tmp_path_factory.mktemp("home-cache")),
            "GIT_CONFIG_GLOBAL": str(git_config),
            "GIT_CONFIG_NOSYSTEM": "1",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MPLBACKEND": "agg",
        }.items():
            patch.setenv(name, value)
        forked.remember_environment()
        yield


@pytest.fixture(autouse=True)
def _same_start(_same_environment: None) -> Iterator[None]:
    """Start each test from the same seeds, environment and folder, whatever the one before it left."""
    environment, folder = dict(os.environ), os.getcwd()
    random.seed(0)
    np.random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
        sys.modules["torch"].set_num_threads(1)  # more only wait for each other where cores are shared
    yield
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)


@pytest.fixture(scope="session")
def sample_dataset(shared_folder: Path) -> Path:
    """A dataset folder with a small generated sample set. Read only: copy it to change it."""

    def make(folder: Path) -> None:
        counts = ("--num_train", "1000", "--num_test", "200")
        words = ("image_classifier", "data", "prepare", "--source", "sample", *counts)
        run_command(*words, "--dataset_folder", folder / "sample")

    return make_once(shared_folder / "data", make) / "sample"


@pytest.fixture(scope="session")
def trained_run(shared_folder: Path, sample_dataset: Path) -> Path:
    """The folder of a finished run on the sample set, <experiments>/experiment/run. Read only: copy it to change it."""

    def make(folder: Path) -> None:
        run_command(
            "image_classifier.main",
            *("--experiments_folder", folder, "--experiment_name", "experiment", "--run_name", "run"),
            *("--dataset_folder", sample_dataset, "--recipe", "notebook", "--views", "mirror"),
            *("--batch_size", "20", "--learning_rate", "0.02", "--num_threads", "1"),
        )

    return make_once(shared_folder / "trained", make) / "experiment" / "run"


@pytest.fixture(scope="session")
def published_run(shared_folder: Path, trained_run: Path) -> Path:
    """The folder of a published model, <experiments>/experiment/run/published. Read only: copy it to change it."""

    def make(folder: Path) -> None:
        shutil.copytree(trained_run, folder / "experiment" / "run")
        run_command("image_classifier", "publish", folder / "experiment" / "run")

    return make_once(shared_folder / "published", make) / "experiment" / "run" / "published"


@pytest.fixture(scope="session")
def project_copy(shared_folder: Path) -> Path:
    """A copy of the files that Git tracks or would, committed in a repository of its own. Read only: clone it."""

    def make(folder: Path) -> None:
        git, copy = require_program("git"), folder / "image_classifier"
        listing = run_program(git, "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=PROJECT)
        for name in filter(None, listing.split("\0")):
            source, target = PROJECT / name, copy / name
            is_run = target.match("experiments/*/*/*")
            if source.is_file() and not is_run:  # a file that was deleted is listed until that is committed
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, target)
        run_program(git, "init", "--quiet", cwd=copy)
        run_program(git, "add", "--all", cwd=copy)
        run_program(git, "commit", "--quiet", "--message=Copy", cwd=copy)

    return make_once(shared_folder / "project", make) / "image_classifier"


@pytest.fixture(scope="session")
def distributions(shared_folder: Path, project_copy: Path) -> dict[str, Path]:
    """The `wheel` and the `sdist` that `python -m build` makes; the wheel from the sdist."""

    def make(folder: Path) -> None:
        run_program(sys.executable, *"-m build --no-isolation --outdir".split(), folder, cwd=project_copy)

    folder = make_once(shared_folder / "dist", make)
    (wheel,) = folder.glob("*.whl")
    (sdist,) = folder.glob("*.tar.gz")
    return {"wheel": wheel, "sdist": sdist}


@pytest.fixture(scope="session")
def installed_environment(shared_folder: Path, distributions: dict[str, Path]) -> Path:
    """A clean environment's folder: the base dependencies that the wheel declares, the wheel, and nothing else."""

    def make(folder: Path) -> None:
        link_environment(folder / ".venv", find_dependencies("image-classifier") - {"image-classifier"})
        install_wheel(folder / ".venv", distributions["wheel"])

    return make_once(shared_folder / "installed", make) / ".venv"


def install_wheel(folder: Path, wheel: Path) -> None:
    """Install a wheel into an environment, without its dependencies and without an index."""
    python = folder / "bin" / "python"
    words = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-index", "--no-deps", wheel)
    run_program(*words, cwd=folder)


@pytest.fixture(scope="session")
def developed_copy(tmp_path_factory: pytest.TempPathFactory, project_copy: Path) -> Path:
    """A clone of the project after `make venv`: with a `.venv` in which it is installed as editable, and the hooks.

    The requirements are there before, so that pip finds each at the locked version and needs no index.
    """
    copy = tmp_path_factory.mktemp("developed") / "image_classifier"
    run_program(require_program("git"), "clone", "--quiet", project_copy, copy, cwd=copy.parent)
    installed = {canonicalize_name(distribution.name) for distribution in importlib.metadata.distributions()}
    link_environment(copy / ".venv", installed - {"image-classifier"})
    (copy / ".venv" / ".made").touch()
    run_program(require_program("make"), "venv", cwd=copy, PIP_NO_INDEX="1")
    return copy


def find_dependencies(name: str, extras: Collection[str] = ()) -> set[str]:
    """Find the names of an installed distribution and of all that it and its extras need on this platform."""
    found: set[tuple[str, str]] = set()
    pending = [(canonicalize_name(name), extra) for extra in ("", *extras)]
    while pending:
        dependent, extra = pending.pop()
        if (dependent, extra) in found:
            continue
        found.add((dependent, extra))
        for requirement in map(Requirement, importlib.metadata.requires(dependent) or []):
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                pending += [(canonicalize_name(requirement.name), extra) for extra in ("", *requirement.extras)]
    return {dependent for dependent, _ in found}


def link_environment(folder: Path, names: Collection[str]) -> None:
    """Make an environment that holds some of this one's distributions, and no others.

    Their files are linked: copying torch and what it needs would take gigabytes, installing it minutes.
    """
    venv.create(folder, symlinks=True)
    source = Path(sysconfig.get_path("purelib"))
    target = folder / source.relative_to(sys.prefix)
    for name in names:
        for file in importlib.metadata.files(name) or []:
            original, link = (Path(os.path.normpath(base / file)) for base in (source, target))
            if link.exists() or not original.is_file():  # two distributions may share a file
                continue
            link.parent.mkdir(parents=True, exist_ok=True)
            if link.parent == folder / "bin":  # its first line names the interpreter
                link.write_bytes(original.read_bytes().replace(os.fsencode(sys.prefix), os.fsencode(folder)))
                shutil.copymode(original, link)
            else:
                _link(original, link)


def _link(original: Path, link: Path) -> None:
    try:
        os.link(original, link)
    except OSError:  # another file system
        link.symlink_to(original)


def find_port() -> int:
    """Find a port that is free now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
