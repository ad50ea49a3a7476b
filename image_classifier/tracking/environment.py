"""What a run's environment was made of: environment.json, from which `verify --recreate` makes it again.

A distribution is known by the wheels that the lock allows for its version, and by a digest over its files, which needs
no lock. That digest is over what RECORD says: pip copies it from the wheel, so that a wheel and what was installed of
it have the same. What pip writes itself is left out: its notes, scripts, which name the interpreter, and headers.
"""

from __future__ import annotations

import csv
import hashlib
import importlib.metadata
import json
import platform
import posixpath
import re
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import image_classifier
from image_classifier.storage import compute_file_digest
from image_classifier.tracking.layout import FORMAT_VERSION

DISTRIBUTION = "image-classifier"
EXTRAS = ("parquet", "database")
"""Those that the training image has: whatever is installed of them may have read the data."""

_FOLDER = Path(image_classifier.__file__).parent
_LOCK = "requirements-prod.txt"
_NOTES = {"INSTALLER", "REQUESTED", "RECORD", "RECORD.jws", "RECORD.p7s", "direct_url.json", "uv_cache.json"}
_LOCKED = re.compile(r"^([A-Za-z0-9._-]+)==(\S+)((?: *\\\n +--hash=sha256:[0-9a-f]{64})+)", re.MULTILINE)


def find_lock() -> Path | None:
    """Find the lock of what training runs on: in the package that was installed, or beside it in a clone."""
    places = (_FOLDER / _LOCK, _FOLDER.parent / "requirements" / _LOCK)
    return next((path for path in places if path.is_file()), None)


def parse_lock(text: str) -> dict[tuple[str, str], list[str]]:
    """Parse pip-tools' lock: the sha256 of the files of each name and version."""
    return {
        (canonicalize_name(name), version): re.findall(r"[0-9a-f]{64}", hashes)
        for name, version, hashes in _LOCKED.findall(text)
    }


def describe_installation(code: Mapping[str, Any], plugins: Iterable[str] = ()) -> dict[str, Any]:
    """Describe what is installed here, as far as a run may import it.

    Args:
        code: of the run's record.
        plugins: distributions of plug-ins, which belong to it with what they need.
    """
    lock = find_lock()
    return {
        "format_version": FORMAT_VERSION,
        "python": {
            "version": platform.python_version(),
            "implementation": sys.implementation.name,
            "platform": sysconfig.get_platform(),
        },
        "package": {"name": DISTRIBUTION, **code, "wheel": _get_wheel_digest(DISTRIBUTION)},
        "lock_digest": compute_file_digest(lock) if lock else None,
        "distributions": _describe_distributions(lock, tuple(plugins)),
    }


@cache  # 0.2 s, which a sweep would pay for each trial
def _describe_distributions(lock: Path | None, plugins: tuple[str, ...]) -> dict[str, Any]:
    locked = parse_lock(lock.read_text(encoding="utf-8")) if lock else {}
    names = find_closure([DISTRIBUTION, *plugins], _get_installed_requirements) - {DISTRIBUTION}
    return {name: _describe_distribution(name, locked) for name in sorted(names)}


def _describe_distribution(name: str, locked: Mapping[tuple[str, str], Sequence[str]]) -> dict[str, Any]:
    distribution = importlib.metadata.distribution(name)
    wheel, record = _get_wheel_digest(name), distribution.read_text("RECORD")
    is_installed = record and "editable" not in (_read_origin(name).get("dir_info") or {})
    return {
        "version": distribution.version,
        "files": compute_files_digest(list_installed_files(record)) if record and is_installed else None,
        "wheels": [wheel] if wheel else list(locked.get((name, distribution.version), [])),
    }


def _get_installed_requirements(name: str) -> list[str] | None:
    try:
        return importlib.metadata.requires(name) or []
    except importlib.metadata.PackageNotFoundError:  # a requirement for another platform, or not installed
        return None


def _get_wheel_digest(name: str) -> str | None:
    """Get the sha256 of the wheel that a distribution is of, which pip notes where a file or a URL was named."""
    hashes = (_read_origin(name).get("archive_info") or {}).get("hashes") or {}
    digest = hashes.get("sha256")
    return digest if isinstance(digest, str) else None


def _read_origin(name: str) -> dict[str, Any]:
    try:
        origin = json.loads(importlib.metadata.distribution(name).read_text("direct_url.json") or "{}")
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return {}
    return origin if isinstance(origin, dict) else {}


def find_closure(
    names: Iterable[str], get_requirements: Callable[[str], Iterable[str] | None], variables: Mapping[str, str] = {}
) -> set[str]:
    """Find the names of distributions and of all that they need, with the extras that they ask for.

    Args:
        get_requirements: gives those of a distribution, or None where there is no such one.
        variables: of environment markers, where they are not this interpreter's.
    """
    found: set[tuple[str, str]] = set()
    requirements: dict[str, list[Requirement] | None] = {}
    pending = [(str(canonicalize_name(name)), "") for name in names] + [(DISTRIBUTION, extra) for extra in EXTRAS]
    while pending:
        name, extra = pending.pop()
        if name not in requirements:
            texts = get_requirements(name)
            requirements[name] = None if texts is None else list(map(Requirement, texts))
        needed = requirements[name]
        if needed is None or (name, extra) in found:
            continue
        found.add((name, extra))
        for requirement in needed:
            if requirement.marker is None or requirement.marker.evaluate({**variables, "extra": extra}):
                pending += [(canonicalize_name(requirement.name), each) for each in ("", *requirement.extras)]
    return {name for name, _ in found}


def list_installed_files(record: str) -> Iterator[tuple[str, str]]:
    """List path and hash of what a wheel has brought, from the RECORD of what was installed."""
    for path, digest in _iterate_record(record):
        path = posixpath.normpath(path)
        outside = path.removeprefix("../").lstrip("./") if path.startswith("../") else None
        yield from _list_data(outside, digest) if outside is not None else [(path, digest)]


def list_wheel_files(record: str) -> Iterator[tuple[str, str]]:
    """List the same from the RECORD of the wheel itself."""
    for path, digest in _iterate_record(record):
        folder, _, rest = path.partition("/")
        kind, _, inner = rest.partition("/")
        if not folder.endswith(".data"):
            yield path, digest
        elif kind in ("purelib", "platlib"):
            yield inner, digest
        elif kind == "data":
            yield from _list_data(inner, digest)


def _list_data(path: str, digest: str) -> Iterator[tuple[str, str]]:
    if path.partition("/")[0] not in ("bin", "include"):  # scripts and headers: where pip puts them, beside its own
        yield f"data/{path}", digest


def _iterate_record(record: str) -> Iterator[tuple[str, str]]:
    for row in csv.reader(record.splitlines()):
        path, digest = (*row, "", "")[:2]
        folder, _, name = path.partition("/")
        if digest and not (folder.endswith(".dist-info") and name in _NOTES):  # what was compiled has no hash
            yield path, digest


def compute_files_digest(files: Iterable[tuple[str, str]]) -> str:
    """Compute the sha256 over paths and hashes, in sorted order."""
    lines = sorted(f"{path}\0{digest}\n" for path, digest in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()
