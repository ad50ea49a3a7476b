"""Files that are bombs, each read in a process of its own under a limit of memory and of computing time."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from image_classifier.data.levels import compute_size
from image_classifier.imaging import MAX_PIXELS, MAX_SCANS
from image_classifier.tracking.run import RunFolder
from tests.bombs import (
    SERVED_SIDE,
    SIDE_OF_MOST,
    build_chunk,
    build_even_png,
    build_exif,
    build_laughs,
    build_onnx_of_zeros,
    build_onnx_without_end,
    build_png,
    build_progressive,
    build_run_lengths,
    save,
    write_parquet_of_one_value,
    write_parquet_of_zeros,
)
from tests.confined import call_confined
from tests.conftest import PROJECT
from tests.datasets import make_arrays, write_image_folder
from tests.limits import ROWS, build_table

IMAGES: dict[str, Callable[[], bytes]] = {
    "16 bits of grey": lambda: build_even_png(16, 0),
    "palette with transparency": lambda: build_even_png(
        8, 3, build_chunk(b"PLTE", bytes(768)) + build_chunk(b"tRNS", bytes(256))
    ),
    "colour with a transparent one": lambda: build_even_png(8, 2, build_chunk(b"tRNS", bytes(6))),
    "a long row": lambda: build_png(MAX_PIXELS, 1, depth=1, content=bytes(1 + MAX_PIXELS // 8)),
    "a progressive JPEG of four inks": lambda: build_progressive(
        MAX_SCANS, (SIDE_OF_MOST,) * 2, "CMYK", exif=build_exif(6)
    ),
    "WebP": lambda: save(Image.new("RGBA", (5000, 5000), (1, 2, 3, 4)), "WEBP", lossless=True, exif=build_exif(6)),
    "BMP with a leap": lambda: build_run_lengths(1024, b"\0\2\xff\xff" * 100),
}
"""As many pixels as are decoded, but for the long row."""

SERVED: dict[str, tuple[Callable[[], bytes], int]] = {
    "16 bits of grey": (lambda: build_even_png(16, 0, side=SERVED_SIDE), 45),
    "16 bits of colour": (lambda: build_even_png(16, 2, side=SERVED_SIDE), 70),
    "16 bits with transparency": (lambda: build_even_png(16, 6, side=SERVED_SIDE), 70),
    "palette with transparency": (
        lambda: build_even_png(
            8, 3, build_chunk(b"PLTE", bytes(768)) + build_chunk(b"tRNS", bytes(256)), side=SERVED_SIDE
        ),
        35,
    ),
    "a JPEG of a camera": (lambda: save(Image.new("RGB", (6000, 4000)), "JPEG", exif=build_exif(6)), 20),
    "a progressive JPEG": (
        lambda: save(Image.new("RGB", (SERVED_SIDE,) * 2), "JPEG", progressive=True, exif=build_exif(6)),
        55,
    ),
    "a progressive JPEG of four inks": (
        lambda: build_progressive(MAX_SCANS, (SERVED_SIDE,) * 2, "CMYK", exif=build_exif(6)),
        115,
    ),
    "WebP with transparency": (
        lambda: save(Image.new("RGBA", (3840, 2160), (1, 2, 3, 4)), "WEBP", lossless=True, exif=build_exif(6)),
        150,
    ),
    "BMP": (lambda: save(Image.new("P", (SERVED_SIDE,) * 2), "BMP"), 35),
}
"""As many pixels as the server decodes by default, and the MB that decoding takes, with a few for what is around it."""


@dataclass(frozen=True)
class Bomb:
    """A file that would take much, or for ever.

    Attributes:
        read: MODULE:FUNCTION that reads it.
        name: of the file.
        write: writes it to a path.
        reason: pattern of the message that it is refused with.
        is_folder: the function takes the folder that it lies in.
    """

    read: str
    name: str
    write: Callable[[Path], object]
    reason: str
    is_folder: bool = False


def write_sparse(num_bytes: int) -> Callable[[Path], None]:
    """Make what writes a file of so many zeros, which take no room."""

    def write(path: Path) -> None:
        path.touch()
        os.truncate(path, num_bytes)

    return write


def put(content: bytes | str) -> Callable[[Path], object]:
    """Make what writes this content."""
    return lambda path: path.write_bytes(content.encode() if isinstance(content, str) else content)


def write_long_head(path: Path) -> None:
    """Write a snapshot of two images, whose array has a header of 65,535 bytes."""
    record = {"format_version": 2, "digest": "0" * 64, "classes": ["cat"], "shape": [3, 32, 32]}
    (path.parent / "snapshot.json").write_text(json.dumps(record | {"num_train": 1, "num_test": 1}))
    (path.parent / "tree.bin").write_bytes(bytes(2 * compute_size(1)))
    path.write_bytes(b"\x93NUMPY\1\0\xff\xff" + b" " * 2**16)


def write_tar(*members: tuple[str, int, bytes], number: int = 1, is_packed: bool = True) -> Callable[[Path], None]:
    """Make what writes an archive with members of a name, a size and a kind, so many times."""

    def write(path: Path) -> None:
        file = gzip.open(path, "wb", compresslevel=1) if is_packed else path.open("wb")
        with file, tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as archive:
            for name, size, kind in members * number:
                member = tarfile.TarInfo(name)
                member.size, member.type, member.linkname = size, kind, "/etc/passwd"
                archive.addfile(member, Zeros(size) if size else None)

    return write


class Zeros(io.RawIOBase):
    """A file of so many zeros."""

    def __init__(self, size: int) -> None:
        self._left = size

    def read(self, size: int = -1) -> bytes:
        size = min(size, self._left)
        self._left -= size
        return bytes(size)


def write_zip(members: Mapping[str, bytes | int]) -> Callable[[Path], None]:
    """Make what writes a compressed zip file of members with this content, or so many zeros."""

    def write(path: Path) -> None:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            for name, content in members.items():
                with archive.open(name, "w", force_zip64=True) as member:
                    if isinstance(content, bytes):
                        member.write(content)
                    else:
                        for _ in range(content // 2**20):
                            member.write(bytes(2**20))

    return write


def write_classes(path: Path) -> None:
    """Write a data set whose metadata name many classes."""
    write_image_folder(path.parent, make_arrays(2, 2, num_classes=2), ["0", "1"])
    path.write_text(json.dumps({"classes": list(map(str, range(1001)))}), encoding="utf-8")


def build_npy(head: str) -> bytes:
    """Build an .npy file that holds nothing of what its head says."""
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(head)) + head.encode()


class Command:
    """What runs a command when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("exit 1",)


