"""Checks that a run is finished and that its files match its manifest."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from image_classifier.errors import ModelError, RunError
from image_classifier.progress import track
from image_classifier.published.folder import ATTESTATIONS, PUBLISHED, read_published
from image_classifier.text import count, list_first, quote_unprintable
from image_classifier.tracking.layout import (
    CHECKPOINTS,
    KINDS,
    MANIFEST,
    is_as_described,
    is_part_of_run,
    is_regular,
    list_entries,
)
from image_classifier.tracking.reading import read_manifest

_NUM_NAMED = 10  # files that a message names


def is_finished(folder: Path) -> bool:
    """Say whether a run came to its end: its manifest is written last."""
    return os.path.isfile(folder / MANIFEST)


def check_finished(folder: Path) -> None:
    """Check that a folder holds a finished run, all of whose files are there in their recorded size.

    Raises:
        RunError: it does not; the message says what is missing.
    """
    if not folder.is_dir():
        remedy = "it is a file, so name the folder of its run" if folder.exists() else "correct the path"
        raise RunError(f"there is no run folder {folder}; {remedy}")
    if not is_finished(folder):
        raise RunError(f"{folder} is not a finished run: it has no {MANIFEST}; continue it with --resume")
    for name, facts in _list_expected(folder).items():
        path = folder / name
        if not is_regular(path) or path.stat().st_size != facts["size"]:
            raise RunError(f"{path} is missing or was changed after the run: it should have {facts['size']} bytes")


def find_changed_files(folder: Path) -> list[str]:
    """List the files whose content is not what the manifest says, or that are missing or unknown to it.

    Checkpoints may have been removed all together: Git leaves them out of a run that is committed.

    Raises:
        RunError: the manifest itself is missing or damaged.
    """
    return sorted(_find_differences(folder))


def _find_differences(folder: Path) -> dict[str, str]:
    """Find what is wrong with the files of a run, by name."""
    differences = {}
    expected, present = _list_expected(folder), list_entries(folder)
    for name, facts in expected.items():
        if name not in present:
            differences[name] = "is missing"
        elif present[name] != "file":
            differences[name] = KINDS[present[name]]
        elif not is_as_described(folder / name, facts):
            differences[name] = "is not what the manifest says"
    for name, kind in present.items():
        if name not in expected and is_part_of_run(name):
            differences[name] = "is in no manifest" if kind == "file" else KINDS[kind]
    return differences


def _list_expected(folder: Path) -> dict[str, dict[str, Any]]:
    files = read_manifest(folder)["files"]
    has_checkpoints = os.path.lexists(folder / CHECKPOINTS)
    return {name: facts for name, facts in files.items() if has_checkpoints or not name.startswith(f"{CHECKPOINTS}/")}


@track("checking the run's files")
def verify_files(folder: Path) -> tuple[str, ...]:
    """Check every file of a finished run, and of a model published of it; return what is wrong, a line a file.

    Raises:
        RunError: the folder holds no finished run.
    """
    if not is_finished(folder):
        raise RunError(f"{folder} is not a finished run: it has no {MANIFEST}; continue it with --resume")
    differences = _find_differences(folder)
    lines = [f"{quote_unprintable(name)} {what}" for name, what in sorted(differences.items())]
    if os.path.lexists(folder / PUBLISHED):
        try:
            manifest = read_published(folder / PUBLISHED).manifest
            if manifest.get("run_manifest_digest") != read_manifest(folder)["digest"]:
                raise ModelError(f"{folder / PUBLISHED} was published from another run")
        except ModelError as error:
            lines.append(str(error))
    return tuple(lines)


def describe_others(folder: Path) -> tuple[str, ...]:
    """Say of a run whose files are right what lies beside them: what its own manifest covers, and what none does."""
    lines = []
    if os.path.lexists(folder / PUBLISHED):
        num_files = len(read_published(folder / PUBLISHED).manifest["files"])
        lines.append(f"{num_files} files of {PUBLISHED}/ match their manifest")
    entries = list_entries(folder)
    verdicts = {name for name, kind in entries.items() if kind == "file" and name.startswith(f"{ATTESTATIONS}/")}
    if verdicts:
        lines.append(
            f"not checked here: {count(len(verdicts), 'file')} in {ATTESTATIONS}/; `verify --policy` counts verdicts"
        )
    others = [
        quote_unprintable(name) + ("" if kind == "file" else f", which {KINDS[kind]}")
        for name, kind in sorted(entries.items())
        if not is_part_of_run(name) and name not in {MANIFEST, *verdicts} and not name.startswith(f"{PUBLISHED}/")
    ]
    if others:
        lines.append(f"not checked, because no manifest lists it: {list_first(others, _NUM_NAMED, '; ')}")
    return tuple(lines)
