"""Every reader of files in this package, with valid files and with what changes them in the ways of their format."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import logging
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import onnx
import torch
from cryptography.hazmat.primitives.asymmetric import ec
from PIL import Image

from image_classifier.access import DatabaseAccess, Reading
from image_classifier.capture.labels import load_labels
from image_classifier.cli.compare import format_comparison
from image_classifier.cli.evaluate import format_evaluation
from image_classifier.cli.train import build_trainer_parser, load_config
from image_classifier.credentials import load_secret
from image_classifier.data.card import check_sizes
from image_classifier.data.corrections import read_corrections
from image_classifier.data.dataset import load_snapshot
from image_classifier.data.metadata import METADATA_FILE, load_metadata
from image_classifier.data.parquet import iterate_images
from image_classifier.data.place import load_place
from image_classifier.data.snapshot import compute_fingerprint
from image_classifier.data.source import find_source
from image_classifier.errors import ImageClassifierError
from image_classifier.imaging import decode_image
from image_classifier.published import folder as published
from image_classifier.published.predictor import build_predictor, load_predictor
from image_classifier.published.reference import (
    build_reference,
    compute_stability_index,
    count_both,
    read_reference,
    serialize_reference,
)
from image_classifier.publishing.evidence import read_claims
from image_classifier.publishing.onnx import export_model
from image_classifier.publishing.quantize import quantize
from image_classifier.publishing.signing import build_signer
from image_classifier.recipe import load_recipe
from image_classifier.serving import oip
from image_classifier.serving.app import describe_model
from image_classifier.serving.auth import TokenGate, load_keys
from image_classifier.serving.requests import parse_body
from image_classifier.settings import restore_training_settings
from image_classifier.tracking import checking, layout, reading
from image_classifier.tracking.checkpoint import load_model
from image_classifier.tracking.compare import compare_runs
from image_classifier.tracking.pretrained import load_pretrained
from image_classifier.tracking.run import RunFolder
from image_classifier.tracking.state import TrainingState
from image_classifier.training.optimizer import build_optimizer
from tests.bombs import build_chunk, build_exif, save
from tests.conftest import PROJECT
from tests.datasets import make_arrays, write_cifar10_binary, write_cifar10_python
from tests.fuzz import Reader
from tests.limits import load_script
from tests.mutate import (
    change_bytes,
    change_jpeg,
    change_json,
    change_json_lines,
    change_message,
    change_npy,
    change_parquet,
    change_pickle,
    change_png,
    change_riff,
    change_tar,
    change_text,
    change_zip,
    dump_json,
    mix,
    seal,
    splice,
)
from tests.published import write_keys

GOLDEN = PROJECT / "tests" / "data" / "run_v1"
_CLASSES = ("plane", "car", "bird", "cat")


def build_readers(scratch: Path) -> list[Reader]:
    """Build all readers; what their files are made of is written to a folder first."""
    logging.disable(logging.CRITICAL)
    readers = [_build_images(), *_build_datasets(scratch), *_build_run_files(), *_build_published(scratch)]
    return [*readers, *_build_settings(), *_build_requests(), *_build_artifact(scratch)]


def read_folder(folder: Path) -> dict[str, bytes]:
    """Read all files below a folder by their relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _write_all(folder: Path, contents: Mapping[str, bytes]) -> None:
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


# Images.


