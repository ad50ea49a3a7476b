"""Loads a published model with ONNX Runtime and predicts with it: uint8 images in, probabilities out."""

from __future__ import annotations

import hashlib
import math
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
from numpy.typing import NDArray

from image_classifier import files
from image_classifier.choices import Fit, ServingPrecision
from image_classifier.confinement import ConfinedError, read_confined
from image_classifier.errors import DataError, ModelError
from image_classifier.extras import load_extra
from image_classifier.image_sizes import DEFAULT_IMAGE_SIZE, IMAGE_SIZES, ImageSize
from image_classifier.published import model_process
from image_classifier.published.folder import (
    CARD,
    FORMAT_VERSION,
    INT8_MODEL,
    MANIFEST,
    MAX_BYTES,
    MODEL,
    REFERENCE,
    SAMPLES,
    read_published,
)
from image_classifier.published.model_process import build_options, get_image_size
from image_classifier.published.policy import Policy, check_published
from image_classifier.published.verdicts import Verdict, read_verdicts
from image_classifier.text import one_line

INPUT, OUTPUT = "images", "probabilities"
WORTH_ALL_CORES = 0.8
"""A single image uses all cores if that takes at most this fraction of one core's time: other work needs them too."""

METADATA_PREFIX = "image_classifier."
"""Prefix of the package's keys in the metadata of an ONNX file."""


@dataclass(frozen=True)
class PublishedModel:
    """Description of a published model.

    Attributes:
        path: the folder, or the ONNX file.
        version: of the registry; without one, the first 12 digits of `digest`.
        views: test-time augmentation inside the model.
        data_digest: digest of the training snapshot.
        fit: how image files of other sizes are resized, as in training.
        image_size: side of the input in pixels.
        card: content of MODEL_CARD.md; None if there is none.
        manifest: content of manifest.json, likewise.
        digest: sha256 of the ONNX file.
        samples: content of samples.png, likewise.
        verdicts: about its run, from the attestations in the folder.
        reference: content of drift_reference.json, likewise.
    """

    path: Path
    classes: tuple[str, ...]
    version: str
    experiment_name: str
    run_name: str
    data_digest: str
    views: str
    format_version: int
    fit: Fit = "squeeze"
    image_size: ImageSize = DEFAULT_IMAGE_SIZE
    card: bytes | None = None
    manifest: bytes | None = None
    digest: str = ""
    samples: bytes | None = None
    verdicts: tuple[Verdict, ...] = ()
    reference: bytes | None = None


class Predictor:
    """Predicts with one model. Thread-safe.

    Attributes:
        model: description of the model.
        seconds_per_image: inference time, set by `measure`.
    """

    def __init__(self, session: Any, model: PublishedModel, lone_session: Any = None) -> None:
        self.model = model
        self.seconds_per_image = math.inf
        self._session = session
        self._lone_session = lone_session or session

    def measure(self) -> None:
        """Measure the inference time of an image, and choose the number of threads for a single image.

        Raises:
            ModelError: the model cannot be computed.
        """
        try:
            if self._time(1, is_alone=True) > WORTH_ALL_CORES * self._time(1, is_alone=False):
                self._lone_session = self._session
            self.seconds_per_image = self._time(4, is_alone=False) / 4
        except Exception as error:  # ONNX Runtime's own types
            raise ModelError(f"{self.model.path} cannot be computed: {one_line(error)}") from error

    def _time(self, num_images: int, *, is_alone: bool) -> float:
        images = np.zeros((num_images, self.model.image_size, self.model.image_size, 3), np.uint8)
        seconds: list[float] = []
        while len(seconds) < 20 and sum(seconds) < 0.05:  # the minimum counts: other processes may disturb
            began = time.perf_counter()
            probabilities = self.predict(images, is_alone=is_alone)
            seconds.append(time.perf_counter() - began)
        if probabilities.shape != (num_images, len(self.model.classes)):
            raise ValueError(
                f"it returns {probabilities.shape[1:]} values per image for {len(self.model.classes)} classes"
            )
        return min(seconds)

    def predict(self, images: NDArray[np.uint8], *, is_alone: bool = False) -> NDArray[np.float32]:
        """Predict class probabilities, float32 [N, C], of RGB images, uint8 [N, S, S, 3].

        Args:
            is_alone: nothing else is being computed.

        Raises:
            DataError: the images have another type or shape.
        """
        side = self.model.image_size
        if images.dtype != np.uint8 or images.shape[1:] != (side, side, 3):
            raise DataError(f"images must be uint8 [N, {side}, {side}, 3], got: {images.dtype} {list(images.shape)}")
        if not len(images):
            return np.empty((0, len(self.model.classes)), np.float32)
        session = self._lone_session if is_alone else self._session
        (probabilities,) = session.run([OUTPUT], {INPUT: images})
        return np.asarray(probabilities, np.float32)


