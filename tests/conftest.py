"""What all tests stand on: the same start for each, real data and programs by name, and what is costly made once."""

from __future__ import annotations

import importlib.metadata
import os
import random
import shutil
import subprocess
import sys
import sysconfig
import time
import venv
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = Path(__file__).resolve().parents[1]
REAL_DATA = ("IMAGE_CLASSIFIER_CIFAR10", "IMAGE_CLASSIFIER_CIFAR10_ORIGINAL")
"""Variables that name folders with real CIFAR-10: all 60,000 images that JPEG changed a little, and 6,102 unchanged."""

PROGRAMS = ("IMAGE_CLASSIFIER_MLFLOW",)
"""Variables that name programs which do not lie on the PATH: mlflow with its server, which needs other libraries."""

GIT_CONFIG = """
[user]
    name = A Developer
    email = developer@localhost
[init]
    defaultBranch = main
[safe]
    directory = *
"""


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
def sample_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset folder with a small generated sample set. Read only: copy it to change it."""
    folder = tmp_path_factory.mktemp("data") / "sample"
    run_program(
        *(sys.executable, "-m", "image_classifier", "data", "prepare", "--source", "sample"),
        *("--num_train", "1000", "--num_test", "200", "--dataset_folder", folder),
        cwd=PROJECT,
    )
    return folder


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory: pytest.TempPathFactory, sample_dataset: Path) -> Path:
    """The folder of a finished run on the sample set, <experiments>/experiment/run. Read only: copy it to change it."""
    experiments = tmp_path_factory.mktemp("experiments")
    run_program(
        *(sys.executable, "-m", "image_classifier.main"),
        *("--experiments_folder", experiments, "--experiment_name", "experiment", "--run_name", "run"),
        *("--dataset_folder", sample_dataset, "--recipe", "notebook", "--views", "mirror"),
        *("--batch_size", "20", "--learning_rate", "0.02", "--num_threads", "1"),
        cwd=PROJECT,
    )
    return experiments / "experiment" / "run"


@pytest.fixture(scope="session")
def published_run(tmp_path_factory: pytest.TempPathFactory, trained_run: Path) -> Path:
    """The folder of a published model, <experiments>/experiment/run/published. Read only: copy it to change it."""
    run = tmp_path_factory.mktemp("experiments") / "experiment" / "run"
    shutil.copytree(trained_run, run)
    run_program(sys.executable, "-m", "image_classifier", "publish", run, cwd=PROJECT)
    return run / "published"


@pytest.fixture(scope="session")
def project_copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the files that Git tracks or would, committed in a repository of its own."""
    git = require_program("git")
    listing = run_program(git, "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=PROJECT)
    copy = tmp_path_factory.mktemp("project") / "image_classifier"
    for name in filter(None, listing.split("\0")):
        source, target = PROJECT / name, copy / name
        is_run = target.match("experiments/*/*/*")
        if source.is_file() and not is_run:  # a file that was deleted is listed until that is committed
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)
    run_program(git, "init", "--quiet", cwd=copy)
    run_program(git, "add", "--all", cwd=copy)
    run_program(git, "commit", "--quiet", "--message=Copy", cwd=copy)
    return copy


@pytest.fixture(scope="session")
def distributions(tmp_path_factory: pytest.TempPathFactory, project_copy: Path) -> dict[str, Path]:
    """The `wheel` and the `sdist` that `python -m build` makes; the wheel from the sdist."""
    folder = tmp_path_factory.mktemp("dist")
    run_program(sys.executable, *"-m build --no-isolation --outdir".split(), folder, cwd=project_copy)
    (wheel,) = folder.glob("*.whl")
    (sdist,) = folder.glob("*.tar.gz")
    return {"wheel": wheel, "sdist": sdist}


@pytest.fixture(scope="session")
def installed_environment(tmp_path_factory: pytest.TempPathFactory, distributions: dict[str, Path]) -> Path:
    """A clean environment's folder: the base dependencies that the wheel declares, the wheel, and nothing else."""
    folder = tmp_path_factory.mktemp("installed") / ".venv"
    link_environment(folder, find_dependencies("image-classifier") - {"image-classifier"})
    install_wheel(folder, distributions["wheel"])
    return folder


def install_wheel(folder: Path, wheel: Path) -> None:
    """Install a wheel into an environment, without its dependencies and without an index."""
    python = folder / "bin" / "python"
    words = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-index", "--no-deps", wheel)
    run_program(*words, cwd=folder)


@pytest.fixture(scope="session")
def developed_copy(project_copy: Path) -> Path:
    """The project's copy after `make venv`: with a `.venv` in which it is installed in editable mode, and the hooks.

    The requirements are there before, so that pip finds each at the locked version and needs no index.
    """
    installed = {canonicalize_name(distribution.name) for distribution in importlib.metadata.distributions()}
    link_environment(project_copy / ".venv", installed - {"image-classifier"})
    (project_copy / ".venv" / ".made").touch()
    run_program(require_program("make"), "venv", cwd=project_copy, PIP_NO_INDEX="1")
    return project_copy


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