def _build_images() -> Reader:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
    small, smooth = Image.fromarray(pixels[:24, :24]), Image.fromarray(pixels[:4, :4]).resize((80, 64))
    exif = build_exif(6)
    seeds = {
        "rgb.png": save(small),
        "rgba.png": save(smooth.convert("RGBA")),
        "grey16.png": save(Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40))),
        "palette.png": save(smooth.convert("P"), transparency=3),
        "bits.png": save(smooth.convert("1")),
        "turned.png": save(smooth, exif=exif),
        "animated.png": save(small, save_all=True, append_images=[small.transpose(Image.Transpose.ROTATE_180)]),
        "rgb.jpg": save(smooth, "JPEG"),
        "progressive.jpg": save(smooth, "JPEG", progressive=True, exif=exif),
        "grey.jpg": save(smooth.convert("L"), "JPEG"),
        "inks.jpg": save(smooth.convert("CMYK"), "JPEG", progressive=True),
        "restarts.jpg": save(smooth, "JPEG", restart_marker_blocks=2, icc_profile=b"profile" * 20),
        "lossy.webp": save(smooth.convert("RGBA"), "WEBP", exif=exif),
        "lossless.webp": save(small, "WEBP", lossless=True),
        "animated.webp": save(small, "WEBP", save_all=True, append_images=[small.transpose(Image.Transpose.ROTATE_90)]),
        "rgb.bmp": save(small, "BMP"),
        "palette.bmp": save(smooth.convert("P"), "BMP"),
        "bits.bmp": save(smooth.convert("1"), "BMP"),
        "rgb.gif": save(smooth.convert("P"), "GIF"),
        "rgb.tiff": save(small, "TIFF"),
    }
    seeds["text.png"] = seeds["rgb.png"][:33] + build_chunk(b"tEXt", b"a\0b") + seeds["rgb.png"][33:]

    def change(chance: Any, content: bytes) -> bytes:
        structured = {b"\x89": change_png, b"\xff": change_jpeg, b"R": change_riff}.get(content[:1], change_bytes)
        return mix(structured, structured, change_bytes, splice(list(seeds.values())))(chance, content)

    return Reader("image", seeds, change, lambda name, content, folder: decode_image(content))


# Data sets.


def _build_datasets(scratch: Path) -> list[Reader]:
    arrays = make_arrays(10, 2)
    python, binary = scratch / "python", scratch / "binary"
    python.mkdir()
    binary.mkdir()
    write_cifar10_python(python, arrays)
    write_cifar10_binary(binary, arrays)
    old = scratch / "old"
    old.mkdir()
    write_cifar10_python(old, arrays, protocol=2)
    pickles = read_folder(python)
    archives = {name: _pack(folder) for name, folder in (("python.tar.gz", python), ("binary.tar.gz", binary))}
    is_batch = {name: content for name, content in pickles.items() if name.endswith(("data_batch_1", "batches.meta"))}
    old_batches = {f"old {name}": read_folder(old)[name] for name in is_batch}
    parquets = _build_parquets(scratch)
    few = write_snapshot_source(scratch / "few")
    return [
        Reader(
            "archive",
            archives,
            mix(change_bytes, change_tar(mix(change_pickle, change_bytes)), change_tar(change_bytes), _in_gzip),
            lambda name, content, folder: _read_dataset(_write(folder / "all.tar.gz", content)),
        ),
        Reader(
            "WebDataset",
            _build_tars(),
            mix(change_bytes, change_tar(change_bytes), change_tar(change_png), change_tar(change_text)),
            lambda name, content, folder: _read_dataset(_write(folder / "all.tar", content)),
        ),
        Reader(
            "pickled batch",
            is_batch | old_batches,
            mix(change_bytes, change_pickle, change_pickle),
            lambda name, content, folder: _read_batch(folder / name.removeprefix("old "), content),
            lambda folder: _write_all(folder, pickles),
        ),
        Reader(
            "binary batch",
            {name: content for name, content in read_folder(binary).items() if "batch_1" in name or "meta" in name},
            change_bytes,
            lambda name, content, folder: _read_batch(folder / name, content),
            lambda folder: _write_all(folder, read_folder(binary)),
        ),
        Reader(
            "Parquet",
            parquets,
            mix(change_bytes, change_parquet, change_parquet, change_parquet),
            _read_parquet,
            share=0.4,
        ),
        Reader(
            "metadata.json",
            {
                "full": dump_json({"name": "a", "classes": list("abcdefghij"), "digest": "0" * 64, "split_seed": 3}),
                "classes": dump_json({"format_version": 1, "classes": list("abcdefghij")}),
            },
            mix(change_json, change_bytes, change_text),
            lambda name, content, folder: load_metadata(_write(folder / "metadata.json", content).parent),
        ),
        Reader("dataset_info", _build_infos(), mix(change_text, change_text, change_bytes, _change_infos), _read_infos),
        Reader(
            "snapshot",
            {name: content for name, content in few.items() if ".lock" not in name and name.startswith(".snapshots")},
            mix(change_bytes, _change_by_form),
            _read_snapshot,
            lambda folder: _write_all(folder / "whole", few),
        ),
    ]


