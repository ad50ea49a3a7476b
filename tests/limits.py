"""The table of SECURITY.md: what each reader of files takes at most, by the constants that say so in the code."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

from image_classifier import confinement, files, imaging
from image_classifier.capture import labels
from image_classifier.data import (
    card,
    cifar,
    content,
    corrections,
    download,
    parquet_process,
    partial_snapshot,
    pickles,
    proof,
    webdataset,
)
from image_classifier.published import attestation
from image_classifier.published import folder as published
from image_classifier.remote import store
from image_classifier.serving import auth
from image_classifier.tracking import reading, tensor_file
from tests.conftest import PROJECT


def load_script(name: str) -> ModuleType:
    """Load one of the workflows' scripts as a module."""
    spec = importlib.util.spec_from_file_location(name, PROJECT / ".github" / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


_unpack_run = load_script("unpack_run")

_SIZES = {2**10: "KB", 2**20: "MB", 2**30: "GB"}


def _size(num_bytes: int) -> str:
    """Write a number of bytes in the largest unit, of powers of 1,024, that it is a whole number of."""
    unit = max(unit for unit in _SIZES if num_bytes % unit == 0)
    return f"{num_bytes // unit:,} {_SIZES[unit]}"


_OWN = f"a separate one: {_size(confinement.MEMORY_BYTES)} of memory, {confinement.COMPUTING_S} s of computing time"

ROWS: dict[str, tuple[str, str]] = {
    "image: PNG, JPEG, WebP, BMP": (
        f"{_size(imaging.MAX_BYTES)}, {imaging.MAX_PIXELS:,} pixels (WebP {imaging.MAX_WEBP_PIXELS:,}, BMP with run "
        f"lengths {imaging.MAX_RUN_LENGTH_PIXELS:,}), {imaging.MAX_SIDE:,} pixels per side; JPEG: {imaging.MAX_SCANS} "
        f"scans, "
        f"{imaging.MAX_SEGMENTS:,} segments; PNG: {imaging.MAX_CHUNKS:,} chunks, {imaging.MAX_TEXTS} text chunks; "
        "animated images",
        "the caller's; 450 MB for all threads",
    ),
    "CIFAR archive": (
        f"{_size(cifar.MAX_ARCHIVE_BYTES)} unpacked, {cifar.MAX_MEMBERS:,} members, names of "
        f"{_size(cifar.MAX_NAME_BYTES)}; links and devices",
        "the caller's",
    ),
    "CIFAR file": (
        f"{_size(cifar.MAX_FILE_BYTES)}; pickles: {pickles.MAX_INSTRUCTIONS:,} instructions; pickles that call or "
        "import something",
        "the caller's",
    ),
    "Parquet": (
        f"{parquet_process.MAX_ROWS:,} rows; one row per {parquet_process.MIN_ROW_BYTES} bytes after the first "
        f"1,000; images {parquet_process.MAX_RATIO} times the file's size in all; paths of "
        f"{parquet_process.MAX_PATH_LENGTH:,} "
        "characters",
        _OWN + " between two batches",
    ),
    "WebDataset tar": (
        f"{webdataset.MAX_SHARDS:,} shards, {webdataset.MAX_KEYS:,} keys in all, headers of "
        f"{_size(webdataset.MAX_HEAD_BYTES)}, labels of {_size(webdataset.MAX_LABEL_BYTES)}; links and devices, data "
        "after the end marker",
        "the caller's",
    ),
    "classes of a data set": (f"{content.MAX_CLASSES:,}", "the caller's"),
    "JSON": (
        f"{_size(files.MAX_JSON_BYTES)}, {files.MAX_JSON_VALUES:,} values, {files.MAX_DEPTH} levels; duplicate keys, "
        "numbers that are not finite or have more than 64 bits",
        "the caller's",
    ),
    "JSON lines": (
        f"{_size(files.MAX_LINES_BYTES)}, {files.MAX_JSON_VALUES:,} values in all lines",
        "the caller's",
    ),
    "YAML": (f"{_size(files.MAX_YAML_BYTES)}, {files.MAX_DEPTH} levels; aliases, duplicate keys", "the caller's"),
    "`README.md` of a data set": (
        f"{_size(card.MAX_CARD_BYTES)}, and the limits of YAML for its header",
        "the caller's",
    ),
    "`predictions.npz`": (
        f"{_size(reading.MAX_PREDICTIONS_BYTES)}, compressed and uncompressed; arrays of other types",
        "the caller's",
    ),
    "`model.pth`, checkpoint": (
        f"{_size(tensor_file.MAX_BYTES)}, {tensor_file.MAX_RECORDS:,} records, {_size(tensor_file.MAX_PICKLE_BYTES)} "
        "besides the tensors; compressed records, tensors larger than their storage, other objects than tensors",
        "the caller's",
    ),
    "`.safetensors`": (
        f"{_size(tensor_file.MAX_BYTES)}, {_size(tensor_file.MAX_HEADER_BYTES)} of header; tensors that overlap or "
        "leave gaps",
        "the caller's",
    ),
    "file of a published model": (f"{_size(published.MAX_BYTES)}", "the caller's"),
    "verdict": (
        f"{_size(attestation.MAX_BYTES)}, {attestation.MAX_FILES} in a folder, and the limits of JSON; links, more "
        f"than one "
        "signature, non-canonical base64",
        "the caller's",
    ),
    "proof of an image": (f"{_size(proof.MAX_BYTES)}, and the limits of JSON; any other encoding", "the caller's"),
    "snapshot of `data fetch`": (
        f"`snapshot.json` of {_size(partial_snapshot.MAX_RECORD_BYTES)} and the limits of JSON, NumPy headers of "
        f"{_size(partial_snapshot.MAX_HEAD_BYTES)}; other sizes than the counts give, trees and images that do not "
        "match the digest",
        "the caller's",
    ),
    "ONNX": (
        f"{_size(published.MAX_BYTES)}; weights in other files",
        _OWN + ", plus 4 times the file's size; the caller's if a given key has signed the file",
    ),
    "CSV of `data relabel`": (f"{_size(corrections.MAX_CORRECTIONS_BYTES)}", "the caller's"),
    "CSV of `drift --labels`": (f"{_size(labels.MAX_BYTES)}", "the caller's"),
    "API keys, JSON web keys": (f"{_size(auth.MAX_KEYS_BYTES)}", "the server's"),
    "download": (f"{_size(download.MAX_BYTES)}", "the caller's; on disk"),
    "folder at a URL": (f"{store.MAX_FILES:,} files", "the caller's; their size on disk"),
    "artifact of a workflow": (
        f"{_unpack_run.MAX_MEMBERS:,} files, {_size(_unpack_run.MAX_BYTES)} unpacked and {_unpack_run.MAX_RATIO} times "
        f"the zip file's size, documents of {_size(_unpack_run.MAX_DOCUMENT_BYTES)}; links and devices",
        "the caller's",
    ),
}
"""Of each kind of file: what is refused beyond what, and the process that reads it."""


def build_table() -> str:
    """Build the table."""
    lines = ["| file | limits; what else is refused | process that reads it |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {name} | {limit} | {process} |" for name, (limit, process) in ROWS.items())])
