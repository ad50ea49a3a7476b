"""The run folder: its record, its growing files, and the manifest that makes it a finished run."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import stat
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from image_classifier.config import DEFAULT_IMAGE_SIZE, DatabaseAccess, Reading, get_reference, resolve_password
from image_classifier.errors import DataError, ModelError, RunBusyError, RunError
from image_classifier.files import LimitError, check_form, load_json, load_json_lines, read_file
from image_classifier.progress import track
from image_classifier.published.folder import ATTESTATIONS, PUBLISHED, check_published, one_line
from image_classifier.storage import (
    DISK,
    TEMPORARY_PREFIX,
    Disk,
    locked_folder,
    storage_error,
    write_atomically,
    write_folder_atomically,
)

FORMAT_VERSION = 1
RECORD = "run.json"
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
_NUM_NAMED = 10  # files that a message names
_DESCRIPTIONS = {"link": "is a symbolic link", "special": "is no file"}
MAX_PREDICTIONS_BYTES = 2**28
"""Of predictions.npz, packed and unpacked: 60,000 images of 1,000 classes."""
_NONE = type(None)
_DIGEST = {"digest": str}
_RECORD_FORM = {
    **dict.fromkeys(("experiment_name", "run_name", "started_at"), str),
    "recipe": (str, _NONE),  # none where the settings were given in Python
    "command": [str],
    "settings": {"model": str, "seed": int, "num_epochs": int},
    "execution": {"dataset_folder": str, "experiments_folder": str, "pretrained_model": (str, _NONE)},
    "data": {"name": str, "classes": [str], "num_train": int, "num_test": int, **_DIGEST},
    "pretrained": ({"path": str, **_DIGEST}, _NONE),
    "code": {"version": str, "commit": (str, _NONE), **_DIGEST},
    "environment": {"python": str, "distributions": {str: str}, **_DIGEST},
    "machine": {"class": {}, **_DIGEST},
}
_RATE = (float, int, _NONE)
_EVALUATION_FORM = {
    "num_images": int,
    "views": str,
    **dict.fromkeys(("accuracy", "accuracy_single_view", "top5_accuracy", "loss", "expected_calibration_error"), float),
    "per_class": {str: {**dict.fromkeys(("accuracy", "precision", "f1"), _RATE), "support": int}},
    "macro": {"f1": float},
    "confusion_matrix": [[int]],
}
_EPOCH_FORM = {
    **dict.fromkeys(("epoch", "step"), int),
    **dict.fromkeys(("train_loss", "train_accuracy", "learning_rate", "seconds"), float),
    "loss_by_part": [float],
}
_MANIFEST_FORM = {"files": {str: {"size": int, "sha256": str}}, "digest": str}
"""What others than the run itself rely on in these files."""


class RunFolder:
    """A run folder that is being written, by this process alone.

    Args:
        path: the folder; it exists.
        disk: the seam through which everything is written.
    """

    def __init__(self, path: Path, disk: Disk = DISK) -> None:
        self.path = path
        self.disk = disk
        self._status = path.stat()

    def check_place(self) -> None:
        """Check that the path still names the folder that was opened: what follows would go into another run.

        Raises:
            RunError: it was moved, removed or replaced.
        """
        try:
            is_there = os.path.samestat(self._status, self.path.stat())
        except FileNotFoundError:
            is_there = False
        except OSError:  # the write that follows says it better
            return
        if not is_there:
            raise RunError(
                f"{self.path} was moved, removed or replaced while it was written to, so that nothing more is written; "
                "put it back and continue with --resume"
            )

    def write(self, name: str, content: bytes) -> str:
        """Write one of the run's files whole and durably; return its sha256."""
        self.check_place()
        return write_atomically(self.path / name, content, self.disk)

    def write_folder(self, name: str, files: dict[str, bytes]) -> None:
        """Write a folder beside the run's files whole, in the place of an earlier one."""
        self.check_place()
        write_folder_atomically(self.path / name, files, self.disk, replace=True)

    def write_json(self, name: str, value: Any) -> str:
        """Write a value as readable, strict JSON."""
        return self.write(name, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())

    def append_line(self, name: str, value: dict[str, Any]) -> None:
        """Append a line of JSON to a growing file, whole or not at all; `sync_lines` makes it durable."""
        self.check_place()
        path, size = self.path / name, 0
        try:
            size = path.stat().st_size if path.exists() else 0
            self.disk.append(path, (json.dumps(value, allow_nan=False) + "\n").encode())
        except OSError as error:
            with suppress(OSError):
                os.truncate(path, size)
            raise storage_error(path, error) from error

    def sync_lines(self) -> dict[str, dict[str, Any]]:
        """Force the growing files onto the disk; return the size and sha256 of each, for a checkpoint to remember."""
        self.check_place()
        try:
            paths = [self.path / name for name in (METRICS, CHAIN) if (self.path / name).exists()]
            for path in paths:
                self.disk.sync(path)
            self.disk.sync(self.path)
            return {path.name: _describe_file(path) for path in paths}
        except OSError as error:
            raise storage_error(self.path, error) from error

    def check_lines(self, lines: dict[str, dict[str, Any]]) -> None:
        """Check that the growing files still begin with what a checkpoint remembers of them.

        Raises:
            RunError: one is shorter, or was changed.
        """
        for name, facts in lines.items():
            if not _is_as_described(self.path / name, facts, may_go_on=True):
                raise RunError(f"{self.path / name} has lost or changed lines that the checkpoint counts on")

    def cut_lines(self, lines: dict[str, dict[str, Any]]) -> None:
        """Cut the growing files back to where they stood at a checkpoint, or to nothing."""
        for name in (METRICS, CHAIN):
            path, size = self.path / name, lines.get(name, {"size": 0})["size"]
            try:
                if path.exists() and path.stat().st_size > size:
                    self.disk.truncate(path, size)
            except OSError as error:
                raise storage_error(path, error) from error

    def finish(self, **facts: Any) -> None:
        """Write the manifest over every file of the run: from then on the run is finished."""
        files = {name: _describe_file(self.path / name) for name in list_run_files(self.path)}
        manifest = {"format_version": FORMAT_VERSION, **facts, "files": files}
        self.write_json(MANIFEST, {**manifest, "digest": _compute_manifest_digest(manifest)})


