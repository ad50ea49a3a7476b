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

from image_classifier.kernels.library import Arguments, Kernels

MOST_PRODUCTS = 8_000_000
"""Of one convolution or product of matrices that the kernels take: with more, torch's libraries, which look longer for
the best way, are faster."""


@dataclass(frozen=True)
class KernelCall:
    """A call of a kernel.

    Attributes:
        inputs: what is read, by the field of the arguments that has its address.
    """

    kernel: str
    arguments: Arguments
    inputs: dict[str, Tensor]


@dataclass(frozen=True)
class Call:
    """Calls of kernels that take the place of one operation of torch.

    Attributes:
        result: what torch's operation would give; its memory is written to by every repetition.
        scratch: memory that the calls need.
    """

    kernels: list[KernelCall]
    result: Any
    scratch: list[Tensor]


class _Writer:
    """Writes down calls of kernels."""

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels
        self._calls: list[KernelCall] = []
        self._scratch: list[Tensor] = []

    def add(self, kernel: str, outputs: Mapping[str, Tensor | None], /, **values: Any) -> None:
        """Add a kernel's call; an output's address does not change, an input's may, and None is 0.

        Args:
            values: tensors that are read, numbers, and sequences of numbers, by field; not `scratch`.
        """
        inputs = {name: value for name, value in values.items() if isinstance(value, Tensor)}
        needs_scratch = {"scratch": 0} if kernel in WITH_SCRATCH else {}
        arguments = self._kernels.prepare(
            kernel, **needs_scratch, **{name: _get_number(value) for name, value in {**outputs, **values}.items()}
        )
        if needs_scratch:
            self._scratch.append(torch.empty(self._kernels.count_scratch(kernel, arguments), dtype=torch.uint8))
            arguments.scratch = self._scratch[-1].data_ptr()
        self._calls.append(KernelCall(kernel, arguments, inputs))

    def finish(self, result: Any) -> Call:
        return Call(self._calls, result, self._scratch)


WITH_SCRATCH = ("convolve", "convolve_filter_gradient")


