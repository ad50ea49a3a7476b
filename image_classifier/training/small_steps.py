"""Maps ATen operators to fp32 kernels for small batches.

There, most of the time of an operation of torch goes into finding out what to do. A call of a kernel is prepared once,
with its addresses, and repeated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from image_classifier.training.steps import Steps, have_same_order, takes

MOST_PRODUCTS = 8_000_000
"""Of one convolution or product of matrices that the kernels take: with more, torch's libraries, which look longer for
the best way, are faster."""


class SmallSteps(Steps):
    """Computes operations on images as planes."""

    def compute(self, called: Any, arguments: Any, options: Mapping[str, Any]) -> Any:
        return compute_small(self, called, arguments, options)


def compute_small(steps: Steps, called: Any, arguments: Any, options: Mapping[str, Any]) -> Any:
    """Compute an operation of ATen on images as planes; None if these kernels do not take it."""
    compute, dtypes = COMPUTE.get(called, (None, ()))
    tensors = [each for each in arguments if isinstance(each, Tensor)]
    if compute is None or any(each.device.type != "cpu" or each.dtype not in dtypes for each in tensors):
        return None
    return compute(steps, *arguments, **options) if takes(compute, (steps, *arguments), options) else None


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


def _compute_convolution(
    steps: Steps,
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Any:
    if not _is_plain(stride, padding, dilation, transposed) or groups != 1 or _get_taps(weight) is None:
        return None
    if _count_products(images, weight) > MOST_PRODUCTS:
        return None
    out = _add_convolution(steps, images, weight, bias, padding[0], weight.stride(), 0)
    return out


def _add_convolution(
    steps: Steps,
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
    out = steps.make(torch.empty, num_images, outputs, height + 2 * padding - taps + 1, width + 2 * padding - taps + 1)
    steps.call(
        "convolve",
        {"out": out},
        **{"images": images, "filters": filters, "bias": bias},
        **{"num_images": num_images, "channels": channels, "height": height, "width": width, "outputs": outputs},
        **{"taps": taps, "padding": padding, "first_weight": first_weight},
        **{"image_strides": images.stride(), "filter_strides": strides},
    )
    return out


def _compute_convolution_backward(
    steps: Steps,
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
) -> Any:
    taps = _get_taps(weight)
    if not _is_plain(stride, padding, dilation, transposed) or groups != 1 or taps is None or padding[0] >= taps:
        return None
    if _count_products(images, weight) > MOST_PRODUCTS:
        return None
    of_images = of_weight = of_bias = None
    if mask[0]:  # the same with inputs and outputs exchanged, and the filters mirrored
        o, c, y, x = weight.stride()
        offset = (taps - 1) * (y + x)
        of_images = _add_convolution(steps, gradient, weight, None, taps - 1 - padding[0], [c, o, -y, -x], offset)
    if mask[1] or mask[2]:
        num_images, channels, height, width = images.shape
        outputs = weight.shape[0]
        of_weight = steps.make(torch.empty_like, weight) if mask[1] else None
        of_bias = steps.make(torch.empty, outputs) if mask[2] else None
        steps.call(
            "convolve_filter_gradient",
            {"of_filters": of_weight, "of_bias": of_bias},
            **{"images": images, "gradient": gradient},
            **{"num_images": num_images, "channels": channels, "height": height, "width": width, "outputs": outputs},
            **{"taps": taps, "padding": padding[0], "image_strides": images.stride()},
            **{"gradient_strides": gradient.stride(), "filter_strides": weight.stride()},
        )
    return of_images, of_weight, of_bias


def _compute_pool(steps: Steps, images: Tensor, size: Sequence[int], stride: Sequence[int] = (), *others: Any) -> Any:
    if list(size) != [2, 2] or list(stride) not in ([], [2, 2]) or others or not images.is_contiguous():
        return None
    number, channels, height, width = images.shape
    out, indices = (
        steps.make(torch.empty, number, channels, height // 2, width // 2, dtype=t) for t in (None, torch.uint8)
    )
    outputs = {"out": out, "indices": indices}
    steps.call("pool_planes", outputs, images=images, num_planes=number * channels, height=height, width=width)
    return out, indices


def _compute_unpool(steps: Steps, gradient: Tensor, images: Tensor, *others: Any) -> Any:
    indices: Tensor = others[-1]
    if indices.dtype != torch.uint8 or not (images.is_contiguous() and indices.is_contiguous()):  # another pooled
        return None
    out = steps.make(torch.empty_like, images)
    number, channels, height, width = images.shape
    sizes = {"num_images": number, "channels": channels, "height": height, "width": width}
    strides = gradient.stride()
    steps.call(
        "pool_planes_gradient",
        {"out": out},
        **{"indices": indices, "gradient": gradient, **sizes, "gradient_strides": strides},
    )
    return out


def _compute_relu(steps: Steps, values: Tensor) -> Any:
    if not _is_dense(values):
        return None
    out = steps.make(torch.empty_like, values)
    steps.call("relu", {"out": out}, values=values, count=values.numel())
    return out


def _compute_threshold_backward(steps: Steps, gradient: Tensor, values: Tensor, threshold: float) -> Any:
    if threshold != 0 or not _is_dense(values) or not have_same_order(gradient, values):
        return None
    out = steps.make(torch.empty_like, values)
    steps.call("relu_gradient", {"out": out}, gradient=gradient, values=values, count=values.numel())
    return out


def _compute_mm(steps: Steps, left: Tensor, right: Tensor) -> Any:
    return _compute_product(steps, None, left, right)


def _compute_addmm(steps: Steps, bias: Tensor, left: Tensor, right: Tensor) -> Any:
    return (
        _compute_product(steps, bias, left, right) if bias.shape == right.shape[1:] and bias.is_contiguous() else None
    )


def _compute_product(steps: Steps, bias: Tensor | None, left: Tensor, right: Tensor) -> Any:
    (rows, depth), columns = left.shape, right.shape[1]
    if rows * depth * columns > MOST_PRODUCTS:
        return None
    out = steps.make(torch.empty, rows, columns)
    sides = {"left": left, "right": right, "bias": bias}
    sizes = {"rows": rows, "depth": depth, "columns": columns}
    if right.stride(1) == 1:
        left_row, left_column = left.stride()
        strides = {"left_row": left_row, "left_column": left_column, "right_row": right.stride(0)}
        steps.call("matmul", {"out": out}, **sides, **sizes, **strides)
    elif right.stride(0) == 1 and left.stride(1) == 1:
        strides = {"left_row": left.stride(0), "right_column": right.stride(1)}
        steps.call("matmul_transposed", {"out": out}, **sides, **sizes, **strides)
    else:
        return None
    return out


def _compute_sum(steps: Steps, values: Tensor, dimensions: Sequence[int], keep: bool = False) -> Any:
    if list(dimensions) != [0] or values.ndim != 2 or not values.is_contiguous() or not keep:
        return None
    out = steps.make(torch.empty, 1, values.shape[1])
    steps.call("sum_rows", {"out": out}, values=values, rows=len(values), columns=values.shape[1])
    return out


def _compute_clone(steps: Steps, values: Tensor, memory_format: Any = None) -> Any:
    if not values.is_contiguous():  # which a view of the result may need
        return None
    out = steps.make(
        torch.empty_like, values
    )  # channels next to each other are a wish that the other kernels do not have
    steps.call("copy", {"out": out}, values=values, num_bytes=values.numel() * values.element_size())
    return out


def _compute_to_copy(steps: Steps, values: Tensor, **options: Any) -> Any:
    if options != {"dtype": torch.float32} or values.dtype != torch.uint8 or not _is_dense(values):
        return None
    out = steps.make(torch.empty_like, values, dtype=torch.float32)
    steps.call("convert_bytes", {"out": out}, values=values, count=values.numel())
    return out


def _compute_sub(steps: Steps, values: Tensor, numbers: Tensor) -> Any:
    return _compute_shift(steps, values, numbers, False)


def _compute_div(steps: Steps, values: Tensor, numbers: Tensor) -> Any:
    return _compute_shift(steps, values, numbers, True)


def _compute_shift(steps: Steps, values: Tensor, numbers: Any, divide: bool) -> Any:
    if values.ndim != 4 or not isinstance(numbers, Tensor) or numbers.shape != (1, values.shape[1], 1, 1):
        return None
    if not values.is_contiguous() or numbers.stride(1) != 1:
        return None
    number, channels, height, width = values.shape
    out = steps.make(torch.empty_like, values)
    sizes = {"num_images": number, "channels": channels, "num_pixels": height * width}
    steps.call("shift_channels", {"out": out}, values=values, numbers=numbers, **sizes, divides=divide)
    return out


def _compute_log_softmax(steps: Steps, values: Tensor, dimension: int, to_float: bool) -> Any:
    if values.ndim != 2 or dimension != 1 or to_float or not values.is_contiguous():
        return None
    out = steps.make(torch.empty_like, values)
    steps.call("log_softmax", {"out": out}, values=values, rows=len(values), columns=values.shape[1])
    return out


def _compute_log_softmax_backward(steps: Steps, gradient: Tensor, values: Tensor, dimension: int, dtype: Any) -> Any:
    if values.ndim != 2 or dimension != 1 or not gradient.is_contiguous() or not values.is_contiguous():
        return None
    out = steps.make(torch.empty_like, values)
    sizes = {"rows": len(values), "columns": values.shape[1]}
    steps.call("log_softmax_gradient", {"out": out}, gradient=gradient, values=values, **sizes)
    return out


MEAN, IGNORED = 1, -100
"""Of torch's losses: the reduction, and the label that is left out."""