def _describe_file(path: Path, size: int | None = None) -> dict[str, Any]:
    """Describe a file, or its first bytes, by size and sha256."""
    digest, num_bytes = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while piece := file.read(_PIECE if size is None else min(_PIECE, size - num_bytes)):
            digest.update(piece)
            num_bytes += len(piece)
    return {"size": num_bytes, "sha256": digest.hexdigest()}


def _is_as_described(path: Path, facts: dict[str, Any], *, may_go_on: bool = False) -> bool:
    """Say whether a file, or its first bytes, are as they were described.

    Raises:
        RunError: it cannot be read, so that nothing can be said.
    """
    try:
        if not may_go_on and path.stat().st_size != facts["size"]:
            return False
        return _describe_file(path, facts["size"] if may_go_on else None) == facts
    except (FileNotFoundError, ValueError):  # a name may be none that the system takes
        return False
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror}; check the disk") from error


def list_run_files(folder: Path) -> list[str]:
    """List the files that are part of a run, relative to its folder, sorted; the manifest itself is left out."""
    return sorted(name for name, kind in _list_entries(folder).items() if kind == "file" and _is_part_of_run(name))


def _is_part_of_run(name: str) -> bool:
    parts = name.split("/")
    return parts[0] not in (MANIFEST, *ADDED_LATER) and not any(part.startswith(TEMPORARY_PREFIX) for part in parts)


def _list_entries(folder: Path) -> dict[str, str]:
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


@contextmanager
def open_run_folder(path: Path, *, resume: bool, disk: Disk = DISK) -> Iterator[RunFolder]:
    """Create a run's folder, or open the one to resume, and hold a lock on it that dies with the process.

    What a killed process had begun to write is removed, and so is a folder that was created and got no record.

    Raises:
        RunError: it exists (or, to resume, does not, or is no run's), or another process is writing it.
        StorageError: the disk refuses.
    """
    error = RunBusyError(f"another process is training into {path}; wait for it, or choose another --run_name")
    with ExitStack() as stack:
        try:
            created = _find_resumable(path) if resume else _create_folders(path, disk)
            stack.enter_context(locked_folder(path, error))
            stack.callback(_remove_without_record, path, created)
            for leftover in path.glob(f"{TEMPORARY_PREFIX}*"):  # nobody else writes here: the lock is held
                disk.remove(leftover)
        except FileExistsError as error:
            raise run_exists_error(path) from error
        except OSError as error:
            raise storage_error(path, error) from error
        yield RunFolder(path, disk)


