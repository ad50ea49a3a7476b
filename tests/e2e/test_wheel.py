"""What is built and installed: all of the package and nothing else, and it trains in a clean environment."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import sys
import tarfile
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from image_classifier import __version__
from image_classifier.kernels.builder import LIBRARIES, get_library_names, get_target
from image_classifier.kernels.library import get_kernels_digest
from image_classifier.storage import compute_file_digest
from image_classifier.tracking.identity import compute_code_digest
from tests.conftest import PROJECT, find_dependencies, link_environment, run_program

PYPROJECT = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def list_package(project: Path) -> set[str]:
    """List the files of the package as they lie in a checkout."""
    paths = (project / "image_classifier").rglob("*")
    return {p.relative_to(project).as_posix() for p in paths if p.is_file() and "__pycache__" not in p.parts}


def test_the_wheel_holds_the_package_and_nothing_else(distributions: dict[str, Path], project_copy: Path) -> None:
    with zipfile.ZipFile(distributions["wheel"]) as wheel:
        names = set(wheel.namelist())
    about = {name for name in names if name.startswith(f"image_classifier-{__version__}.dist-info/")}
    libraries = [*get_library_names(get_target()).values(), LIBRARIES]
    built = {f"image_classifier/kernels/{name}" for name in libraries} | {"image_classifier/requirements-prod.txt"}
    assert names - about == list_package(project_copy) | built
    assert distributions["wheel"].stat().st_size < 3e6
    assert {name.partition("/")[2] for name in about} >= {"METADATA", "entry_points.txt", "licenses/LICENSE"}


def test_wheels_for_other_platforms_are_built_here(project_copy: Path, tmp_path: Path) -> None:
    clone = tmp_path / "project"
    run_program("git", "clone", "--quiet", project_copy, clone, cwd=tmp_path)
    programs = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    run_program(clone / ".github" / "scripts" / "build.sh", cwd=clone, PATH=programs)
    wheels = {path.name.split("-")[-1]: path for path in (clone / "dist").glob("*.whl")}
    names = {"manylinux_2_17_x86_64.whl": "avx2.so", "manylinux_2_17_aarch64.whl": "neon.so"}
    names["macosx_12_0_arm64.whl"] = "neon.dylib"
    assert wheels.keys() == names.keys()
    digests = set()
    for platform, library in names.items():
        with zipfile.ZipFile(wheels[platform]) as wheel:
            libraries = [name for name in wheel.namelist() if name.endswith((".so", ".dylib"))]
            assert f"image_classifier/kernels/{library}" in libraries
            assert len({Path(name).suffix for name in libraries}) == 1, "kernels of another platform are left over"
            digests.add(json.loads(wheel.read(f"image_classifier/kernels/{LIBRARIES}"))["digest"])
    assert len(digests) == 1, "portable runs would be of several classes"


def test_the_sdist_holds_what_builds_the_wheel(distributions: dict[str, Path], project_copy: Path) -> None:
    """`python -m build` made the wheel from the sdist, so nothing that it needs is missing."""
    with tarfile.open(distributions["sdist"]) as sdist:
        names = {member.name.partition("/")[2] for member in sdist if member.isfile()}
    names -= {name for name in names if ".egg-info/" in name}
    others = {
        "CHANGELOG.md",
        "LICENSE",
        "MANIFEST.in",
        "PKG-INFO",
        "README.md",
        "pyproject.toml",
        "requirements/requirements-prod.txt",
        "setup.py",
        "setup.cfg",
        "tox.ini",
    }
    assert names - others == list_package(project_copy)
    assert names >= {"CHANGELOG.md", "LICENSE", "README.md", "pyproject.toml"}


def test_the_metadata_declare_what_pyproject_says(distributions: dict[str, Path]) -> None:
    with zipfile.ZipFile(distributions["wheel"]) as wheel:
        metadata = Parser().parsestr(wheel.read(f"image_classifier-{__version__}.dist-info/METADATA").decode())
    declared = [Requirement(text) for text in metadata.get_all("Requires-Dist", [])]
    assert {str(r) for r in declared if r.marker is None} == {str(Requirement(t)) for t in PYPROJECT["dependencies"]}
    assert set(metadata.get_all("Provides-Extra", [])) == PYPROJECT["optional-dependencies"].keys()
    assert (metadata["Version"], metadata["License-Expression"]) == (__version__, "MIT")
    assert metadata["Requires-Python"] == ">=3.11"


def test_the_environment_is_clean_and_complete(installed_environment: Path) -> None:
    python = installed_environment / "bin" / "python"
    script = "import importlib.metadata as m; print(*(d.name for d in m.distributions()))"
    present = {canonicalize_name(name) for name in run_program(python, "-c", script, cwd=installed_environment).split()}
    assert present == find_dependencies("image-classifier")
    assert not present & {"pytest", "pyarrow", "sqlalchemy"}


def test_the_installed_trainer_trains_in_any_folder(
    installed_environment: Path,
    sample_dataset: Path,
    tmp_path: Path,
    project_copy: Path,
    distributions: dict[str, Path],
) -> None:
    output = run_program(
        installed_environment / "bin" / "image_classifier_trainer",
        *("--experiment_name", "wheel", "--run_name", "first", "--dataset_folder", sample_dataset),
        *("--recipe", "notebook", "--num_epochs", "1", "--batch_size", "100", "--num_threads", "1"),
        cwd=tmp_path,
    )
    folder = tmp_path / "experiments" / "wheel" / "first"
    record = json.loads((folder / "run.json").read_text())
    evaluation = json.loads((folder / "evaluation.json").read_text())
    assert (folder / "manifest.json").is_file()
    assert "experiments/wheel/first" in output
    assert f"{evaluation['accuracy']:.2%}" in output
    assert record["code"] == {
        "version": __version__,
        "digest": compute_code_digest(project_copy / "image_classifier"),
        "commit": None,
        "uncommitted_changes": None,
    }
    assert record["settings"]["engine"] == "compiled"
    machine = record["machine"]["class"]
    assert machine["kernels"] == get_kernels_digest(machine["instruction_set"]), "another build of the same kernels"
    versions = record["environment"]["distributions"]
    assert versions == {name: importlib.metadata.version(name) for name in versions}
    assert versions.keys() >= {"torch", "numpy", "pillow"}
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["package"]["wheel"] == compute_file_digest(distributions["wheel"])
    assert environment["distributions"]["numpy"]["wheels"], "the package carries no lock"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["image_classifier_trainer", "--help"], "usage: image_classifier_trainer"),
        (["image_classifier", "--help"], "usage: image_classifier COMMAND"),
        (["image_classifier", "train", "--help"], "usage: image_classifier"),
        (["image_classifier", "--version"], f"image_classifier {__version__}"),
        (["python", "-m", "image_classifier.main", "--help"], "usage: image_classifier_trainer"),
    ],
)
def test_the_installed_commands_answer(
    installed_environment: Path, tmp_path: Path, words: list[str], expected: str
) -> None:
    assert run_program(installed_environment / "bin" / words[0], *words[1:], cwd=tmp_path).startswith(expected)


def test_the_sdist_installs_and_answers(distributions: dict[str, Path], tmp_path: Path) -> None:
    """From the sdist's own files: setuptools and the compiler alone are there to build with, and no other compiler."""
    dependencies = find_dependencies("image-classifier") - {"image-classifier"}
    link_environment(tmp_path / ".venv", dependencies | {"setuptools", "packaging", "pip", "ziglang"})
    words = (
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-index",
        "--no-deps",
        "--no-build-isolation",
        distributions["sdist"],
    )
    run_program(tmp_path / ".venv" / "bin" / "python", *words, cwd=tmp_path, PATH="/nowhere")
    assert re.match(
        r"image_classifier \d", run_program(tmp_path / ".venv/bin/image_classifier", "--version", cwd=tmp_path)
    )
