"""Recreates a run's environment in a scratch folder, where the package that trained the run verifies it.

Wheels are downloaded and checked before any of their code runs: against the recorded sha256, against the digest of the
installed files, and whether the package requires them at all. This interpreter's environment stays unchanged. The
recorded package gives the verdict, in its own process.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from email.parser import HeaderParser
from pathlib import Path
from typing import Any

from packaging.requirements import InvalidRequirement
from packaging.utils import InvalidName, InvalidWheelFilename, canonicalize_name, parse_wheel_filename
from packaging.version import InvalidVersion, Version

from image_classifier.errors import RunError, SettingsError, StorageError
from image_classifier.plugins import PLUGGABLE, check_allowed
from image_classifier.progress import paused, track
from image_classifier.storage import compute_file_digest, scratch_folder
from image_classifier.text import make_printable, one_line
from image_classifier.tracking.environment import (
    DISTRIBUTION,
    compute_files_digest,
    find_closure,
    list_wheel_files,
)
from image_classifier.tracking.identity import (
    PACKAGE_FOLDER,
    SOURCES,
    compute_code_digest,
    compute_sources_digest,
)
from image_classifier.tracking.layout import ENVIRONMENT, RECORD
from image_classifier.tracking.reading import read_environment, read_record

_PATIENCE_S = 30
"""Time for an interrupted training to finish its step and remove its scratch folder before it is killed."""


@dataclass(frozen=True)
class Wheel:
    """A wheel file with its name and version."""

    path: Path
    name: str
    version: str

    def read_record(self) -> str:
        """Read its list of files."""
        return self._read_metadata("RECORD")

    def list_requirements(self) -> list[str]:
        """List the requirements in its metadata."""
        return HeaderParser().parsestr(self._read_metadata("METADATA")).get_all("Requires-Dist", [])

    def compute_code_digest(self) -> str:
        """Compute the code digest of this package in the wheel, as for an installed package."""
        top = f"{PACKAGE_FOLDER.name}/"
        with zipfile.ZipFile(self.path) as archive:
            names = [name for name in archive.namelist() if name.startswith(top) and Path(name).suffix in SOURCES]
            return compute_sources_digest({name.removeprefix(top): archive.read(name) for name in names})

    def find_false_file(self) -> str | None:
        """Find a file that does not match the wheel's RECORD, or is missing in the wheel or in RECORD."""
        hashes = {row[0]: row[1] for row in csv.reader(self.read_record().splitlines()) if len(row) == 3 and row[1]}
        with zipfile.ZipFile(self.path) as archive:
            for entry in archive.infolist():
                if entry.is_dir() or re.fullmatch(r"[^/]+\.dist-info/RECORD(\.jws|\.p7s)?", entry.filename):
                    continue
                with archive.open(entry) as file:
                    digest = hashlib.file_digest(file, "sha256").digest()  # type: ignore[arg-type]  # a binary file
                text = base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
                if hashes.get(entry.filename) != f"sha256={text}":
                    return entry.filename
            return min(hashes.keys() - set(archive.namelist()), default=None)

    def _read_metadata(self, name: str) -> str:
        with zipfile.ZipFile(self.path) as archive:
            found = [each for each in archive.namelist() if re.fullmatch(rf"[^/]+\.dist-info/{name}", each)]
            if len(found) != 1:
                raise zipfile.BadZipFile(f"{self.path.name} has {len(found)} files {name} instead of one")
            return archive.read(found[0]).decode()