def _find_resumable(path: Path) -> list[Path]:
    """Check that a folder holds a run, or what a killed process has left of its beginning; no folder is created."""
    if not path.is_dir():
        raise RunError(f"there is no run {path} to resume; leave out --resume to start it")
    names = sorted(name for name in os.listdir(path) if not name.startswith(TEMPORARY_PREFIX))
    if names and RECORD not in names:
        raise RunError(f"{path} holds {names[0]} but no {RECORD}: it is no run that could be resumed")
    return []


def _create_folders(path: Path, disk: Disk, num_tries: int = 10) -> list[Path]:
    """Create a folder and those missing above it, durably and all or none; return which, the outermost first.

    Raises:
        FileExistsError: the folder itself exists.
    """
    created: list[Path] = []
    try:
        for folder in (*reversed(path.parents), path):
            if folder != path and folder.is_dir():
                continue
            try:
                disk.make_folder(folder)
            except FileExistsError as error:
                if folder == path:
                    raise
                if not folder.is_dir():
                    raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder)) from error
                continue  # another process has made it at the same moment
            created.append(folder)
            disk.sync(folder.parent)
    except BaseException as error:
        _remove_without_record(path, created)
        if isinstance(error, FileNotFoundError) and num_tries > 1:  # another process has removed what it had made
            return _create_folders(path, disk, num_tries - 1)
        raise
    return created


def _remove_without_record(path: Path, created: list[Path]) -> None:
    with suppress(OSError):  # a folder that holds something stays
        if not os.path.exists(path / RECORD):  # False, and no error, for a name that is too long
            for folder in reversed(created):
                folder.rmdir()


def run_exists_error(path: Path) -> RunError:
    """Say that a run folder is taken, with the advice that fits."""
    advice = "choose another --run_name"
    if path.is_dir() and not is_finished(path):
        advice += ", or continue it with --resume"
    return RunError(f"the run folder {path} exists already; {advice}")


def is_finished(folder: Path) -> bool:
    """Say whether a run came to its end: its manifest is written last."""
    return os.path.isfile(folder / MANIFEST)


def check_finished(folder: Path) -> None:
    """Check that a folder holds a finished run, all of whose files are there in their recorded size.

    Raises:
        RunError: it does not; the message says what is missing.
    """
    if not folder.is_dir():
        raise RunError(f"there is no run folder {folder}")
    if not is_finished(folder):
        raise RunError(f"{folder} is not a finished run: it has no {MANIFEST}; continue it with --resume")
    for name, facts in _list_expected(folder).items():
        path = folder / name
        if not _is_regular(path) or path.stat().st_size != facts["size"]:
            raise RunError(f"{path} is missing or was changed after the run: it should have {facts['size']} bytes")


