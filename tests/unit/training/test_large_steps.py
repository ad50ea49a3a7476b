"""Kernels of large steps: what torch gives, for whatever they take, in both precisions; torch's own for the rest."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from image_classifier.choices import Precision
from image_classifier.kernels.library import load_kernels
from image_classifier.model.catalog import build_classifier
from image_classifier.training.determinism import CAPS, get_instruction_set
from image_classifier.training.engine import build_engine
from image_classifier.training.large_steps import COMPUTE, LargeSteps
from image_classifier.training.replay import Recorder
from tests.tiny import make_training

aten = torch.ops.aten
RANDOM = torch.Generator().manual_seed(0)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


@pytest.fixture
def recorder() -> Recorder:
    return Recorder([], kernels=load_kernels(get_instruction_set()), is_small=False)


@pytest.fixture
def steps(recorder: Recorder) -> LargeSteps:
    assert isinstance(recorder.steps, LargeSteps)
    return recorder.steps


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    found: torch.dtype = request.param
    return found


def make(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    values = torch.randn(*shape, generator=RANDOM).to(dtype)
    return values.to(memory_format=torch.channels_last) if len(shape) == 4 else values


HOW = [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, True, False]


def convolve(images: Tensor, outputs: int, *, pad: int = 1) -> tuple[Tensor, Tensor, Tensor, None]:
    """Make what the gradient of a convolution needs: the output's gradient, images, weights, no bias."""
    number, channels, height, width = images.shape
    gradient = make(number, outputs, height + 2 * pad - 2, width + 2 * pad - 2, dtype=images.dtype)
    return gradient, images, make(outputs, channels, 3, 3, dtype=images.dtype), None


def compute(steps: LargeSteps, called: Any, *arguments: Any) -> Any:
    """Compute an operation by a kernel, which must take it."""
    result = steps.compute(called, arguments, {})
    assert result is not None, f"{called} stayed torch's"
    again = steps.compute(called, arguments, {})
    for one, other in zip(as_tuple(result), as_tuple(again), strict=True):
        assert (one is None and other is None) or torch.equal(one.nan_to_num(7), other.nan_to_num(7))
    return result