def write_tensors(path: Path) -> None:
    """Write a file of torch.save with a pickle that runs a command."""
    torch.save({"format_version": 2, "model": Command()}, path)


def write_external(path: Path) -> None:
    """Write an ONNX file whose weights lie in a file of the system."""
    model = onnx.load_from_string(build_onnx_of_zeros(10))
    weights = onnx.TensorProto(name="zeros", dims=[10], data_type=onnx.TensorProto.FLOAT)
    weights.data_location = onnx.TensorProto.EXTERNAL
    weights.external_data.add(key="location", value="/etc/passwd")
    model.graph.initializer.append(weights)
    del model.graph.node[0]
    path.write_bytes(model.SerializeToString())


DATASET, RUN = "tests.confined:read_dataset", "image_classifier.tracking.reading"
METADATA, CONFIG = "image_classifier.data.metadata:load_metadata", "tests.confined:read_config"
PREDICTIONS, MODEL = f"{RUN}:read_predictions", "image_classifier.tracking.checkpoint:load_model"
STATE = "image_classifier.tracking.pretrained:load_pretrained"
SNAPSHOT = "tests.confined:open_snapshot"
PUBLISHED = "image_classifier.published.predictor:load_predictor"
LABELS = build_npy("{'descr': '<i8', 'fortran_order': False, 'shape': (1,)}") + bytes(8)