def _is_regular(path: Path) -> bool:
    """Say whether a path is that of a file itself: a link may lead anywhere, and a pipe is waited for."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False


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
    expected, present = _list_expected(folder), _list_entries(folder)
    for name, facts in expected.items():
        if name not in present:
            differences[name] = "is missing"
        elif present[name] != "file":
            differences[name] = _DESCRIPTIONS[present[name]]
        elif not _is_as_described(folder / name, facts):
            differences[name] = "is not what the manifest says"
    for name, kind in present.items():
        if name not in expected and _is_part_of_run(name):
            differences[name] = "is in no manifest" if kind == "file" else _DESCRIPTIONS[kind]
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
    lines = [f"{_make_printable(name)} {what}" for name, what in sorted(differences.items())]
    if os.path.lexists(folder / PUBLISHED):
        try:
            published = check_published(folder / PUBLISHED)
            if published.get("run_manifest_digest") != read_manifest(folder)["digest"]:
                raise ModelError(f"{folder / PUBLISHED} was published of another run")
        except ModelError as error:
            lines.append(str(error))
    return tuple(lines)


def describe_others(folder: Path) -> tuple[str, ...]:
    """Say of a run whose files are right what lies beside them: what its own manifest covers, and what none does."""
    lines = []
    if os.path.lexists(folder / PUBLISHED):
        num_files = len(check_published(folder / PUBLISHED)["files"])
        lines.append(f"{num_files} files of {PUBLISHED}/ are as the manifest there has them")
    others = [
        _make_printable(name) + ("" if kind == "file" else f", which {_DESCRIPTIONS[kind]}")
        for name, kind in sorted(_list_entries(folder).items())
        if not _is_part_of_run(name) and name != MANIFEST and not name.startswith(f"{PUBLISHED}/")
    ]
    if others:
        more = f" and {len(others) - _NUM_NAMED} more" if len(others) > _NUM_NAMED else ""
        lines.append(f"not checked, as no manifest names it: {'; '.join(others[:_NUM_NAMED])}{more}")
    return tuple(lines)


def _make_printable(name: str) -> str:
    return name if name.isprintable() else ascii(name)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read manifest.json: `files` by name with `size` and `sha256`, `weights_digest`, `chain_head`, and its `digest`.

    Raises:
        RunError: it is missing or damaged, or names files that cannot be a run's.
    """
    manifest = _read_json(folder / MANIFEST, _MANIFEST_FORM)
    if manifest["digest"] != _compute_manifest_digest(manifest):
        raise RunError(f"{folder / MANIFEST} is damaged: its content does not have the digest that it names")
    files = manifest["files"]
    for name in files if isinstance(files, dict) else ("files",):
        if not isinstance(files, dict) or not _is_description(name, files[name]):
            raise RunError(f"{folder / MANIFEST} is damaged: {name!a} is no file of a run, with its size and sha256")
    return manifest


def _is_description(name: str, facts: Any) -> bool:
    """Say whether a manifest's entry describes a file that lies in the run folder, and that is part of the run."""
    is_name = name.isprintable() and "\\" not in name and _is_part_of_run(name)
    is_inside = all(part not in ("", ".", "..") and len(os.fsencode(part)) < 256 for part in name.split("/"))
    has_facts = isinstance(facts, dict) and isinstance(facts.get("sha256"), str)
    has_size = has_facts and type(facts.get("size")) is int and facts["size"] >= 0
    return is_name and is_inside and has_size


