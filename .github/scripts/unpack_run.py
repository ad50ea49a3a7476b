#!/usr/bin/env python3
"""Take a published run out of an artifact, a zip file or a folder: unpack_run.py ARTIFACT TARGET

Only what a manifest names is taken, the run's and that of the published model in it, and only if its size and sha256
are what the manifest says. What else is there is named on stderr and left behind. Anything that is no plain file, or
that has a name which no run has, is refused. Prints the names of the experiment and of the run.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from image_classifier.errors import ImageClassifierError, RunError
from image_classifier.published import folder as published
from image_classifier.storage import storage_error
from image_classifier.tracking import checking, layout, reading

MAX_MEMBERS = 10_000
MAX_BYTES = 2**31
"""Of all that is taken; a run of the recipe with the largest network has 0.2 GB, its checkpoints included."""
MAX_RATIO = 200
"""Of a zip file, between what it unpacks to and its own size; weights do not shrink, and text does by 10."""
MAX_DOCUMENT_BYTES = 2**24
"""Of each file of JSON that is read before anything is known of it."""

NAME = re.compile(r"(?!\.{1,2}$)[A-Za-z0-9_.][A-Za-z0-9_.+ -]{0,254}")
"""Of a file or folder in an artifact: no way out of it, and nothing that a terminal would take for a command."""
COMMITTED_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+ -]{0,254}")
"""Of one that is committed: nothing that Git would read, such as .gitattributes."""
FOLDER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
"""Of an experiment or a run that is committed."""


@dataclass(frozen=True)
class Artifact:
    """What an artifact holds: the size of each file by name, and how one is opened."""

    sizes: dict[str, int]
    open: Callable[[str], BinaryIO]


def main(words: list[str]) -> int:
    """Unpack what the command line names and return the exit status."""
    if len(words) != 2:
        print("error: usage: unpack_run.py ARTIFACT TARGET", file=sys.stderr)
        return 2
    path, target = map(Path, words)
    try:
        with ExitStack() as stack:
            artifact = open_folder(path) if path.is_dir() else open_zip(path, stack)
            record, left_behind = unpack(artifact, path, target)
    except (ImageClassifierError, OSError) as error:
        shutil.rmtree(target, ignore_errors=True)
        shown = storage_error(target, error) if isinstance(error, OSError) else error
        print(f"error: {shown}", file=sys.stderr)
        return 2
    if left_behind:
        more = f" and {len(left_behind) - 10} more" if len(left_behind) > 10 else ""
        print(f"left behind, as no manifest names it: {', '.join(left_behind[:10])}{more}", file=sys.stderr)
    print(record["experiment_name"], record["run_name"], sep="\n")
    return 0


def open_folder(path: Path) -> Artifact:
    """List a folder.

    Raises:
        RunError: it holds what no run has.
    """
    sizes: dict[str, int] = {}
    for here, folders, names in os.walk(path):
        for name in (*folders, *names):
            entry = Path(here, name)
            status = entry.lstat()
            relative = entry.relative_to(path).as_posix()
            check_kind(relative, status.st_mode)
            if not stat.S_ISDIR(status.st_mode):
                sizes[relative] = status.st_size
            if len(sizes) > MAX_MEMBERS:
                raise RunError(f"{path} holds more than {MAX_MEMBERS:,} files; no run does")
    check_names(sizes)

    def open_file(name: str) -> BinaryIO:
        return open(os.open(path / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb")

    return Artifact(sizes, open_file)


def open_zip(path: Path, stack: ExitStack) -> Artifact:
    """List a zip file.

    Raises:
        RunError: it is none, or holds what no run has, or unpacks to much more than its own size.
    """
    try:
        archive = stack.enter_context(zipfile.ZipFile(path))
        members = archive.infolist()
    except (OSError, zipfile.BadZipFile, NotImplementedError, ValueError) as error:  # of zipfile, for a damaged file
        raise RunError(f"{path} is no zip file, and no folder: {error}") from error
    if len(members) > MAX_MEMBERS:
        raise RunError(f"{path} holds more than {MAX_MEMBERS:,} files; no run does")
    sizes: dict[str, int] = {}
    for member in members:
        name = member.orig_filename.removesuffix("/")  # not cut at a zero byte, as filename is
        check_kind(name, member.external_attr >> 16)
        if member.flag_bits & 1:
            raise RunError(f"{name!a} is encrypted; unpack it first")
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise RunError(f"{name!a} is compressed in another way than deflated; unpack it first")
        if not member.orig_filename.endswith("/"):
            if name in sizes:
                raise RunError(f"{path} holds {name!a} twice")
            sizes[name] = member.file_size
    check_names(sizes)
    size = path.stat().st_size
    if sum(sizes.values()) > MAX_RATIO * size:
        raise RunError(f"{path} has {size:,} bytes and unpacks to {sum(sizes.values()):,}: no run shrinks so much")

    def open_member(name: str) -> BinaryIO:
        return archive.open(name)  # type: ignore[return-value]  # it is read as one

    return Artifact(sizes, open_member)


def check_kind(name: str, mode: int) -> None:
    """Check that a member is a file or a folder; a zip file need not say."""
    if stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
        kind = "a symbolic link" if stat.S_ISLNK(mode) else "no file"
        raise RunError(f"{name!a} is {kind}; a published run has only files")


def check_names(names: Iterable[str], pattern: re.Pattern[str] = NAME) -> None:
    """Check that names are such as a run may have, and differ by more than case."""
    seen: dict[str, str] = {}
    for name in names:
        if not all(pattern.fullmatch(part) for part in name.split("/")):
            raise RunError(f"{name!a} is no name of a file in a run")
        for end in (index for index, letter in enumerate(f"{name}/") if letter == "/"):
            former = seen.setdefault(name[:end].casefold(), name[:end])
            if former != name[:end]:
                raise RunError(f"{former!a} and {name[:end]!a} differ by case alone")


def unpack(artifact: Artifact, path: Path, target: Path) -> tuple[dict[str, str], list[str]]:
    """Write the run to a folder that is made; return its record, and what was left behind.

    Raises:
        RunError: it is no finished run, or a file is not what its manifest says.
        ModelError: the published model in it is not what its manifest says.
    """
    for name in (layout.RECORD, layout.MANIFEST):
        if name not in artifact.sizes:
            raise RunError(f"{path} holds no {name}: it is no run that was published")
    target.mkdir()
    write(artifact, layout.MANIFEST, target, MAX_DOCUMENT_BYTES)
    manifest = reading.read_manifest(target)
    check_names(manifest["files"], COMMITTED_NAME)
    if layout.RECORD not in manifest["files"]:
        raise RunError(f"the manifest of {path} does not name {layout.RECORD}")
    wanted = {name: facts["size"] for name, facts in manifest["files"].items() if name in artifact.sizes}
    wanted |= find_published(artifact, target)
    if sum(wanted.values()) > MAX_BYTES:
        raise RunError(f"{path} holds a run of {sum(wanted.values()):,} bytes; at most {MAX_BYTES:,} are taken")
    for name, size in wanted.items():
        write(artifact, name, target, size)
    wrong = checking.verify_files(target)
    if wrong:
        raise RunError(f"{path} is no whole run: {wrong[0]}")
    record = reading.read_record(target)
    for key in ("experiment_name", "run_name"):
        if not isinstance(record.get(key), str) or not FOLDER.fullmatch(record[key]):
            raise RunError(f"{str(record.get(key))[:200]!a} is no name of a folder that is committed")
    taken = {*wanted, layout.MANIFEST, f"{published.PUBLISHED}/{published.MANIFEST}"}
    return record, sorted(name for name in artifact.sizes if name not in taken)


def find_published(artifact: Artifact, target: Path) -> dict[str, int]:
    """Find the files of the published model, if there is one with a manifest; take that, and return the others."""
    folder = published.PUBLISHED
    if f"{folder}/{published.MANIFEST}" not in artifact.sizes:
        return {}
    (target / folder).mkdir()
    write(artifact, f"{folder}/{published.MANIFEST}", target, MAX_DOCUMENT_BYTES)
    files = published.read_manifest(target / folder)["files"]
    check_names(files, COMMITTED_NAME)
    sizes: dict[str, int] = {f"{folder}/{name}": facts["size"] for name, facts in files.items()}
    signature = f"{folder}/{published.SIGNATURE}"
    if signature in artifact.sizes:
        sizes[signature] = min(artifact.sizes[signature], MAX_DOCUMENT_BYTES)
    return {name: size for name, size in sizes.items() if name in artifact.sizes}


def write(artifact: Artifact, name: str, target: Path, size: int) -> None:
    """Write a file of at most so many bytes.

    Raises:
        RunError: it has more, or cannot be read.
    """
    path = target / name
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with artifact.open(name) as source, open(path, "xb") as file:
            while piece := source.read(min(2**20, size + 1 - file.tell())):
                file.write(piece)
                if file.tell() > size:
                    raise RunError(f"{name} has more than the {size:,} bytes that it should have")
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, RuntimeError) as error:
        # RuntimeError: zipfile's, of a member that says in its own header that it is encrypted or a patch.
        raise RunError(f"{name} cannot be unpacked: {error}") from error


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
