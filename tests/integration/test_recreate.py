"""A run's environment made again: by real wheels, pip and interpreters, of a package small enough to build in a second.

The package that is made again says what it was started with. That a real one gives its verdict there is shown in
docs/proofs.md: torch's wheels take gigabytes.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from image_classifier import recreation
from image_classifier.cli.verify import main
from image_classifier.errors import RunError, StorageError
from image_classifier.recreation import Pip, Wheel, check_wheels, fetch_wheels, open_wheel, run_quietly
from image_classifier.storage import compute_file_digest
from image_classifier.tracking.environment import compute_files_digest, list_installed_files, list_wheel_files
from image_classifier.tracking.identity import compute_code_digest
from tests.conftest import PROJECT, run_program, wait_until
from tests.runs import reseal, write_run

PACKAGE = """
import importlib.metadata, json, os, sys
import other, tool
facts = {"words": sys.argv[1:], "prefix": sys.prefix, "place": __file__, "tmp": os.environ["TMPDIR"]}
facts |= {name: importlib.metadata.distribution(name).read_text("RECORD") for name in ("other", "tool")}
print(json.dumps(facts))
sys.exit(3)
"""
BACKEND = """
import sys; sys.path.insert(0, ".")
from pathlib import Path
def build_wheel(folder, config_settings=None, metadata_directory=None):
    from wheels import write_wheel
    files = {f"image_classifier/{path.name}": path.read_text() for path in Path("image_classifier").iterdir()}
    return write_wheel(Path(folder), "image_classifier", "0.0.1", files, ["tool>=1", "other"]).name
"""
WHEELS = '''
import base64, hashlib, zipfile
def write_wheel(folder, name, version, files, requires=(), false=()):
    """Write a wheel; `false` names files whose content is not what the list says."""
    about = f"{name}-{version}.dist-info"
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    lines += [f"Requires-Dist: {requirement}" for requirement in requires]
    tag = "Wheel-Version: 1.0\\nGenerator: test\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n"
    files = {**files, f"{about}/METADATA": "\\n".join(lines) + "\\n", f"{about}/WHEEL": tag}
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        rows = []
        for each, content in files.items():
            digest = base64.urlsafe_b64encode(hashlib.sha256(content.encode()).digest()).rstrip(b"=").decode()
            rows.append(f"{each},sha256={digest},{len(content)}")
            archive.writestr(each, content + ("#" if each in false else ""))
        archive.writestr(f"{about}/RECORD", "\\n".join([*rows, f"{about}/RECORD,,"]) + "\\n")
    return path
'''
scope: dict[str, Any] = {}
exec(WHEELS, scope)  # the clone's build backend has the same lines
write_wheel: Callable[..., Path] = scope["write_wheel"]

OTHER = {
    "other.py": "value = 2\n",
    "other-2.0.data/data/share/other.txt": "a file beside\n",
    "other-2.0.data/scripts/other-run": "#!python\nprint(1)\n",
}


def describe(path: Path, *, hashed: bool) -> dict[str, Any]:
    wheel = open_wheel(path)
    files = compute_files_digest(list_wheel_files(wheel.read_record()))
    return {"version": wheel.version, "files": files, "wheels": [compute_file_digest(path)] if hashed else []}


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a wheel that is known by its sha256, and one that is known by its files. Read only."""
    folder = tmp_path_factory.mktemp("wheels")
    write_wheel(folder, "tool", "1.0", {"tool/__init__.py": "value = 1\n"})
    write_wheel(folder, "other", "2.0", OTHER)
    return folder


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone of the package's project."""
    folder = tmp_path_factory.mktemp("clone")
    (folder / "image_classifier").mkdir()
    files = {"image_classifier/__init__.py": "", "image_classifier/__main__.py": PACKAGE, "backend.py": BACKEND}
    files |= {"wheels.py": WHEELS, "pyproject.toml": '[build-system]\nrequires = []\nbuild-backend = "backend"\n'}
    files["pyproject.toml"] += 'backend-path = ["."]\n'
    for name, content in files.items():
        (folder / name).write_text(content)
    for words in (["init", "--quiet"], ["add", "--all"], ["commit", "--quiet", "--message=One"]):
        run_program("git", *words, cwd=folder)
    return folder


@pytest.fixture
def run(tmp_path: Path, clone: Path, wheels: Path) -> Path:
    """A run of the clone's commit."""
    digest = compute_code_digest(clone / "image_classifier")
    commit = run_program("git", "rev-parse", "HEAD", cwd=clone).strip()
    code = {"version": "0.0.1", "digest": digest, "commit": commit, "uncommitted_changes": False}
    versions = {"python": "3.11", "distributions": {"tool": "1.0"}}
    folder = write_run(tmp_path / "experiments", changes={"code": code, "environment": versions})
    python = {"version": sys.version.split()[0], "implementation": "cpython", "platform": sysconfig.get_platform()}
    described = {
        "tool": describe(wheels / "tool-1.0-py3-none-any.whl", hashed=True),
        "other": describe(wheels / "other-2.0-py3-none-any.whl", hashed=False),
    }
    package = {"name": "image-classifier", **code, "wheel": None}
    content = {"format_version": 1, "python": python, "package": package, "distributions": described}
    (folder / "environment.json").write_text(json.dumps(content))
    reseal(folder)
    return folder


