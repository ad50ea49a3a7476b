"""Pretrained weights of torchvision: found in its registry, downloaded once, and checked by digest."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from image_classifier.data.download import Archive, fetch_archive
from image_classifier.errors import ModelError, StorageError
from image_classifier.storage import find_cache, storage_error

NETWORKS = {"resnet18": "resnet18_imagenet"}
"""The networks of the catalogue whose state_dict has the names of torchvision's, by torchvision's name."""

_DIGEST = re.compile(r"-([0-9a-f]{8,64})\.[a-z]+")


@dataclass(frozen=True)
class TorchvisionWeights:
    """An entry of torchvision's registry.

    Attributes:
        url: of the file, whose name holds the beginning of its sha256.
        network: name in the catalogue; None where it has none of this kind.
        classes: the head's, in the order of its rows.
        image_size: side in pixels of the images that they were evaluated on.
    """

    url: str
    network: str | None
    classes: tuple[str, ...]
    input_mean: tuple[float, ...]
    input_std: tuple[float, ...]
    image_size: int


def find_weights(network: str, name: str) -> TorchvisionWeights:
    """Find weights in torchvision's registry.

    Raises:
        ModelError: there are none of this name, or not of a classifier of images.
    """
    from torchvision import models  # 1 s that only those pay who take weights from there

    try:
        registered = models.get_model_weights(network)
    except ValueError as error:
        raise ModelError(f"torchvision knows no network {network!r}; its documentation lists them") from error
    entry: Any = registered.__members__.get(name)
    if entry is None:
        names = ", ".join(registered.__members__) or "none"
        raise ModelError(f"torchvision has no weights {name!r} for {network}; it has: {names}")
    try:
        transforms = entry.transforms()
        return TorchvisionWeights(
            url=entry.url,
            network=NETWORKS.get(network),
            classes=tuple(map(str, entry.meta["categories"])),
            input_mean=tuple(map(float, transforms.mean)),
            input_std=tuple(map(float, transforms.std)),
            image_size=int(transforms.crop_size[0]),
        )
    except (AttributeError, KeyError, TypeError) as error:
        raise ModelError(f"torchvision's weights {network}@{name} are not those of an image classifier") from error


def fetch_weights(weights: TorchvisionWeights) -> Path:
    """Find the file of weights in the user's cache, or download it there.

    Raises:
        ModelError: its name holds no digest.
        DownloadError: it cannot be downloaded, or is another one than its name says.
        StorageError: there is no place for it, or the disk refused.
    """
    cache = find_cache()
    if cache is None:
        raise StorageError("there is no cache folder for weights; set IMAGE_CLASSIFIER_CACHE to a folder")
    folder = cache / "weights"
    name = Path(urlsplit(weights.url).path).name
    digest = _DIGEST.search(name)
    if digest is None:
        raise ModelError(
            f"{weights.url} cannot be checked, because its name has no digest; download it, and give its path"
        )
    remedy = f"download it elsewhere and put it into {folder}"
    archive = Archive(weights.url, name, digest[1], is_shortened=True, remedy=remedy)
    target = folder / name
    try:
        if target.is_file() and archive.find_other_digest(target) is None:
            return target
    except OSError as error:
        raise storage_error(target, error, "read") from error
    return fetch_archive(archive, folder, waits=True)
