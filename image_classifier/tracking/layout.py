"""The file names of a run folder, and which files belong to the run."""

from __future__ import annotations

import hashlib
import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any

from image_classifier.errors import RunError
from image_classifier.published.folder import ATTESTATIONS, PUBLISHED, RUN_RECORD
from image_classifier.storage import TEMPORARY_PREFIX

FORMAT_VERSION = 1


RECORD = RUN_RECORD


ENVIRONMENT = "environment.json"


METRICS = "metrics.jsonl"


CHAIN = "digests.jsonl"


EVALUATION = "evaluation.json"


PREDICTIONS = "predictions.npz"


MODEL = "model.pth"


FIGURE = "metrics.png"


MANIFEST = "manifest.json"


CHECKPOINTS = "checkpoints"


PROFILE = "profile"


BOARD = "tensorboard"


ADDED_LATER = ("report.html", PROFILE, BOARD, PUBLISHED, ATTESTATIONS)
"""What may lie in a run folder without being part of the run."""


_PIECE = 2**20  # bytes that are hashed at once


KINDS = {"link": "is a symbolic link", "special": "is no file"}


def describe_file(path: Path, size: int | None = None) -> dict[str, Any]:
    """Describe a file, or its first bytes, by size and sha256."""
    digest, num_bytes = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while piece := file.read(_PIECE if size is None else min(_PIECE, size - num_bytes)):
            digest.update(piece)
            num_bytes += len(piece)
    return {"size": num_bytes, "sha256": digest.hexdigest()}


def is_as_described(path: Path, facts: dict[str, Any], *, may_go_on: bool = False) -> bool:
    """Say whether a file, or its first bytes, are as they were described.

    Raises:
        RunError: it cannot be read, so that nothing can be said.
    """
    try:
        if not may_go_on and path.stat().st_size != facts["size"]:
            return False
        return describe_file(path, facts["size"] if may_go_on else None) == facts
    except (FileNotFoundError, ValueError):  # a name may be none that the system takes
        return False
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror}; check the disk") from error


def list_run_files(folder: Path) -> list[str]:
    """List the files that are part of a run, relative to its folder, sorted; the manifest itself is left out."""
    return sorted(name for name, kind in list_entries(folder).items() if kind == "file" and is_part_of_run(name))


def is_part_of_run(name: str) -> bool:
    parts = name.split("/")
    return parts[0] not in (MANIFEST, *ADDED_LATER) and not any(part.startswith(TEMPORARY_PREFIX) for part in parts)


def list_entries(folder: Path) -> dict[str, str]:
    """List all that lies in a folder and is no folder, relative to it: a file, a link, or something else."""
    kinds = {}
    try:
        for here, folders, names in os.walk(folder, onerror=_refuse):
            for name in (*names, *folders):
                with suppress(FileNotFoundError):  # another process's temporary file, which it has finished
                    path = Path(here, name)
                    mode = path.lstat().st_mode
                    if not stat.S_ISDIR(mode):
                        kind = "file" if stat.S_ISREG(mode) else "link" if stat.S_ISLNK(mode) else "special"
                        kinds[path.relative_to(folder).as_posix()] = kind
    except OSError as error:
        raise RunError(f"{error.filename} cannot be read: {error.strerror}") from error
    return kinds


def _refuse(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


def is_regular(path: Path) -> bool:
    """Say whether a path is that of a file itself: a link may lead anywhere, and a pipe is waited for."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False
