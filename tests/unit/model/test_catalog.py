"""The networks: found by name, of the size they claim, drawn from the seed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from image_classifier.errors import SettingsError
from image_classifier.model.airbench import Airbench
from image_classifier.model.catalog import build_classifier
from image_classifier.model.classifier import Classifier
from image_classifier.model.lenet import LeNet
from image_classifier.model.residual import ResNet18
from image_classifier.plugins import NETWORKS

SCALING = {"input_mean": (0.5, 0.4, 0.3), "input_std": (0.5, 0.25, 0.2)}


def build(name: str, num_classes: int = 10, seed: int = 0) -> Classifier:
    mean, std = SCALING["input_mean"], SCALING["input_std"]
    return build_classifier(name, num_classes, input_mean=mean, input_std=std, seed=seed)


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


@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "lenet"])
@pytest.mark.parametrize("image_size", [16, 20, 32, 40])
def test_a_network_takes_images_of_other_sizes(name: str, image_size: int) -> None:
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert build(name).eval()(images, image_size).shape == (3, 10)


def test_images_are_scaled_to_the_networks_size_as_pillow_scales_them() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    expected = np.asarray(Image.fromarray(pixels).resize((20, 20), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    classifier = Classifier(torch.nn.Identity(), (0, 0, 0), (1 / 255,) * 3, image_size=20)
    scaled = classifier(torch.from_numpy(pixels.transpose(2, 0, 1)[None].copy()))[0].numpy()
    assert np.abs(scaled - expected).max() <= 1  # Pillow rounds to whole values, twice


def test_resnet18_computes_what_torchvisions_does_of_the_same_weights() -> None:
    published, own = torchvision.models.resnet18(num_classes=7).eval(), ResNet18(7, has_imagenet_stem=True).eval()
    own.load_state_dict(published.state_dict())
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(own(images), published(images))


def test_the_residual_networks_are_as_large_as_published() -> None:
    sizes = {name: sum(parameter.numel() for parameter in build(name).parameters()) for name in NETWORKS}
    assert sizes["resnet18"] == 11_173_962  # of CIFAR's stem, as in kuangliu/pytorch-cifar
    assert sizes["wide_resnet_16_4"] == 2_748_890  # Zagoruyko, Komodakis, table 4: 2.7 million


def test_airbench_is_as_large_as_published() -> None:
    assert sum(parameter.numel() for parameter in Airbench(10).parameters() if parameter.requires_grad) == 1_971_352


def test_airbench_whitens_patches() -> None:
    """The answers of the first twelve filters have no correlation, and variance 1 where there is any."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (500, 3, 32, 32), dtype=torch.uint8, generator=generator)
    images[:, 1] = images[:, 0] // 2 + images[:, 1] // 2
    classifier = build("airbench")
    network = classifier.network
    assert isinstance(network, Airbench)
    classifier.initialize_from(images.numpy())
    weight = network.whiten.weight
    answers = torch.nn.functional.conv2d(classifier.scale(images, 32), weight).transpose(0, 1).flatten(1)
    moments = answers[:12] @ answers[:12].T / answers.shape[1]
    assert torch.allclose(moments, torch.eye(12), atol=0.02)
    assert torch.equal(weight[12:], -weight[:12]) and not weight.requires_grad


def test_airbench_repeats_the_right_and_lower_edge_of_images() -> None:
    network = build("airbench").network
    assert isinstance(network, Airbench)
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    repeated = torch.cat([images, images[:, :, -1:]], dim=2)
    repeated = torch.cat([repeated, repeated[:, :, :, -1:]], dim=3)
    expected = torch.nn.functional.conv2d(repeated, network.whiten.weight, network.whiten.bias)
    assert expected.shape[2:] == (32, 32) and torch.allclose(network.whiten(images), expected, atol=1e-6)


def test_networks_without_whitening_leave_their_weights_as_drawn() -> None:
    classifier = build("resnet")
    before = {name: value.clone() for name, value in classifier.state_dict().items()}
    classifier.initialize_from(np.zeros((2, 3, 32, 32), dtype=np.uint8))
    assert all(torch.equal(value, before[name]) for name, value in classifier.state_dict().items())


def test_inputs_are_scaled_as_the_settings_say() -> None:
    classifier = Classifier(torch.nn.Flatten(), SCALING["input_mean"], SCALING["input_std"], image_size=1)
    pixels = torch.tensor([0, 128, 255], dtype=torch.uint8).reshape(1, 3, 1, 1)
    expected = [
        (value / 255 - mean) / std
        for value, mean, std in zip((0, 128, 255), (0.5, 0.4, 0.3), (0.5, 0.25, 0.2), strict=True)
    ]
    assert classifier(pixels).tolist()[0] == pytest.approx(expected, rel=1e-6)


def test_an_unknown_network_is_refused_with_the_ones_there_are() -> None:
    with pytest.raises(SettingsError, match="--model takes one of .*lenet, resnet.*got: resnte .did you mean resnet"):
        build("resnte")


@pytest.mark.parametrize("image_size", [64, 96, 128, 224])
@pytest.mark.parametrize("name", ["airbench_small", "resnet"])
def test_networks_take_images_of_any_size_and_see_all_of_them(name: str, image_size: int) -> None:
    scaling = {"input_mean": (0.5,) * 3, "input_std": (0.25,) * 3}
    classifier = build_classifier(name, 3, **scaling, seed=0, image_size=image_size).eval()
    images = np.random.default_rng(0).integers(0, 256, (4, 3, image_size, image_size), dtype=np.uint8)
    classifier.initialize_from(images)
    changed = images.copy()
    changed[0, :, -8:, -8:] = 255  # a corner
    with torch.no_grad():
        logits, others = (classifier(torch.from_numpy(pixels)) for pixels in (images, changed))
    assert logits.shape == (4, 3) and logits.isfinite().all()
    assert torch.equal(logits[1:], others[1:]) and not torch.equal(logits[0], others[0])
