"""Static int8 quantization of the graph, calibrated with training images, if it is faster and nearly as accurate."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from image_classifier.errors import ImageClassifierError, ModelError
from image_classifier.extras import load_extra
from image_classifier.image_sizes import scale_batch
from image_classifier.progress import track
from image_classifier.published.predictor import INPUT, Predictor
from image_classifier.storage import scratch_folder
from image_classifier.text import one_line

NUM_CALIBRATION_IMAGES = 512
MAX_LOSS = 0.005
"""Of accuracy on the test set, as a fraction."""
TIMED_BATCH_SIZE, NUM_TIMED_IMAGES = 64, 512
_NUM_ROUNDS, _ROUND_S = 5, 0.3
_BATCH_SIZE = 64


# Over 50 lines: one call of a library, with all that it needs spelled out.
@track("quantizing")
def quantize(content: bytes, images: NDArray[np.uint8]) -> bytes:
    """Quantize an exported model: convolutions with weights of 7 bits, one scale a channel, and what pools them.

    Those that read pixels stay as they are: they are a small part of the work, and turning pixels into bytes and back
    costs more than it saves.

    7 bits, because processors without VNNI add two products of 8 bits in 16, where they would overflow: the answers
    must not depend on the machine that serves. Ranges of activations are those met on the images given.

    Args:
        content: an ONNX file.
        images: uint8 [N, 3, S, S] of the training set.

    Raises:
        ModelError: the graph cannot be quantized.
    """
    quantization = load_extra("onnxruntime.quantization", "publish")
    preprocess = load_extra("onnxruntime.quantization.shape_inference", "publish").quant_pre_process
    onnx = load_extra("onnx", "publish")

    class Reader(quantization.CalibrationDataReader):  # type: ignore[name-defined,misc]  # the library wants a subclass
        def __init__(self) -> None:
            self._batches = ({INPUT: pixels} for pixels in _iterate_pixels(images))

        def get_next(self) -> dict[str, Any] | None:
            return next(self._batches, None)

    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # it warns of its own defaults through the root logger
    try:
        with scratch_folder() as folder:
            source, prepared, target = (folder / name for name in ("source.onnx", "prepared.onnx", "target.onnx"))
            source.write_bytes(content)
            preprocess(source, prepared, skip_symbolic_shape=True)
            read_pixels = _find_convolutions_of_pixels(onnx.load(prepared))
            quantization.quantize_static(
                prepared,
                target,
                Reader(),
                quant_format=quantization.QuantFormat.QDQ,
                op_types_to_quantize=["Conv", "MaxPool"],
                nodes_to_exclude=read_pixels,
                activation_type=quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8,
                per_channel=True,
                reduce_range=True,
            )
            proto = onnx.load(target)
    except ImageClassifierError:
        raise
    except Exception as error:  # of the library's many types
        raise ModelError(f"the exported graph cannot be quantized: {one_line(error)}") from error
    finally:
        root.setLevel(level)
    del proto.metadata_props[:]
    proto.metadata_props.extend(onnx.load_from_string(content).metadata_props)
    quantized: bytes = proto.SerializeToString(deterministic=True)
    return quantized


def _find_convolutions_of_pixels(proto: Any) -> list[str]:
    channels = {weight.name: weight.dims[1] for weight in proto.graph.initializer if len(weight.dims) == 4}
    return [node.name for node in proto.graph.node if node.op_type == "Conv" and channels.get(node.input[1]) == 3]


def _iterate_pixels(images: NDArray[np.uint8]) -> Iterator[NDArray[np.uint8]]:
    """Iterate over batches of images [N, 3, S, S] as a predictor takes them: [n, S, S, 3]."""
    size = scale_batch(_BATCH_SIZE, images.shape[-1])
    for start in range(0, len(images), size):
        yield np.ascontiguousarray(images[start : start + size].transpose(0, 2, 3, 1))


@track("comparing both precisions")
def compare_precisions(
    predictors: dict[str, Predictor], images: NDArray[np.uint8], labels: NDArray[np.int64]
) -> dict[str, Any]:
    """Compare the predictors `fp32` and `int8` in accuracy, in their answers, and in speed side by side.

    Args:
        images: uint8 [N, 3, S, S].
        labels: int64 [N].

    Returns:
        `accuracy` and `images_per_second` by precision, `largest_difference`, `agreement`, `batch_size` of the timing,
        and `verdict`: None if the quantized model is worth having, or else why not.
    """
    answers = {
        name: np.concatenate([predictor.predict(pixels) for pixels in _iterate_pixels(images)])
        for name, predictor in predictors.items()
    }
    accuracy = {name: float((values.argmax(axis=1) == labels).mean()) for name, values in answers.items()}
    rates = measure_speed(predictors, np.ascontiguousarray(images[:NUM_TIMED_IMAGES].transpose(0, 2, 3, 1)))
    speed = {name: round(float(np.median(values)), 1) for name, values in rates.items()}
    loss = round(accuracy["fp32"] - accuracy["int8"], 9)
    verdict = None
    if loss > MAX_LOSS:
        verdict = f"it loses {100 * loss:.2f} points of accuracy, more than the {100 * MAX_LOSS:g} that are allowed"
    elif speed["int8"] <= speed["fp32"]:
        verdict = f"it is not faster: {speed['int8']:,.0f} images/s, {speed['fp32']:,.0f} in fp32"
    return {
        "accuracy": accuracy,
        "largest_difference": float(np.abs(answers["fp32"] - answers["int8"]).max()),
        "agreement": float((answers["fp32"].argmax(axis=1) == answers["int8"].argmax(axis=1)).mean()),
        "images_per_second": speed,
        "batch_size": scale_batch(TIMED_BATCH_SIZE, images.shape[-1]),
        "verdict": verdict,
    }


def describe_comparison(comparison: Mapping[str, Any]) -> str:
    """Describe on one line what `compare_precisions` has found."""
    if comparison["verdict"] is not None:
        return f"int8 is left out, because {comparison['verdict']}"
    speed, accuracy = comparison["images_per_second"], comparison["accuracy"]
    gain = speed["int8"] / speed["fp32"]
    return f"int8: {gain:.1f} times as fast as fp32, accuracy {accuracy['int8']:.2%}, fp32 {accuracy['fp32']:.2%}"


def measure_speed(predictors: dict[str, Predictor], pixels: NDArray[np.uint8]) -> dict[str, list[float]]:
    """Measure images a second of each predictor on uint8 [N, S, S, 3], in several rounds in turn."""
    size = scale_batch(TIMED_BATCH_SIZE, pixels.shape[1])
    batches = [pixels[start : start + size] for start in range(0, len(pixels) - size + 1, size)]
    batches = batches or [np.resize(pixels, (size, *pixels.shape[1:]))]
    rates: dict[str, list[float]] = {name: [] for name in predictors}
    for _ in range(_NUM_ROUNDS):
        for name, predictor in predictors.items():
            num_images, start = 0, time.perf_counter()
            while (seconds := time.perf_counter() - start) < _ROUND_S:
                predictor.predict(batches[num_images // size % len(batches)])
                num_images += size
            rates[name].append(num_images / seconds)
    return rates