def _is_loss(values: Tensor, labels: Tensor, weight: Any, reduction: int, ignored: int) -> bool:
    is_plain = values.ndim == 2 and values.is_contiguous() and labels.is_contiguous() and weight is None
    return is_plain and reduction == MEAN and ignored == IGNORED


def _compute_nll_loss(steps: Steps, values: Tensor, labels: Tensor, weight: Any, reduction: int, ignored: int) -> Any:
    if not _is_loss(values, labels, weight, reduction, ignored):
        return None
    loss, total = steps.make(torch.empty, ()), steps.make(torch.empty, ())
    sizes = {"rows": len(values), "columns": values.shape[1]}
    steps.call("nll_loss", {"loss": loss, "total": total}, values=values, labels=labels, **sizes)
    return loss, total


def _compute_nll_loss_backward(
    steps: Steps,
    gradient: Tensor,
    values: Tensor,
    labels: Tensor,
    weight: Any,
    reduction: int,
    ignored: int,
    total: Tensor,
) -> Any:
    if not _is_loss(values, labels, weight, reduction, ignored):
        return None
    out = steps.make(torch.empty_like, values)
    sizes = {"rows": len(values), "columns": values.shape[1]}
    steps.call("nll_loss_gradient", {"out": out}, gradient=gradient, labels=labels, **sizes)
    return out


