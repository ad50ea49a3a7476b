"""The networks by name. A new one is a file of its own and a line here.

What a network computes may depend on the shape of the images and on tensors alone, not on anything that Python counts,
draws or remembers: the operations of a small step are written down once and repeated (`training/replay.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn

from image_classifier.errors import ModelError
from image_classifier.model.airbench import Airbench
from image_classifier.model.classifier import Classifier
from image_classifier.model.initialization import draw_weights
from image_classifier.model.lenet import LeNet
from image_classifier.model.resnet import ResNet

NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "airbench": Airbench,
    "airbench_large": partial(Airbench, widths=(128, 384, 384)),
    "airbench_small": partial(Airbench, widths=(32, 64, 128)),
    "lenet": LeNet,
    "resnet": ResNet,
}


def build_classifier(
    name: str,
    num_classes: int,
    *,
    input_mean: Sequence[float],
    input_std: Sequence[float],
    seed: int,
    image_size: int = 32,
) -> Classifier:
    """Build a network of the catalogue with weights drawn from the seed; the global generator is left as it was.

    Raises:
        ModelError: there is no network of this name.
    """
    if name not in NETWORKS:
        raise ModelError(f"no network is called {name!r}; the catalogue has {', '.join(NETWORKS)}")
    with torch.random.fork_rng(devices=[]):
        network = NETWORKS[name](num_classes)
    if not next(network.parameters()).is_meta:  # which has shapes alone
        draw_weights(network, seed)
        if isinstance(network, Airbench):
            network.arrange_weights()
    return Classifier(network, input_mean, input_std, image_size, num_classes).to(memory_format=torch.channels_last)