def load_predictor(
    path: Path,
    *,
    public_key: Path | None = None,
    policy: Policy | None = None,
    num_threads: int = 0,
    num_lone_threads: int = 0,
    precision: ServingPrecision = "fp32",
    version: str | None = None,
) -> Predictor:
    """Check a published model and load it.

    Args:
        path: its folder, or an ONNX file. A file in a published folder is checked against the manifest.
        public_key: of the required signature.
        policy: who must have verified the run.
        num_threads: threads per batch; 0 for all cores.
        num_lone_threads: threads for a single image; 0 for `num_threads`.
        precision: which of the folder's models.
        version: name of the version in the registry.

    Raises:
        ModelError: it is missing, changed, has a later format, fails the signature or policy check, or cannot be
            computed.
        SettingsError: the key has another type, or ONNX Runtime is not installed.
    """
    content, beside, verdicts = _read_model(path, public_key, policy, precision)
    predictor = build_predictor(
        content,
        path,
        num_threads=num_threads,
        num_lone_threads=num_lone_threads,
        version=version,
        is_signed=public_key is not None,
    )
    names = {"card": CARD, "manifest": MANIFEST, "samples": SAMPLES, "reference": REFERENCE}
    shown = {name: beside.get(file) for name, file in names.items()}
    predictor.model = replace(predictor.model, verdicts=verdicts, **shown)  # type: ignore[arg-type]  # of bytes alone
    return predictor


def build_predictor(
    content: bytes,
    path: Path,
    *,
    num_threads: int = 0,
    num_lone_threads: int = 0,
    version: str | None = None,
    is_signed: bool = False,
) -> Predictor:
    """Build a predictor from the content of an ONNX file.

    Args:
        is_signed: a trusted key signed it; otherwise a separate process with limits tests it first.

    The other arguments are those of `load_predictor`.

    Raises:
        ModelError: it has a later format or external weights, or cannot be computed.
        SettingsError: ONNX Runtime is not installed.
    """
    runtime = load_extra("onnxruntime", "serve")
    if not is_signed:
        try:
            for _ in read_confined(model_process.__name__, content=content):
                pass
        except ConfinedError as error:
            raise ModelError(f"{path} {error}") from None
    num_threads = num_threads or len(os.sched_getaffinity(0))
    try:
        session = _build_session(runtime, content, num_threads)
        lone_session = _build_session(runtime, content, num_lone_threads) if num_lone_threads > num_threads else None
    except Exception as error:  # ONNX Runtime's own types: a newer opset, an unknown operator, not an ONNX file
        raise ModelError(f"{path} cannot be loaded by ONNX Runtime {runtime.__version__}: {one_line(error)}") from error
    digest = hashlib.sha256(content).hexdigest()
    return Predictor(session, _describe(path, session, version or digest[:12], digest), lone_session)


def _build_session(runtime: Any, content: bytes, num_threads: int) -> Any:
    options = build_options(runtime, num_threads)
    # Threads that spin between two batches would take CPU time from decoding and answering.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def _read_model(
    path: Path, public_key: Path | None, policy: Policy | None, precision: ServingPrecision
) -> tuple[bytes, dict[str, bytes], tuple[Verdict, ...]]:
    """Read and check a model: its content, the files of its folder, and the verdicts about its run."""
    if not path.exists():
        raise ModelError(f"there is no published model {path}; publish a run first")
    folder, name = (path, INT8_MODEL if precision == "int8" else MODEL) if path.is_dir() else (path.parent, path.name)
    if not path.is_dir() and public_key is None and policy is None and not (folder / MANIFEST).is_file():
        try:
            return files.read_file(path, MAX_BYTES), {}, ()
        except (OSError, ValueError) as error:
            raise ModelError(f"{path} cannot be read: {one_line(error)}; choose another file") from error
    published = read_published(folder, public_key)
    if name not in published.manifest["files"]:
        raise ModelError(f"{folder} was published without {name}; choose --precision fp32")
    tally = None if policy is None else check_published(folder, published, policy, name)
    return published.files[name], published.files, read_verdicts(folder, published.manifest, tally)


def _describe(path: Path, session: Any, version: str, digest: str) -> PublishedModel:
    try:
        metadata = {
            key.removeprefix(METADATA_PREFIX): value
            for key, value in session.get_modelmeta().custom_metadata_map.items()
            if key.startswith(METADATA_PREFIX)
        }
        format_version = int(metadata["format_version"])
        if format_version > FORMAT_VERSION:
            raise ModelError(
                f"{path} has the format {format_version}; this version reads up to {FORMAT_VERSION}: "
                "install a later one"
            )
        fit = metadata.get("fit", "squeeze")
        if fit not in get_args(Fit):
            raise ValueError("fit")
        image_size = get_image_size(session)
        if image_size is None:
            raise ValueError(f"input of square images of {', '.join(map(str, IMAGE_SIZES))} pixels")
        classes = files.parse_json(metadata["classes"])
        if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
            raise ValueError("list of classes")
        return PublishedModel(
            path=path,
            classes=tuple(classes),
            version=version,
            experiment_name=metadata["experiment_name"],
            run_name=metadata["run_name"],
            data_digest=metadata["data_digest"],
            views=metadata["views"],
            format_version=format_version,
            fit=cast(Fit, fit),
            image_size=image_size,
            digest=digest,
        )
    except (KeyError, ValueError, TypeError) as error:
        raise ModelError(f"{path} is not a model published by this package: it has no valid {error}") from error
