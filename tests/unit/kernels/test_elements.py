"""Kernels of elements.c and products.h against doubles, number by number; none reads or writes beyond its memory, and
all instruction sets give the same bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

from image_classifier.training.optimizer import NEWTON_SCHULZ, NUM_ITERATIONS, orthogonalize
from tests.guarded import LEVELS, call, check

RANDOM = torch.Generator().manual_seed(0)
UNIT = 2.0**-24
"""Largest relative error of a rounded float."""
OPERATIONS = {"add": 0, "sub": 1, "mul": 2, "div": 3}


def make(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=RANDOM)


def bound_sums(absolute: Tensor, length: int) -> Tensor:
    """Bound the error of sums of so many products, in any order, by the sums of their absolute values (Higham: Accuracy
    and Stability of Numerical Algorithms, 3.5)."""
    return absolute.double() * ((length + 2) * UNIT / (1 - (length + 2) * UNIT)) + 1e-37


def call_all(kernel: str, tensors: Mapping[str, Tensor | None], **sizes: Any) -> dict[str, Tensor]:
    """Call a kernel on each instruction set, which must give the same bits."""
    found = [call(level, kernel, tensors, **sizes) for level in LEVELS]
    for other in found[1:]:
        for name, tensor in found[0].items():
            assert torch.equal(tensor.nan_to_num(7), other[name].nan_to_num(7)), name
    return found[0]


CONVOLUTIONS = [(2, 3, 9, 8, 24, 2, 0), (3, 6, 9, 9, 16, 5, 0), (1, 1, 5, 9, 1, 1, 0), (2, 17, 3, 3, 70, 3, 1)]
SIZES = ("num_images", "channels", "height", "width", "outputs", "taps", "padding")


@pytest.mark.parametrize("sizes", CONVOLUTIONS)
@pytest.mark.parametrize("is_strange", [False, True])
def test_a_convolution_and_its_gradients_are_within_the_bounds_of_their_sums(
    sizes: tuple[int, ...], is_strange: bool
) -> None:
    number, channels, height, width, outputs, taps, padding = sizes
    images, filters, bias = make(number, channels, height, width), make(outputs, channels, taps, taps), make(outputs)
    images = images.to(memory_format=torch.channels_last)
    if is_strange:
        images[0, 0, 0, 0], images[-1, -1, -1, -1] = float("nan"), float("inf")
    expected = F.conv2d(images.double(), filters.double(), bias.double(), padding=padding)
    absolute = F.conv2d(images.nan_to_num(0, 0).abs(), filters.abs(), bias.abs(), padding=padding)
    named = dict(zip(SIZES, sizes, strict=True))
    pixels = images.permute(0, 2, 3, 1)
    tensors = {"out": torch.empty(expected.permute(0, 2, 3, 1).shape), "images": pixels}
    found = call_all(
        "convolve_pixels",
        {**tensors, "filters": filters, "bias": bias},
        **named,
        first_weight=0,
        image_strides=images.stride(),
        filter_strides=filters.stride(),
    )["out"]
    check(found.permute(0, 3, 1, 2), expected, bound_sums(absolute, channels * taps**2))

    gradient = make(*expected.shape)

    def correlate(images: Tensor, gradient: Tensor) -> Tensor:
        shape = list(filters.shape)
        found: Tensor = conv2d_weight(images, shape, gradient, padding=padding)  # type: ignore[no-untyped-call]
        return found

    length = number * expected.shape[2] * expected.shape[3]
    found_all = call_all(
        "convolve_filter_gradient_pixels",
        {"of_filters": torch.empty(filters.shape), "of_bias": torch.empty(outputs), "images": pixels}
        | {"gradient": gradient},
        **named,
        image_strides=images.stride(),
        gradient_strides=gradient.stride(),
        filter_strides=filters.stride(),
    )
    if not is_strange:
        absolute = correlate(images.abs(), gradient.abs())
        check(found_all["of_filters"], correlate(images.double(), gradient.double()), bound_sums(absolute, length))
    of_bias = gradient.double().sum(dim=(0, 2, 3))
    check(found_all["of_bias"], of_bias, bound_sums(gradient.abs().sum(dim=(0, 2, 3)), length))


@pytest.mark.parametrize(("rows", "depth", "columns"), [(1, 1, 1), (7, 300, 70), (12, 513, 16), (65, 5, 129)])
@pytest.mark.parametrize("has_base", [False, True])
def test_product_of_matrices(rows: int, depth: int, columns: int, has_base: bool) -> None:
    alpha, beta = 1.5, -0.75
    left, right, base = make(rows, depth), make(columns, depth), make(columns) if has_base else None
    expected = alpha * (left.double() @ right.double().T) + (beta * base.double() if base is not None else 0)
    absolute = alpha * (left.abs() @ right.abs().T) + (abs(beta) * base.abs() if base is not None else 0)
    found = call_all(
        "multiply",
        {"out": torch.empty(rows, columns), "left": left, "right": right, "base": base},
        **{"rows": rows, "depth": depth, "columns": columns, "alpha": alpha, "beta": beta},
        **{"left_strides": (depth, 1), "right_strides": (1, depth), "base_strides": (0, 1)},
    )["out"]
    check(found, expected, bound_sums(absolute, depth + 1))


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("factor", [1.0, -0.3])
def test_numbers_combined_one_by_one(operation: str, factor: float) -> None:
    left, right = make(3, 5, 4, 19), make(1, 5, 1, 19)
    left[0, 0, 0, :3] = torch.tensor([float("nan"), float("inf"), -0.0])
    right[0, 1, 0, :2] = torch.tensor([0.0, float("-inf")])
    other = right.double() * (factor if operation in ("add", "sub") else 1)
    expected = getattr(torch, operation)(left.double(), other)
    sizes = {"operation": OPERATIONS[operation], "factor": factor, "number": 0.0, "sizes": tuple(left.shape)}
    layout = {"out_strides": left.stride(), "left_strides": left.stride(), "right_strides": (0, 19, 0, 1)}
    tensors = {"out": torch.empty(left.shape), "left": left, "right": right}
    found = call_all("combine", tensors, **sizes, **layout)["out"]
    # The factor is rounded to a float, and the result once.
    bound = UNIT * (expected.nan_to_num(0, 0, 0).abs() + other.nan_to_num(0, 0, 0).abs()) + 1e-44
    check(found, expected.float().double().where(expected.isinf(), expected), bound)
    with_number = call_all("combine", {**tensors, "right": None}, **{**sizes, "number": 2.5}, **layout)["out"]
    wanted = getattr(torch, operation)(left.double(), 2.5 * (factor if operation in ("add", "sub") else 1))
    check(with_number, wanted, UNIT * (wanted.nan_to_num(0, 0, 0).abs() + 2.5) + 1e-44)


@pytest.mark.parametrize(("rows", "depth", "columns"), [(1, 1, 1), (3, 7, 5), (1, 100, 33), (5, 40, 1)])
def test_sums_and_greatest(rows: int, depth: int, columns: int) -> None:
    values = make(rows, depth, columns)
    sizes = {"rows": rows, "depth": depth, "columns": columns}
    tensors = {"out": torch.empty(rows, columns), "values": values}
    found = call_all("reduce", tensors, **sizes, takes_greatest=0)["out"]
    check(found, values.double().sum(dim=1), bound_sums(values.abs().sum(dim=1), depth))
    values[0, depth // 2, 0] = float("nan")
    found = call_all("reduce", tensors, **sizes, takes_greatest=1)["out"]
    check(found, values.double().amax(dim=1), 0.0)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (24, 216), (7, 300)])
def test_orthogonalization_is_that_of_double_precision(rows: int, columns: int) -> None:
    matrix = make(rows, columns)
    a, b, c = NEWTON_SCHULZ
    sizes = {"rows": rows, "columns": columns, "num_iterations": NUM_ITERATIONS, "matrix_strides": (columns, 1)}
    tensors = {"out": torch.empty(rows, columns), "matrix": matrix}
    found = call_all("orthogonalize", tensors, **sizes, a=a, b=b, c=c)["out"]
    check(found, orthogonalize(matrix.double()), 2e-6)


@pytest.mark.parametrize("count", [1, 16, 1001])
def test_a_norm_is_exact_to_a_rounding_also_of_large_values(count: int) -> None:
    values = make(count) * 1e15
    found = call_all("norm", {"out": torch.empty(1), "values": values}, count=count)["out"]
    expected = values.double().norm().reshape(1)
    check(found, expected, expected * UNIT * 1.01)


@pytest.mark.parametrize(
    ("height", "width", "out_height", "out_width"), [(32, 32, 16, 24), (7, 9, 13, 9), (5, 5, 1, 2)]
)
def test_images_are_resized_as_torch_does_with_antialias(
    height: int, width: int, out_height: int, out_width: int
) -> None:
    images = make(2, 3, height, width)
    options = {"size": (out_height, out_width), "mode": "bilinear", "antialias": True}
    expected = F.interpolate(images.double(), **options).permute(0, 2, 3, 1)  # type: ignore[arg-type]
    found = call_all(
        "resize",
        {"out": torch.empty(expected.shape), "images": images},
        **{"num_images": 2, "channels": 3, "height": height, "width": width},
        **{"out_height": out_height, "out_width": out_width, "image_strides": images.stride()},
    )["out"]
    check(found, expected, float(images.abs().max()) * 32 * UNIT)


@pytest.mark.parametrize(("num_pixels", "channels"), [(1, 1), (30, 17), (7, 64)])
def test_batch_norm_that_does_not_train(num_pixels: int, channels: int) -> None:
    values, weight, bias, mean = make(num_pixels, channels), make(channels), make(channels), make(channels)
    variance, epsilon = make(channels).abs(), 1e-5
    values[0, 0] = float("nan")
    sizes = {"num_pixels": num_pixels, "channels": channels, "epsilon": epsilon}
    tensors = {"out": torch.empty(values.shape), "values": values, "weight": weight, "bias": bias, "mean": mean}
    found = call_all("batch_norm_inference", {**tensors, "variance": variance}, **sizes)["out"]
    factors = weight.double() / (variance.double() + epsilon).sqrt()
    expected = (values.double() - mean) * factors + bias
    bound = 4 * UNIT * ((values.nan_to_num(0).abs() + mean.abs()) * factors.abs() + bias.abs())
    check(found, expected, bound)


@pytest.mark.parametrize("count", [1, 15, 16, 1001])
@pytest.mark.parametrize("is_nesterov", [0, 1])
@pytest.mark.parametrize("factor", [0.0, 0.9])
def test_step_of_sgd(count: int, is_nesterov: int, factor: float) -> None:
    parameter, gradient, momentum = make(count), make(count), make(count)
    given = momentum if factor else None
    numbers = {"learning_rate": 0.1, "factor": factor, "weight_decay": 0.01}
    tensors = {"parameter": parameter, "gradient": gradient, "momentum": given}
    found = call_all("sgd", tensors, **numbers, is_nesterov=is_nesterov, count=count)
    decayed = gradient.double() + 0.01 * parameter.double()
    kept = factor * momentum.double() + decayed
    step = decayed if not factor else decayed + factor * kept if is_nesterov else kept
    size = parameter.abs() + gradient.abs() + momentum.abs()
    check(found["parameter"], parameter.double() - 0.1 * step, 8 * UNIT * size)
    if factor:
        check(found["momentum"], kept, 8 * UNIT * size)


def test_probabilities() -> None:
    values = make(6, 11) * 20
    values[0, 3], values[1, 2] = float("nan"), float("-inf")
    tensors = {"out": torch.empty(values.shape), "values": values}
    found = call_all("softmax", tensors, rows=6, columns=11)["out"]
    expected = values.double().softmax(dim=1)
    check(found, expected, (expected.nan_to_num(0) * 32 * UNIT * 30) + 1e-38)