def recreate(
    folder: Path, options: Sequence[str], *, wheels: Path | None = None, say: Callable[[str], None] = print
) -> int:
    """Recreate the environment of a finished run, verify the run in it, and return the exit status.

    Args:
        folder: the run, whose files match its manifest.
        options: of the recorded package's `verify`.
        wheels: folder with all wheels, to work offline; None uses pip's index.
        say: receives a line about what was checked.

    Raises:
        RunError: the environment was not recorded, or a part is missing or has changed.
        SettingsError: the folder of wheels does not exist.
        StorageError: the disk is full.
    """
    record, environment = read_record(folder), read_environment(folder)
    check_recreatable(folder, record, environment)
    if wheels is not None and not wheels.is_dir():
        raise SettingsError(f"--wheels takes a folder with wheels; {wheels} is not a folder")
    python = find_interpreter(environment["python"]["version"])
    with scratch_folder() as scratch:
        try:
            package = find_package(environment["package"], wheels)
            source = scratch if package else extract_source(environment["package"], scratch)
            with track("making the environment again"):
                venv_python = _make_venv(python, scratch)
                pip = Pip(venv_python, scratch, wheels)
                package = package or open_wheel(pip.build(source))
                found = fetch_wheels(environment, scratch / "wheels", pip)
                num_hashed = check_wheels(environment, record, package, found)
                pip.install([package, *found.values()])
            shutil.rmtree(scratch / "wheels")  # they are installed, and torch's take gigabytes
        except (zipfile.BadZipFile, zlib.error, tarfile.TarError, UnicodeDecodeError, InvalidRequirement) as error:
            raise RunError(f"the environment of {folder} cannot be recreated: {one_line(error)}") from error
        checked = f"{num_hashed} by the sha256 of their wheel and {len(found) - num_hashed} by their files"
        say(f"recreated: {_describe_package(environment)}, {len(found)} distributions, checked {checked}")
        return _verify(venv_python, folder, options, scratch)


def check_recreatable(folder: Path, record: dict[str, Any], environment: dict[str, Any]) -> None:
    """Check that a run was trained in a single, fully recorded environment, on this platform.

    Raises:
        RunError: it was not.
    """
    for kind in PLUGGABLE:
        check_allowed(kind, record["settings"].get(kind, "sgd"), folder / RECORD, RunError)
    changed = sorted({part for change in record.get("changes", []) for part in change} & {"code", "environment"})
    if changed:
        raise RunError(f"{folder} was continued with another {changed[0]}: no single environment can train it again")
    if environment["package"]["digest"] != record["code"]["digest"]:
        raise RunError(f"{folder / ENVIRONMENT} is from another run: it names other code than {RECORD}")
    of_record, of_file = record["environment"]["distributions"], environment["distributions"]
    for name, version in of_record.items():
        if of_file.get(canonicalize_name(name), {}).get("version") != version:
            raise RunError(f"{folder / ENVIRONMENT} is from another run: {RECORD} has {name} {version}")
    _check_names(folder / ENVIRONMENT, of_file)
    here = {"implementation": sys.implementation.name, "platform": sysconfig.get_platform()}
    for part, present in here.items():
        if environment["python"][part] != present:
            raise RunError(f"the run's wheels are for {environment['python'][part]}, and this machine has {present}")
    unknown = [name for name, facts in of_file.items() if not facts["wheels"] and not facts["files"]]
    if unknown:
        names = ", ".join(unknown)
        raise RunError(
            f"{folder} does not record the files of {names} (not installed from a wheel), so they cannot be checked"
        )


def _check_names(path: Path, distributions: Mapping[str, Mapping[str, Any]]) -> None:
    """Check the names and versions that are passed to pip, so that none is an option or a URL."""
    try:
        for name, facts in distributions.items():
            if canonicalize_name(name, validate=True) != name:
                raise InvalidName(f"{name!a} is not a canonical name")
            Version(facts["version"])
            if not all(re.fullmatch("[0-9a-f]{64}", digest) for digest in facts["wheels"]):
                raise InvalidName(f"{name} has an invalid sha256")
    except (InvalidName, InvalidVersion) as error:
        raise RunError(f"{path} is damaged: {one_line(error)}") from error


