"""What `evaluate` and `predict` compute with: a run's model, with torch, or a published one, without."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace

from image_classifier.choices import Device, Fit, ServingPrecision
from image_classifier.errors import SettingsError
from image_classifier.image_sizes import ImageSize, scale_batch
from image_classifier.progress import track
from image_classifier.published.folder import is_published
from image_classifier.remote.cache import localize

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

BATCH_SIZE = 500


@dataclass(frozen=True)
class LoadedModel:
    """A loaded model.

    Attributes:
        path: the model's file, or the folder of a published one.
        views: of an image that its answers average.
        data_digest: of the data that it was trained on.
        fit: how images of another size are fitted.
        image_size: side in pixels of the images that it takes.
        predict: uint8 images [N, 3, S, S] to float32 probabilities [N, C].
        evaluate: images and labels int64 [N] to what evaluation.json holds.
    """

    path: Path
    classes: tuple[str, ...]
    views: str
    data_digest: str | None
    fit: Fit
    image_size: ImageSize
    predict: Callable[[NDArray[np.uint8]], NDArray[np.float32]]
    evaluate: Callable[[NDArray[np.uint8], NDArray[np.int64]], dict[str, Any]]


def add_model_arguments(parser: ArgumentParser) -> None:
    """Add the argument that names a model, and the options that say how to compute with it."""
    parser.add_argument(
        "run", type=Path, help="folder of a finished run or of a published model, a model.pth or .onnx, or a URL of one"
    )
    parser.add_argument(
        "--device", type=Device, default="auto", help="where to compute; auto takes a GPU if there is one"
    )
    parser.add_argument(
        "--precision", type=ServingPrecision, default="fp32", help="numeric precision of a published model"
    )
    parser.add_argument(
        "--public_key", type=Path | None, default=None, help="PEM file of the key that a published model is signed by"
    )


@track("loading the model")
def load(arguments: Namespace) -> LoadedModel:
    """Load the model that the arguments name.

    Raises:
        ImageClassifierError: there is none, or it was changed, or an option is for the other kind of model.
    """
    path = localize(arguments.run)
    return _load_published(path, arguments) if is_published(path) else _load_trained(path, arguments)


def _load_published(path: Path, arguments: Namespace) -> LoadedModel:
    import numpy as np

    from image_classifier.metrics import build_evaluation
    from image_classifier.published.predictor import load_predictor

    if arguments.device == "cuda":
        raise SettingsError("--device cuda: a published model is computed on the processor; choose cpu, or auto")
    predictor = load_predictor(path, public_key=arguments.public_key, precision=arguments.precision)
    model = predictor.model

    def predict(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        return predictor.predict(np.ascontiguousarray(images.transpose(0, 2, 3, 1)))

    def evaluate(images: NDArray[np.uint8], labels: NDArray[np.int64]) -> dict[str, Any]:
        with track("evaluating", len(images), "images") as task:
            size = scale_batch(BATCH_SIZE, model.image_size)
            parts = []
            for start in range(0, max(len(images), 1), size):
                parts.append(predict(images[start : start + size]))
                task.advance(len(parts[-1]))
        probabilities = np.concatenate(parts)
        single_view = probabilities if model.views == "one" else None
        return build_evaluation(probabilities, labels, model.classes, views=model.views, single_view=single_view)

    return LoadedModel(
        path, model.classes, model.views, model.data_digest, model.fit, model.image_size, predict, evaluate
    )


def _load_trained(path: Path, arguments: Namespace) -> LoadedModel:
    if arguments.precision != "fp32" or arguments.public_key is not None:
        raise SettingsError(
            f"--precision and --public_key are for published models, which {path} is not; "
            "create one with: image_classifier publish RUN"
        )
    model_path = find_model(path)

    if find_spec("torch") is None:
        raise SettingsError(
            f"{path} is a run, which needs torch, and that is not installed: pip install image-classifier; "
            "without torch name the published model of a run, see: image_classifier publish"
        )
    from image_classifier.tracking.checkpoint import load_model
    from image_classifier.training.evaluate import compute_evaluation, compute_probabilities
    from image_classifier.training.portable_steps import choose_arithmetic
    from image_classifier.training.threads import Threads

    model = load_model(model_path)
    is_portable = model.run.get("instruction_set") == "portable" and arguments.device != "cuda"
    device = choose_device("cpu" if is_portable else arguments.device)
    classifier, views = model.classifier.to(device), model.views
    threads = Threads(arithmetic=choose_arithmetic("portable" if is_portable else "native"))

    def predict(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        return compute_probabilities(classifier, images, views=views, device=device, threads=threads)

    def evaluate(images: NDArray[np.uint8], labels: NDArray[np.int64]) -> dict[str, Any]:
        evaluation, _ = compute_evaluation(
            classifier, images, labels, model.classes, views=views, device=device, threads=threads
        )
        return evaluation

    data_digest = model.run.get("data_digest")
    return LoadedModel(model_path, model.classes, views, data_digest, model.fit, model.input_size, predict, evaluate)


def find_model(run: Path) -> Path:
    """Find the model file of a finished run, or take the path for a model file itself.

    Raises:
        RunError: the folder is not a finished run.
    """
    from image_classifier.tracking.checking import check_finished
    from image_classifier.tracking.layout import MODEL

    if run.is_file():
        return run
    check_finished(run)
    return run / MODEL


def choose_device(device: Device) -> torch.device:
    """Choose where to compute.

    Raises:
        SettingsError: a GPU was asked for and there is none.
    """
    import torch

    has_gpu = torch.cuda.is_available()
    if device == "cuda" and not has_gpu:
        raise SettingsError("--device cuda: torch sees no GPU here; choose cpu, or auto")
    return torch.device("cuda" if has_gpu and device != "cpu" else "cpu")
