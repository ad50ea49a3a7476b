"""Initial weights with the same bits on every processor, from arithmetic with exactly one correct result.

Torch draws and computes by code that is chosen for the processor. Here are multiplications of doubles number by number,
sums of whole numbers, and sums that are rounded once.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from image_classifier.randomness import WEIGHTS, draw_bits

PART_SIZE = 64 * 3 * 32**2
"""Numbers of images whose patches are laid out at once."""
NUM_SWEEPS = 30
"""Most sweeps of Jacobi's rotations; a dozen rows need about 8."""


@torch.no_grad()
def draw_weights(network: nn.Module, seed: int) -> None:
    """Draw weights and biases of all convolutions and linear layers, evenly up to one over the root of the number of
    inputs to either side, as torch does (He et al.: Delving Deep into Rectifiers, 2015, with torch's factor)."""
    layers = [layer for layer in network.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    for number, layer in enumerate(layers):
        bound = 1 / math.sqrt(layer.weight[0].numel())
        weight, bias = layer.weight, layer.bias
        count = weight.numel() + (0 if bias is None else bias.numel())
        bits = draw_bits(seed, number, WEIGHTS, np.arange(count)) >> np.uint64(40)  # as many as a float has
        values = (bits.astype(np.float64) / 2**23 - 1 + 2**-24) * bound
        drawn = torch.from_numpy(values.astype(np.float32))
        weight.copy_(drawn[: weight.numel()].reshape(weight.shape))
        if bias is not None:
            bias.copy_(drawn[weight.numel() :])


def compute_deviation(values: Tensor) -> float:
    """Compute the standard deviation of a sample."""
    numbers = values.double().flatten().tolist()
    mean = math.fsum(numbers) / len(numbers)
    return math.sqrt(math.fsum((number - mean) * (number - mean) for number in numbers) / (len(numbers) - 1))


def compute_patch_moments(images: NDArray[np.uint8], side: int) -> tuple[NDArray[np.float64], int]:
    """Compute the sums of the products of a patch's numbers, and of the numbers, over all patches of images.

    Args:
        images: uint8 [N, C, H, W].

    Returns:
        float64 [C * side * side + 1] twice, all whole numbers; the last row has the sums. And the number of patches.
    """
    height, width = (length - side + 1 for length in images.shape[2:])
    channels = images.shape[1]
    moments, num_patches = np.zeros((channels * side**2 + 1,) * 2), 0
    num_parts = min(max(images.size // PART_SIZE, 1), max(len(images), 1))
    for part in np.array_split(images, num_parts):  # all at once would be a gigabyte
        numbers = np.ones((len(moments), len(part), height, width))
        for row, (c, y, x) in enumerate(np.ndindex(channels, side, side)):
            numbers[row] = part[:, c, y : y + height, x : x + width]
        patches = numbers.reshape(len(moments), -1)
        # Exact in whatever order a library adds: whole numbers below 2 ** 53.
        moments += patches @ patches.T
        num_patches += patches.shape[1]
    return moments, num_patches


def decompose(matrix: list[list[float]]) -> tuple[list[float], list[list[float]]]:
    """Find the eigenvalues of a symmetric matrix, ascending, and an eigenvector for each, by Jacobi's rotations (Golub,
    Van Loan: Matrix Computations, 8.5). The largest number of a vector is positive."""
    size = len(matrix)
    values = [list(row) for row in matrix]
    vectors = [[float(i == j) for j in range(size)] for i in range(size)]
    for _ in range(NUM_SWEEPS):
        if math.fsum(abs(values[i][j]) for i in range(size) for j in range(i)) == 0:
            break
        for p in range(size):
            for q in range(p + 1, size):
                _rotate(values, vectors, p, q)
    order = sorted(range(size), key=lambda index: values[index][index])
    columns = [[row[index] for row in vectors] for index in order]
    columns = [[-x for x in column] if max(column, key=abs) < 0 else column for column in columns]
    return [values[index][index] for index in order], columns


def _rotate(values: list[list[float]], vectors: list[list[float]], p: int, q: int) -> None:
    """Make the number at p, q zero by a rotation in the plane of these two."""
    apart = values[p][q]
    if apart == 0:
        return
    if abs(apart) < 1e-18 * math.sqrt(abs(values[p][p] * values[q][q])):
        values[p][q] = values[q][p] = 0.0
        return
    ratio = (values[q][q] - values[p][p]) / (2 * apart)
    tangent = math.copysign(1.0, ratio) / (abs(ratio) + math.sqrt(1 + ratio * ratio))
    cosine = 1 / math.sqrt(1 + tangent * tangent)
    sine = tangent * cosine
    for row in values:
        row[p], row[q] = cosine * row[p] - sine * row[q], sine * row[p] + cosine * row[q]
    for k in range(len(values)):
        one, other = values[p][k], values[q][k]
        values[p][k], values[q][k] = cosine * one - sine * other, sine * one + cosine * other
    values[p][q] = values[q][p] = 0.0
    for row in vectors:
        row[p], row[q] = cosine * row[p] - sine * row[q], sine * row[p] + cosine * row[q]