def change(folder: Path, changes: Callable[[dict[str, Any]], object], name: str = "environment.json") -> None:
    content = json.loads((folder / name).read_text())
    changes(content)
    (folder / name).write_text(json.dumps(content))
    reseal(folder)


def read(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "environment.json").read_text())
    return content


def test_the_recorded_package_verifies_its_run_in_its_own_environment(
    run: Path,
    wheels: Path,
    clone: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    monkeypatch.setenv("PYTHONPATH", str(PROJECT))
    monkeypatch.chdir(clone)  # whose package is not to be imported, but built
    assert main([str(run), "--recreate", "--wheels", str(wheels), "--num_threads", "2", "--segment", "0:10"]) == 3
    output, errors = capfd.readouterr()
    facts = json.loads(output)
    assert facts["words"] == ["verify", str(run), "--segment=0:10", "--num_threads=2"]
    for name in ("prefix", "place", "tmp"):
        assert facts[name].startswith(str(tmp_path / "tmp")), "what is here was used"
    assert "2 distributions, checked 1 by the sha256 of their wheel and 1 by their files" in errors
    assert list((tmp_path / "tmp").iterdir()) == [] == [path for path in clone.iterdir() if path.suffix == ".whl"]
    for name, recorded in read(run)["distributions"].items():
        assert compute_files_digest(list_installed_files(facts[name])) == recorded["files"], "as pip has installed it"


EARLY: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "another Python": (
        lambda e: e["python"].update(version="3.99.1"),
        "trained with Python 3.99, but there is no working python3.99",
    ),
    "no version": (lambda e: e["python"].update(version="../x"), "'../x' is not a version of Python"),
    "another platform": (lambda e: e["python"].update(platform="none"), "the run's wheels are for none, and this"),
    "an unknown commit": (lambda e: e["package"].update(commit="0" * 40), "of commit 000000000000, which is not here"),
    "an option as commit": (lambda e: e["package"].update(commit="--output=x"), "had uncommitted changes: put its"),
    "changes": (lambda e: e["package"].update(uncommitted_changes=True), "had uncommitted changes: put its wheel"),
    "a wheel": (lambda e: e["package"].update(commit=None, wheel="0" * 64), "was installed from a wheel: put its"),
    "an editable one": (lambda e: e["distributions"]["other"].update(files=None), "does not record the files of other"),
    "an option as name": (lambda e: e["distributions"].update({"--pre": e["distributions"]["tool"]}), "is damaged"),
    "a URL as version": (lambda e: e["distributions"]["other"].update(version="1 @ file:///x"), "is damaged"),
    "a false sha256": (lambda e: e["distributions"]["tool"].update(wheels=["0\n-e ."]), "is damaged"),
    "another run's": (lambda e: e["distributions"].pop("tool"), "is from another run: run.json has tool 1.0"),
    "other code": (lambda e: e["package"].update(digest="0" * 64), "is from another run: it names other code"),
    "a later format": (lambda e: e.update(format_version=9), "has the format 9; this version reads up to 1"),
    "no form": (lambda e: e.pop("python"), "is missing or damaged: it has no python"),
}


