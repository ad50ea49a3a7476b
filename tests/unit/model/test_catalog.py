"""The networks: found by name, of the size they claim, drawn from the seed."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from image_classifier.config import ModelName
from image_classifier.errors import ModelError
from image_classifier.model.catalog import NETWORKS, build_classifier
from image_classifier.model.classifier import Classifier
from image_classifier.model.lenet import LeNet

SCALING = {"input_mean": (0.5, 0.4, 0.3), "input_std": (0.5, 0.25, 0.2)}


def build(name: str, num_classes: int = 10, seed: int = 0) -> Classifier:
    return build_classifier(name, num_classes, seed=seed, **SCALING)


def test_the_catalogue_and_the_setting_have_the_same_names() -> None:
    assert set(NETWORKS) == set(get_args(ModelName))


def test_lenet_has_the_parameters_of_the_notebooks_network() -> None:
    assert sum(parameter.numel() for parameter in LeNet(10).parameters()) == 62_006


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("num_classes", [1, 10, 100])
def test_a_network_maps_uint8_images_to_float_logits(name: str, num_classes: int) -> None:
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    logits = build(name, num_classes).eval()(images)
    assert logits.shape == (3, num_classes) and logits.dtype == torch.float32 and bool(logits.isfinite().all())


@pytest.mark.parametrize("name", NETWORKS)
def test_weights_are_drawn_from_the_seed_and_the_global_generator_is_left_alone(name: str) -> None:
    before = torch.random.get_rng_state()
    first, same, other = build(name, seed=1), build(name, seed=1), build(name, seed=2)
    assert torch.equal(before, torch.random.get_rng_state())
    pairs = list(zip(first.state_dict().values(), same.state_dict().values(), strict=True))
    assert all(torch.equal(one, two) for one, two in pairs)
    weights = zip(first.parameters(), other.parameters(), strict=True)
    assert any(not torch.equal(one, two) for one, two in weights)


def test_inputs_are_scaled_as_the_settings_say() -> None:
    classifier = Classifier(torch.nn.Flatten(), **SCALING)
    pixels = torch.tensor([0, 128, 255], dtype=torch.uint8).reshape(1, 3, 1, 1)
    expected = [
        (value / 255 - mean) / std
        for value, mean, std in zip((0, 128, 255), (0.5, 0.4, 0.3), (0.5, 0.25, 0.2), strict=True)
    ]
    assert classifier(pixels).tolist()[0] == pytest.approx(expected, rel=1e-6)


def test_an_unknown_network_is_refused_with_the_ones_there_are() -> None:
    with pytest.raises(ModelError, match="'vgg'.*lenet, resnet"):
        build("vgg")