def _compute_manifest_digest(manifest: dict[str, Any]) -> str:
    content = {key: value for key, value in manifest.items() if key != "digest"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def read_record(folder: Path) -> dict[str, Any]:
    """Read run.json."""
    return _read_json(folder / RECORD, _RECORD_FORM)


def find_dataset(
    folder: Path, dataset_folder: Path | None = None, access: DatabaseAccess | None = None
) -> tuple[Path, DatabaseAccess, Reading]:
    """Find the data set of a run, in its record unless it is named, how it is reached if it lies in a database, and how
    its files are read.

    Raises:
        DataError: the folder that the record names is there no longer.
    """
    access = access or DatabaseAccess(password=resolve_password(None))
    record = read_record(folder)
    execution = record["execution"]
    image_size = record["settings"].get("image_size", DEFAULT_IMAGE_SIZE)
    reading = Reading(
        fit=execution.get("fit", "squeeze"), skip_bad=execution.get("skip_bad", False), image_size=image_size
    )
    if dataset_folder is not None:
        return dataset_folder, access, Reading(image_size=image_size) if get_reference(dataset_folder) else reading
    dataset_folder = Path(execution["dataset_folder"])
    if execution.get("database"):
        config = access.config or (execution["db_config"] and Path(execution["db_config"]))
        return (
            Path(f"db:{execution['database']}"),
            replace(access, config=config, dataset_folder=dataset_folder),
            reading,
        )
    if not dataset_folder.exists():
        raise DataError(f"the data set of {folder} was at {dataset_folder}, where nothing is; give --dataset_folder")
    return dataset_folder, access, reading


def read_evaluation(folder: Path) -> dict[str, Any]:
    """Read evaluation.json."""
    evaluation = _read_json(folder / EVALUATION, _EVALUATION_FORM)
    num_classes = len(evaluation["per_class"])
    if [len(row) for row in evaluation["confusion_matrix"]] != [num_classes] * num_classes:
        raise RunError(f"{folder / EVALUATION} is damaged: its confusion_matrix is not one of {num_classes} classes")
    return evaluation


def read_epochs(folder: Path) -> list[dict[str, Any]]:
    """Read metrics.jsonl: a dictionary an epoch."""
    return _read_lines(folder / METRICS, _EPOCH_FORM)


def read_chain(folder: Path) -> list[dict[str, Any]]:
    """Read digests.jsonl: a dictionary for each digest of the state, and for each break."""
    lines = _read_lines(folder / CHAIN, {"step": int, "digest": str})
    for line in lines:
        if "break" not in line and not isinstance(line.get("tensors"), dict):
            raise RunError(f"{folder / CHAIN} is damaged: a line has neither tensors nor a break")
    return lines


def read_predictions(folder: Path) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Read predictions.npz: probabilities [N, C] and labels [N] of the test set.

    Raises:
        RunError: the file is missing or damaged.
    """
    path = folder / PREDICTIONS
    try:
        content = io.BytesIO(read_file(path, MAX_PREDICTIONS_BYTES))
        if content.getvalue().count(b"PK\1\2") > 100:  # each entry of its directory begins so
            raise ValueError("it has more than 2 arrays")
        with zipfile.ZipFile(content) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > MAX_PREDICTIONS_BYTES:
                raise LimitError(f"it unpacks to more than the {MAX_PREDICTIONS_BYTES:,} bytes that are read")
            probabilities = _parse_array(archive.read("probabilities.npy"), np.dtype(np.float32), 2)
            labels = _parse_array(archive.read("labels.npy"), np.dtype(np.int64), 1)
        if len(probabilities) != len(labels) or not len(labels):
            raise ValueError(f"it has {len(probabilities):,} rows of probabilities for {len(labels):,} labels")
        if not np.isfinite(probabilities).all() or labels.min() < 0 or labels.max() >= probabilities.shape[1]:
            raise ValueError("it has a probability that is no number, or a label of no class")
    except Exception as error:  # what a damaged archive raises is of many types: zlib.error, BadZipFile, ...
        raise RunError(f"{path} is missing or damaged: {one_line(error)}") from error
    return probabilities, labels


def _parse_array(content: bytes, dtype: np.dtype[Any], num_dimensions: int) -> NDArray[Any]:
    """Parse an .npy file of this type; np.load would take the memory that its head asks for."""
    stream = io.BytesIO(content)
    if np.lib.format.read_magic(stream) != (1, 0):
        raise ValueError("it has an array of a later format")
    shape, is_fortran, found = np.lib.format.read_array_header_1_0(stream)
    if found != dtype or is_fortran or len(shape) != num_dimensions:
        raise ValueError(f"it has an array of {found} {list(shape)[:5]}")
    return np.frombuffer(content, dtype, offset=stream.tell()).reshape(shape)


def serialize_predictions(probabilities: NDArray[np.float32], labels: NDArray[np.int64]) -> bytes:
    """Serialize predictions as a compressed .npz."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, probabilities=probabilities, labels=labels)
    return buffer.getvalue()


def _read_json(path: Path, form: Any) -> dict[str, Any]:
    try:
        value: dict[str, Any] = load_json(path)
        check_form(value, {"format_version": int})
        version = value["format_version"]
        if version > FORMAT_VERSION:
            raise RunError(f"{path} has the format {version}; this version reads up to {FORMAT_VERSION}")
        check_form(value, form)
    except (OSError, ValueError) as error:
        raise RunError(f"{path} is missing or damaged: {error}") from error
    return value


def _read_lines(path: Path, form: Any) -> list[dict[str, Any]]:
    if not _is_regular(path):
        return []
    try:
        lines = load_json_lines(path)
        check_form(lines, [form])
    except (OSError, ValueError) as error:
        raise RunError(f"{path} is damaged: {error}") from error
    return lines