def _build_tars() -> dict[str, bytes]:
    image = save(Image.new("RGB", (8, 8), "red"))
    labels = {"names": ("cls", b"cat"), "records": ("json", b'{"label": "cat"}')}
    tars = {}
    for name, (suffix, label) in labels.items():
        for kind in (tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
            packed = io.BytesIO()
            with tarfile.open(fileobj=packed, mode="w", format=kind) as archive:
                for number in range(6):
                    stem = f"{number}" if kind == tarfile.USTAR_FORMAT else f"{'x' * 120}ü{number}"
                    for ending, content in (("png", image), (suffix, label)):
                        member = tarfile.TarInfo(f"{stem}.{ending}")
                        member.size = len(content)
                        archive.addfile(member, io.BytesIO(content))
            tars[f"{name} {kind}"] = packed.getvalue()
    return tars


def _pack(folder: Path) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz", compresslevel=1) as archive:
        archive.add(folder, "cifar")
    return packed.getvalue()


def _in_gzip(chance: Any, content: bytes) -> bytes:
    return gzip.compress(change_bytes(chance, gzip.decompress(content)), 1)


def _write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@contextmanager
def _replaced(path: Path, content: bytes) -> Iterator[None]:
    """Put other content into a file for as long as the block lasts."""
    whole = path.read_bytes()
    path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(whole)


def _read_dataset(path: Path, folder: Path | None = None) -> None:
    """Read the data set that a file is, or that it lies in."""
    content = find_source(folder or path).read(load_metadata(path.parent))
    for batches in content.parts.values():
        for _ in batches:
            pass


def _read_batch(path: Path, content: bytes) -> None:
    with _replaced(path, content):
        _read_dataset(path, path.parent)


def _build_parquets(scratch: Path) -> dict[str, bytes]:
    import pyarrow
    import pyarrow.parquet

    pixels = np.random.default_rng(0).integers(0, 256, (6, 4, 4, 3), dtype=np.uint8)
    images = [{"bytes": save(Image.fromarray(image)), "path": f"{number}.png"} for number, image in enumerate(pixels)]
    info = {"info": {"features": {"label": {"names": list(_CLASSES), "_type": "ClassLabel"}}, "splits": {}}}
    columns = pyarrow.table({"image": images, "label": [0, 1, 2, 3, 0, 1]}).replace_schema_metadata(
        {"huggingface": json.dumps(info)}
    )
    bare = pyarrow.table({"img": [image["bytes"] for image in images], "label": pyarrow.array([0, 1] * 3, "int8")})
    options: dict[str, dict[str, Any]] = {
        "structs": {},
        "zstd": {"compression": "zstd", "row_group_size": 2},
        "plain": {"compression": "none", "use_dictionary": False, "data_page_version": "2.0"},
        "lz4": {"compression": "lz4", "write_page_index": True},
        "gzip": {"compression": "gzip", "column_encoding": {"label": "DELTA_BINARY_PACKED"}, "use_dictionary": False},
    }
    seeds = {}
    for name, values in options.items():
        for kind, table in (("structs", columns), ("bytes", bare)):
            path = scratch / "seed.parquet"
            if name != "gzip" or kind == "bytes":
                pyarrow.parquet.write_table(table, path, **values)
                seeds[f"{name} {kind}"] = path.read_bytes()
    return seeds


def _read_parquet(name: str, content: bytes, folder: Path) -> None:
    path = _write(folder / "all.parquet", content)
    if name.endswith("bytes"):  # which name no classes
        for _ in iterate_images(path):
            pass
    else:
        _read_dataset(path)


def _build_infos() -> dict[str, bytes]:
    info = {"splits": [{"name": "train", "num_examples": 10, "num_bytes": 1}, {"name": "test", "num_examples": 2}]}
    yaml = "dataset_info:\n  features:\n  - name: image\n    dtype: image\n  splits:\n"
    yaml += "  - name: train\n    num_bytes: 1\n    num_examples: 10\n  - name: test\n    num_examples: 2\n"
    configured = yaml.replace("dataset_info:", "dataset_info:\n- config_name: a")
    return {
        "README.md": f"---\nlicense: mit\n{yaml}---\n# A data set\n".encode(),
        "README.md list": f"---\n{configured}---\n".encode(),
        "dataset_infos.json": dump_json({"default": info, "other": {"splits": {"train": {"num_examples": 10}}}}),
    }


def _change_infos(chance: Any, content: bytes) -> bytes:
    if content.startswith(b"{"):
        return change_json(chance, content)
    _, head, rest = content.split(b"---\n", 2)
    return b"---\n" + change_text(chance, head) + b"---\n" + rest


def _read_infos(name: str, content: bytes, folder: Path) -> None:
    path = _write(folder / name.split()[0], content)
    try:
        check_sizes({"train": 10, "test": 2}, [folder])
    finally:
        path.unlink()


def write_snapshot_source(folder: Path) -> dict[str, bytes]:
    """Write a data set of a few images with its snapshot, and return all of its files."""
    folder.mkdir()
    for name, content in {"train/a/0": 1, "train/b/0": 2, "test/a/0": 3, "test/b/0": 4}.items():
        path = folder / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(save(Image.new("RGB", (16, 20), (content, 0, 0))))
    load_snapshot(folder)
    return read_folder(folder)


def _read_snapshot(name: str, content: bytes, folder: Path) -> None:
    """Load a data set whose snapshot was changed; it has to be found, or to be made again."""
    place = folder / "changed"
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(folder / "whole", place)
    index = next((place / ".snapshots" / "index").iterdir())
    if name.startswith(".snapshots/index"):
        index.write_bytes(content)
    else:
        (place / name).write_bytes(content)
    load_snapshot_of(place, index)


def load_snapshot_of(folder: Path, index: Path) -> None:
    """Load the snapshot that an index file is of, whatever the source's fingerprint is by now."""
    fingerprint = compute_fingerprint(find_source(folder), folder / METADATA_FILE, Reading())
    index.rename(index.with_name(f"{fingerprint}.json"))
    load_snapshot(folder).describe_notes()


def _change_by_form(chance: Any, content: bytes) -> bytes:
    return change_npy(chance, content) if content.startswith(b"\x93NUMPY") else change_json(chance, content)


# Runs.


def _build_run_files() -> list[Reader]:
    files = read_folder(GOLDEN)
    state = next(name for name in files if name.endswith("state.pth"))
    tensors = change_zip(("data.pkl", mix(change_pickle, change_bytes)))
    documents = {name: files[name] for name in (layout.RECORD, layout.EVALUATION)}
    lines = {name: files[name] for name in (layout.METRICS, layout.CHAIN)}
    parts = documents | lines

    def change_part(chance: Any, content: bytes) -> bytes:
        structured = change_json if b"\n " in content[:10] else change_json_lines
        return mix(structured, structured, structured, change_bytes, change_text)(chance, content)

    def prepare(folder: Path) -> None:
        _write_all(folder / "run", {name: content for name, content in files.items() if "checkpoints" not in name})
        shutil.copytree(folder / "run", folder / "other")

    return [
        Reader("run record", parts, change_part, _read_run, prepare),
        Reader(
            "run manifest",
            {layout.MANIFEST: files[layout.MANIFEST]},
            mix(
                change_bytes, change_json, seal(change_json, _seal_run_manifest), seal(change_json, _seal_run_manifest)
            ),
            _read_run_manifest,
            prepare,
        ),
        Reader(
            "predictions.npz",
            {layout.PREDICTIONS: files[layout.PREDICTIONS]},
            mix(change_bytes, change_zip((".npy", change_npy)), change_zip((".npy", change_npy))),
            _read_run,
            prepare,
        ),
        Reader(
            "model.pth",
            {layout.MODEL: files[layout.MODEL]},
            mix(change_bytes, tensors, tensors),
            lambda name, content, folder: load_model(_write(folder / name, content)),
        ),
        Reader(
            "state_dict",
            _build_states(),
            lambda chance, content: (
                mix(change_bytes, tensors) if content.startswith(b"PK") else mix(change_bytes, _change_safetensors)
            )(chance, content),
            lambda name, content, folder: load_pretrained(_write(folder / name, content)),
        ),
        Reader(
            "checkpoint",
            {state: files[state]},
            mix(change_bytes, tensors, tensors),
            _read_checkpoint,
            lambda folder: _write_all(folder, files),
        ),
        Reader("job summary", parts | {layout.MANIFEST: files[layout.MANIFEST]}, change_part, _summarize, prepare),
    ]


def _build_states() -> dict[str, bytes]:
    """Build a state_dict in both formats."""
    raw, weights = io.BytesIO(), np.arange(6, dtype=np.float32).reshape(3, 2)
    torch.save({"fc.weight": torch.from_numpy(weights), "fc.bias": torch.zeros(3).half()}, raw)
    header = {
        "__metadata__": {"format": "pt"},
        "fc.weight": {"dtype": "F32", "shape": [3, 2], "data_offsets": [0, 24]},
        "fc.bias": {"dtype": "F16", "shape": [3], "data_offsets": [24, 30]},
    }
    return {
        "a.pth": raw.getvalue(),
        "a.safetensors": _join_safetensors(dump_json(header), weights.tobytes() + bytes(6)),
    }


def _join_safetensors(header: bytes, body: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + body


def _change_safetensors(chance: Random, content: bytes) -> bytes:
    end = 8 + int.from_bytes(content[:8], "little")
    return _join_safetensors(change_json(chance, content[8:end]), content[end:])


def _read_run(name: str, content: bytes, folder: Path) -> None:
    """Read a run one of whose files was changed, in the ways of all commands that take runs."""
    run = folder / "run"
    with _replaced(run / name, content):
        errors = [_attempt(read, run) for read in _READS]
        _seal_run(run)
        errors.append(_attempt(lambda path: _compare([folder / "other", path]), run))
    for error in errors:
        if error is not None:
            raise error


def _attempt(read: Callable[[Path], object], path: Path) -> ImageClassifierError | None:
    try:
        read(path)
        return None
    except ImageClassifierError as error:
        return error


def _compare(folders: list[Path]) -> None:
    comparison = compare_runs(folders, allow_different_data=True)
    format_comparison(comparison)
    json.dumps(comparison, allow_nan=False)


_READS: tuple[Callable[[Path], object], ...] = (
    lambda run: restore_training_settings(reading.read_record(run)["settings"]),
    lambda run: reading.find_dataset(run, access=DatabaseAccess()),
    lambda run: format_evaluation(reading.read_evaluation(run)),
    reading.read_epochs,
    reading.read_chain,
    reading.read_predictions,
)


def _seal_run(folder: Path) -> None:
    (folder / layout.MANIFEST).unlink()
    RunFolder(folder).finish(weights_digest="0" * 64, chain_head="")


def _seal_run_manifest(content: bytes) -> bytes:
    manifest = json.loads(content)
    facts = {key: value for key, value in manifest.items() if key != "digest"}
    line = json.dumps(facts, sort_keys=True, separators=(",", ":")).encode()
    return dump_json({**facts, "digest": hashlib.sha256(line).hexdigest()})


def _read_run_manifest(name: str, content: bytes, folder: Path) -> None:
    run = folder / "run"
    (run / name).write_bytes(content)
    errors = [_attempt(checking.verify_files, run), _attempt(checking.check_finished, run)]
    for error in filter(None, errors):
        raise error


def _read_checkpoint(name: str, content: bytes, folder: Path) -> None:
    """Resume from a changed checkpoint that its manifest agrees with, and take a step."""
    settings = restore_training_settings(reading.read_record(folder)["settings"])
    for place in (folder / "checkpoints").iterdir():
        shutil.rmtree(place)
    facts = {"format_version": 1, "size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    _write_all(folder, {name: content, str(Path(name).with_name("manifest.json")): json.dumps(facts).encode()})
    classifier = load_model(folder / layout.MODEL).classifier
    optimizer = build_optimizer(classifier, settings)
    state = TrainingState(RunFolder(folder), classifier, optimizer, settings, 20, {"digest": "", "class": {}})
    lines = {name: (folder / name).read_bytes() for name in (layout.METRICS, layout.CHAIN)}
    try:
        state.restore(2)
        for parameter in classifier.parameters():  # not by torch's threads, which a fork has lost
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    finally:
        _write_all(folder, lines)


def _summarize(name: str, content: bytes, folder: Path) -> None:
    with _replaced(folder / "run" / name, content):
        load_script("summarize").summarize(folder / "run")


# Published models.


def _build_published(scratch: Path) -> list[Reader]:
    model = load_model(GOLDEN / layout.MODEL)
    content = export_model(model)
    images = np.random.default_rng(0).integers(0, 256, (64, 3, 32, 32), dtype=np.uint8)
    models = {"fp32": content, "int8": quantize(content, images), "mirror": export_model(model, views="mirror")}
    folder, key = scratch / "published", scratch / "key"
    folder.mkdir()
    key.mkdir()
    private, public = write_keys(key, "key", ec.SECP256R1())
    files = {published.MODEL: content, published.CARD: b"# A model\n", published.PARITY: b"{}\n"}
    predictor = build_predictor(content, folder)
    names = ("experiment_name", "run_name", "data_digest", "views", "classes", "format_version")
    manifest = {name: getattr(predictor.model, name) for name in names}
    metrics = {"accuracy": 0.5, "top5_accuracy": 1.0, "loss": 1.0, "num_images": 16}
    manifest |= {"metrics": metrics, "right": "00ff", "classes": list(predictor.model.classes)}
    manifest["files"] = {name: published.describe_content(content) for name, content in files.items()}
    _write_all(folder, files | {published.MANIFEST: published.serialize_manifest(manifest)})
    build_signer(str(private))(folder)
    whole = read_folder(folder)

    def prepare(place: Path) -> None:
        _write_all(place / "model", whole)
        shutil.copy(public, place / "key.pub")

    change_manifest = mix(
        change_bytes, change_json, seal(change_json, _seal_manifest), seal(change_json, _seal_manifest)
    )
    return [
        Reader(
            "ONNX",
            models,
            mix(change_bytes, *[change_message(onnx.ModelProto)] * 3),
            lambda name, content, folder: build_predictor(content, folder / name, num_threads=1).measure(),
            share=0.4,
        ),
        Reader(
            "published manifest",
            {published.MANIFEST: whole[published.MANIFEST]},
            change_manifest,
            lambda name, content, place: _read_published(place / "model", name, content, None),
            prepare,
        ),
        Reader(
            "drift reference",
            {"json": serialize_reference(build_reference(_CLASSES, images[:12], np.eye(12, 4, dtype=np.float32)))},
            mix(change_bytes, change_json, change_json),
            lambda name, content, place: _read_reference(content),
        ),
        Reader(
            "published signature",
            {published.SIGNATURE: whole[published.SIGNATURE]},
            mix(change_bytes, change_json, change_json, _change_signed),
            lambda name, content, place: _read_published(place / "model", name, content, place / "key.pub"),
            prepare,
        ),
        Reader(
            "public key",
            {"key.pub": public.read_bytes()},
            mix(change_bytes, change_text),
            lambda name, content, place: published.read_published(place / "model", _write(place / name, content)),
            prepare,
        ),
        Reader(
            "private key",
            {"key.pem": private.read_bytes()},
            mix(change_bytes, change_text),
            lambda name, content, place: build_signer(str(_write(place / name, content))),
        ),
    ]


def _seal_manifest(content: bytes) -> bytes:
    return published.serialize_manifest(json.loads(content))


def _change_signed(chance: Any, content: bytes) -> bytes:
    """Change what was signed, which lies in base64 in the signature."""
    import base64

    bundle = json.loads(content)
    payload = base64.b64decode(bundle["dsseEnvelope"]["payload"])
    bundle["dsseEnvelope"]["payload"] = base64.b64encode(change_json(chance, payload)).decode()
    return dump_json(bundle)


def _read_published(folder: Path, name: str, content: bytes, key: Path | None) -> None:
    with _replaced(folder / name, content):
        model = published.read_published(folder, key)
        read_claims("the model", model)
        json.dumps(describe_model("model", load_predictor(folder, num_threads=1).model), allow_nan=False)


def _read_reference(content: bytes) -> None:
    model = published.Published({"classes": list(_CLASSES)}, {published.REFERENCE: content})
    reference = read_reference(Path("published"), model)
    serialize_reference(reference)
    for values in reference.quantiles.values():
        assert compute_stability_index(*count_both(values, values, reference.num_images)) >= 0


# Settings and lists.


def _build_settings() -> list[Reader]:
    parser = build_trainer_parser()
    recipe = "".join(f"{name}: {json.dumps(value)}\n" for name, value in load_recipe("fast").items()).encode()
    more = b"experiment_name: a\nrun_name: b\ndataset_folder: data\nseed: 3\nkeep_checkpoints: 3\nnum_workers: 2\n"
    database = b"driver: postgresql\nhost: localhost\nport: 5432\ndatabase: images\nuser: someone\ntls: verify-full\n"
    jwk = json.loads(_build_jwks())
    texts = mix(change_text, change_text, change_bytes)

    def read_database(name: str, content: bytes, folder: Path) -> None:
        load_place(DatabaseAccess(config=_write(folder / "db.yaml", content)))

    return [
        Reader(
            "configuration",
            {"recipe": recipe, "more": more + recipe},
            texts,
            lambda name, content, folder: load_config(parser, _write(folder / "config.yaml", content)),
        ),
        Reader("database configuration", {"postgresql": database, "sqlite": b"database: a.db\n"}, texts, read_database),
        Reader(
            "corrections",
            {"csv": b'image,label\n1,cat\n2,"a ""b"""\n30,dog\n', "bom": b"\xef\xbb\xbfimage,label\r\n4,car\r\n"},
            texts,
            lambda name, content, folder: read_corrections(_write(folder / "a.csv", content)),
        ),
        Reader(
            "labels",
            {"csv": b'request_id,image_index,label\na-0,0,cat\nb,12,"plane"\n'},
            texts,
            lambda name, content, folder: load_labels(_write(folder / "l.csv", content), _CLASSES) and None,
        ),
        Reader(
            "API keys",
            {"keys": b"# ours\n" + b"".join(b"%s:%s\n" % (name, b"0" * 64) for name in (b"a", b"b@c"))},
            texts,
            lambda name, content, folder: load_keys(_write(folder / "keys", content)),
        ),
        Reader(
            "JSON web keys",
            {"keys": dump_json(jwk)},
            mix(change_json, change_json, change_bytes),
            lambda name, content, folder: TokenGate("a", "b", str(_write(folder / "jwks", content))),
        ),
        Reader(
            "secret",
            {"secret": b"a secret\nand more\n"},
            texts,
            lambda name, content, folder: load_secret(_write(folder / "secret", content), "db_pass_file"),
        ),
    ]


def _build_jwks() -> str:
    from cryptography.hazmat.primitives.asymmetric import ed25519, rsa
    from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

    keys = [
        RSAAlgorithm.to_jwk(rsa.generate_private_key(65537, 2048).public_key()),
        ECAlgorithm.to_jwk(ec.generate_private_key(ec.SECP256R1()).public_key()),
        OKPAlgorithm.to_jwk(ed25519.Ed25519PrivateKey.generate().public_key()),
    ]
    return json.dumps({"keys": [{**json.loads(key), "kid": str(number)} for number, key in enumerate(keys)]})


# What a server is sent.


def _build_requests() -> list[Reader]:
    import base64

    image = save(Image.new("RGB", (8, 8), (1, 2, 3)))
    text = base64.b64encode(image).decode()
    part = b'--b\r\nContent-Disposition: form-data; name="%s"%s\r\n\r\n%s\r\n'
    file = part % (b"image", b'; filename="a.png"\r\nContent-Type: image/png', image)
    multipart = file + part % (b"top_k", b"", b"3") + file + b"--b--\r\n"
    tensor = {"name": "images", "shape": [1, 32, 32, 3], "datatype": "UINT8", "data": [0] * 3072}
    small = {**tensor, "parameters": {"binary_data_size": 3072}}
    del small["data"]
    outputs = [{"name": "probabilities", "parameters": {"classification": 2, "binary_data": True}}]

    def parse(name: str, content: bytes, folder: Path) -> None:
        kind = {"json": b"application/json", "multipart": b"multipart/form-data; boundary=b"}[name]
        parse_body(content, kind, {}, 64, 32)

    def infer(name: str, content: bytes, folder: Path) -> None:
        head = content.find(b"\n}") + 2 if name == "binary" else None
        oip.parse_infer(content, head, 64, 32)

    return [
        Reader(
            "request",
            {"json": dump_json({"images": [text, text], "top_k": 3, "request_id": "a"}), "multipart": multipart},
            mix(change_bytes, change_text, _change_if_json),
            parse,
        ),
        Reader(
            "inference request",
            {
                "json": dump_json({"id": "1", "inputs": [tensor], "outputs": outputs}),
                "binary": dump_json({"inputs": [small], "outputs": outputs}) + bytes(3072),
            },
            mix(change_bytes, _change_if_json, _change_if_json),
            infer,
        ),
    ]


def _change_if_json(chance: Any, content: bytes) -> bytes:
    end = content.rfind(b"}") + 1
    if not content.startswith(b"{"):
        return change_bytes(chance, content)
    return change_json(chance, content[:end]) + content[end:]


# A run out of another repository's workflow.


def _build_artifact(scratch: Path) -> list[Reader]:
    files = {name: content for name, content in read_folder(GOLDEN).items() if "checkpoints" not in name}
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)

    def unpack(name: str, content: bytes, folder: Path) -> None:
        main = load_script("unpack_run").main
        target = folder / "target"
        said = io.StringIO()
        with redirect_stderr(said), redirect_stdout(io.StringIO()):
            status = main([str(_write(folder / "run.zip", content)), str(target)])
        shutil.rmtree(target, ignore_errors=True)
        lines = said.getvalue().splitlines()
        if status == 2 and len(lines) == 1:
            raise ImageClassifierError(lines[0])
        assert status == 0 and len(lines) <= 1, (status, lines)

    documents = (".json", mix(change_json, seal(change_json, _seal_run_manifest)))
    return [Reader("artifact", {"run.zip": packed.getvalue()}, mix(change_bytes, change_zip(documents)), unpack)]
