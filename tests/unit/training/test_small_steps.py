"""Kernels for small steps: what torch gives, for whatever they take; torch's own for the rest."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from image_classifier.kernels.library import Arguments, load_kernels
from image_classifier.training.determinism import get_instruction_set
from image_classifier.training.small_steps import SmallSteps

aten = torch.ops.aten
KERNELS = load_kernels(get_instruction_set())
RANDOM = torch.Generator().manual_seed(0)


def make(*shape: int, channels_last: bool = False) -> Tensor:
    values = torch.randn(*shape, generator=RANDOM)
    return values.to(memory_format=torch.channels_last) if channels_last else values


def build_steps(made: list[Tensor], calls: list[tuple[str, Arguments]]) -> SmallSteps:
    """Build steps that note what they make and call."""

    def make(function: Callable[..., Tensor], *arguments: Any, **options: Any) -> Tensor:
        made.append(function(*arguments, **options))
        return made[-1]

    def call(kernel: str, arguments: Arguments, *tensors: Mapping[str, Tensor]) -> None:
        calls.append((kernel, arguments))

    return SmallSteps(KERNELS, make, call)


def compute(called: Any, *arguments: Any, **options: Any) -> Any:
    """Compute an operation by the kernels, which must take it, twice over memory that held something else."""
    made: list[Tensor] = []
    calls: list[tuple[str, Arguments]] = []
    result = build_steps(made, calls).compute(called, arguments, options)
    assert result is not None, f"{called} stayed torch's"
    for each in made if calls else ():
        each.copy_(torch.full_like(each, 7))
    for kernel, prepared in calls:
        KERNELS.call(kernel, prepared)
    return result


def compare(called: Any, *arguments: Any, exact: bool = False, **options: Any) -> None:
    """Compare what the kernels give with what torch gives."""
    found, expected = compute(called, *arguments, **options), called(*arguments, **options)
    if isinstance(expected, Tensor):
        found, expected = (found,), (expected,)
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert one.shape == other.shape and one.dtype == other.dtype
            tolerance = 0.0 if exact else 1e-5 * max(1.0, float(other.float().abs().max()))
            torch.testing.assert_close(one, other, rtol=0, atol=tolerance, equal_nan=True)


def convolve(*, stride: int = 1, groups: int = 1, taps: int = 3, pads: tuple[int, int] = (0, 0)) -> tuple[Any, ...]:
    """Make the arguments of a convolution."""
    weight = make(2, 2 // groups, taps, taps)
    return make(1, 2, 8, 8), weight, None, [stride] * 2, list(pads), [1, 1], False, [0, 0], groups


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    ("channels", "height", "width", "outputs", "taps", "pad"),
    [
        (3, 32, 32, 6, 5, 0),
        (6, 14, 14, 16, 5, 0),
        (1, 5, 9, 1, 1, 0),
        (17, 7, 4, 13, 3, 1),
        (2, 3, 40, 7, 2, 0),
        (4, 6, 6, 5, 5, 2),
    ],
)
def test_convolutions_and_their_gradients(
    channels: int, height: int, width: int, outputs: int, taps: int, pad: int, channels_last: bool
) -> None:
    images = make(3, channels, height, width, channels_last=channels_last)
    weight = make(outputs, channels, taps, taps, channels_last=channels_last)
    how = [[1, 1], [pad, pad], [1, 1], False, [0, 0], 1]
    for bias in (make(outputs), None):
        compare(aten.convolution.default, images, weight, bias, *how)
    gradient = make(*F.conv2d(images, weight, padding=pad).shape, channels_last=channels_last)
    for mask in ([True, True, True], [False, True, True], [True, False, False], [False, True, False]):
        compare(aten.convolution_backward.default, gradient, images, weight, [outputs], *how, mask)
    alone = compute(aten.convolution_backward.default, gradient, images, weight, [outputs], *how, [False, False, True])
    assert alone[:2] == (None, None)
    torch.testing.assert_close(alone[2], gradient.sum(dim=(0, 2, 3)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (1, 5, 7, 9), (4, 1, 2, 2)])
def test_pooling_and_its_gradient(shape: tuple[int, int, int, int]) -> None:
    images = make(*shape).round()  # equal ones among them
    images[0, 0, 0, 1] = float("nan")
    compare(aten.relu.default, images, exact=True)
    expected, torchs = aten.max_pool2d_with_indices.default(images, [2, 2])
    out, indices = compute(aten.max_pool2d_with_indices.default, images, [2, 2])
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
    how: tuple[Any, ...] = ([2, 2], [], [0, 0], [1, 1], False)
    for gradient in (make(*out.shape), make(*out.shape).transpose(2, 3).contiguous().transpose(2, 3)):
        found = compute(aten.max_pool2d_with_indices_backward.default, gradient, images, *how, indices)
        called = aten.max_pool2d_with_indices_backward.default
        assert torch.equal(found, called(gradient, images, *how, torchs))


@pytest.mark.parametrize(
    ("rows", "depth", "columns"), [(4, 400, 120), (4, 84, 10), (1, 1, 1), (9, 33, 70), (3, 17, 64)]
)
def test_products_of_matrices(rows: int, depth: int, columns: int) -> None:
    left, right, bias = make(rows, depth), make(depth, columns), make(columns)
    for one in (left, left.T.contiguous().T):
        compare(aten.mm.default, one, right)
    transposed = right.T.contiguous().T
    compare(aten.mm.default, left, transposed)
    compare(aten.addmm.default, bias, left, transposed)
    compare(aten.addmm.default, bias, left, right)
    assert (
        build_steps([], []).compute(aten.mm.default, (left.T.contiguous().T, transposed), {}) is None
        or rows == 1
        or depth == 1
    )
    compare(aten.sum.dim_IntList, left, [0], True)


def test_the_loss_and_its_gradient() -> None:
    logits, labels = make(5, 10), torch.tensor([0, 9, 3, 3, 7])
    logits[1, 2] = logits[1, 5] = 4.0
    compare(aten._log_softmax.default, logits, 1, False)
    logs = logits.log_softmax(dim=1)
    compare(aten._log_softmax_backward_data.default, make(5, 10), logs, 1, torch.float32)
    compare(aten.nll_loss_forward.default, logs, labels, None, 1, -100)
    how = logs, labels, None, 1, -100, torch.tensor(5.0)
    compare(aten.nll_loss_backward.default, torch.tensor(2.0), *how)
    compare(aten.argmax.default, logits, 1, exact=True)
    compare(aten.eq.Tensor, logits.argmax(dim=1), labels)
    compare(aten.sum.default, torch.tensor([True, False, True]))
    compare(aten.ones_like.default, torch.tensor(3.0))


def test_exponentials_and_logarithms_are_right_to_the_last_bit_but_one() -> None:
    values = torch.cat([torch.linspace(-110, 89, 100_001), torch.tensor([0.0, -0.0, 1e-30, 88.72, -87.4, -104.0])])
    gradient = torch.zeros(len(values) + 1).index_fill_(0, torch.tensor([0]), -1)
    row = torch.cat([torch.zeros(1), values])
    found = compute(aten._log_softmax_backward_data.default, gradient[None], row[None], 1, torch.float32)[0, 1:]
    expected = values.double().exp()
    spacing = torch.maximum(expected * 2.0**-23, torch.tensor(2.0**-149).double())
    assert bool(((found.double() - expected).abs() <= spacing)[expected < 3e38].all())
    for value in (float("nan"), float("-inf"), float("inf")):
        row[1] = value
        found = compute(aten._log_softmax_backward_data.default, gradient[None], row[None], 1, torch.float32)[0, 1]
        assert torch.equal(found, torch.tensor(value).exp()) or (value != value and found.isnan())
    for count in (*range(1, 300), 999, 65_537):
        found = -compute(aten._log_softmax.default, torch.zeros(1, count), 1, False)[0, 0].double()
        expected = torch.tensor(count).double().log()
        assert abs(found - expected) <= expected * 2.0**-23


def test_a_label_that_is_no_class_gives_no_number_and_reads_nothing_else() -> None:
    logs, labels = make(2, 10).log_softmax(dim=1), torch.tensor([3, 10])
    assert compute(aten.nll_loss_forward.default, logs, labels, None, 1, -100)[0].isnan()
    how = logs, labels, None, 1, -100, torch.tensor(2.0)
    assert compute(aten.nll_loss_backward.default, torch.tensor(1.0), *how)[1].abs().sum() == 0


def test_images_are_scaled_as_torch_scales_them() -> None:
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8, generator=RANDOM)
    compare(aten.clone.default, images, memory_format=torch.channels_last)
    compare(aten._to_copy.default, images, dtype=torch.float32, exact=True)
    numbers = torch.tensor([125.3, 123.0, 113.9]).reshape(1, 3, 1, 1)
    compare(aten.sub.Tensor, images.float(), numbers, exact=True)
    compare(aten.div.Tensor, images.float(), numbers, exact=True)


@pytest.mark.parametrize(
    ("called", "arguments", "options"),
    [
        (aten.convolution.default, convolve(stride=2), {}),
        (aten.convolution.default, convolve(groups=2), {}),
        (aten.convolution.default, convolve(taps=7), {}),
        (aten.convolution.default, convolve(pads=(0, 1)), {}),
        (aten.mm.default, (make(4, 4).bfloat16(), make(4, 4).bfloat16()), {}),
        (aten.max_pool2d_with_indices.default, (make(1, 2, 8, 8), [3, 3]), {}),
        (aten.relu.default, (make(4, 6)[:, ::2],), {}),
        (aten.clone.default, (make(2, 3, 4, 4, channels_last=True),), {"memory_format": torch.contiguous_format}),
        (aten.sub.Tensor, (make(2, 3, 4, 4), make(2, 3, 4, 4)), {}),
        (aten._to_copy.default, (torch.zeros(4, dtype=torch.uint8),), {"dtype": torch.float64}),
        (aten.gelu.default, (make(4),), {}),
        (aten.addmm.default, (make(4), make(3, 4), make(4, 4)), {"beta": 0.5}),
    ],
)
def test_what_no_kernel_is_for_stays_torchs(called: Any, arguments: Any, options: Any) -> None:
    assert build_steps([], []).compute(called, arguments, options) is None