BOMBS: dict[str, dict[str, Bomb]] = {
    "CIFAR archive": {
        "gzip": Bomb(
            DATASET, "all.tar.gz", write_tar(("zeros", 2**28, b"0")), "unpacks to more than 268,435,456 bytes"
        ),
        "members": Bomb(DATASET, "all.tar.gz", write_tar(("a", 0, b"0"), number=1001), "more than 1,000 files"),
        "a name": Bomb(DATASET, "all.tar.gz", write_tar(("a" * 10**6, 0, b"0")), "with 1,000,001 bytes"),
        "a link": Bomb(
            DATASET, "all.tar.gz", write_tar(("data_batch_1", 0, tarfile.SYMTYPE)), "which is not a regular " "file"
        ),
        "a device": Bomb(
            DATASET, "all.tar.gz", write_tar(("data_batch_1", 0, tarfile.CHRTYPE)), "which is not a regular file"
        ),
    },
    "CIFAR file": {
        "size": Bomb(DATASET, "data_batch_1", write_sparse(2**28 + 1), "more than the 268,435,456 bytes", True),
        "instructions": Bomb(
            DATASET, "data_batch_1", put(b"]" + b"Na" * 500_000 + b"."), "more than 1,000,000 inst", True
        ),
        "a command": Bomb(DATASET, "data_batch_1", put(pickle.dumps(Command())), "wants to run 'posix.system'", True),
    },
    "Parquet": {
        "a large value": Bomb(
            "image_classifier.data.parquet:iterate_images",
            "all.parquet",
            lambda path: write_parquet_of_zeros(path, 1, 600_000_000),
            ".",
        ),
        "one value in each row": Bomb(
            "image_classifier.data.parquet:iterate_images",
            "all.parquet",
            lambda path: write_parquet_of_one_value(path, 1000, bytes(30_000_000)),
            ".",
        ),
    },
    "WebDataset tar": {
        "a label": Bomb(
            DATASET,
            "all.tar",
            write_tar(("a.jpg", 9, b"0"), ("a.cls", 2**28, b"0"), is_packed=False),
            "of 268,435,456 bytes, too many for a label",
        ),
        "a head": Bomb(
            DATASET, "all.tar", write_tar(("a" * 10**6, 0, b"0"), is_packed=False), "a header of 1,000,448 bytes"
        ),
        "a link": Bomb(
            DATASET, "all.tar", write_tar(("a.jpg", 0, tarfile.SYMTYPE), is_packed=False), "which is not a regular file"
        ),
    },
    "classes of a data set": {
        "number": Bomb(
            DATASET,
            "metadata.json",
            write_classes,
            "1,001 classes, at most 1,000",
            True,
        )
    },
    "JSON": {
        "size": Bomb(METADATA, "metadata.json", write_sparse(2**25 + 1), "more than the 33,554,432 bytes", True),
        "values": Bomb(
            METADATA, "metadata.json", put("[" + "0," * 2_000_000 + "0]"), "than the 2,000,000 values", True
        ),
        "depth": Bomb(METADATA, "metadata.json", put("[" * 10**6), "deeper than the 32 levels", True),
    },
    "JSON lines": {
        "size": Bomb(
            f"{RUN}:read_epochs", "metrics.jsonl", write_sparse(2**27 + 1), "than the 134,217,728 bytes", True
        ),
        "lines": Bomb(
            f"{RUN}:read_epochs", "metrics.jsonl", put("{}\n" * 2_000_001), "than the 2,000,000 values", True
        ),
    },
    "YAML": {
        "size": Bomb(CONFIG, "config.yaml", put("a: " + "b" * 2**16), "more than the 65,536 bytes"),
        "depth": Bomb(CONFIG, "config.yaml", put("[" * 30_000), "deeper than the 32 levels"),
        "aliases": Bomb(CONFIG, "config.yaml", put(build_laughs()), "it has the alias"),
    },
    "`README.md` of a data set": {
        "size": Bomb(
            "tests.confined:read_card", "README.md", write_sparse(2**20 + 1), "than the 1,048,576 bytes", True
        ),
        "aliases": Bomb(
            "tests.confined:read_card",
            "README.md",
            put(f"---\ndataset_info: 1\n{build_laughs()}\n---\n"),
            "the alias",
            True,
        ),
    },
    "`predictions.npz`": {
        "zeros": Bomb(
            PREDICTIONS,
            "predictions.npz",
            write_zip({"labels.npy": LABELS, "probabilities.npy": 2**30}),
            "unpacks to more than 268,435,456 bytes",
            True,
        ),
        "a head": Bomb(
            PREDICTIONS,
            "predictions.npz",
            write_zip(
                {
                    "labels.npy": LABELS,
                    "probabilities.npy": build_npy("{'descr': '<f4', 'fortran_order': False, 'shape': (999999999, 9)}"),
                }
            ),
            "missing or damaged",
            True,
        ),
        "objects": Bomb(
            PREDICTIONS,
            "predictions.npz",
            lambda path: np.savez(path, labels=np.array([Command()]), probabilities=np.array([[Command()]])),
            "an array of object",
            True,
        ),
    },
    "`model.pth`, checkpoint": {
        "size": Bomb(MODEL, "model.pth", write_sparse(2**29 + 1), "more than the 536,870,912 bytes"),
        "zeros": Bomb(
            MODEL,
            "model.pth",
            write_zip({"archive/data.pkl": b"N.", "archive/version": b"3", "archive/data/0": 2**30}),
            "is compressed",
        ),
        "a command": Bomb(MODEL, "model.pth", write_tensors, "asks for 'posix.system'"),
    },
    "`.safetensors`": {
        "size": Bomb(STATE, "a.safetensors", write_sparse(2**29 + 1), "more than the 536,870,912 bytes"),
        "depth": Bomb(
            STATE,
            "a.safetensors",
            lambda path: path.write_bytes((2**22).to_bytes(8, "little") + b"[" * 2**22),
            "more than the 2,000,000 values",
        ),
    },
    "file of a published model": {
        "size": Bomb(PUBLISHED, "model.onnx", write_sparse(2**30 + 1), "more than the 1,073,741,824 bytes")
    },
    "verdict": {
        "size": Bomb(
            "tests.confined:count_verdicts", "attestations/a", write_sparse(2**30), "more than the 262,144", True
        ),
        "nested": Bomb(
            "tests.confined:count_verdicts",
            "attestations/a",
            lambda path: path.write_bytes(b"[" * 2**17),
            "nested deeper",
            True,
        ),
    },
    "proof of an image": {
        "size": Bomb("tests.confined:check_proof", "proof.json", write_sparse(2**22 + 1), "more than the 4,194,304 b"),
        "nested": Bomb(
            "tests.confined:check_proof", "proof.json", lambda path: path.write_bytes(b"[" * 2**20), "nested deeper"
        ),
    },
    "snapshot of `data fetch`": {
        "size": Bomb(SNAPSHOT, "snapshot.json", write_sparse(2**20 + 1), "more than the 1,048,576 bytes", True),
        "nested": Bomb(SNAPSHOT, "snapshot.json", put(b"[" * 2**20), "nested deeper", True),
        "a header": Bomb(SNAPSHOT, "images.npy", write_long_head, "images.npy is no array of NumPy", True),
    },
    "ONNX": {
        "zeros": Bomb(
            PUBLISHED,
            "model.onnx",
            lambda path: path.write_bytes(build_onnx_of_zeros(10**9)),
            "takes more than 1024 MB of memory",
        ),
        "no end": Bomb(
            PUBLISHED,
            "model.onnx",
            lambda path: path.write_bytes(build_onnx_without_end()),
            "takes more computing time to read",
        ),
        "weights elsewhere": Bomb(PUBLISHED, "model.onnx", write_external, "cannot be loaded by ONNX Runtime"),
    },
    "CSV of `data relabel`": {
        "size": Bomb(
            "image_classifier.data.corrections:read_corrections", "a.csv", write_sparse(2**23 + 1), "the 8,388,608 b"
        )
    },
    "CSV of `drift --labels`": {
        "size": Bomb("tests.confined:read_labels", "a.csv", write_sparse(2**26 + 1), "than the 67,108,864 bytes")
    },
    "API keys, JSON web keys": {
        "size": Bomb("image_classifier.serving.auth:load_keys", "keys", write_sparse(2**20 + 1), "the 1,048,576 bytes")
    },
    "artifact of a workflow": {
        "zeros": Bomb("tests.confined:unpack_artifact", "run.zip", write_zip({"run.json": 2**30}), "refused")
    },
}
"""By row of SECURITY.md's table, apart from images, which are above, and what test_download.py and test_remote.py have.
"""