def _compute_argmax(steps: Steps, values: Tensor, dimension: int | None = None, keep: bool = False) -> Any:
    if values.ndim != 2 or dimension != 1 or keep or not values.is_contiguous():
        return None
    out = steps.make(torch.empty, len(values), dtype=torch.int64)
    steps.call("argmax", {"out": out}, values=values, rows=len(values), columns=values.shape[1])
    return out


def _compute_eq(steps: Steps, left: Tensor, right: Any) -> Any:
    if not isinstance(right, Tensor) or left.shape != right.shape or not left.is_contiguous() & right.is_contiguous():
        return None
    out = steps.make(torch.empty_like, left, dtype=torch.bool)
    steps.call("equal", {"out": out}, left=left, right=right, count=left.numel())
    return out


def _compute_count(steps: Steps, values: Tensor) -> Any:
    if not values.is_contiguous():
        return None
    out = steps.make(torch.empty, (), dtype=torch.int64)
    steps.call("count_true", {"out": out}, values=values, count=values.numel())
    return out


def _compute_ones_like(steps: Steps, values: Tensor, **options: Any) -> Any:
    return steps.make(torch.ones_like, values, **options) if values.ndim == 0 else None


_aten = torch.ops.aten
_FLOATS = (torch.float32,)
COMPUTE: dict[Any, tuple[Callable[..., Any], tuple[torch.dtype, ...]]] = {
    _aten.convolution.default: (_compute_convolution, _FLOATS),
    _aten.convolution_backward.default: (_compute_convolution_backward, _FLOATS),
    _aten.max_pool2d_with_indices.default: (_compute_pool, _FLOATS),
    _aten.max_pool2d_with_indices_backward.default: (_compute_unpool, (torch.float32, torch.uint8)),
    _aten.relu.default: (_compute_relu, _FLOATS),
    _aten.threshold_backward.default: (_compute_threshold_backward, _FLOATS),
    _aten.mm.default: (_compute_mm, _FLOATS),
    _aten.addmm.default: (_compute_addmm, _FLOATS),
    _aten.sum.dim_IntList: (_compute_sum, _FLOATS),
    _aten.clone.default: (_compute_clone, (torch.float32, torch.uint8)),
    _aten._to_copy.default: (_compute_to_copy, (torch.uint8,)),
    _aten.sub.Tensor: (_compute_sub, _FLOATS),
    _aten.div.Tensor: (_compute_div, _FLOATS),
    _aten._log_softmax.default: (_compute_log_softmax, _FLOATS),
    _aten._log_softmax_backward_data.default: (_compute_log_softmax_backward, _FLOATS),
    _aten.nll_loss_forward.default: (_compute_nll_loss, (torch.float32, torch.int64)),
    _aten.nll_loss_backward.default: (_compute_nll_loss_backward, (torch.float32, torch.int64)),
    _aten.argmax.default: (_compute_argmax, _FLOATS),
    _aten.eq.Tensor: (_compute_eq, (torch.int64,)),
    _aten.ones_like.default: (_compute_ones_like, _FLOATS),
    _aten.sum.default: (_compute_count, (torch.bool,)),
}
"""What computes an operation of torch, as long as its tensors are of these types."""
