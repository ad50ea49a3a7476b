"""Exports a model as one ONNX graph, from uint8 pixels to probabilities."""

from __future__ import annotations

import copy
import json
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from image_classifier import __version__
from image_classifier.choices import Views
from image_classifier.errors import ModelError, SettingsError
from image_classifier.extras import load_extra
from image_classifier.model.airbench import ConvGroup
from image_classifier.model.classifier import Classifier
from image_classifier.progress import track
from image_classifier.published.folder import FORMAT_VERSION
from image_classifier.published.predictor import INPUT, METADATA_PREFIX, OUTPUT
from image_classifier.text import one_line
from image_classifier.tracking.checkpoint import Model
from image_classifier.training.evaluate import SURE, VIEWS

OPSETS = range(18, 24)
"""Versions of ONNX's operators that can be asked for: the exporter writes 18 and up, and 23 is what runtimes know."""
DEFAULT_OPSET = 20
"""The first with GELU as an operator of its own, which runtimes compute in one go."""

_ROWS, _MARGIN = "rows", "margin"


class PublishedClassifier(nn.Module):
    """What is exported: uint8 images [N, S, S, 3] to probabilities [N, C], averaged over views.

    Resizing with antialiasing, which ONNX has in another form, is linear in rows and in columns: it is computed as two
    products with the matrix that torch's own resizing makes of an identity.

    Args:
        side: S.
    """

    input_mean: Tensor  # [1, 3, 1, 1] float32
    input_std: Tensor  # [1, 3, 1, 1] float32
    resize: Tensor | None  # [image_size, S] float32

    def __init__(self, classifier: Classifier, views: Views, side: int) -> None:
        super().__init__()
        self.side = side
        self.network = fold_norms(classifier.network)
        self.views = views
        self.register_buffer("input_mean", classifier.input_mean)
        self.register_buffer("input_std", classifier.input_std)
        identity = torch.eye(side).reshape(1, 1, side, side)
        matrix = F.interpolate(identity, size=(classifier.image_size, side), mode="bilinear", antialias=True)[0, 0]
        self.register_buffer("resize", None if classifier.image_size == side else matrix)

    def forward(self, images: Tensor, rows: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Compute probabilities [N, C]; for six views of the images at rows, and also the margin [N] that chooses them.

        ONNX knows a number of rows that depends on the data, torch's exporter does not: for it they come from outside.
        """
        pixels = images.permute(0, 3, 1, 2).float()  # [N, 3, S, S]
        if self.views == "mirror":
            return self._average(pixels, "mirror")
        single_view = self._compute(pixels)
        if rows is None:
            return single_view
        likeliest = single_view.topk(2, dim=1).values
        averaged = self._average(pixels[rows], "six", single_view[rows])
        return single_view.index_copy(0, rows, averaged), likeliest[:, 0] - likeliest[:, 1]

    def _average(self, pixels: Tensor, views: Views, first: Tensor | None = None) -> Tensor:
        """Average over views, of which the first may be known already."""
        padded = F.pad(pixels, (1, 1, 1, 1), mode="reflect")  # views are shifted by up to a pixel
        weights, images = [], []
        for weight, mirror, shift in VIEWS[views][0 if first is None else 1 :]:
            window = slice(1 - shift, 1 - shift + self.side)
            view = padded[:, :, window, window] if shift else pixels
            images.append(view.flip(3) if mirror else view)
            weights.append(weight)
        probabilities = self._compute(torch.cat(images))
        parts = probabilities.reshape(len(images), -1, probabilities.shape[1])
        total = (parts * torch.tensor(weights).reshape(-1, 1, 1)).sum(dim=0)
        return total if first is None else VIEWS[views][0][0] * first + total

    def _compute(self, pixels: Tensor) -> Tensor:
        scaled = (pixels - self.input_mean) / self.input_std
        if self.resize is not None:
            scaled = resize_columns(resize_columns(scaled, self.resize), self.resize)
        probabilities: Tensor = self.network(scaled).float().softmax(dim=1)
        return probabilities


def resize_columns(images: Tensor, matrix: Tensor) -> Tensor:
    """Resize along the width and transpose; as a product of two matrices, which runtimes also take without rows."""
    height, width = images.shape[2:]
    rows = images.reshape(-1, width) @ matrix.T
    return rows.reshape(-1, 3, height, rows.shape[1]).transpose(2, 3)


def fold_norms(network: nn.Module) -> nn.Module:
    """Copy a network with each norm after a pooling folded into the convolution before it, as runtimes do without one.

    A maximum commutes with what the norm does to each channel, as its scale is positive.
    """
    network = copy.deepcopy(network).eval()
    for module in network.modules():
        if isinstance(module, ConvGroup) and bool((module.norm1.weight > 0).all()):
            module.conv1 = fuse_conv_bn_eval(module.conv1, module.norm1)
            module.norm1 = nn.Identity()  # type: ignore[assignment]  # called in place of the norm
    return network


# Over 50 lines: one call of the exporter between what it needs and what is checked.
@track("exporting the network")
def export_model(model: Model, *, views: Views = "one", opset: int = DEFAULT_OPSET) -> bytes:
    """Export a model as an ONNX file, which says in its metadata what it is a model of.

    The same model gives the same bytes: nothing of this machine or of this moment is left in the file.

    Args:
        model: on the CPU.
        views: that are averaged inside the graph, as `compute_probabilities` does.

    Raises:
        ModelError: the network has an operation that cannot be exported.
        SettingsError: the opset is none that can be written, or the extra `publish` is not installed.
    """
    if opset not in OPSETS:
        raise SettingsError(f"--opset takes a whole number from {OPSETS[0]} to {OPSETS[-1]}, got: {opset}")
    onnx = load_extra("onnx", "publish")
    load_extra("onnxscript", "publish")
    if len(model.classes) == 1 and views == "six":
        views = "one"  # an image of the only class is never unsure
    module = PublishedClassifier(model.classifier, views, model.input_size).eval()
    images = torch.zeros((4, model.input_size, model.input_size, 3), dtype=torch.uint8)
    takes_rows = views == "six"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter's, of its own deprecations
            program = torch.onnx.export(
                module,
                (images, torch.tensor([0, 2, 3])) if takes_rows else (images,),
                input_names=[INPUT, _ROWS][: 1 + takes_rows],
                output_names=[OUTPUT, _MARGIN][: 1 + takes_rows],
                dynamic_shapes=({0: torch.export.Dim("N")}, {0: torch.export.Dim("U")} if takes_rows else None)[
                    : 1 + takes_rows
                ],
                opset_version=opset,
                dynamo=True,
                verbose=False,
            )
        assert program is not None
        proto = program.model_proto
    except Exception as error:  # of the exporter's many types
        raise ModelError(f"the network {model.name} cannot be exported to opset {opset}: {one_line(error)}") from error
    if takes_rows:
        proto = _choose_rows_inside(proto, onnx)
    _remove_traces(proto)
    proto.producer_name, proto.producer_version = "image_classifier", __version__
    onnx.helper.set_model_props(proto, {METADATA_PREFIX + key: value for key, value in _describe(model, views).items()})
    try:
        onnx.checker.check_model(proto, full_check=True)
    except Exception as error:
        raise ModelError(f"the exported graph of {model.name} is not valid ONNX: {one_line(error)}") from error
    content: bytes = proto.SerializeToString(deterministic=True)
    return content


def _choose_rows_inside(proto: Any, onnx: Any) -> Any:
    """Put the choice of the images that are unsure, by the margin of their first view, into the graph."""
    import numpy as np
    from onnxscript import ir

    graph = proto.graph
    del graph.input[1], graph.output[1]
    for name, value in (("sure", np.float32(SURE)), ("first_axis", np.array([0]))):
        graph.initializer.append(onnx.numpy_helper.from_array(value, name))
    graph.node.extend(
        [
            onnx.helper.make_node("Less", [_MARGIN, "sure"], ["is_unsure"]),
            onnx.helper.make_node("NonZero", ["is_unsure"], ["unsure"]),  # [1, U]
            onnx.helper.make_node("Squeeze", ["unsure", "first_axis"], [_ROWS]),
        ]
    )
    model = ir.from_proto(proto)
    model.graph.sort()
    return ir.to_proto(model)


def _remove_traces(proto: Any) -> None:
    """Remove what the exporter notes for its developers: paths and lines of sources, and shapes between the nodes."""
    proto.doc_string = ""
    del proto.metadata_props[:], proto.graph.metadata_props[:], proto.graph.value_info[:]
    for part in (*proto.graph.node, *proto.graph.input, *proto.graph.output, *proto.graph.initializer):
        part.doc_string = ""
        del part.metadata_props[:]


def _describe(model: Model, views: Views) -> dict[str, str]:
    return {
        "format_version": str(FORMAT_VERSION),
        "classes": json.dumps(model.classes, ensure_ascii=False),
        "network": model.name,
        "views": views,
        "fit": model.fit,
        **model.run,  # experiment_name, run_name, data_digest, code_digest
        "package_version": __version__,
    }