def _get_number(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.data_ptr()
    return tuple(value) if isinstance(value, (tuple, list)) else value or 0


def prepare_call(kernels: Kernels, called: Any, arguments: Sequence[Any], options: Mapping[str, Any]) -> Call | None:
    """Find kernels for an operation with these arguments; None if it stays torch's.

    Args:
        called: an operation of ATen.
    """
    prepare, dtypes = PREPARE.get(called, (None, ()))
    tensors = [each for each in arguments if isinstance(each, Tensor)]
    if prepare is None or any(each.device.type != "cpu" or each.dtype not in dtypes for each in tensors):
        return None
    return prepare(_Writer(kernels), *arguments, **options)


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
    writer: _Writer,
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
    out = _add_convolution(writer, images, weight, bias, padding[0], weight.stride(), 0)
    return writer.finish(out)


def _add_convolution(
    writer: _Writer,
    images: Tensor,
    filters: Tensor,
    bias: Tensor | None,
    padding: int,
    strides: Sequence[int],
    first_weight: int,
) -> Tensor:
    """Add a convolution with the filters [O, C, K, K] that begin at a weight and have these strides."""
    num_images, channels, height, width = images.shape
    taps = filters.shape[2]
    outputs = filters.numel() // (channels * taps**2)
    out = torch.empty(num_images, outputs, height + 2 * padding - taps + 1, width + 2 * padding - taps + 1)
    writer.add(
        "convolve",
        {"out": out},
        **{"images": images, "filters": filters, "bias": bias},
        **{"num_images": num_images, "channels": channels, "height": height, "width": width, "outputs": outputs},
        **{"taps": taps, "padding": padding, "first_weight": first_weight},
        **{"image_strides": images.stride(), "filter_strides": strides},
    )
    return out


def _prepare_convolution_backward(
    writer: _Writer,
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
    of_images = of_weight = of_bias = None
    if mask[0]:  # the same with inputs and outputs exchanged, and the filters mirrored
        o, c, y, x = weight.stride()
        offset = (taps - 1) * (y + x)
        of_images = _add_convolution(writer, gradient, weight, None, taps - 1 - padding[0], [c, o, -y, -x], offset)
    if mask[1] or mask[2]:
        num_images, channels, height, width = images.shape
        outputs = weight.shape[0]
        of_weight = torch.empty_like(weight) if mask[1] else None
        of_bias = torch.empty(outputs) if mask[2] else None
        writer.add(
            "convolve_filter_gradient",
            {"of_filters": of_weight, "of_bias": of_bias},
            **{"images": images, "gradient": gradient},
            **{"num_images": num_images, "channels": channels, "height": height, "width": width, "outputs": outputs},
            **{"taps": taps, "padding": padding[0], "image_strides": images.stride()},
            **{"gradient_strides": gradient.stride(), "filter_strides": weight.stride()},
        )
    return writer.finish((of_images, of_weight, of_bias))


def _prepare_pool(
    writer: _Writer, images: Tensor, size: Sequence[int], stride: Sequence[int] = (), *others: Any
) -> Call | None:
    if list(size) != [2, 2] or list(stride) not in ([], [2, 2]) or others or not images.is_contiguous():
        return None
    number, channels, height, width = images.shape
    out, indices = (torch.empty(number, channels, height // 2, width // 2, dtype=t) for t in (None, torch.uint8))
    outputs = {"out": out, "indices": indices}
    writer.add("pool_planes", outputs, images=images, num_planes=number * channels, height=height, width=width)
    return writer.finish((out, indices))


def _prepare_unpool(writer: _Writer, gradient: Tensor, images: Tensor, *others: Any) -> Call | None:
    indices: Tensor = others[-1]
    if indices.dtype != torch.uint8:  # then torch pooled
        return None
    out = torch.empty_like(images)
    number, channels, height, width = images.shape
    sizes = {"num_images": number, "channels": channels, "height": height, "width": width}
    strides = gradient.stride()
    writer.add(
        "pool_planes_gradient",
        {"out": out},
        **{"indices": indices, "gradient": gradient, **sizes, "gradient_strides": strides},
    )
    return writer.finish(out)


def _prepare_relu(writer: _Writer, values: Tensor) -> Call | None:
    if not _is_dense(values):
        return None
    out = torch.empty_like(values)
    writer.add("relu", {"out": out}, values=values, count=values.numel())
    return writer.finish(out)


def _prepare_threshold_backward(writer: _Writer, gradient: Tensor, values: Tensor, threshold: float) -> Call | None:
    if threshold != 0 or not _is_dense(values) or gradient.stride() != values.stride():
        return None
    out = torch.empty_like(values)
    writer.add("relu_gradient", {"out": out}, gradient=gradient, values=values, count=values.numel())
    return writer.finish(out)


def _prepare_mm(writer: _Writer, left: Tensor, right: Tensor) -> Call | None:
    return _prepare_product(writer, None, left, right)


def _prepare_addmm(writer: _Writer, bias: Tensor, left: Tensor, right: Tensor) -> Call | None:
    return (
        _prepare_product(writer, bias, left, right) if bias.shape == right.shape[1:] and bias.is_contiguous() else None
    )


def _prepare_product(writer: _Writer, bias: Tensor | None, left: Tensor, right: Tensor) -> Call | None:
    (rows, depth), columns = left.shape, right.shape[1]
    if rows * depth * columns > MOST_PRODUCTS:
        return None
    out = torch.empty(rows, columns)
    sides = {"left": left, "right": right, "bias": bias}
    sizes = {"rows": rows, "depth": depth, "columns": columns}
    if right.stride(1) == 1:
        left_row, left_column = left.stride()
        strides = {"left_row": left_row, "left_column": left_column, "right_row": right.stride(0)}
        writer.add("matmul", {"out": out}, **sides, **sizes, **strides)
    elif right.stride(0) == 1 and left.stride(1) == 1:
        strides = {"left_row": left.stride(0), "right_column": right.stride(1)}
        writer.add("matmul_transposed", {"out": out}, **sides, **sizes, **strides)
    else:
        return None
    return writer.finish(out)


def _prepare_sum(writer: _Writer, values: Tensor, dimensions: Sequence[int], keep: bool = False) -> Call | None:
    if list(dimensions) != [0] or values.ndim != 2 or not values.is_contiguous() or not keep:
        return None
    out = torch.empty(1, values.shape[1])
    writer.add("sum_rows", {"out": out}, values=values, rows=len(values), columns=values.shape[1])
    return writer.finish(out)


def _prepare_clone(writer: _Writer, values: Tensor, memory_format: Any = None) -> Call | None:
    if not values.is_contiguous():  # which a view of the result may need
        return None
    out = torch.empty_like(values)  # channels next to each other are a wish that the other kernels do not have
    writer.add("copy", {"out": out}, values=values, num_bytes=values.numel() * values.element_size())
    return writer.finish(out)


def _prepare_to_copy(writer: _Writer, values: Tensor, **options: Any) -> Call | None:
    if options != {"dtype": torch.float32} or values.dtype != torch.uint8 or not _is_dense(values):
        return None
    out = torch.empty_like(values, dtype=torch.float32)
    writer.add("convert_bytes", {"out": out}, values=values, count=values.numel())
    return writer.finish(out)


def _prepare_sub(writer: _Writer, values: Tensor, numbers: Tensor) -> Call | None:
    return _prepare_shift(writer, values, numbers, False)


def _prepare_div(writer: _Writer, values: Tensor, numbers: Tensor) -> Call | None:
    return _prepare_shift(writer, values, numbers, True)


def _prepare_shift(writer: _Writer, values: Tensor, numbers: Any, divide: bool) -> Call | None:
    if values.ndim != 4 or not isinstance(numbers, Tensor) or numbers.shape != (1, values.shape[1], 1, 1):
        return None
    if not values.is_contiguous() or numbers.stride(1) != 1:
        return None
    number, channels, height, width = values.shape
    out = torch.empty_like(values)
    sizes = {"num_images": number, "channels": channels, "num_pixels": height * width}
    writer.add("shift_channels", {"out": out}, values=values, numbers=numbers, **sizes, divides=divide)
    return writer.finish(out)


def _prepare_log_softmax(writer: _Writer, values: Tensor, dimension: int, to_float: bool) -> Call | None:
    if values.ndim != 2 or dimension != 1 or to_float or not values.is_contiguous():
        return None
    out = torch.empty_like(values)
    writer.add("log_softmax", {"out": out}, values=values, rows=len(values), columns=values.shape[1])
    return writer.finish(out)


def _prepare_log_softmax_backward(
    writer: _Writer, gradient: Tensor, values: Tensor, dimension: int, dtype: Any
) -> Call | None:
    if values.ndim != 2 or dimension != 1 or not gradient.is_contiguous() or not values.is_contiguous():
        return None
    out = torch.empty_like(values)
    sizes = {"rows": len(values), "columns": values.shape[1]}
    writer.add("log_softmax_gradient", {"out": out}, gradient=gradient, values=values, **sizes)
    return writer.finish(out)


MEAN, IGNORED = 1, -100
"""Of torch's losses: the reduction, and the label that is left out."""


def _is_loss(values: Tensor, labels: Tensor, weight: Any, reduction: int, ignored: int) -> bool:
    is_plain = values.ndim == 2 and values.is_contiguous() and labels.is_contiguous() and weight is None
    return is_plain and reduction == MEAN and ignored == IGNORED


def _prepare_nll_loss(
    writer: _Writer, values: Tensor, labels: Tensor, weight: Any, reduction: int, ignored: int
) -> Call | None:
    if not _is_loss(values, labels, weight, reduction, ignored):
        return None
    loss, total = torch.empty(()), torch.empty(())
    sizes = {"rows": len(values), "columns": values.shape[1]}
    writer.add("nll_loss", {"loss": loss, "total": total}, values=values, labels=labels, **sizes)
    return writer.finish((loss, total))


def _prepare_nll_loss_backward(
    writer: _Writer,
    gradient: Tensor,
    values: Tensor,
    labels: Tensor,
    weight: Any,
    reduction: int,
    ignored: int,
    total: Tensor,
) -> Call | None:
    if not _is_loss(values, labels, weight, reduction, ignored):
        return None
    out = torch.empty_like(values)
    sizes = {"rows": len(values), "columns": values.shape[1]}
    writer.add("nll_loss_gradient", {"out": out}, gradient=gradient, labels=labels, **sizes)
    return writer.finish(out)


def _prepare_argmax(writer: _Writer, values: Tensor, dimension: int | None = None, keep: bool = False) -> Call | None:
    if values.ndim != 2 or dimension != 1 or keep or not values.is_contiguous():
        return None
    out = torch.empty(len(values), dtype=torch.int64)
    writer.add("argmax", {"out": out}, values=values, rows=len(values), columns=values.shape[1])
    return writer.finish(out)


def _prepare_eq(writer: _Writer, left: Tensor, right: Any) -> Call | None:
    if not isinstance(right, Tensor) or left.shape != right.shape or not left.is_contiguous() & right.is_contiguous():
        return None
    out = torch.empty_like(left, dtype=torch.bool)
    writer.add("equal", {"out": out}, left=left, right=right, count=left.numel())
    return writer.finish(out)


def _prepare_count(writer: _Writer, values: Tensor) -> Call | None:
    if not values.is_contiguous():
        return None
    out = torch.empty((), dtype=torch.int64)
    writer.add("count_true", {"out": out}, values=values, count=values.numel())
    return writer.finish(out)


def _prepare_ones_like(writer: _Writer, values: Tensor, **options: Any) -> Call | None:
    return Call([], torch.ones_like(values, **options), []) if values.ndim == 0 else None


_aten = torch.ops.aten
_FLOATS = (torch.float32,)
PREPARE: dict[Any, tuple[Callable[..., Call | None], tuple[torch.dtype, ...]]] = {
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
"""What prepares the kernels for an operation of torch, as long as its tensors are of these types."""