def test_the_table_of_limits_says_what_the_code_does() -> None:
    assert build_table() in (PROJECT / "SECURITY.md").read_text(encoding="utf-8")
    assert {*BOMBS, "image: PNG, JPEG, WebP, BMP", "download", "folder at a URL"} == ROWS.keys()


@pytest.mark.parametrize("row, kind", [(row, kind) for row, bombs in BOMBS.items() for kind in bombs])
def test_a_bomb_is_refused_within_limits(row: str, kind: str, tmp_path: Path) -> None:
    bomb = BOMBS[row][kind]
    (tmp_path / bomb.name).parent.mkdir(exist_ok=True)
    bomb.write(tmp_path / bomb.name)
    if bomb.name == "data_batch_1":
        for name in (*(f"data_batch_{number}" for number in range(2, 6)), "test_batch"):
            (tmp_path / name).touch()
    is_confined = row in ("Parquet", "ONNX")
    path = tmp_path if bomb.is_folder else tmp_path / bomb.name
    outcome = call_confined(bomb.read, path, cpu_s=60 if is_confined else 20)
    assert re.search(bomb.reason, outcome.error or "") and len((outcome.error or "").splitlines()) == 1, outcome
    assert outcome.memory_mb < (1200 if is_confined else 600) and outcome.cpu_s < 30


