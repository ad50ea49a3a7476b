"""Saliency: it is where the network looks, and the same each time."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from image_classifier.visualization.saliency import compute_saliency


class LooksAtACorner(nn.Module):
    """The score of class 1 is the green of four pixels; that of class 0 nothing at all."""

    def forward(self, images: Tensor) -> Tensor:
        score = (images[:, 1, :2, :2] ** 2).sum(dim=(1, 2))
        return torch.stack([0 * score, score], dim=1)


IMAGE = np.full((3, 8, 8), 100, np.uint8)


def test_the_pixels_that_the_score_depends_on_are_bright_and_no_others() -> None:
    saliency = compute_saliency(LooksAtACorner(), IMAGE, 1)
    assert saliency.shape == (8, 8) and saliency.dtype == np.float32
    assert (saliency[:2, :2] > 0.8).all() and saliency.max() == 1
    assert np.count_nonzero(saliency) == 4
    assert not compute_saliency(LooksAtACorner(), IMAGE, 0).any()


def test_it_is_deterministic_and_leaves_the_network_in_its_mode() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(192, 2)).train()
    first = compute_saliency(network, IMAGE, 0)
    np.testing.assert_array_equal(first, compute_saliency(network, IMAGE, 0))
    assert network.training and all(parameter.grad is None for parameter in network.parameters())