def find_interpreter(version: str) -> str:
    """Find an interpreter with the recorded minor version.

    Raises:
        RunError: there is none on the PATH.
    """
    minor = get_minor(version)
    if minor == "{}.{}".format(*sys.version_info):
        return sys.executable
    path = shutil.which(f"python{minor}")
    if path is not None:
        words = [path, "-I", "-c", "import sys; print('{}.{}'.format(*sys.version_info))"]
        answer = subprocess.run(words, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if answer.returncode == 0 and answer.stdout.strip() == minor:
            return path
    raise RunError(
        f"the run was trained with Python {minor}, but there is no working python{minor} on the PATH; install it"
    )


def get_minor(version: str) -> str:
    """Return the minor version of Python, such as 3.11.

    Raises:
        RunError: the version is malformed.
    """
    match = re.fullmatch(r"(\d+\.\d+)(\..*)?", version, re.ASCII)
    if match is None:
        raise RunError(f"{ENVIRONMENT} is damaged: {version!a} is not a version of Python")
    return match[1]


def find_package(package: Mapping[str, Any], wheels: Path | None) -> Wheel | None:
    """Find the recorded package's wheel in a folder, by its sha256 or, if that was not recorded, by its code digest."""
    for path in sorted(wheels.glob("image_classifier-*.whl")) if wheels else []:
        wheel = open_wheel(path)
        if package["wheel"] is not None:
            is_it = compute_file_digest(path) == package["wheel"]
        else:
            is_it = wheel.compute_code_digest() == package["digest"]
        if is_it:
            return wheel
    return None


def open_wheel(path: Path) -> Wheel:
    """Parse the name of a wheel file.

    Raises:
        RunError: it is not the name of a wheel.
    """
    try:
        name, version, _, _ = parse_wheel_filename(path.name)
    except InvalidWheelFilename as error:
        raise RunError(f"{path} does not have the name of a wheel: {one_line(error)}") from error
    return Wheel(path, name, str(version))


def extract_source(package: Mapping[str, Any], scratch: Path) -> Path:
    """Extract the recorded package's source from the history of the current git clone.

    Raises:
        RunError: no clone has the recorded commit.
    """
    commit, version = package["commit"] or "", package["version"]
    what = f"image_classifier {version} (code {package['digest'][:12]})"
    if not re.fullmatch("[0-9a-f]{40,64}", commit) or package.get("uncommitted_changes"):
        why = "had uncommitted changes" if commit else "was installed from a wheel"
        raise RunError(f"the run's package, {what}, {why}: put its wheel into a folder, and name that with --wheels")
    clone = _find_clone(commit)
    if clone is None:
        remedy = "run this in a clone that has it, or name a folder with its wheel with --wheels"
        raise RunError(f"the run's package, {what}, is of commit {commit[:12]}, which is not here: {remedy}")
    archive, source = scratch / "source.tar", scratch / "source"
    run_quietly(["git", "-C", clone, "archive", "--output", str(archive), commit], scratch, f"git cannot read {clone}")
    with tarfile.open(archive) as tar:
        tar.extractall(source, filter="data")
    if compute_code_digest(source / PACKAGE_FOLDER.name) != package["digest"]:
        raise RunError(f"the code of commit {commit[:12]} is not that of the run, {what}")
    return source


def _find_clone(commit: str) -> str | None:
    for place in (Path.cwd(), PACKAGE_FOLDER.parent):
        words = ["git", "-C", str(place), "rev-parse", "--show-toplevel", "--verify", f"{commit}^{{commit}}"]
        with suppress(OSError):
            answer = subprocess.run(words, capture_output=True, encoding="utf-8", stdin=subprocess.DEVNULL)
            if answer.returncode == 0:
                return answer.stdout.partition("\n")[0]
    return None


def _make_venv(python: str, scratch: Path) -> Path:
    words = [python, "-I", "-m", "venv", str(scratch / "venv")]
    run_quietly(words, scratch, "no environment can be made (Debian: install python3-venv)")
    return scratch / "venv" / "bin" / "python"


class Pip:
    """Runs the pip of the scratch environment.

    Args:
        wheels: folder with all wheels; None uses pip's own settings.
    """

    def __init__(self, python: Path, scratch: Path, wheels: Path | None) -> None:
        self._python = python
        self._scratch = scratch
        self._wheels = wheels
        self._sources = ["--no-index", "--find-links", str(wheels.absolute())] if wheels else []

    def download(self, requirements: Sequence[str], target: Path, *options: str) -> None:
        """Download the wheels of pinned requirements, without dependencies or source distributions."""
        if requirements:
            listed = self._scratch / "requirements.txt"
            listed.write_text("\n".join(requirements) + "\n", encoding="utf-8")
            words = ["--no-deps", "--only-binary", ":all:", "--dest", str(target), "--requirement", str(listed)]
            self._run("download", [*self._sources, *words, *options])

    def build(self, source: Path) -> Path:
        """Build the wheel of a source folder."""
        target = self._scratch / "package"
        self._run("wheel", [*self._sources, "--no-deps", "--wheel-dir", str(target), str(source)])
        (path,) = target.glob("*.whl")
        return path

    def install(self, wheels: Sequence[Wheel]) -> None:
        """Install wheels without running any of their code."""
        words = ["--no-index", "--no-deps", "--no-compile", *(str(wheel.path) for wheel in wheels)]
        self._run("install", words, is_alone=True)

    def _run(self, command: str, words: Sequence[str], *, is_alone: bool = False) -> None:
        """Run a pip command; without the user's pip settings if `is_alone` or with a folder of wheels."""
        variables = build_variables(self._scratch)
        if is_alone or self._sources:
            variables = {name: value for name, value in variables.items() if not name.startswith("PIP_")}
            variables["PIP_CONFIG_FILE"] = os.devnull
        variables["PIP_CONSTRAINT"] = os.devnull  # each version is pinned
        quietly = ["--quiet", "--no-input", "--disable-pip-version-check", "--progress-bar", "off"]
        run_quietly(
            [str(self._python), "-m", "pip", command, *quietly, *words], self._scratch, self._explain, variables
        )

    def _explain(self, output: str) -> str:
        """Explain an error of pip on one line."""
        source = str(self._wheels) if self._wheels else "the index"
        if "DO NOT MATCH THE HASHES" in output:
            wrong = re.findall(r"^ {4}(\S+==\S+|\S+\.whl)", output, re.MULTILINE)
            return f"{', '.join(wrong) or 'a wheel'} of {source} does not have the recorded sha256"
        if missing := re.search(r"No matching distribution found for (\S+)", output):
            offline = not self._wheels and re.search("NewConnectionError|NameResolutionError|ConnectTimeout", output)
            if offline:
                return "the index cannot be reached; name a folder of wheels with --wheels"
            return f"{source} has no wheel of {missing[1]} for this Python and platform"
        lines = [line for line in output.splitlines() if line.startswith("ERROR: ")] or output.splitlines()[-1:]
        return f"pip says: {lines[0].removeprefix('ERROR: ') if lines else 'nothing'}"


def build_variables(scratch: Path) -> dict[str, str]:
    """Build the variables of a process that must not see this one's packages or leave files behind."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    for name in ("VIRTUAL_ENV", "IMAGE_CLASSIFIER_REVISION"):
        variables.pop(name, None)
    (scratch / "tmp").mkdir(exist_ok=True)
    temporary = str(scratch / "tmp")
    return variables | {
        "PYTHONSAFEPATH": "1",  # do not import from the current folder
        "PYTHONNOUSERSITE": "1",
        "TMPDIR": temporary,
        "MPLCONFIGDIR": temporary,
    }


def run_quietly(
    words: Sequence[str], folder: Path, explain: str | Callable[[str], str], variables: Mapping[str, str] | None = None
) -> None:
    """Run a program whose output matters only if it fails. An interrupt kills it and its children.

    Raises:
        RunError: it failed.
        StorageError: the disk is full.
    """
    process = subprocess.Popen(
        words,
        env=variables or build_variables(folder),
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        process_group=0,
    )
    try:
        output, _ = process.communicate()
    except BaseException:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    if process.returncode == 0:
        return
    if "No space left on device" in output or "Disk quota exceeded" in output:
        raise StorageError(f"there is no room for the environment in {folder.parent}; name another disk in TMPDIR")
    reason = explain if isinstance(explain, str) else explain(output)
    raise RunError(f"the run's environment cannot be recreated: {make_printable(reason)[:500]}")


def fetch_wheels(environment: Mapping[str, Any], target: Path, pip: Pip) -> dict[str, Wheel]:
    """Download the wheel of each recorded distribution, by sha256 if that was recorded, else by name and version."""
    hashed, others = [], []
    for name, facts in environment["distributions"].items():
        pinned = f"{name}=={facts['version']}"
        if facts["wheels"]:
            hashed.append(" ".join([pinned, *(f"--hash=sha256:{digest}" for digest in facts["wheels"])]))
        else:
            others.append(pinned)
    target.mkdir()
    pip.download(hashed, target, "--require-hashes")
    pip.download(others, target)
    return {wheel.name: wheel for wheel in map(open_wheel, sorted(target.glob("*.whl")))}


def check_wheels(
    environment: Mapping[str, Any], record: Mapping[str, Any], package: Wheel, found: Mapping[str, Wheel]
) -> int:
    """Check wheels against the files that the run had installed, before any of their code runs.

    In wheels that were not downloaded by sha256, each file is checked against the wheel's RECORD, and RECORD against
    the run's digest.

    Returns:
        The number of wheels that were downloaded by sha256.

    Raises:
        RunError: a wheel has other files, or no distribution requires it.
    """
    num_hashed = 0
    for name, facts in environment["distributions"].items():
        wheel, title = found[name], f"{name} {facts['version']}"
        files = compute_files_digest(list_wheel_files(wheel.read_record()))
        if facts["files"] is not None and files != facts["files"]:
            raise RunError(f"{wheel.path.name} has other files than the {title} that the run had")
        num_hashed += bool(facts["wheels"])
        if not facts["wheels"] and (false := wheel.find_false_file()) is not None:
            raise RunError(f"{wheel.path.name} is damaged: {make_printable(false)} does not match its list of files")
    plugins = [each["distribution"] for each in (record.get("plugins") or {}).values() if each["distribution"]]
    full = environment["python"]["version"]
    variables = {"python_full_version": full, "python_version": get_minor(full)}
    wheels = {**found, DISTRIBUTION: package}
    needed = find_closure(
        [DISTRIBUTION, *plugins], lambda name: wheels[name].list_requirements() if name in wheels else None, variables
    )
    if strange := sorted(found.keys() - needed):
        raise RunError(f"{ENVIRONMENT} names {strange[0]}, which no other distribution needs: it is not installed")
    return num_hashed


def _describe_package(environment: Mapping[str, Any]) -> str:
    package = environment["package"]
    origin = f"commit {package['commit'][:12]}" if package["commit"] else f"code {package['digest'][:12]}"
    return f"Python {get_minor(environment['python']['version'])}, image_classifier {package['version']} ({origin})"


def _verify(python: Path, folder: Path, options: Sequence[str], scratch: Path) -> int:
    """Run the recorded package's `verify`; an interrupt stops it."""
    words = [str(python), "-m", "image_classifier", "verify", str(folder), *options]
    with paused():
        process = subprocess.Popen(words, env=build_variables(scratch))
        try:
            status = process.wait()
        except BaseException:
            with suppress(ProcessLookupError):
                process.terminate()
            try:
                process.wait(_PATIENCE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            raise
    if status < 0:
        raise RunError(f"the verification was ended by {signal.Signals(-status).name}: there is no verdict")
    return status