def test_an_image_of_more_frames_or_pixels_is_refused(tmp_path: Path) -> None:
    one, *others = (Image.new("RGB", (1000, 1000), (10 * number, 0, 0)) for number in range(20))
    bombs = {
        "PNG": (save(one, save_all=True, append_images=others), "the image is animated"),
        "WEBP": (save(one, "WEBP", save_all=True, append_images=others), "the image is animated"),
        "size": (build_png(2**31 - 1, 2**31 - 1), "pixels"),
        "side": (build_png(65_535, 65_535), "50,000,000"),
    }
    for name, (content, reason) in bombs.items():
        (tmp_path / name).write_bytes(content)
        outcome = call_confined("image_classifier.imaging:load_image", tmp_path / name, memory_mb=700)
        assert reason in (outcome.error or "") and outcome.memory_mb < 100, (name, outcome)


@pytest.mark.parametrize("kind", IMAGES)
def test_decoding_takes_no_more_memory_than_is_said(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(IMAGES[kind]())
    outcome = call_confined("image_classifier.imaging:load_image", path, memory_mb=700)
    assert outcome.memory_mb < 450
    assert outcome.error is None or kind == "a long row" and "a side may have 65,535 at most" in outcome.error


@pytest.mark.parametrize("kind", SERVED)
def test_the_server_decodes_with_little_memory(kind: str, tmp_path: Path) -> None:
    build, memory_mb = SERVED[kind]
    (tmp_path / "image").write_bytes(build())
    outcome = call_confined("tests.confined:decode_as_server", tmp_path / "image")
    assert outcome.error is None and outcome.memory_mb < memory_mb, outcome


def test_images_that_come_together_take_little_more_memory_than_one(tmp_path: Path) -> None:
    paths = []
    for number, kind in enumerate((*SERVED, *SERVED)):
        paths.append(tmp_path / str(number))
        paths[-1].write_bytes(SERVED[kind][0]())
    outcome = call_confined("tests.confined:decode_as_server", *paths, memory_mb=4096)
    assert outcome.error is None and outcome.memory_mb < 200, outcome


# Commands, each on a file that is one of these.


def seal(run: Path) -> None:
    """Let a run's manifest agree with what was put into its folder."""
    (run / "manifest.json").unlink()
    RunFolder(run).finish(weights_digest="0" * 64, chain_head="")


def replace_and_seal(name: str, write: Callable[[Path], object]) -> Callable[[Path], None]:
    """Make what puts a file into a run, in the place of another."""

    def change(home: Path) -> None:
        write(home / "run" / name)
        seal(home / "run")

    return change


TARGZ = BOMBS["CIFAR archive"]["gzip"].write
DEEP = put("[" * 10**6)
NAMES = ("--experiments_folder", "runs", "--experiment_name", "e", "--run_name", "r")

COMMANDS: dict[str, tuple[Callable[[Path], object], tuple[str, ...], str]] = {
    "train": (
        lambda home: TARGZ(home / "all.tar.gz"),
        ("train", *NAMES, "--dataset_folder", "all.tar.gz"),
        "unpacks to more than",
    ),
    "train --config": (
        lambda home: put(build_laughs())(home / "config.yaml"),
        ("train", *NAMES, "--config", "config.yaml"),
        "it has the alias",
    ),
    "data info": (
        lambda home: TARGZ(home / "all.tar.gz"),
        ("data", "info", "--dataset_folder", "all.tar.gz"),
        "unpacks to more than",
    ),
    "data prepare": (
        lambda home: DEEP(home / "data" / "metadata.json"),
        ("data", "prepare", "--dataset_folder", "data"),
        "deeper than",
    ),
    "data ingest": (
        lambda home: TARGZ(home / "all.tar.gz"),
        ("data", "ingest", "all.tar.gz", "--dataset", "images", "--dataset_folder", "data"),
        "unpacks to more than",
    ),
    "predict": (
        replace_and_seal("model.pth", BOMBS["`model.pth`, checkpoint"]["zeros"].write),
        ("predict", "run", "image.png"),
        "is compressed",
    ),
    "evaluate": (
        lambda home: write_sparse(2**25 + 1)(home / "data" / "metadata.json"),
        ("evaluate", "run", "--dataset_folder", "data"),
        "more than the 33,554,432 bytes",
    ),
    "compare": (
        replace_and_seal("evaluation.json", DEEP),
        ("compare", "run", "model"),
        "deeper than",
    ),
    "report": (
        replace_and_seal("predictions.npz", BOMBS["`predictions.npz`"]["zeros"].write),
        ("report", "run"),
        "unpa",
    ),
    "publish": (
        replace_and_seal("model.pth", BOMBS["`model.pth`, checkpoint"]["a command"].write),
        ("publish", "run", "--overwrite", "--dataset_folder", "data"),
        "asks for 'posix.system'",
    ),
    "verify": (lambda home: DEEP(home / "run" / "manifest.json"), ("verify", "run"), "deeper than"),
    "registry add": (
        lambda home: DEEP(home / "model" / "manifest.json"),
        ("registry", "add", "model", "--name", "a", "--experiments_folder", "runs"),
        "deeper than",
    ),
    "serve": (
        lambda home: (home / "a.onnx").write_bytes(build_onnx_of_zeros(10**9)),
        ("serve", "a.onnx"),
        "takes more than 1024 MB",
    ),
}


MEASURE = """
import json, os, subprocess, sys
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
print(json.dumps([os.waitstatus_to_exitcode(status), usage.ru_maxrss, usage.ru_utime + usage.ru_stime]))
"""
"""Runs a command and prints its status, memory in KB and seconds: a process begins with the memory of its parent, which
is much where the tests are."""


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_ends_with_one_line(name: str, sample_dataset: Path, published_run: Path, tmp_path: Path) -> None:
    write, words, reason = COMMANDS[name]
    shutil.copytree(sample_dataset, tmp_path / "data")
    shutil.copytree(published_run.parent, tmp_path / "run", ignore=shutil.ignore_patterns("published"))
    shutil.copytree(published_run, tmp_path / "model")
    (tmp_path / "image.png").write_bytes(save(Image.new("RGB", (32, 32))))
    write(tmp_path)
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, sys.executable, "-m", "image_classifier", *words],
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(PROJECT)},
    )
    status, memory_kb, cpu_s = json.loads(result.stdout)
    said = result.stderr
    assert status == 2 and reason in said, said
    assert said.startswith("error: ") and len(said.splitlines()) == 1
    assert memory_kb < 1.5 * 2**20 and cpu_s < 30
    assert not list(tmp_path.glob("runs/e/r/*")) and not list(tmp_path.rglob(".tmp-*"))
