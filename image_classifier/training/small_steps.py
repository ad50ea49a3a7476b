"""Which kernels take the place of which operations of torch in steps of few images, in single precision.

There, most of the time of an operation of torch goes into finding out what to do. A call of a kernel is prepared once,
with its addresses, and repeated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from image_classifier.training.kernels import KERNELS

REGISTERS = 16 * 5
"""Floats that a kernel may read beyond an image's last plane: 5 vectors of 16."""


MOST_PRODUCTS = 8_000_000
"""Of one convolution or product of matrices that the kernels take: with more, torch's libraries, which look longer for
the best way and use all threads, are faster."""


@dataclass(frozen=True)
class Call:
    """Calls of kernels that take the place of one operation of torch.

    Attributes:
        words: of each kernel: its number, how many words follow, and these; a tensor is the address of its data.
        operands: where in `words` the address of which input stands.
        result: what torch's operation would give; its memory is written to by every repetition.
        scratch: what else the words point to.
    """

    words: list[int]
    operands: list[tuple[int, Tensor]]
    result: Any
    scratch: list[Tensor]


class _Writer:
    """Writes the words of a call."""

    def __init__(self) -> None:
        self._words: list[int] = []
        self._operands: list[tuple[int, Tensor]] = []
        self._scratch: list[Tensor] = []

    def add(self, kernel: str, outputs: Sequence[Tensor | None], arguments: Sequence[Any]) -> None:
        """Add a kernel's call; an output's address does not change, an input's may, and None is 0.

        Args:
            arguments: tensors that are read, numbers, and sequences of numbers.
        """
        words: list[int] = [output.data_ptr() if output is not None else 0 for output in outputs]
        start = len(self._words) + 2
        for argument in arguments:
            if isinstance(argument, Tensor):
                self._operands.append((start + len(words), argument))
                words.append(argument.data_ptr())
            elif isinstance(argument, (tuple, list)):
                words += argument
            else:
                words.append(argument or 0)
        self._words += [KERNELS.index(kernel), len(words), *words]

    def make_scratch(self, num_floats: int) -> int:
        """Make memory for a kernel and return its address."""
        self._scratch.append(torch.empty(num_floats))
        return self._scratch[-1].data_ptr()

    def finish(self, result: Any) -> Call:
        return Call(self._words, self._operands, result, self._scratch)


def prepare_call(called: Any, arguments: Sequence[Any], options: Mapping[str, Any]) -> Call | None:
    """Find kernels for an operation with these arguments; None if it stays torch's.

    Args:
        called: an operation of ATen.
    """
    prepare, dtypes = _PREPARE.get(called, (None, ()))
    tensors = [each for each in arguments if isinstance(each, Tensor)]
    if prepare is None or any(each.device.type != "cpu" or each.dtype not in dtypes for each in tensors):
        return None
    return prepare(*arguments, **options)


def _is_dense(tensor: Tensor) -> bool:
    return tensor.is_contiguous() or (tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last))


def _is_plain(stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], transposed: bool) -> bool:
    return (
        not transposed and set(stride) == {1} and set(dilation) == {1} and len(set(padding)) == 1 and len(stride) == 2
    )


def _get_taps(weight: Tensor) -> int | None:
    """Get the side of square filters that the kernels can take."""
    height, width = weight.shape[2:]
    return int(height) if height == width and height <= 5 else None


def _count_products(images: Tensor, weight: Tensor) -> int:
    return len(images) * images.shape[2] * images.shape[3] * weight.numel()


