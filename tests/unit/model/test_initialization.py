"""The weights that a network begins with."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from image_classifier.model.initialization import compute_deviation, compute_patch_moments, decompose, draw_weights


def draw(seed: int) -> dict[str, Tensor]:
    network = nn.Sequential(nn.Conv2d(16, 32, 3), nn.Linear(400, 300), nn.BatchNorm2d(3), nn.Linear(7, 5, bias=False))
    draw_weights(network, seed)
    return network.state_dict()


def test_weights_are_spread_evenly_as_far_as_torch_spreads_them() -> None:
    weights = draw(0)
    for layer, num_inputs in (("0", 144), ("1", 400)):
        bound = 1 / math.sqrt(num_inputs)
        for name in ("weight", "bias"):
            assert float(weights[f"{layer}.{name}"].abs().max()) < bound
        ordered = weights[f"{layer}.weight"].flatten().sort().values / bound
        even = torch.linspace(-1, 1, len(ordered))
        assert float((ordered - even).abs().max()) < 0.03  # Kolmogorov and Smirnov's distance of 1.5 %
        assert len(set(ordered.tolist())) > 0.98 * len(ordered)
    assert torch.equal(weights["2.weight"], torch.ones(3))


def test_weights_depend_on_seed_and_layer_alone() -> None:
    one, again, other = draw(3), draw(3), draw(4)
    assert all(torch.equal(value, again[name]) for name, value in one.items())
    assert not torch.equal(one["0.weight"], other["0.weight"])
    assert not torch.allclose(one["0.weight"].flatten()[:35] * 12, one["3.weight"].flatten() * math.sqrt(7))


def test_moments_of_patches_are_exact() -> None:
    images = np.random.default_rng(0).integers(0, 256, (6, 3, 5, 4), dtype=np.uint8)
    moments, num_patches = compute_patch_moments(images, 2)
    patches = F.unfold(torch.from_numpy(images).double(), 2).transpose(0, 1).flatten(1)
    assert num_patches == patches.shape[1] == 6 * 4 * 3
    assert np.array_equal(moments[:12, :12], (patches @ patches.T).numpy())
    assert np.array_equal(moments[12, :12], patches.sum(dim=1).numpy())
    in_parts, _ = compute_patch_moments(np.tile(images, (100, 1, 1, 1)), 2)
    assert np.array_equal(in_parts, 100 * moments)


@pytest.mark.parametrize("size", [1, 2, 12])
def test_eigenvectors_are_those_of_lapack(size: int) -> None:
    matrix = np.random.default_rng(size).standard_normal((size, 3 * size))
    matrix = matrix @ matrix.T
    values, vectors = decompose(matrix.tolist())
    expected, columns = np.linalg.eigh(matrix)
    assert np.allclose(values, expected, rtol=1e-12, atol=1e-12 * expected[-1])
    assert np.allclose(np.abs(np.asarray(vectors) @ columns), np.eye(size), atol=1e-9)
    assert np.allclose(np.asarray(vectors) @ np.asarray(vectors).T, np.eye(size), atol=1e-14)
    assert all(max(vector, key=abs) > 0 for vector in vectors)


def test_eigenvectors_of_what_does_not_vary() -> None:
    values, vectors = decompose([[2.0, 2.0, 0.0], [2.0, 2.0, 0.0], [0.0, 0.0, 0.0]])
    assert values == pytest.approx([0, 0, 4], abs=1e-15)
    assert vectors[2] == pytest.approx([0.5**0.5, 0.5**0.5, 0])


def test_standard_deviation() -> None:
    values = torch.arange(11.0).reshape(11, 1)
    assert compute_deviation(values) == pytest.approx(float(values.std()))
