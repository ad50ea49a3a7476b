"""Pretrained weights: from a run, from a file with a state_dict, or from torchvision."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from image_classifier.errors import ModelError
from image_classifier.image_sizes import is_image_size
from image_classifier.model.classifier import Classifier
from image_classifier.model.head import find_head
from image_classifier.references import get_published_weights
from image_classifier.settings import TrainingSettings
from image_classifier.tracking.checkpoint import check_state, load_tensors, parse_model, read_model_file
from image_classifier.tracking.safetensors import read_safetensors
from image_classifier.tracking.torchvision_weights import fetch_weights, find_weights


@dataclass(frozen=True)
class Pretrained:
    """Weights to start from; what their file does not say is None, or without an entry.

    Attributes:
        path: of the file, or torchvision:NETWORK@WEIGHTS.
        digest: sha256 of the file.
        state: the network's state_dict.
        model: name of the network in the catalogue.
        classes: in the order of the head's rows.
        image_size: side in pixels of the images that the model takes.
        scaled_to: side in pixels that the network is used at.
    """

    path: Path
    digest: str
    state: Mapping[str, Tensor]
    model: str | None = None
    classes: tuple[str, ...] = ()
    input_mean: tuple[float, ...] | None = None
    input_std: tuple[float, ...] | None = None
    image_size: int | None = None
    scaled_to: int | None = None

    def list_kept_classes(self, classes: Sequence[str]) -> list[str]:
        """List those of the classes whose rows of the head are kept: that have the name of one class here."""
        return [name for name in classes if self.classes.count(name) == 1]

    def describe(self, classes: Sequence[str], settings: Sequence[str]) -> dict[str, Any]:
        """Describe the weights for the record of a run on these classes, which has these settings from them."""
        return {
            "path": str(self.path),
            "digest": self.digest,
            "classes": list(self.classes),
            "kept_classes": self.list_kept_classes(classes),
            "settings": list(settings),
        }


def load_pretrained(path: Path, named: str | None = None) -> Pretrained:
    """Load weights to start from, those of torchvision by way of the user's cache.

    Args:
        named: network that the user has named, which may be a plug-in.

    Raises:
        ModelError: there is no such file, or it is damaged, hostile, or holds no weights.
        DownloadError, StorageError: torchvision's cannot be downloaded or kept.
    """
    published = get_published_weights(path)
    if published is not None:
        weights = find_weights(*published)
        raw = read_model_file(fetch_weights(weights))
        state, digest = _find_state(raw, path), hashlib.sha256(raw).hexdigest()
        if state is None:
            raise ModelError(f"{weights.url} has no state_dict; choose other weights")
        scaling = weights.input_mean, weights.input_std
        side = weights.image_size if is_image_size(weights.image_size) else None
        return Pretrained(path, digest, state, weights.network, weights.classes, *scaling, side, weights.image_size)
    raw = read_model_file(path)
    state, digest = _find_state(raw, path), hashlib.sha256(raw).hexdigest()
    if state is not None:
        return Pretrained(path, digest, state)
    model = parse_model(raw, path, named)
    classifier = model.classifier
    scaling = _find_decimals(classifier.input_mean), _find_decimals(classifier.input_std)
    state = classifier.network.state_dict()
    return Pretrained(path, digest, state, model.name, model.classes, *scaling, model.input_size, classifier.image_size)


def _find_state(raw: bytes, path: Path) -> dict[str, Tensor] | None:
    """Find a file's state_dict, in single precision; None for a file of another kind."""
    try:
        content = read_safetensors(raw) if path.suffix == ".safetensors" else load_tensors(raw, path, "model")
    except ValueError as error:
        raise ModelError(f"{path} cannot be read: {error}; choose another model") from error
    if not isinstance(content, dict) or not content or not all(isinstance(each, Tensor) for each in content.values()):
        return None
    return {name: each.float() if each.is_floating_point() else each for name, each in content.items()}


def _find_decimals(in_pixels: Tensor) -> tuple[float, ...]:
    """Find the shortest decimals that a classifier computes these numbers [1, 3, 1, 1] from."""
    decimals = []
    for value in in_pixels.flatten().tolist():
        rounded = (round(value / 255, digits) for digits in range(1, 18))
        decimals.append(next((short for short in rounded if _to_pixels(short) == value), value / 255))
    return tuple(decimals)


def _to_pixels(value: float) -> float:
    return float(np.float32(value) * np.float32(255))


def check_pretrained(pretrained: Pretrained, training: TrainingSettings) -> None:
    """Check that weights are of the network and the input scaling of the settings.

    Raises:
        ModelError: they are of others.
    """
    path = pretrained.path
    if pretrained.model not in (None, training.model):
        raise ModelError(
            f"--pretrained_model {path} has the network {pretrained.model}, not {training.model}; "
            f"choose --model {pretrained.model}, or another file"
        )
    for name in ("input_mean", "input_std"):
        theirs = getattr(pretrained, name)
        if theirs is not None and [*map(_to_pixels, theirs)] != [*map(_to_pixels, getattr(training, name))]:
            raise ModelError(f"--pretrained_model {path} was trained with --{name} {[*theirs]}; set the same value")


def start_from(classifier: Classifier, pretrained: Pretrained, classes: Sequence[str]) -> None:
    """Give a classifier of these classes weights to start from.

    Where the classes are others, each row of the head is that of the class of the same name, or stays as it is.

    Raises:
        ModelError: the weights are of another network, or its head cannot be found; nothing was changed.
    """
    network, path = classifier.network, pretrained.path
    wanted, state = network.state_dict(), dict(pretrained.state)
    for name in wanted:
        if name.endswith("num_batches_tracked"):  # which torch's first batch norm had not
            state.setdefault(name, wanted[name])
    if pretrained.classes != tuple(classes):
        head = find_head(network, len(classes))
        kept = pretrained.list_kept_classes(classes)
        rows, old_rows = ([names.index(name) for name in kept] for names in (list(classes), pretrained.classes))
        for name in [f"{head}.{name}" for name in network.get_submodule(head).state_dict()]:
            old, new = state.get(name), wanted[name].clone()
            if old is None or (old.ndim, old.shape[1:], old.dtype) != (new.ndim, new.shape[1:], new.dtype):
                continue  # which is said below
            if pretrained.classes and len(old) != len(pretrained.classes):
                raise ModelError(f"{path} has {len(old)} rows of {name} for {len(pretrained.classes)} classes")
            new[rows] = old[old_rows]
            state[name] = new
    check_state(network, state, path)
    network.load_state_dict(state)
