"""A published model, loaded with ONNX Runtime: uint8 images in, probabilities out. Never imports torch."""

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
from image_classifier.published.policy import Policy, check_published
from image_classifier.published.session import build_options, get_image_size
from image_classifier.published.verdicts import Verdict, read_verdicts
from image_classifier.text import one_line

INPUT, OUTPUT = "images", "probabilities"
WORTH_ALL_CORES = 0.8
"""All cores compute one image where they take no more than this part of one core's time: others need them, too."""

METADATA_PREFIX = "image_classifier."
"""Of the keys of an ONNX file's metadata that say what it is."""


@dataclass(frozen=True)
class PublishedModel:
    """What a published model says about itself.

    Attributes:
        path: the folder, or the ONNX file.
        version: the registry's, or else the first 12 digits of the ONNX file's sha256.
        views: views of an image that are averaged inside.
        data_digest: of the snapshot that it was trained on.
        fit: how image files of another size are fitted, as those were that it was trained on.
        image_size: side in pixels of the images that it takes.
        card: MODEL_CARD.md, as it was read with the model; None where there is none.
        manifest: manifest.json likewise.
        digest: sha256 of the ONNX file.
        samples: samples.png likewise.
        verdicts: about its run, of the attestations beside it.
        reference: drift_reference.json likewise.
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
    """Answers for one model; safe to be called from several threads.

    Attributes:
        model: what the model says about itself.
        seconds_per_image: of computing, measured when `measure` was called.
    """

    def __init__(self, session: Any, model: PublishedModel, lone_session: Any = None) -> None:
        self.model = model
        self.seconds_per_image = math.inf
        self._session = session
        self._lone_session = lone_session or session

    def measure(self) -> None:
        """Measure how long an image takes, and choose how one is computed that is alone.

        Raises:
            ModelError: it cannot be computed.
        """
        try:
            if self._time(1, is_alone=True) > WORTH_ALL_CORES * self._time(1, is_alone=False):
                self._lone_session = self._session
            self.seconds_per_image = self._time(4, is_alone=False) / 4
        except Exception as error:  # of types that the runtime alone knows
            raise ModelError(f"{self.model.path} cannot be computed here: {one_line(error)}") from error

    def _time(self, num_images: int, *, is_alone: bool) -> float:
        images = np.zeros((num_images, self.model.image_size, self.model.image_size, 3), np.uint8)
        seconds: list[float] = []
        while len(seconds) < 20 and sum(seconds) < 0.05:  # the shortest: others may be at work, too
            began = time.perf_counter()
            probabilities = self.predict(images, is_alone=is_alone)
            seconds.append(time.perf_counter() - began)
        if probabilities.shape != (num_images, len(self.model.classes)):
            raise ValueError(f"{probabilities.shape[1:]} answers an image for {len(self.model.classes)} classes")
        return min(seconds)

    def predict(self, images: NDArray[np.uint8], *, is_alone: bool = False) -> NDArray[np.float32]:
        """Compute the probability of each class: uint8 [N, S, S, 3] RGB to float32 [N, C].

        Args:
            is_alone: nothing else is computed meanwhile.

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
        path: its folder, or an ONNX file; one in a published folder is held against the manifest there.
        public_key: the key that it must be signed by.
        policy: by whom its run must have been verified.
        num_threads: threads that compute one batch; 0 for all cores.
        num_lone_threads: threads that compute what is alone; 0 for as many as always.
        precision: which of the folder's two models.
        version: what the registry calls it.

    Raises:
        ModelError: it is missing, changed, not signed by the key, not verified as the policy asks for, of a later
            format, or cannot be computed here.
        SettingsError: the key is of another kind, or ONNX Runtime is not installed.
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

    It is loaded in a process of its own first, within limits, unless it is signed by a key that the caller trusts.
    The other arguments are those of `load_predictor`.

    Raises:
        ModelError: it is of a later format, has weights in other files, or cannot be computed here.
        SettingsError: ONNX Runtime is not installed.
    """
    runtime = load_extra("onnxruntime", "serve")
    if not is_signed:  # what is signed comes from who is trusted
        try:
            for _ in read_confined(model_process.__name__, content=content):
                pass
        except ConfinedError as error:
            raise ModelError(f"{path} {error}") from None
    num_threads = num_threads or len(os.sched_getaffinity(0))
    try:
        session = _build_session(runtime, content, num_threads)
        lone_session = _build_session(runtime, content, num_lone_threads) if num_lone_threads > num_threads else None
    except Exception as error:  # of types that the runtime alone knows: a newer opset, an unknown operator, no model
        raise ModelError(f"{path} cannot be loaded by ONNX Runtime {runtime.__version__}: {one_line(error)}") from error
    digest = hashlib.sha256(content).hexdigest()
    return Predictor(session, _describe(path, session, version or digest[:12], digest), lone_session)


def _build_session(runtime: Any, content: bytes, num_threads: int) -> Any:
    options = build_options(runtime, num_threads)
    # A thread that spins between two batches takes the processor from the ones that decode and answer.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def _read_model(
    path: Path, public_key: Path | None, policy: Policy | None, precision: ServingPrecision
) -> tuple[bytes, dict[str, bytes], tuple[Verdict, ...]]:
    """Read the content of a model once, and what is shown of its folder: the bytes that were checked."""
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
        return PublishedModel(
            path=path,
            classes=_parse_classes(metadata["classes"]),
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
        raise ModelError(f"{path} is no model that this package published: it has no valid {error}") from error


def _parse_classes(text: str) -> tuple[str, ...]:
    classes = files.parse_json(text)
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise ValueError("list of classes")
    return tuple(classes)