def as_tuple(result: Any) -> tuple[Any, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def compare(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape and found.dtype == expected.dtype
    tolerance = TOLERANCE[expected.dtype] * max(1.0, float(expected.float().abs().nan_to_num().max()))
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("shape", [(3, 24, 7, 8), (1, 5, 9, 9), (2, 64, 2, 3)])
def test_pooling_and_its_gradient(steps: LargeSteps, dtype: torch.dtype, shape: tuple[int, int, int, int]) -> None:
    images = make(*shape, dtype=dtype).round()  # equal ones among them
    images[0, 0, 0, 1] = float("nan")
    expected, torchs = aten.max_pool2d_with_indices.default(images, [2, 2])
    out, indices = compute(steps, aten.max_pool2d_with_indices.default, images, [2, 2])
    assert torch.equal(out.nan_to_num(7), expected.nan_to_num(7)) and out.dtype == dtype
    how: tuple[Any, ...] = ([2, 2], [], [0, 0], [1, 1], False)
    backward = aten.max_pool2d_with_indices_backward.default
    for gradient in (make(*out.shape, dtype=dtype), make(*out.shape, dtype=dtype).contiguous()):
        found = compute(steps, backward, gradient, images, *how, indices)
        assert torch.equal(found, backward(gradient, images, *how, torchs))


def test_gelu_and_its_gradient(steps: LargeSteps, dtype: torch.dtype) -> None:
    values = make(4, 16, 33, 5, dtype=dtype) * 4
    values.flatten()[:6] = torch.tensor([0.0, -0.0, 30.0, -30.0, float("nan"), 1e-20])
    gradient = make(*values.shape, dtype=dtype)
    compare(compute(steps, aten.gelu_backward.default, gradient, values), aten.gelu_backward(gradient, values))
    compare(compute(steps, aten.gelu.default, values), aten.gelu(values))


@pytest.mark.parametrize("shape", [(30, 24, 7, 8), (2, 3, 2, 2), (129, 64, 2, 1)])
def test_normalisation_and_its_gradient(
    steps: LargeSteps, dtype: torch.dtype, shape: tuple[int, int, int, int]
) -> None:
    images, channels = make(*shape, dtype=dtype) * 3 + 5, shape[1]
    weight, bias = make(channels), make(channels)
    statistics = [(torch.zeros(channels), torch.ones(channels)) for _ in "12"]
    normalize, backward = aten.native_batch_norm.default, aten.native_batch_norm_backward.default
    found = COMPUTE[normalize](steps, images, weight, bias, *statistics[0], True, 0.4, 1e-5)
    expected = normalize(images, weight, bias, *statistics[1], True, 0.4, 1e-5)
    for one, other in [*zip(found, expected, strict=True), *zip(*statistics, strict=True)]:
        compare(one, other)
    gradient = make(*shape, dtype=dtype)
    for mask in ([True, True, True], [True, False, True]):
        arguments = gradient, images, weight, *statistics[1], *expected[1:], True, 1e-5, mask
        for one, other in zip(compute(steps, backward, *arguments), backward(*arguments), strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                compare(one, other)


@pytest.mark.parametrize(
    ("number", "channels", "outputs", "height", "width"),
    [
        (300, 8, 16, 3, 3),  # one tile an image
        (20, 24, 40, 31, 14),  # tiles over the edge, channels that fill no vector
        (70, 50, 134, 7, 8),  # more vectors of outputs than are multiplied at once, rows left over
    ],
)
def test_convolutions_by_tiles(
    steps: LargeSteps, dtype: torch.dtype, number: int, channels: int, outputs: int, height: int, width: int
) -> None:
    if dtype not in steps._tiled:
        pytest.skip(f"{get_instruction_set()} does not compute convolutions of {dtype} by tiles")
    images, gradient = (make(number, some, height, width, dtype=dtype) for some in (channels, outputs))
    weight = make(outputs, channels, 3, 3, dtype=dtype)
    how = [1, 1], [1, 1], [1, 1], False, [0, 0], 1
    found = compute(steps, aten.convolution.default, images, weight, None, *how)
    compare_whole(found, aten.convolution.default(images.double(), weight.double(), None, *how))
    of_both, of_images, of_weight = [True, True, False], [True, False, False], [False, True, False]
    exact = gradient.double(), images.double(), weight.double()
    for mask in (of_both, of_images, of_weight):
        found = compute(steps, aten.convolution_backward.default, gradient, images, weight, None, *how, mask)
        for one, other in zip(found, aten.convolution_backward.default(*exact, None, *how, mask), strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                compare_whole(one, other)


@pytest.mark.skipif(get_instruction_set() in ("default", "avx2"), reason="this processor is tested as it is")
def test_convolutions_by_tiles_without_avx512() -> None:
    name = f"{__file__}::{test_convolutions_by_tiles.__name__}"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", name, "-k", "fp32"]
    answer = subprocess.run(command, env={**os.environ, **CAPS["avx2"]}, capture_output=True, text=True, check=False)
    assert answer.returncode == 0 and "3 passed" in answer.stdout, answer.stdout


def compare_whole(found: Tensor, exact: Tensor) -> None:
    """Compare all numbers at once: a tile's errors stand in the relation of its largest numbers, not of each."""
    assert found.shape == exact.shape and found.is_contiguous(memory_format=torch.channels_last)
    limit = 5e-6 if found.dtype == torch.float32 else 0.015
    assert float((found.double() - exact).norm() / exact.norm()) < limit


@pytest.mark.skipif(get_instruction_set() != "amx_bf16", reason="this processor has no AMX")
@pytest.mark.parametrize(
    ("number", "channels", "outputs", "height", "width", "taps"),
    [
        (37, 32, 64, 5, 5, 3),  # several images at a time, and some left
        (7, 24, 32, 21, 14, 3),  # more pixels in an image than are taken at a time, channels that fill no tile
        (5, 3, 96, 4, 7, 5),  # threads with unequal parts
        (9, 272, 32, 2, 2, 1),  # one part of the channels after the other; outputs for one thread only
        (1, 16, 64, 1, 1, 3),
    ],
)
def test_gradients_of_convolutions(
    steps: LargeSteps, number: int, channels: int, outputs: int, height: int, width: int, taps: int
) -> None:
    images = make(number, channels, height, width, dtype=torch.bfloat16)
    weight = make(outputs, channels, taps, taps, dtype=torch.bfloat16)
    how = [1, 1], [taps // 2, taps // 2], [1, 1], False, [0, 0], 1
    gradient = make(number, outputs, height, width, dtype=torch.bfloat16)
    for mask in ([True, True, False], [False, True, False], [True, True, True]):
        arguments = gradient, images, weight, [outputs], *how, mask
        found = compute(steps, aten.convolution_backward.default, *arguments)
        for one, other in zip(found, aten.convolution_backward.default(*arguments), strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                compare(one, other)


@pytest.mark.parametrize(
    ("called", "arguments"),
    [
        (aten.max_pool2d_with_indices.default, (torch.randn(2, 8, 8, 8), [2, 2])),  # channels not next to each other
        (aten.max_pool2d_with_indices.default, (make(2, 8, 8, 8), [3, 3])),
        (aten.gelu_backward.default, (make(4), make(4))),
        (aten.convolution.default, (make(2, 8, 6, 6), make(8, 8, 3, 3), None, *HOW[:-1])),  # too few images
        (aten.convolution.default, (make(300, 8, 6, 6), make(8, 8, 3, 3), make(8), *HOW[:-1])),
        (aten.convolution.default, (make(300, 8, 6, 6), make(8, 8, 3, 3), None, [2, 2], *HOW[1:-1])),
        (aten.convolution.default, (make(300, 8, 2, 2), make(8, 8, 3, 3), None, *HOW[:-1])),  # 36 products either way
        (aten.convolution_backward.default, (*convolve(make(2, 8, 6, 6), 32), *HOW)),  # not of 16 bits
        (aten.convolution_backward.default, (*convolve(make(2, 8, 6, 6, dtype=torch.bfloat16), 40), *HOW)),
        (
            aten.convolution_backward.default,
            (*convolve(make(2, 8, 6, 6, dtype=torch.bfloat16), 32, pad=0), [1, 1], [0, 0], *HOW[2:]),
        ),
        (aten.gelu_backward.default, (make(1, 2, 3, 3).double(), make(1, 2, 3, 3).double())),
        (
            aten.native_batch_norm.default,
            (make(2, 8, 4, 4), torch.ones(8), torch.ones(8), torch.zeros(8), torch.ones(8), False, 0.1, 1e-5),
        ),
    ],
)
def test_what_no_kernel_is_for_stays_torchs(recorder: Recorder, steps: LargeSteps, called: Any, arguments: Any) -> None:
    assert steps.compute(called, arguments, {}) is None
    with recorder:
        found = called(*arguments)
    for one, other in zip(as_tuple(found), as_tuple(called(*arguments)), strict=True):
        assert (one is None and other is None) or torch.equal(one, other)


@pytest.mark.parametrize("model", ["airbench_small", "resnet"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_is_as_near_to_single_precision_as_torchs(model: Any, precision: Precision) -> None:
    settings = make_training(device="cpu", shards=2, model=model, precision="fp32", engine="eager", batch_size=100)
    images = torch.randint(0, 256, (100, 3, 32, 32), dtype=torch.uint8, generator=RANDOM)
    labels = torch.arange(100) % 10
    in_tiles = precision == "bf16" and get_instruction_set() == "avx512_bf16"  # then errors add up to more
    given = []
    for engine, chosen in (("eager", "fp32"), ("eager", precision), ("compiled", precision), ("compiled", precision)):
        classifier = build_classifier(model, 10, input_mean=(0.5,) * 3, input_std=(0.2,) * 3, seed=0).train()
        compute_gradients = build_engine(
            classifier, replace(settings, engine=engine, precision=chosen)  # type: ignore[arg-type]  # words
        )
        loss, _ = compute_gradients(images, labels, 24)
        gradients = [parameter.grad for parameter in classifier.parameters() if parameter.grad is not None]
        if in_tiles:
            gradients = [torch.cat([gradient.flatten() for gradient in gradients])]
        given.append([loss, *gradients, *classifier.buffers()])
    for exact, eager, compiled, again in zip(*given, strict=True):
        assert torch.equal(compiled, again)
        size = float(exact.float().norm())
        # 3 %, for a sum in another order puts some values near 0 on the other side of it: so do torch's, by threads.
        limit = (2 if in_tiles else 1.2) * float((eager.float() - exact.float()).norm()) + 0.03 * size
        assert float((compiled.float() - exact.float()).norm()) <= limit
