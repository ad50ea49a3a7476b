"""Published models that answer as a test wants them to, made in milliseconds and as whole as real ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from image_classifier.data.snapshot import Snapshot
from image_classifier.metrics import compute_metrics
from image_classifier.published.folder import INT8_MODEL, MANIFEST, MODEL, describe_content, serialize_manifest
from image_classifier.published.predictor import METADATA_PREFIX
from image_classifier.publishing.evidence import METRICS


def build_model(snapshot: Snapshot, num_right: int, metadata: dict[str, Any]) -> bytes:
    """Build an ONNX file that has the first so many test images right: a linear network, fitted to the test set."""
    images, labels = snapshot.test
    num_classes = len(snapshot.classes)
    answers = np.where(np.arange(len(labels)) < num_right, labels, (labels + 1) % num_classes)
    pixels = np.ascontiguousarray(images.transpose(0, 2, 3, 1)).reshape(len(images), -1).astype(np.float64)
    weights = np.linalg.lstsq(pixels, 20 * np.eye(num_classes)[answers], rcond=None)[0].astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["images"], ["floats"], to=TensorProto.FLOAT),
            helper.make_node("Reshape", ["floats", "shape"], ["pixels"]),
            helper.make_node("MatMul", ["pixels", "weights"], ["scores"]),
            helper.make_node("Softmax", ["scores"], ["probabilities"], axis=1),
        ],
        "linear",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["N", 32, 32, 3])],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["N", num_classes])],
        [
            numpy_helper.from_array(np.array([-1, pixels.shape[1]]), "shape"),
            numpy_helper.from_array(weights, "weights"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
    helper.set_model_props(model, {f"{METADATA_PREFIX}{key}": value for key, value in texts.items()})
    return bytes(model.SerializeToString())


def write_published(folder: Path, like: Path, snapshot: Snapshot, num_right: int, **changes: Any) -> Path:
    """Write a published folder like another one, with a model that has so many test images right.

    Args:
        changes: of the manifest, such as another run_name; what the ONNX file says, too, is changed there alike.
    """
    folder.mkdir(parents=True)
    manifest: dict[str, Any] = json.loads((like / MANIFEST).read_text()) | changes
    for name in list(manifest["files"]):
        if name not in (MODEL, INT8_MODEL):
            shutil.copy(like / name, folder)
    names = ("experiment_name", "run_name", "classes", "data_digest", "views", "format_version")
    content = build_model(snapshot, num_right, {name: manifest[name] for name in names})
    onnx.checker.check_model(content)
    (folder / MODEL).write_bytes(content)
    manifest["files"].pop(INT8_MODEL, None)
    manifest["files"] = {**manifest["files"], MODEL: describe_content(content)}
    num_images = len(snapshot.test[1])
    is_right = np.arange(num_images) < num_right
    labels = snapshot.test[1]
    answers = np.eye(len(snapshot.classes), dtype=np.float32)[np.where(is_right, labels, (labels + 1) % 10)]
    metrics = compute_metrics(answers, labels, snapshot.classes)
    manifest["metrics"] = {**{name: metrics[name] for name in METRICS}, "num_images": num_images}
    manifest["right"] = pack(is_right)
    (folder / MANIFEST).write_bytes(serialize_manifest(manifest))
    return folder


def pack(is_right: NDArray[np.bool_]) -> str:
    """Pack which images are right as a manifest has it."""
    return np.packbits(is_right).tobytes().hex()


def claim(folder: Path, num_right: int) -> None:
    """Let a manifest claim that so many test images are right, as anybody can who writes one."""
    manifest = json.loads((folder / MANIFEST).read_text())
    num_images = manifest["metrics"]["num_images"]
    manifest["right"] = pack(np.arange(num_images) < num_right)
    manifest["metrics"]["accuracy"] = num_right / num_images
    (folder / MANIFEST).write_bytes(serialize_manifest(manifest))


def write_keys(folder: Path, name: str, curve: ec.EllipticCurve | None = None) -> tuple[Path, Path]:
    """Write a private key, an RSA one without a curve, and its public key."""
    key = ec.generate_private_key(curve) if curve else rsa.generate_private_key(65537, 2048)
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    encoding, no_password = serialization.Encoding.PEM, serialization.NoEncryption()
    private.write_bytes(key.private_bytes(encoding, serialization.PrivateFormat.PKCS8, no_password))
    public.write_bytes(key.public_key().public_bytes(encoding, serialization.PublicFormat.SubjectPublicKeyInfo))
    return private, public
