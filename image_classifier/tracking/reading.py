"""Reads and validates the files of a run folder."""

from __future__ import annotations

import hashlib
import io
import json
import os
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from image_classifier.access import DatabaseAccess, Reading
from image_classifier.credentials import resolve_password
from image_classifier.errors import DataError, RunError
from image_classifier.files import LimitError, check_form, load_json, load_json_lines, read_file
from image_classifier.image_sizes import DEFAULT_IMAGE_SIZE
from image_classifier.references import get_reference, get_url
from image_classifier.text import one_line
from image_classifier.tracking.layout import (
    CHAIN,
    ENVIRONMENT,
    EVALUATION,
    FORMAT_VERSION,
    MANIFEST,
    METRICS,
    PREDICTIONS,
    RECORD,
    is_part_of_run,
    is_regular,
)

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


_ENVIRONMENT_FORM = {
    "python": dict.fromkeys(("version", "implementation", "platform"), str),
    "package": {"version": str, "digest": str, "commit": (str, _NONE), "wheel": (str, _NONE)},
    "distributions": {str: {"version": str, "files": (str, _NONE), "wheels": [str]}},
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


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read manifest.json: `files` by name with `size` and `sha256`, `weights_digest`, `chain_head`, and its `digest`.

    Raises:
        RunError: it is missing or damaged, or names files that cannot be a run's.
    """
    manifest = _read_json(folder / MANIFEST, _MANIFEST_FORM)
    if manifest["digest"] != compute_manifest_digest(manifest):
        raise RunError(f"{folder / MANIFEST} is damaged: its content does not match its digest")
    files = manifest["files"]
    for name in files if isinstance(files, dict) else ("files",):
        if not isinstance(files, dict) or not _is_description(name, files[name]):
            raise RunError(f"{folder / MANIFEST} is damaged: {name!a} is not a file name with size and sha256")
    return manifest


def _is_description(name: str, facts: Any) -> bool:
    """Say whether a manifest's entry describes a file that lies in the run folder, and that is part of the run."""
    is_name = name.isprintable() and "\\" not in name and is_part_of_run(name)
    is_inside = all(part not in ("", ".", "..") and len(os.fsencode(part)) < 256 for part in name.split("/"))
    has_facts = isinstance(facts, dict) and isinstance(facts.get("sha256"), str)
    has_size = has_facts and type(facts.get("size")) is int and facts["size"] >= 0
    return is_name and is_inside and has_size


def compute_manifest_digest(manifest: dict[str, Any]) -> str:
    content = {key: value for key, value in manifest.items() if key != "digest"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def read_record(folder: Path) -> dict[str, Any]:
    """Read run.json."""
    return _read_json(folder / RECORD, _RECORD_FORM)


def read_environment(folder: Path) -> dict[str, Any]:
    """Read environment.json: Python, package and distributions, each with what its wheel is known by.

    Raises:
        RunError: it is damaged, or the run is of a version that did not write it.
    """
    if not (folder / ENVIRONMENT).exists():
        raise RunError(f"{folder} has no {ENVIRONMENT}: it is of a version that did not keep what its environment was")
    return _read_json(folder / ENVIRONMENT, _ENVIRONMENT_FORM)


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
    if get_url(dataset_folder) is None and not dataset_folder.exists():
        raise DataError(f"the data set of {folder} is no longer at {dataset_folder}; give --dataset_folder")
    return dataset_folder, access, reading


def read_evaluation(folder: Path) -> dict[str, Any]:
    """Read evaluation.json."""
    evaluation = _read_json(folder / EVALUATION, _EVALUATION_FORM)
    num_classes = len(evaluation["per_class"])
    if [len(row) for row in evaluation["confusion_matrix"]] != [num_classes] * num_classes:
        raise RunError(f"{folder / EVALUATION} is damaged: its confusion_matrix does not have {num_classes} classes")
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
                raise LimitError(f"it unpacks to more than {MAX_PREDICTIONS_BYTES:,} bytes")
            probabilities = _parse_array(archive.read("probabilities.npy"), np.dtype(np.float32), 2)
            labels = _parse_array(archive.read("labels.npy"), np.dtype(np.int64), 1)
        if len(probabilities) != len(labels) or not len(labels):
            raise ValueError(f"it has {len(probabilities):,} rows of probabilities for {len(labels):,} labels")
        if not np.isfinite(probabilities).all() or labels.min() < 0 or labels.max() >= probabilities.shape[1]:
            raise ValueError("it has a probability that is not finite, or a label without a class")
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
        if not path.parent.is_dir():
            raise RunError(f"there is no run folder {path.parent}; correct the path") from error
        raise RunError(f"{path} is missing or damaged: {error}") from error
    return value


def _read_lines(path: Path, form: Any) -> list[dict[str, Any]]:
    if not is_regular(path):
        return []
    try:
        lines = load_json_lines(path)
        check_form(lines, [form])
    except (OSError, ValueError) as error:
        raise RunError(f"{path} is damaged: {error}") from error
    return lines
