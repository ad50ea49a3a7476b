"""The exported graph: it answers as the trainer does, whatever the network, the size and the views."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from image_classifier.choices import Fit, Views
from image_classifier.errors import ModelError, SettingsError
from image_classifier.image_sizes import ImageSize
from image_classifier.model.catalog import build_classifier
from image_classifier.published.predictor import load_predictor
from image_classifier.publishing.onnx import DEFAULT_OPSET, export_model
from image_classifier.publishing.quantize import quantize
from image_classifier.tracking.checkpoint import Model
from image_classifier.training.evaluate import SURE, compute_probabilities

CONTRASTS = np.linspace(0.02, 1, 40).reshape(40, 1, 1, 1)
IMAGES = (np.random.default_rng(0).integers(0, 256, (40, 3, 32, 32)) * CONTRASTS).astype(np.uint8)
ORIGIN = {"experiment_name": "experiment", "run_name": "run", "data_digest": "0" * 64, "code_digest": "1" * 64}


def build_model(name: str, image_size: int = 32, *, sharpness: float = 1.0) -> Model:
    """Build a model that was never trained, whose answers are far from alike."""
    classifier = build_classifier(name, 3, input_mean=(0.5,) * 3, input_std=(0.25,) * 3, seed=0, image_size=image_size)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for module in classifier.modules():
            if (
                isinstance(module, nn.BatchNorm2d)
                and module.running_mean is not None
                and module.running_var is not None
            ):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
        list(classifier.network.parameters())[-1].mul_(sharpness)
    return Model(classifier.eval(), name, ("a", "b", "c"), "six", ORIGIN)


def predict(content: bytes, folder: Path, images: NDArray[np.uint8], size: int) -> NDArray[np.float32]:
    """Compute what an ONNX file answers, in batches of a size."""
    (folder / "model.onnx").write_bytes(content)
    predictor = load_predictor(folder / "model.onnx", num_threads=1)
    pixels = np.ascontiguousarray(images.transpose(0, 2, 3, 1))
    return np.concatenate([predictor.predict(pixels[start : start + size]) for start in range(0, len(pixels), size)])


@pytest.mark.parametrize(
    ("name", "image_size", "views"),
    [("lenet", 32, "one"), ("airbench_small", 24, "six"), ("airbench_small", 20, "mirror"), ("resnet", 32, "one")],
)
def test_the_graph_answers_as_the_trainer_does(name: str, image_size: int, views: Views, tmp_path: Path) -> None:
    model = build_model(name, image_size)
    expected = compute_probabilities(model.classifier, IMAGES, views=views)
    content = export_model(model, views=views)
    for size in (1, 7, 40):
        np.testing.assert_allclose(predict(content, tmp_path, IMAGES, size), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "side", "image_size", "views"),
    [
        *(("resnet", 64, 64, "mirror"), ("airbench_small", 96, 96, "six"), ("airbench_small", 64, 32, "six")),
        *(("resnet", 32, 64, "one"), ("lenet", 64, 32, "one"), ("airbench_small", 224, 224, "one")),
    ],
)
def test_the_graph_takes_the_images_of_the_run(
    name: str, side: ImageSize, image_size: int, views: Views, tmp_path: Path
) -> None:
    model = replace(build_model(name, image_size), input_size=side)
    contrasts = np.linspace(0.02, 1, 9).reshape(9, 1, 1, 1)
    images = (np.random.default_rng(0).integers(0, 256, (9, 3, side, side)) * contrasts).astype(np.uint8)
    content = export_model(model, views=views)
    expected = compute_probabilities(model.classifier, images, views=views)
    for size in (1, 7):
        np.testing.assert_allclose(predict(content, tmp_path, images, size), expected, rtol=0, atol=1e-5)
    assert load_predictor(tmp_path / "model.onnx").model.image_size == side


def test_only_unsure_images_are_looked_at_six_times(tmp_path: Path) -> None:
    """Batches without one, with one and with several of them."""
    logits = np.log(compute_probabilities(build_model("airbench_small", 24).classifier, IMAGES).astype(np.float64))
    low, high = -20.0, 20.0  # of the logarithm of the sharpness at which half of the images are unsure
    for _ in range(60):
        sharpness = float(np.exp((low + high) / 2))
        scores = np.sort(np.exp(sharpness * (logits - logits.max(axis=1, keepdims=True))), axis=1)
        margin = np.median((scores[:, -1] - scores[:, -2]) / scores.sum(axis=1))
        low, high = (low, np.log(sharpness)) if margin > SURE else (np.log(sharpness), high)
    model = build_model("airbench_small", 24, sharpness=sharpness)
    ordered = np.sort(compute_probabilities(model.classifier, IMAGES), axis=1)
    is_unsure = ordered[:, -1] - ordered[:, -2] < SURE
    assert 2 <= is_unsure.sum() <= len(IMAGES) - 2
    content = export_model(model, views="six")
    for chosen in (IMAGES[~is_unsure], IMAGES[is_unsure][:1], IMAGES):
        expected = compute_probabilities(model.classifier, chosen, views="six")
        np.testing.assert_allclose(predict(content, tmp_path, chosen, 40), expected, rtol=0, atol=1e-5)


def test_the_file_is_valid_describes_itself_and_names_nothing_of_this_machine() -> None:
    content = export_model(build_model("airbench_small", 24), views="six")
    proto = onnx.load_from_string(content)
    onnx.checker.check_model(proto, full_check=True)
    assert proto.opset_import[0].version == DEFAULT_OPSET
    metadata = {entry.key: entry.value for entry in proto.metadata_props}
    assert metadata["image_classifier.classes"] == '["a", "b", "c"]'
    assert metadata["image_classifier.run_name"] == "run"
    assert [dimension.dim_value for dimension in proto.graph.input[0].type.tensor_type.shape.dim][1:] == [32, 32, 3]
    assert proto.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert str(Path(__file__).parents[3]).encode() not in content


def test_the_same_model_gives_the_same_bytes() -> None:
    assert export_model(build_model("lenet")) == export_model(build_model("lenet"))


@pytest.mark.parametrize("opset", [17, 24])
def test_an_opset_that_cannot_be_written_is_refused(opset: int) -> None:
    with pytest.raises(SettingsError, match=f"--opset takes a whole number from 18 to 23, got: {opset}"):
        export_model(build_model("lenet"), opset=opset)


class Unexportable(nn.Module):
    """An operation that depends on the values of its input, which no graph holds."""

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)[:, :3] if float(images.mean()) > 0 else images.flatten(1)[:, 3:6]


def test_an_operation_that_cannot_be_exported_is_one_line() -> None:
    model = build_model("lenet")
    model.classifier.network = Unexportable()
    with pytest.raises(ModelError, match="the network lenet cannot be exported to opset 20") as caught:
        export_model(model)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("views", ["one", "six"])
def test_the_quantized_graph_answers_nearly_the_same(views: Views, tmp_path: Path) -> None:
    model = build_model("airbench_small", 24)
    content = export_model(model, views=views)
    quantized = quantize(content, IMAGES)
    assert len(quantized) < 0.6 * len(content)
    answers = predict(quantized, tmp_path, IMAGES, 7)
    np.testing.assert_allclose(answers, compute_probabilities(model.classifier, IMAGES, views=views), atol=0.1)
    assert onnx.load_from_string(quantized).metadata_props == onnx.load_from_string(content).metadata_props


@pytest.mark.parametrize("fit", ["squeeze", "crop", "pad"])
def test_a_published_model_says_how_images_are_fitted(fit: Fit, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(export_model(replace(build_model("lenet"), fit=fit)))
    assert load_predictor(tmp_path / "model.onnx").model.fit == fit
    content = export_model(replace(build_model("lenet"), fit="bend"))  # type: ignore[arg-type]
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(ModelError, match="is not a model published by this package: it has no valid fit"):
        load_predictor(tmp_path / "model.onnx")
