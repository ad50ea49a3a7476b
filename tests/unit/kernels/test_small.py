"""Kernels of small batches against doubles, number by number; none reads or writes beyond its memory."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

from tests.guarded import LEVELS, call, check

RANDOM = torch.Generator().manual_seed(0)
UNIT = 2.0**-24
"""Largest relative error of a rounded float."""


def make(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=RANDOM)


def bound_sums(absolute: Tensor, length: int) -> Tensor:
    """Bound the error of sums of so many products, in any order, by the sums of their absolute values (Higham: Accuracy
    and Stability of Numerical Algorithms, 3.5)."""
    return absolute.double() * ((length + 1) * UNIT / (1 - (length + 1) * UNIT)) + 1e-38


CONVOLUTIONS = [(2, 3, 32, 32, 6, 5, 0), (3, 6, 14, 14, 16, 5, 0), (1, 1, 5, 9, 1, 1, 0), (3, 17, 7, 4, 13, 3, 1)]
SIZES = ("num_images", "channels", "height", "width", "outputs", "taps", "padding")


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("sizes", CONVOLUTIONS)
def test_a_convolution_is_within_the_bounds_of_its_sums(sizes: tuple[int, ...], level: str) -> None:
    number, channels, height, width, outputs, taps, padding = sizes
    images, filters, bias = make(number, channels, height, width), make(outputs, channels, taps, taps), make(outputs)
    expected = F.conv2d(images.double(), filters.double(), bias.double(), padding=padding)
    absolute = F.conv2d(images.abs(), filters.abs(), bias.abs(), padding=padding)
    found = call(
        level,
        "convolve",
        {"out": torch.empty(expected.shape), "images": images, "filters": filters, "bias": bias},
        **dict(zip(SIZES, sizes, strict=True)),
        first_weight=0,
        image_strides=images.stride(),
        filter_strides=filters.stride(),
    )
    check(found["out"], expected, bound_sums(absolute, channels * taps**2))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("sizes", CONVOLUTIONS)
def test_gradients_of_filters_and_bias(sizes: tuple[int, ...], level: str) -> None:
    number, channels, height, width, outputs, taps, padding = sizes
    images = make(number, channels, height, width)
    gradient = make(number, outputs, height + 2 * padding - taps + 1, width + 2 * padding - taps + 1)

    def correlate(images: Tensor, gradient: Tensor) -> Tensor:
        shape = [outputs, channels, taps, taps]
        pair = images.double(), gradient.double()
        found: Tensor = conv2d_weight(pair[0], shape, pair[1], padding=padding)  # type: ignore[no-untyped-call]
        return found

    expected = correlate(images, gradient)
    found = call(
        level,
        "convolve_filter_gradient",
        {
            "of_filters": torch.empty(expected.shape),
            "of_bias": torch.empty(outputs),
            "images": images,
            "gradient": gradient,
        },
        **dict(zip(SIZES, sizes, strict=True)),
        **{"image_strides": images.stride(), "gradient_strides": gradient.stride()},
        filter_strides=torch.empty(expected.shape).stride(),
    )
    length = gradient[:, 0].numel()
    check(found["of_filters"], expected, bound_sums(correlate(images.abs(), gradient.abs()), length))
    sums = gradient.double().sum(dim=(0, 2, 3))
    check(found["of_bias"], sums, bound_sums(gradient.abs().sum(dim=(0, 2, 3)), length))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    ("rows", "depth", "columns"), [(4, 400, 120), (4, 84, 10), (1, 1, 1), (9, 33, 70), (3, 17, 64), (5, 8, 25)]
)
def test_products_of_matrices(rows: int, depth: int, columns: int, level: str) -> None:
    left, right, bias = make(rows, depth), make(depth, columns), make(columns)
    expected = left.double() @ right.double() + bias.double()
    bound = bound_sums(left.abs() @ right.abs() + bias.abs(), depth + 1)
    sizes = {"rows": rows, "depth": depth, "columns": columns}
    tensors = {"out": torch.empty(rows, columns), "left": left, "right": right, "bias": bias}
    found = call(level, "matmul", tensors, **sizes, left_row=depth, left_column=1, right_row=columns)
    check(found["out"], expected, bound)
    turned = {**tensors, "left": left.T.contiguous()}
    found = call(level, "matmul", turned, **sizes, left_row=1, left_column=rows, right_row=columns)
    check(found["out"], expected, bound)
    turned = {**tensors, "right": right.T.contiguous()}
    found = call(level, "matmul_transposed", turned, **sizes, left_row=depth, right_column=depth)
    check(found["out"], expected, bound)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("height", "width"), [(8, 8), (7, 9), (2, 2), (1, 5)])
def test_pooling_and_its_gradient(height: int, width: int, level: str) -> None:
    images = make(2, 3, height, width).round()  # equal ones among them
    images[0, 0, 0, :2] = torch.tensor([float("nan"), float("inf")])
    shape = 2, 3, height // 2, width // 2
    tensors = {"out": torch.empty(shape), "indices": torch.empty(shape, dtype=torch.uint8), "images": images}
    found = call(level, "pool_planes", tensors, num_planes=6, height=height, width=width)
    if height > 1:
        check(found["out"], F.max_pool2d(images, 2).double(), 0.0)
    gradient = make(*shape)
    tensors = {"out": torch.empty(images.shape), "indices": found["indices"], "gradient": gradient}
    sizes = {"num_images": 2, "channels": 3, "height": height, "width": width}
    back = call(level, "pool_planes_gradient", tensors, **sizes, gradient_strides=gradient.stride())["out"]
    expected = torch.zeros(images.shape)
    for n, c, y, x in itertools.product(*map(range, shape)):
        which = int(found["indices"][n, c, y, x])
        expected[n, c, 2 * y + which // 2, 2 * x + which % 2] = gradient[n, c, y, x]
    check(back, expected.double(), 0.0)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("count", [1, 15, 16, 17, 100])
def test_what_is_computed_for_each_number(count: int, level: str) -> None:
    values, gradient, numbers = make(count), make(count), make(1)
    values[0] = float("nan")
    out = torch.empty(count)
    found = call(level, "relu", {"out": out, "values": values}, count=count)["out"]
    check(found, values.relu().double(), 0.0)
    tensors = {"out": out, "gradient": gradient, "values": found}
    back = call(level, "relu_gradient", tensors, count=count)["out"]
    check(back, torch.where(found <= 0, 0, gradient).double(), 0.0)
    sizes = {"num_images": 1, "channels": 1, "num_pixels": count}
    tensors = {"out": out, "values": values, "numbers": numbers}
    check(call(level, "shift_channels", tensors, **sizes, divides=1)["out"], (values / numbers).double(), 0.0)
    check(call(level, "shift_channels", tensors, **sizes, divides=0)["out"], (values - numbers).double(), 0.0)
    small = torch.arange(count, dtype=torch.uint8)
    check(call(level, "convert_bytes", {"out": out, "values": small}, count=count)["out"], small.double(), 0.0)
    check(call(level, "copy", {"out": out, "values": values}, num_bytes=4 * count)["out"], values.double(), 0.0)
    check(
        call(level, "sum_rows", {"out": out, "values": gradient}, rows=1, columns=count)["out"], gradient.double(), 0.0
    )


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (5, 10), (7, 33)])
def test_the_loss_and_its_gradient(rows: int, columns: int, level: str) -> None:
    logits, labels = make(rows, columns) * 5, torch.arange(rows) % columns
    sizes = {"rows": rows, "columns": columns}
    logs = call(level, "log_softmax", {"out": torch.empty(rows, columns), "values": logits}, **sizes)["out"]
    expected = logits.double().log_softmax(dim=1)
    check(logs, expected, (columns + 8) * UNIT * (1 + expected.abs() + logits.abs().double().amax()))
    loss = call(
        level, "nll_loss", {"loss": torch.empty(1), "total": torch.empty(1), "values": logs, "labels": labels}, **sizes
    )
    chosen = logs[torch.arange(rows), labels].double()
    check(loss["loss"], -chosen.mean()[None], float((rows + 2) * UNIT * chosen.abs().mean()))
    assert float(loss["total"]) == rows
    out = torch.empty(rows, columns)
    tensors = {"out": out, "gradient": torch.tensor([2.0]), "labels": labels}
    gradient = call(level, "nll_loss_gradient", tensors, **sizes)["out"]
    check(gradient, -2.0 * F.one_hot(labels, columns).double() / rows, 4 * UNIT)
    found = call(level, "log_softmax_gradient", {"out": out, "gradient": gradient, "values": logs}, **sizes)["out"]
    exact = gradient.double() - logs.double().exp() * gradient.double().sum(dim=1, keepdim=True)
    check(found, exact, (columns + 6) * UNIT * 3)
    best = call(level, "argmax", {"out": torch.empty(rows, dtype=torch.int64), "values": logits}, **sizes)["out"]
    assert torch.equal(best, logits.argmax(dim=1))
    is_right = torch.empty(rows, dtype=torch.uint8)
    is_right = call(level, "equal", {"out": is_right, "left": best, "right": labels}, count=rows)["out"]
    assert torch.equal(is_right.bool(), best == labels)
    total = torch.empty(1, dtype=torch.int64)
    assert int(call(level, "count_true", {"out": total, "values": is_right}, count=rows)["out"]) == int(is_right.sum())
