"""Kernels of large batches against doubles, number by number; none reads or writes beyond its memory, and all
instruction sets give the same bits in single precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

from image_classifier.kernels.library import load_kernels
from tests.guarded import LEVELS, call, check

RANDOM = torch.Generator().manual_seed(0)
UNIT = {"float": 2.0**-24, "bf16": 2.0**-8}
"""Largest relative error of a rounded number."""
DTYPE = {"float": torch.float32, "bf16": torch.bfloat16}
TINY = 1e-36

CASES = [(level, kind) for level in LEVELS for kind in DTYPE]
WINOGRAD_CASES = [(level, kind) for level, kind in CASES if kind == "float" or level in ("avx512_bf16", "amx_bf16")]


def make(*shape: int, kind: str) -> Tensor:
    return torch.randn(*shape, generator=RANDOM).to(DTYPE[kind])


def get_sizes(images: Tensor) -> dict[str, int]:
    return dict(zip(("num_images", "height", "width", "channels"), images.shape, strict=True))


def to_planes(pixels: Tensor) -> Tensor:
    return pixels.double().movedim(3, 1)


@pytest.mark.parametrize(("level", "kind"), CASES)
@pytest.mark.parametrize("shape", [(3, 7, 8, 24), (1, 9, 9, 5), (2, 2, 3, 64)])
def test_pooling_and_its_gradient(shape: tuple[int, int, int, int], level: str, kind: str) -> None:
    images = make(*shape, kind=kind).round()  # equal ones among them
    images[0, 0, 0, 0], images[0, 0, 1, 1] = float("nan"), float("inf")
    number, height, width, channels = shape
    pooled = number, height // 2, width // 2, channels
    out, indices = torch.empty(pooled, dtype=DTYPE[kind]), torch.empty(pooled, dtype=torch.uint8)
    tensors = {"out": out, "indices": indices, "images": images}
    found = call(level, f"max_pool_{kind}", tensors, **get_sizes(images))
    expected, flat = F.max_pool2d(to_planes(images), 2, return_indices=True)
    check(found["out"], expected.movedim(1, 3), 0.0)
    gradient = make(*pooled, kind=kind)
    tensors = {"out": torch.empty(shape, dtype=DTYPE[kind]), "indices": found["indices"], "gradient": gradient}
    back = call(level, f"max_pool_gradient_{kind}", tensors, **get_sizes(images))["out"]
    exact = torch.zeros(number, channels, height * width, dtype=torch.float64)
    exact.scatter_(2, flat.flatten(2), to_planes(gradient).flatten(2))
    check(back, exact.reshape(number, channels, height, width).movedim(1, 3), 0.0)


@pytest.mark.parametrize(("level", "kind"), CASES)
@pytest.mark.parametrize("count", [1, 31, 4096])
def test_gelu_and_its_gradient(count: int, level: str, kind: str) -> None:
    values, gradient = make(count, kind=kind) * 3, make(count, kind=kind)
    values[:5] = torch.tensor([0.0, -30.0, 30.0, float("nan"), 1e-20])[:count]
    x = values.double()
    part = 0.5 * (1 + torch.erf(x / 2**0.5))
    slope = part + x * torch.exp(-0.5 * x * x) / (2 * torch.pi) ** 0.5
    tensors = {"out": torch.empty_like(values), "gradient": gradient, "values": values}
    found = call(level, f"gelu_gradient_{kind}", tensors, count=count)["out"]
    approximation = {"float": 6e-7, "bf16": 2.5e-4}[kind]
    check(found, gradient.double() * slope, gradient.double().abs() * (approximation + UNIT[kind] * slope.abs()) + TINY)
    found = call(level, f"gelu_{kind}", {"out": torch.empty_like(values), "values": values}, count=count)["out"]
    approximation = {"float": 2.5e-7, "bf16": 1.5e-5}[kind]
    check(found, x * part, x.abs() * (approximation + UNIT[kind] * part) + TINY)


@pytest.mark.parametrize(("level", "kind"), CASES)
@pytest.mark.parametrize(("num_pixels", "channels"), [(1680, 24), (8, 3), (129, 64), (3000, 17)])
def test_batch_norm_and_its_gradient(num_pixels: int, channels: int, level: str, kind: str) -> None:
    values = make(num_pixels, channels, kind=kind) * 3 + 5
    weight, bias = (torch.randn(channels, generator=RANDOM) for _ in "12")
    running = {"running_mean": torch.ones(channels), "running_variance": torch.full((channels,), 2.0)}
    of_channels = {"mean": torch.empty(channels), "scale": torch.empty(channels)}
    sizes = {"num_pixels": num_pixels, "channels": channels}
    found = call(
        level,
        f"batch_norm_{kind}",
        {"out": torch.empty_like(values), **of_channels, "values": values, "weight": weight, "bias": bias, **running},
        **sizes,
        momentum=0.4,
        epsilon=1e-5,
    )
    x, single = values.double(), UNIT["float"]
    mean, variance = x.mean(dim=0), x.var(dim=0, unbiased=False)
    scale = (variance + 1e-5).rsqrt()
    far = x - x[0]  # sums are of these, over up to 128 pixels in floats
    off_mean = 130 * single * x.abs().mean(dim=0)
    off_variance = 132 * single * (x.abs() * far.abs()).mean(dim=0) + off_mean * (
        x.abs().mean(dim=0) + far.abs().mean(dim=0)
    )
    off_scale = 0.51 * off_variance * scale**3 + 2 * single * scale
    check(found["mean"], mean, off_mean + single * mean.abs())
    check(found["scale"], scale, off_scale)
    expected = (x - mean) * scale * weight + bias
    terms = x.abs() * (scale * weight).abs() + (mean * scale * weight).abs() + bias.abs()
    bound = weight.abs() * ((x - mean).abs() * off_scale + scale * off_mean) + 3 * single * terms
    check(found["out"], expected, bound + UNIT[kind] * expected.abs() + TINY)
    check(found["running_mean"], 0.6 + 0.4 * mean, 0.4 * off_mean + 4 * single * (1 + mean.abs()))
    unbiased = variance * num_pixels / (num_pixels - 1)
    check(found["running_variance"], 1.2 + 0.4 * unbiased, 0.5 * off_variance + 4 * single * (2 + unbiased))

    gradient = make(num_pixels, channels, kind=kind)
    g, mean, scale = gradient.double(), found["mean"].double(), found["scale"].double()
    results = {
        "of_values": torch.empty_like(values),
        "of_weight": torch.empty(channels),
        "of_bias": torch.empty(channels),
    }
    tensors: dict[str, Any] = {"gradient": gradient, "values": values, "weight": weight}
    tensors |= {"mean": found["mean"], "scale": found["scale"]}
    back = call(level, f"batch_norm_gradient_{kind}", {**results, **tensors}, **sizes)
    sums, products = g.sum(dim=0), (g * (x - mean)).sum(dim=0)
    off_sums, off_products = 130 * single * g.abs().sum(dim=0), 132 * single * (g.abs() * (x - mean).abs()).sum(dim=0)
    check(back["of_bias"], sums, off_sums + TINY)
    check(back["of_weight"], products * scale, scale * (off_products + single * products.abs()) + TINY)
    slope = -products * scale**3 * weight / num_pixels
    expected = g * scale * weight + (x - mean) * slope - sums / num_pixels * scale * weight
    off_slope = (off_products + 4 * single * products.abs()) * scale**3 * weight.abs() / num_pixels
    terms = (
        (g * scale * weight).abs() + (x.abs() + mean.abs()) * slope.abs() + (sums / num_pixels * scale * weight).abs()
    )
    bound = (x.abs() + mean.abs()) * off_slope + off_sums / num_pixels * scale * weight.abs() + 5 * single * terms
    check(back["of_values"], expected, bound + UNIT[kind] * expected.abs() + TINY)
    without = call(level, f"batch_norm_gradient_{kind}", {**results, **tensors, "of_values": None}, **sizes)
    assert torch.equal(without["of_weight"], back["of_weight"]) and torch.equal(without["of_bias"], back["of_bias"])


POINTS = (0.0, 0.6, -0.6, 1.5, -1.5)


def build_transforms() -> tuple[Tensor, Tensor, Tensor]:
    """Build the matrices of F(4x4, 3x3) for the points and infinity: of pixels [6, 6], filters [6, 3], results [4, 6].

    A polynomial is evaluated at the points; a product of two is interpolated, which is what transposes them (Lavin,
    Gray, 2016; Toom and Cook).
    """
    points = torch.tensor(POINTS).double()
    of_filters = torch.cat([points[:, None] ** torch.arange(3), torch.tensor([[0.0, 0, 1]])])
    of_results = torch.cat([points[:, None] ** torch.arange(4), torch.tensor([[0.0, 0, 0, 1]])]).T
    whole = torch.cat([points[:, None] ** torch.arange(6), torch.tensor([[0.0, 0, 0, 0, 0, 1]])])
    return torch.linalg.inv(whole).T, of_filters, of_results


def bound_winograd(images: Tensor, filters: Tensor, unit: float) -> Tensor:
    """Bound the error of F(4x4, 3x3) [N, O, H, W], by what it computes with absolute values in place of all numbers.

    Each number is rounded a few times in each transformation, and once for each channel in the products' sums.
    """
    of_pixels, of_filters, of_results = (matrix.abs() for matrix in build_transforms())
    number, channels, height, width = images.shape
    down, across = -(-height // 4), -(-width // 4)
    padded = F.pad(images.abs(), (1, 4 * across - width + 1, 1, 4 * down - height + 1))
    tiles = padded.unfold(2, 6, 4).unfold(3, 6, 4)
    at_points = torch.einsum("ai,bj,ncyxij->ncyxab", of_pixels, of_pixels, tiles)
    filters_at_points = torch.einsum("ai,bj,ocij->ocab", of_filters, of_filters, filters.abs())
    products = torch.einsum("ncyxab,ocab->noyxab", at_points, filters_at_points)
    results = torch.einsum("ia,jb,noyxab->noyixj", of_results, of_results, products)
    sums = results.reshape(number, len(filters), 4 * down, 4 * across)[:, :, :height, :width]
    return sums * (2 * unit + (channels + 40) * UNIT["float"]) * 1.1


SHAPES = [(30, 8, 16, 3, 3), (4, 24, 40, 31, 14), (9, 50, 134, 7, 8), (2, 8, 8, 4, 4)]


def convolve(level: str, kind: str, images: Tensor, filters: Tensor, *, for_gradient: bool = False) -> Tensor:
    """Convolve pixels [N, H, W, C] with filters [O, 3, 3, C], or find the gradient of images from [C, 3, 3, O]."""
    outputs = filters.shape[3] if for_gradient else len(filters)
    kernels, kernel = load_kernels(level), f"winograd_filters_{kind}"
    sizes = {"channels": images.shape[3], "outputs": outputs, "is_for_gradient": int(for_gradient)}
    num_bytes = kernels.count_scratch(kernel, kernels.prepare(kernel, filters=0, scratch=0, **sizes))
    tensors = {"scratch": torch.zeros(num_bytes // 4), "filters": filters}
    at_points = call(level, kernel, tensors, **sizes)["scratch"]
    out = torch.empty(*images.shape[:3], outputs, dtype=images.dtype)
    tensors = {"out": out, "images": images, "filters": at_points}
    return call(level, f"winograd_convolve_{kind}", tensors, **get_sizes(images), outputs=outputs)["out"]


@pytest.mark.parametrize(("level", "kind"), WINOGRAD_CASES)
@pytest.mark.parametrize(("number", "channels", "outputs", "height", "width"), SHAPES)
def test_convolution(number: int, channels: int, outputs: int, height: int, width: int, level: str, kind: str) -> None:
    images, filters = make(number, height, width, channels, kind=kind), make(outputs, 3, 3, channels, kind=kind)
    planes, weight = to_planes(images), to_planes(filters)
    expected = F.conv2d(planes, weight, padding=1)
    bound = bound_winograd(planes, weight, UNIT[kind]) + UNIT[kind] * expected.abs()
    check(convolve(level, kind, images, filters), expected.movedim(1, 3), bound.movedim(1, 3))
    gradient = make(number, height, width, outputs, kind=kind)
    planes, turned = to_planes(gradient), weight.flip(2, 3).movedim(0, 1)
    expected = F.conv2d(planes, turned, padding=1)
    bound = bound_winograd(planes, turned, UNIT[kind]) + UNIT[kind] * expected.abs()
    found = convolve(level, kind, gradient, filters, for_gradient=True)
    check(found, expected.movedim(1, 3), bound.movedim(1, 3))


@pytest.mark.parametrize(("level", "kind"), WINOGRAD_CASES)
@pytest.mark.parametrize(("number", "channels", "outputs", "height", "width"), SHAPES)
def test_gradient_of_filters(
    number: int, channels: int, outputs: int, height: int, width: int, level: str, kind: str
) -> None:
    images, gradient = make(number, height, width, channels, kind=kind), make(number, height, width, outputs, kind=kind)
    shape = [outputs, channels, 3, 3]
    pair = to_planes(images), to_planes(gradient)
    expected = conv2d_weight(pair[0], shape, pair[1], padding=1)  # type: ignore[no-untyped-call]
    out = torch.empty(outputs, 3, 3, channels, dtype=DTYPE[kind])
    tensors = {"out": out, "gradient": gradient, "images": images}
    found = call(level, f"winograd_filter_gradient_{kind}", tensors, **get_sizes(images), outputs=outputs)["out"]
    of_pixels, of_filters, of_results = (matrix.abs() for matrix in build_transforms())
    down, across = -(-height // 4), -(-width // 4)
    fill = 4 * across - width, 4 * down - height
    padded = F.pad(to_planes(images).abs(), (1, fill[0] + 1, 1, fill[1] + 1))
    tiles = torch.einsum("ai,bj,ncyxij->ncyxab", of_pixels, of_pixels, padded.unfold(2, 6, 4).unfold(3, 6, 4))
    blocks = F.pad(to_planes(gradient).abs(), (0, fill[0], 0, fill[1])).unfold(2, 4, 4).unfold(3, 4, 4)
    blocks = torch.einsum("ia,jb,noyxij->noyxab", of_results, of_results, blocks)
    products = torch.einsum("ncyxab,noyxab->ocab", tiles, blocks)
    sums = torch.einsum("ai,bj,ocab->ocij", of_filters, of_filters, products)
    bound = sums * (2 * UNIT[kind] + (number * down * across + 40) * UNIT["float"]) * 1.1 + UNIT[kind] * expected.abs()
    check(found, expected.movedim(1, 3), bound.movedim(1, 3))


@pytest.mark.parametrize(("level", "kind"), WINOGRAD_CASES)
def test_what_is_no_number_stays_in_its_tiles(level: str, kind: str) -> None:
    images, filters = make(3, 12, 12, 8, kind=kind), make(16, 3, 3, 8, kind=kind)
    good = convolve(level, kind, images, filters)
    for value in (float("nan"), float("inf")):
        bad = images.clone()
        bad[1, 5, 5, 3] = value
        found = convolve(level, kind, bad, filters)
        assert not found[1, 4:7, 4:7].isfinite().any()
        is_other = torch.ones(3, 12, 12, dtype=torch.bool)
        is_other[1, 4:8, 4:8] = False
        assert torch.equal(found[is_other], good[is_other])


@pytest.mark.skipif(len(LEVELS) < 2, reason="this processor has one instruction set")
@pytest.mark.parametrize(("number", "channels", "outputs", "height", "width"), SHAPES)
def test_all_instruction_sets_give_the_same_bits(
    number: int, channels: int, outputs: int, height: int, width: int
) -> None:
    images, filters = make(number, height, width, channels, kind="float"), make(outputs, 3, 3, channels, kind="float")
    gradient = make(number, height, width, outputs, kind="float")
    tensors = {"out": torch.empty(outputs, 3, 3, channels), "gradient": gradient, "images": images}
    found = [
        (
            convolve(level, "float", images, filters),
            convolve(level, "float", gradient, filters, for_gradient=True),
            call(level, "winograd_filter_gradient_float", tensors, **get_sizes(images), outputs=outputs)["out"],
        )
        for level in LEVELS
    ]
    for others in found[1:]:
        for one, other in zip(found[0], others, strict=True):
            assert torch.equal(one, other)