@pytest.mark.parametrize("case", EARLY)
def test_what_cannot_be_made_again_is_one_line(
    case: str, run: Path, wheels: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    changes, line = EARLY[case]
    change(run, changes)
    monkeypatch.setattr(recreation, "_make_venv", lambda *_: pytest.fail("an environment was made"))
    monkeypatch.chdir(run)
    assert main([str(run), "--recreate", "--wheels", str(wheels)]) == 2
    output, errors = capsys.readouterr()
    assert not output and errors.startswith("error: ") and errors.count("\n") == 1 and line in errors


def test_a_run_that_went_on_elsewhere_or_was_changed_is_not_made_again(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(run, lambda record: record.update(changes=[{"resumed_at": "", "environment": {}}]), "run.json")
    assert main([str(run), "--recreate"]) == 2
    assert "was continued with another environment: no single environment" in capsys.readouterr().err
    (run / "environment.json").write_text("{}")
    assert main([str(run), "--recreate"]) == 3
    assert capsys.readouterr().out == "DIFFERENT\n  environment.json is not what the manifest says\n"
    (run / "environment.json").unlink()
    reseal(run)
    assert main([str(run), "--recreate"]) == 2
    assert "has no environment.json: it is of a version that" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--wheels", "."], "--wheels is for --recreate"),
        (["--recreate", "--wheels", "nowhere"], "--wheels takes a folder with wheels; nowhere is not a folder"),
        (["--recreate", "--files_only"], "--recreate and --files_only contradict each other"),
        (["--recreate", "--allow_code_change"], "--recreate and --allow_code_change contradict"),
        (["--recreate", "--attest", "--sign_key", "k"], "write a --statement, and sign it with `attest`"),
        (["--recreate", "--threshold", "1-of-1", "--public_key", "k"], "--recreate is for a verification that trains"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    options: list[str], line: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(run), *options]) == 2
    assert line in capsys.readouterr().err


def test_a_wheel_of_another_sha256_and_one_that_is_missing_are_refused(
    run: Path, wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pip = Pip(Path(sys.executable), tmp_path, wheels)
    change(run, lambda e: e["distributions"]["tool"].update(wheels=["0" * 64]))
    with pytest.raises(RunError, match=r"recreated: tool==1\.0 of .* does not have the recorded sha256"):
        fetch_wheels(read(run), tmp_path / "one", pip)
    change(run, lambda e: e["distributions"]["other"].update(version="2.1"))
    with pytest.raises(RunError, match=r"has no wheel of other==2\.1 for this Python"):
        pip.download(["other==2.1"], tmp_path / "two")
    for name, value in {"INDEX_URL": "http://127.0.0.1:9/", "RETRIES": "1", "CONFIG_FILE": os.devnull}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    for name in ("EXTRA_INDEX_URL", "FIND_LINKS"):
        monkeypatch.delenv(f"PIP_{name}", raising=False)
    with pytest.raises(RunError, match="the index cannot be reached; name a folder of wheels with --wheels"):
        Pip(Path(sys.executable), tmp_path, None).download(["tool==1.0"], tmp_path / "three")


def check(run: Path, folder: Path, changed: Mapping[str, Any] = {}) -> int:
    package = write_wheel(folder, "image_classifier", "0.0.1", {}, ["tool>=1", "other; python_version >= '3'"])
    found = {each.name: each for each in map(open_wheel, folder.glob("*.whl")) if each.name != "image-classifier"}
    environment = read(run)
    environment["distributions"].update(changed)
    return check_wheels(environment, json.loads((run / "run.json").read_text()), Wheel(package, "x", "1"), found)


def test_each_file_of_a_wheel_is_what_the_run_had(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "wheels"
    folder.mkdir()
    write_wheel(folder, "tool", "1.0", {"tool/__init__.py": "value = 1\n"})
    other = write_wheel(folder, "other", "2.0", OTHER)
    assert check(run, folder) == 1
    write_wheel(folder, "other", "2.0", {**OTHER, "other.py": "value = 3\n"})
    with pytest.raises(
        RunError, match=r"other-2\.0-py3-none-any\.whl has other files than the other 2\.0 that the run"
    ):
        check(run, folder)
    write_wheel(folder, "other", "2.0", OTHER, false=["other.py"])
    with pytest.raises(RunError, match=r"is damaged: other\.py does not match its list of files"):
        check(run, folder)
    write_wheel(folder, "other", "2.0", OTHER)
    with zipfile.ZipFile(other, "a") as archive:
        archive.writestr("more.pth", "import os")
    with pytest.raises(RunError, match=r"is damaged: more\.pth does not match its list"):
        check(run, folder)
    write_wheel(folder, "other", "2.0", OTHER)
    strange = write_wheel(folder, "strange", "1.0", {"strange.py": ""})
    with pytest.raises(RunError, match=r"names strange, which no other distribution needs: it is not installed"):
        check(run, folder, {"strange": describe(strange, hashed=True)})


def test_a_package_is_found_by_its_sha256_or_by_its_code(run: Path, clone: Path, tmp_path: Path) -> None:
    files = {f"image_classifier/{path.name}": path.read_text() for path in (clone / "image_classifier").iterdir()}
    wheel = write_wheel(tmp_path, "image_classifier", "0.0.1", files)
    package = read(run)["package"]
    assert recreation.find_package(package, tmp_path) == open_wheel(wheel)
    assert recreation.find_package({**package, "wheel": compute_file_digest(wheel)}, tmp_path) == open_wheel(wheel)
    assert recreation.find_package({**package, "wheel": "0" * 64}, tmp_path) is None, "another build of the same code"
    assert recreation.find_package({**package, "digest": "0" * 64}, tmp_path) is None
    assert recreation.find_package(package, None) is None


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"no room for the environment in .*; name another disk in TMPDIR"):
        run_quietly(["cp", sys.executable, "/dev/full"], tmp_path, "never")


def test_an_interrupt_leaves_nothing(run: Path, clone: Path, tmp_path: Path) -> None:
    files = {f"image_classifier/{path.name}": path.read_text() for path in (clone / "image_classifier").iterdir()}
    write_wheel(tmp_path, "image_classifier", "0.0.1", files)
    scratch = tmp_path / "tmp"
    scratch.mkdir()
    for _ in range(10):
        process = subprocess.Popen(
            [sys.executable, "-m", "image_classifier", "verify", run, "--recreate", "--wheels", tmp_path],
            env={**os.environ, "TMPDIR": str(scratch), "PYTHONPATH": str(PROJECT)},
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        wait_until(lambda: any(scratch.glob("*/venv")), process)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
        assert list(scratch.iterdir()) == []
        if "has no wheel of tool==1.0" not in errors:  # else the interrupt came too late
            break
    assert (process.returncode, output, errors) == (130, "", "interrupted\n")
