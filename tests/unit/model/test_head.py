"""The head: found by its name or its shape; frozen, all else stays as it is."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from image_classifier.errors import ModelError
from image_classifier.model.catalog import build_classifier
from image_classifier.model.classifier import Classifier
from image_classifier.model.head import find_head
from image_classifier.plugins import NETWORKS


class Named(nn.Module):
    """Has a linear layer with as many outputs as classes behind its head, and one before."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.first = nn.Linear(3, 7)
        self.head = head
        self.last = nn.Linear(3, 7)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("num_classes", [1, 7, 84, 120])
def test_each_network_of_the_catalogue_has_a_head(name: str, num_classes: int) -> None:
    head = {"lenet": "fc3", "resnet18": "fc", "resnet18_imagenet": "fc"}.get(name, "head")
    classifier = build_classifier(name, num_classes, input_mean=(0.5,) * 3, input_std=(0.5,) * 3, seed=0)
    assert find_head(classifier.network, num_classes) == head


@pytest.mark.parametrize(
    ("head", "found"),
    [
        (nn.Linear(3, 7), "head"),
        (nn.Conv2d(3, 7, 1), "head"),
        (nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 7)), "last"),
        (nn.Linear(3, 8), "last"),
        (nn.Identity(), "last"),
    ],
)
def test_the_head_has_its_name_where_it_has_a_row_a_class_and_else_is_the_last_linear_layer(
    head: nn.Module, found: str
) -> None:
    assert find_head(Named(head), 7) == found


def test_a_network_without_a_head_is_refused() -> None:
    with pytest.raises(ModelError, match="head cannot be found: there is no nn.Linear with 9 outputs"):
        find_head(Named(nn.Linear(3, 7)), 9)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_frozen_body_has_no_gradient_and_keeps_its_statistics(name: str) -> None:
    classifier = build_classifier(name, 4, input_mean=(0.5,) * 3, input_std=(0.5,) * 3, seed=0)
    classifier.freeze_body()
    before = {key: tensor.clone() for key, tensor in classifier.state_dict().items()}
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    evaluated = classifier.eval()(images)
    classifier.train().begin_step(0.0)
    logits = classifier(images)
    assert classifier.training and classifier.head.training and torch.equal(logits, evaluated)
    head = set(classifier.head.parameters())
    assert {parameter for parameter in classifier.parameters() if parameter.requires_grad} == head
    logits.sum().backward()
    assert {parameter for parameter in classifier.parameters() if parameter.grad is not None} == head
    assert all(torch.equal(tensor, before[key]) for key, tensor in classifier.state_dict().items())


def test_a_head_that_is_not_trained_leaves_nothing_to_train() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(3, 2).requires_grad_(False))
    classifier = Classifier(network, (0, 0, 0), (1, 1, 1), image_size=1, num_classes=2)
    with pytest.raises(ModelError, match="--freeze body leaves nothing to train"):
        classifier.freeze_body()
