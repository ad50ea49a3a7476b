"""The networks by name: those of the catalogue in `plugins.py`, and those of other packages.

What a network computes may depend on the shape of the images and on tensors alone, not on anything that Python counts,
draws or remembers: the operations of a small step are written down once and repeated (`training/replay.py`).
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from image_classifier.errors import ModelError
from image_classifier.model.classifier import Classifier
from image_classifier.model.hooks import ArrangesWeights
from image_classifier.model.initialization import draw_weights
from image_classifier.plugins import NETWORKS, explain, load

logger = logging.getLogger(__name__)


def build_classifier(name: str, num_classes: int, **options: Any) -> Classifier:
    """Build the network of this name as `build_classifier_by` does.

    Raises:
        ModelError: as there.
        SettingsError: there is no network of this name, or it cannot be imported.
    """
    if name not in NETWORKS:
        return build_classifier_by(load("model", name), f"--model {name}", num_classes, **options)
    own = NETWORKS[name]
    build = partial(load("model", own.target), **own.options)
    return build_classifier_by(build, name, num_classes, is_own=True, **options)


def build_classifier_by(
    build: Callable[..., nn.Module],
    title: str,
    num_classes: int,
    *,
    input_mean: Sequence[float],
    input_std: Sequence[float],
    seed: int,
    image_size: int = 32,
    is_own: bool = False,
) -> Classifier:
    """Build a network with weights from the seed; the global generator is left as it was.

    The weights of the package's own, and of others that have `arrange_weights`, are drawn by `draw_weights`. What else
    is in a network of another package stays as its builder draws it from torch's generator, which has the seed then.

    Args:
        build: builds the network.
        title: what messages call it.

    Raises:
        ModelError: the builder fails, or gives something else than a network.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        try:
            network = call_builder(build, num_classes, image_size)
        except Exception as error:  # it is somebody's code
            if is_own:
                raise
            logger.debug("%s cannot be built", title, exc_info=error)
            raise ModelError(
                f"{title} cannot be built for {num_classes} classes and images of {image_size} pixels: {explain(error)}"
            ) from error
    if not isinstance(network, nn.Module) or next(network.parameters(), None) is None:
        raise ModelError(f"{title} returns {type(network).__name__}; it must return an nn.Module with parameters")
    is_arranged = isinstance(network, ArrangesWeights)
    if (is_own or is_arranged) and not next(network.parameters()).is_meta:  # which has shapes alone
        draw_weights(network, seed)
        if isinstance(network, ArrangesWeights):
            network.arrange_weights()
    return Classifier(network, input_mean, input_std, image_size, num_classes).to(memory_format=torch.channels_last)


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
