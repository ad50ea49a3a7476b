"""Operations of steps of many images, computed by kernels where torch is slow at them.

Pooling and normalisation are limited by memory, of which torch's own use more: indices of 8 bytes, sums in several
passes. The gradient of a convolution's weights on small images is a matrix product once the pixels around each pixel
stand side by side.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from image_classifier.training.determinism import get_instruction_set
from image_classifier.training.kernels import KERNELS, Run

MOST_UNFOLDED = 32
"""Pixels of an image up to which the gradient of a convolution's weights is computed as a matrix product. With AMX that
takes half the time of oneDNN's at 25 pixels, a seventh at 4, and as long at 49."""


class LargeSteps(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch ships it without types
    """While it is active, operations that kernels can take are computed by them."""

    def __init__(self, run: Run, num_threads: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # likewise
        self._run = run
        self._num_threads = num_threads
        self._unfolds = get_instruction_set() == "amx_bf16"

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or torch would import its compiler to leave this class out, which takes a second

    def __torch_dispatch__(
        self, called: Any, types: object, arguments: tuple[Any, ...] = (), options: dict[str, Any] | None = None
    ) -> Any:
        compute = _COMPUTE.get(called)
        if compute is not None and not options:
            result = compute(self, *arguments)
            if result is not None:
                return result
        return called(*arguments, **(options or {}))

    def _call(self, kernel: str, tensors: Sequence[Tensor | None], *numbers: int) -> None:
        """Run a kernel on the tensors' memory, followed by numbers and the number of threads.

        The first of the tensors that is read decides about the type of floats.
        """
        name = f"{kernel}_{'bf16' if any(t is not None and t.dtype == torch.bfloat16 for t in tensors) else 'float'}"
        words = [0 if tensor is None else tensor.data_ptr() for tensor in tensors] + [*numbers]
        array = (ctypes.c_int64 * (2 + len(words)))(KERNELS.index(name), len(words), *words)
        self._run(array, len(array))

    def _pool(self, images: Tensor, size: Sequence[int], stride: Sequence[int] = (), *others: Any) -> Any:
        if list(size) != [2, 2] or list(stride) not in ([], [2, 2]) or others or not _is_pixels(images):
            return None
        number, channels, height, width = images.shape
        out = torch.empty(
            (number, channels, height // 2, width // 2), dtype=images.dtype, memory_format=torch.channels_last
        )
        indices = torch.empty_like(out, dtype=torch.uint8)
        self._call("pool", [out, indices, images], number, height, width, channels, self._num_threads)
        return out, indices

    def _unpool(self, gradient: Tensor, images: Tensor, *others: Any) -> Any:
        indices: Tensor = others[-1]
        if indices.dtype != torch.uint8:  # then torch pooled
            return None
        number, channels, height, width = images.shape
        out = torch.empty_like(images)
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        self._call("unpool", [out, indices, gradient], number, height, width, channels, self._num_threads)
        return out

    def _gelu_backward(self, gradient: Tensor, values: Tensor) -> Any:
        if not _is_pixels(values) or not _is_pixels(gradient) or gradient.dtype != values.dtype:
            return None
        out = torch.empty_like(values)
        self._call("gelu_gradient", [out, gradient, values], values.numel(), self._num_threads)
        return out

    def _normalize(
        self,
        images: Tensor,
        weight: Tensor,
        bias: Tensor,
        running_mean: Tensor,
        running_variance: Tensor,
        is_training: bool,
        momentum: float,
        floor: float,
    ) -> Any:
        if not is_training or not _is_pixels(images) or weight is None or bias is None or running_mean is None:
            return None
        count = images.numel() // images.shape[1]
        total, squares = self._sum_channels(images, images, torch.zeros_like(running_mean))
        mean = total / count
        variance = (squares / count - mean * mean).clamp_(min=0)
        scale = (variance + floor).rsqrt()
        running_mean.mul_(1 - momentum).add_(mean.float(), alpha=momentum)
        running_variance.mul_(1 - momentum).add_((variance * (count / (count - 1))).float(), alpha=momentum)
        factors = scale * weight
        out = self._scale_channels(images, factors, bias - mean * factors)
        return out, mean.float(), scale.float()

    def _normalize_backward(
        self,
        gradient: Tensor,
        images: Tensor,
        weight: Tensor,
        running_mean: Tensor,
        running_variance: Tensor,
        mean: Tensor,
        scale: Tensor,
        is_training: bool,
        floor: float,
        mask: Sequence[bool],
    ) -> Any:
        if not is_training or not (_is_pixels(images) and _is_pixels(gradient)) or gradient.dtype != images.dtype:
            return None
        count = images.numel() // images.shape[1]
        total, products = self._sum_channels(gradient, images, mean)
        slope = -products * scale.double() ** 3 * weight / count
        factors = scale * weight
        summands = -(total / count) * factors - slope * mean
        of_images = self._scale_channels(gradient, factors, summands, images, slope) if mask[0] else None
        of_weight = (products * scale).float() if mask[1] else None
        return of_images, of_weight, total.float() if mask[2] else None

    def _sum_channels(self, left: Tensor, right: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
        """Sum values, and their products with others less their mean, over all pixels: float64 [C] each."""
        channels = left.shape[1]
        sums = torch.empty(self._num_threads, 2, channels, dtype=torch.float64)
        scratch = torch.empty(sums.shape)
        pixels = left.numel() // channels
        self._call("sum_channels", [sums, left, right, scratch, mean], pixels, channels, self._num_threads)
        total, products = sums.sum(dim=0)
        return total, products

    def _scale_channels(
        self, images: Tensor, factors: Tensor, summands: Tensor, others: Tensor | None = None, slope: Any = None
    ) -> Tensor:
        """Multiply each channel by a factor, add other images' by another one, and add a number."""
        out = torch.empty_like(images)
        numbers = [None if each is None else each.float() for each in (factors, summands, slope)]
        channels = images.shape[1]
        pixels = images.numel() // channels
        addresses = [0 if each is None else each.data_ptr() for each in (others, numbers[2])]
        self._call("scale_channels", [out, images, *numbers[:2]], pixels, channels, self._num_threads, *addresses)
        return out

    def _convolve_backward(
        self, gradient: Tensor, images: Tensor, weight: Tensor, bias_sizes: Any, *others: Any
    ) -> Any:
        stride, padding, dilation, transposed, _, groups, mask = others
        taps, pixels = weight.shape[2], gradient.shape[2] * gradient.shape[3]
        if (
            not self._unfolds
            or pixels > MOST_UNFOLDED
            or taps == 1
            or weight.shape[3] != taps
            or list(mask[1:]) != [True, False]
        ):
            return None
        if list(stride) != [1, 1] or list(dilation) != [1, 1] or transposed or groups != 1 or padding[0] != padding[1]:
            return None
        if not (_is_pixels(gradient) and _is_pixels(images)) or images.dtype != torch.bfloat16:
            return None
        of_images = None
        if mask[0]:
            convolve_backward = torch.ops.aten.convolution_backward.default
            of_images = convolve_backward(gradient, images, weight, bias_sizes, *others[:-1], [True, False, False])[0]
        number, channels, height, width = images.shape
        outputs = weight.shape[0]
        unfolded = torch.empty(number * pixels, taps * taps * channels, dtype=images.dtype)
        sizes = [number, height, width, channels, taps, padding[0], self._num_threads]
        self._call("unfold", [unfolded, images], *sizes)
        rows = gradient.permute(0, 2, 3, 1).reshape(-1, outputs)
        of_weight = (rows.T @ unfolded).view(outputs, taps, taps, channels).permute(0, 3, 1, 2)
        return of_images, of_weight, None


def _is_pixels(values: Tensor) -> bool:
    """Say whether the channels of each pixel stand next to each other, in a type that the kernels know."""
    return (
        values.ndim == 4
        and values.is_contiguous(memory_format=torch.channels_last)
        and values.dtype in (torch.bfloat16, torch.float32)
        and values.device.type == "cpu"
    )


_aten = torch.ops.aten
_COMPUTE: dict[Any, Callable[..., Any]] = {
    _aten.max_pool2d_with_indices.default: LargeSteps._pool,
    _aten.max_pool2d_with_indices_backward.default: LargeSteps._unpool,
    _aten.gelu_backward.default: LargeSteps._gelu_backward,
    _aten.native_batch_norm.default: LargeSteps._normalize,
    _aten.native_batch_norm_backward.default: LargeSteps._normalize_backward,
    _aten.convolution_backward.default: LargeSteps._convolve_backward,
}
