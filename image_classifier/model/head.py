"""A network's head: the layer with one row of weights for each class. All other layers are its body."""

from __future__ import annotations

from torch import nn

from image_classifier.errors import ModelError


def find_head(network: nn.Module, num_classes: int) -> str:
    """Find the name of a network's head: its attribute `head` where that has a row a class, or else the last
    `nn.Linear` with as many outputs as there are classes.

    Raises:
        ModelError: it has neither.
    """
    named = dict(network.named_modules())
    if "head" in named and _has_row_for_each(named["head"], num_classes):
        return "head"
    linear = [n for n, layer in named.items() if isinstance(layer, nn.Linear) and layer.out_features == num_classes]
    if not linear:
        raise ModelError(
            f"the network's head cannot be found: there is no nn.Linear with {num_classes} outputs, one per class; "
            "set the network's attribute `head` to it"
        )
    name: str = linear[-1]
    return name


def _has_row_for_each(layer: nn.Module, num_classes: int) -> bool:
    parameters = list(layer.parameters())
    return bool(parameters) and all(parameter.shape[:1] == (num_classes,) for parameter in parameters)
