"""The networks by name: those of the catalogue in `plugins.py`, and those of other packages.

What a network computes may depend on the shape of the images and on tensors alone, not on anything that Python counts,
draws or remembers: the operations of a small step are written down once and repeated (`training/replay.py`).
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence

import torch
from torch import nn

from image_classifier.errors import ModelError
from image_classifier.model.classifier import Classifier
from image_classifier.model.hooks import ArrangesWeights
from image_classifier.model.initialization import draw_weights
from image_classifier.plugins import NETWORKS, explain, load

logger = logging.getLogger(__name__)


def build_classifier(
    name: str,
    num_classes: int,
    *,
    input_mean: Sequence[float],
    input_std: Sequence[float],
    seed: int,
    image_size: int = 32,
) -> Classifier:
    """Build a network with weights from the seed; the global generator is left as it was.

    The weights of the package's own, and of others that have `arrange_weights`, are drawn by `draw_weights`. What else
    is in a network of another package stays as its builder draws it from torch's generator, which has the seed then.

    Raises:
        ModelError: the builder of another package fails, or gives something else than a network.
        SettingsError: there is no network of this name, or it cannot be imported.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        network = _build_network(name, num_classes, image_size)
    is_arranged = isinstance(network, ArrangesWeights)
    if (name in NETWORKS or is_arranged) and not next(network.parameters()).is_meta:  # which has shapes alone
        draw_weights(network, seed)
        if isinstance(network, ArrangesWeights):
            network.arrange_weights()
    return Classifier(network, input_mean, input_std, image_size).to(memory_format=torch.channels_last)


def _build_network(name: str, num_classes: int, image_size: int) -> nn.Module:
    if name in NETWORKS:
        own = NETWORKS[name]
        network: nn.Module = load("model", own.target)(num_classes, **own.options)
        return network
    build = load("model", name)
    try:
        network = call_builder(build, num_classes, image_size)
    except Exception as error:  # it is somebody's code
        logger.debug("%s cannot be built", name, exc_info=error)
        raise ModelError(
            f"--model {name} cannot be built for {num_classes} classes and images of {image_size} pixels: "
            f"{explain(error)}"
        ) from error
    if not isinstance(network, nn.Module) or next(network.parameters(), None) is None:
        raise ModelError(f"--model {name} gives {type(network).__name__}; it must give an nn.Module with parameters")
    return network


def call_builder(build: Callable[..., nn.Module], num_classes: int, image_size: int) -> nn.Module:
    """Call a builder with the number of classes, and with the image size if it takes that.

    One that takes all names, as those of torchvision do, is asked by calling it: it takes the image size unless it
    raises a TypeError that speaks of `image_size`.
    """
    parameters = inspect.signature(build).parameters
    if "image_size" in parameters:
        return build(num_classes=num_classes, image_size=image_size)
    if any(each.kind == each.VAR_KEYWORD for each in parameters.values()):
        try:
            return build(num_classes=num_classes, image_size=image_size)
        except TypeError as error:
            if "image_size" not in str(error):
                raise
    return build(num_classes=num_classes)