def _prepare_convolution(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Call | None:
    if not _is_plain(stride, padding, dilation, transposed) or groups != 1 or _get_taps(weight) is None:
        return None
    if _count_products(images, weight) > MOST_PRODUCTS:
        return None
    writer = _Writer()
    out = _add_convolution(writer, images, weight, bias, padding[0], weight.stride(), 0)
    return writer.finish(out)


def _add_convolution(
    writer: _Writer,
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pad: int,
    strides: Sequence[int],
    offset: int,
) -> Tensor:
    """Add a convolution with the weights [O, C, K, K] that begin at an offset and have these strides."""
    number, channels, height, width = images.shape
    taps = weight.shape[2]
    outputs = weight.numel() // (channels * taps**2)
    pitch = width + 2 * pad
    out = torch.empty(number, outputs, height + 2 * pad - taps + 1, pitch - taps + 1)
    plane = (height + 2 * pad) * pitch
    packed = outputs * (channels * taps**2 + 1) + channels * plane + REGISTERS + taps
    scratch = writer.make_scratch(packed + 6 * (out.shape[2] * pitch + REGISTERS))
    sizes = [number, channels, height, width, outputs, taps, taps, pad, offset]
    writer.add("convolve", [out], [images, weight, bias, scratch, *sizes, images.stride(), strides])
    return out


def _prepare_convolution_backward(
    gradient: Tensor,
    images: Tensor,
    weight: Tensor,
    bias_sizes: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    mask: Sequence[bool],
) -> Call | None:
    taps = _get_taps(weight)
    if not _is_plain(stride, padding, dilation, transposed) or groups != 1 or taps is None or padding[0] >= taps:
        return None
    if _count_products(images, weight) > MOST_PRODUCTS:
        return None
    writer = _Writer()
    of_images = of_weight = of_bias = None
    if mask[0]:  # the same with inputs and outputs exchanged, and the filters mirrored
        o, c, y, x = weight.stride()
        offset = (taps - 1) * (y + x)
        of_images = _add_convolution(writer, gradient, weight, None, taps - 1 - padding[0], [c, o, -y, -x], offset)
    if mask[1] or mask[2]:
        number, channels, height, width = images.shape
        outputs, pad = weight.shape[0], padding[0]
        of_weight = torch.empty_like(weight) if mask[1] else None
        of_bias = torch.empty(outputs) if mask[2] else None
        pitch = width + 2 * pad
        rows = number * (channels * (height + 2 * pad) * pitch + outputs * (gradient.shape[2] * pitch + 16))
        scratch = writer.make_scratch(rows + pitch + REGISTERS)
        sizes = [number, channels, height, width, outputs, taps, taps, pad]
        strides = [images.stride(), gradient.stride(), weight.stride()]
        writer.add("convolve_weights", [of_weight, of_bias], [images, gradient, scratch, *sizes, *strides])
    return writer.finish((of_images, of_weight, of_bias))


def _prepare_pool(images: Tensor, size: Sequence[int], stride: Sequence[int] = (), *others: Any) -> Call | None:
    if list(size) != [2, 2] or list(stride) not in ([], [2, 2]) or others or not images.is_contiguous():
        return None
    number, channels, height, width = images.shape
    out, indices = (torch.empty(number, channels, height // 2, width // 2, dtype=t) for t in (None, torch.uint8))
    writer = _Writer()
    writer.add("pool", [out, indices], [images, number * channels, height, width])
    return writer.finish((out, indices))


def _prepare_unpool(gradient: Tensor, images: Tensor, *others: Any) -> Call | None:
    indices: Tensor = others[-1]
    if indices.dtype != torch.uint8:  # then torch pooled
        return None
    out = torch.empty_like(images)
    number, channels, height, width = images.shape
    writer = _Writer()
    writer.add("unpool", [out], [indices, gradient, number, channels, height, width, gradient.stride()])
    return writer.finish(out)


def _prepare_relu(values: Tensor) -> Call | None:
    if not _is_dense(values):
        return None
    out = torch.empty_like(values)
    writer = _Writer()
    writer.add("rectify", [out], [values, values.numel()])
    return writer.finish(out)


def _prepare_threshold_backward(gradient: Tensor, values: Tensor, threshold: float) -> Call | None:
    if threshold != 0 or not _is_dense(values) or gradient.stride() != values.stride():
        return None
    out = torch.empty_like(values)
    writer = _Writer()
    writer.add("rectify_gradient", [out], [gradient, values, values.numel()])
    return writer.finish(out)


def _prepare_mm(left: Tensor, right: Tensor) -> Call | None:
    return _prepare_product(None, left, right)


def _prepare_addmm(bias: Tensor, left: Tensor, right: Tensor) -> Call | None:
    return _prepare_product(bias, left, right) if bias.shape == right.shape[1:] and bias.is_contiguous() else None


def _prepare_product(bias: Tensor | None, left: Tensor, right: Tensor) -> Call | None:
    (rows, depth), columns = left.shape, right.shape[1]
    if rows * depth * columns > MOST_PRODUCTS:
        return None
    out = torch.empty(rows, columns)
    writer = _Writer()
    if right.stride(1) == 1:
        strides = [*left.stride(), right.stride(0)]
        writer.add("multiply", [out], [left, right, bias, rows, depth, columns, strides])
    elif right.stride(0) == 1 and left.stride(1) == 1:
        strides = [left.stride(0), right.stride(1)]
        writer.add("multiply_transposed", [out], [left, right, bias, rows, depth, columns, strides])
    else:
        return None
    return writer.finish(out)


def _prepare_sum(values: Tensor, dimensions: Sequence[int], keep: bool = False) -> Call | None:
    if list(dimensions) != [0] or values.ndim != 2 or not values.is_contiguous() or not keep:
        return None
    out = torch.empty(1, values.shape[1])
    writer = _Writer()
    writer.add("sum_rows", [out], [values, *values.shape])
    return writer.finish(out)


def _prepare_clone(values: Tensor, memory_format: Any = None) -> Call | None:
    if not values.is_contiguous():  # which a view of the result may need
        return None
    out = torch.empty_like(values)  # channels next to each other are a wish that the other kernels do not have
    writer = _Writer()
    writer.add("copy", [out], [values, values.numel() * values.element_size()])
    return writer.finish(out)


def _prepare_to_copy(values: Tensor, **options: Any) -> Call | None:
    if options != {"dtype": torch.float32} or values.dtype != torch.uint8 or not _is_dense(values):
        return None
    out = torch.empty_like(values, dtype=torch.float32)
    writer = _Writer()
    writer.add("convert", [out], [values, values.numel()])
    return writer.finish(out)


def _prepare_sub(values: Tensor, numbers: Tensor) -> Call | None:
    return _prepare_shift(values, numbers, False)


def _prepare_div(values: Tensor, numbers: Tensor) -> Call | None:
    return _prepare_shift(values, numbers, True)


def _prepare_shift(values: Tensor, numbers: Any, divide: bool) -> Call | None:
    if values.ndim != 4 or not isinstance(numbers, Tensor) or numbers.shape != (1, values.shape[1], 1, 1):
        return None
    if not values.is_contiguous() or numbers.stride(1) != 1:
        return None
    number, channels, height, width = values.shape
    out = torch.empty_like(values)
    writer = _Writer()
    writer.add("shift_channels", [out], [values, numbers, number, channels, height * width, divide])
    return writer.finish(out)


def _prepare_log_softmax(values: Tensor, dimension: int, to_float: bool) -> Call | None:
    if values.ndim != 2 or dimension != 1 or to_float or not values.is_contiguous():
        return None
    out = torch.empty_like(values)
    writer = _Writer()
    writer.add("log_softmax", [out], [values, *values.shape])
    return writer.finish(out)


def _prepare_log_softmax_backward(gradient: Tensor, values: Tensor, dimension: int, dtype: Any) -> Call | None:
    if values.ndim != 2 or dimension != 1 or not gradient.is_contiguous() or not values.is_contiguous():
        return None
    out = torch.empty_like(values)
    writer = _Writer()
    writer.add("log_softmax_gradient", [out], [gradient, values, *values.shape])
    return writer.finish(out)


MEAN, IGNORED = 1, -100
"""Of torch's losses: the reduction, and the label that is left out."""


def _prepare_nll_loss(values: Tensor, labels: Tensor, weight: Any, reduction: int, ignored: int) -> Call | None:
    if values.ndim != 2 or not values.is_contiguous() or not labels.is_contiguous() or weight is not None:
        return None
    if reduction != MEAN or ignored != IGNORED:
        return None
    loss, total = torch.empty(()), torch.empty(())
    writer = _Writer()
    writer.add("likelihood", [loss, total], [values, labels, *values.shape])
    return writer.finish((loss, total))


def _prepare_nll_loss_backward(
    gradient: Tensor, values: Tensor, labels: Tensor, weight: Any, reduction: int, ignored: int, total: Tensor
) -> Call | None:
    if _prepare_nll_loss(values, labels, weight, reduction, ignored) is None:
        return None
    out = torch.empty_like(values)
    writer = _Writer()
    writer.add("likelihood_gradient", [out], [gradient, labels, *values.shape])
    return writer.finish(out)


def _prepare_argmax(values: Tensor, dimension: int | None = None, keep: bool = False) -> Call | None:
    if values.ndim != 2 or dimension != 1 or keep or not values.is_contiguous():
        return None
    out = torch.empty(len(values), dtype=torch.int64)
    writer = _Writer()
    writer.add("find_largest", [out], [values, *values.shape])
    return writer.finish(out)


def _prepare_eq(left: Tensor, right: Any) -> Call | None:
    if not isinstance(right, Tensor) or left.shape != right.shape or not left.is_contiguous() & right.is_contiguous():
        return None
    out = torch.empty_like(left, dtype=torch.bool)
    writer = _Writer()
    writer.add("compare", [out], [left, right, left.numel()])
    return writer.finish(out)


def _prepare_count(values: Tensor) -> Call | None:
    if not values.is_contiguous():
        return None
    out = torch.empty((), dtype=torch.int64)
    writer = _Writer()
    writer.add("count", [out], [values, values.numel()])
    return writer.finish(out)


def _prepare_ones_like(values: Tensor, **options: Any) -> Call | None:
    if values.ndim != 0:
        return None
    return Call([], [], torch.ones_like(values), [])


_aten = torch.ops.aten
_FLOATS = (torch.float32,)
_PREPARE: dict[Any, tuple[Callable[..., Call | None], tuple[torch.dtype, ...]]] = {
    _aten.convolution.default: (_prepare_convolution, _FLOATS),
    _aten.convolution_backward.default: (_prepare_convolution_backward, _FLOATS),
    _aten.max_pool2d_with_indices.default: (_prepare_pool, _FLOATS),
    _aten.max_pool2d_with_indices_backward.default: (_prepare_unpool, (torch.float32, torch.uint8)),
    _aten.relu.default: (_prepare_relu, _FLOATS),
    _aten.threshold_backward.default: (_prepare_threshold_backward, _FLOATS),
    _aten.mm.default: (_prepare_mm, _FLOATS),
    _aten.addmm.default: (_prepare_addmm, _FLOATS),
    _aten.sum.dim_IntList: (_prepare_sum, _FLOATS),
    _aten.clone.default: (_prepare_clone, (torch.float32, torch.uint8)),
    _aten._to_copy.default: (_prepare_to_copy, (torch.uint8,)),
    _aten.sub.Tensor: (_prepare_sub, _FLOATS),
    _aten.div.Tensor: (_prepare_div, _FLOATS),
    _aten._log_softmax.default: (_prepare_log_softmax, _FLOATS),
    _aten._log_softmax_backward_data.default: (_prepare_log_softmax_backward, _FLOATS),
    _aten.nll_loss_forward.default: (_prepare_nll_loss, (torch.float32, torch.int64)),
    _aten.nll_loss_backward.default: (_prepare_nll_loss_backward, (torch.float32, torch.int64)),
    _aten.argmax.default: (_prepare_argmax, _FLOATS),
    _aten.eq.Tensor: (_prepare_eq, (torch.int64,)),
    _aten.ones_like.default: (_prepare_ones_like, _FLOATS),
    _aten.sum.default: (_prepare_count, (torch.bool,)),
}
