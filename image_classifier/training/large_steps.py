"""Operations of steps of many images, computed by kernels where torch is slow at them.

Pooling and normalisation are limited by memory, of which torch's own use more: indices of 8 bytes, sums in several
passes. Convolutions by 3x3 pixels take a third of the products by Winograd's algorithm; in floats of 32 bits that is
nearly as exact, in 16 bits results are off by about a hundredth of their root mean square. With AMX, where products are
cheap, oneDNN computes them, but for the gradient of a convolution's weights, which takes it four times as long.
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

TILE = 4
"""Pixels of results in each direction that `kernels_winograd.h` computes together."""

POINTS = 36
"""Products that they take for each pair of channels."""

MOST_LANES = 16
"""Floats of the largest vectors."""

FEWEST_CHANNELS, FEWEST_TILES = 8, 256
"""From which on the tiles' products take less than finding their factors."""


class LargeSteps(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch ships it without types
    """While it is active, operations that kernels can take are computed by them."""

    def __init__(self, run: Run, num_threads: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # likewise
        self._run = run
        self._num_threads = num_threads
        self._has_amx = get_instruction_set() == "amx_bf16" and torch.cpu._init_amx()
        self._tiled = _TILED.get(get_instruction_set(), ())

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

    def _gelu(self, values: Tensor) -> Any:
        if not _is_pixels(values) or values.dtype != torch.bfloat16:
            return None
        out = torch.empty_like(values)
        self._call("gelu", [out, values], values.numel(), self._num_threads)
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
        shift = images[0, :, 0, 0].float()  # near the mean, so that little is lost where the values hardly vary
        total, products = self._sum_channels(images, images, shift)
        mean = total / count
        variance = (products / count - mean * (mean - shift)).clamp_(min=0)
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

    def _convolve(self, images: Tensor, weight: Tensor, bias: Tensor | None, *others: Any) -> Any:
        if bias is not None or not self._can_tile(images, weight, others):
            return None
        return self._convolve_tiles(images, weight.permute(2, 3, 1, 0))

    def _convolve_tiles(self, images: Tensor, filters: Tensor) -> Tensor:
        """Convolve with filters [3, 3, C, O]."""
        number, channels, height, width = images.shape
        outputs = filters.shape[3]
        at_points = torch.empty(POINTS, channels, outputs + -outputs % MOST_LANES, dtype=images.dtype)
        self._call("transform_filters", [at_points, filters.float().contiguous()], channels, outputs, self._num_threads)
        out = torch.empty((number, outputs, height, width), dtype=images.dtype, memory_format=torch.channels_last)
        sizes = number, height, width, channels, outputs, self._num_threads
        self._call_with_memory("convolve_tiles", [out, images, at_points], *sizes, threads=self._num_threads)
        return out

    def _correlate_tiles(self, gradient: Tensor, images: Tensor) -> Tensor:
        """Compute the gradient of filters: float32 [3, 3, C, O]."""
        number, channels, height, width = images.shape
        outputs = gradient.shape[1]
        out = torch.empty(3, 3, channels, outputs)
        sizes = number, height, width, channels, outputs, self._num_threads
        self._call_with_memory("correlate_tiles", [out, gradient, images], *sizes, threads=self._num_threads)
        return out

    def _call_with_memory(self, kernel: str, tensors: Sequence[Tensor], *sizes: int, threads: int) -> None:
        """Run a kernel that says, when it is given no memory, how much each thread needs."""
        needed = torch.empty(1, dtype=torch.int64)
        self._call(kernel, [needed, *tensors[1:], None], *sizes)
        memory = torch.empty(threads, int(needed), dtype=torch.uint8)
        self._call(kernel, [*tensors, memory], *sizes)

    def _can_tile(self, images: Tensor, weight: Tensor, others: Sequence[Any]) -> bool:
        stride, padding, dilation, transposed, _, groups = others
        number, channels, height, width = images.shape
        tiles = -(-height // TILE) * -(-width // TILE)
        return bool(
            images.dtype in self._tiled
            and _is_pixels(images)
            and list(weight.shape[2:]) == [3, 3]
            and channels % 2 == weight.shape[0] % 2 == 0  # two share a word
            and min(channels, weight.shape[0]) >= FEWEST_CHANNELS
            and number * tiles >= FEWEST_TILES
            and tiles * POINTS < height * width * 9
            and list(stride) == list(padding) == list(dilation) == [1, 1]
            and not transposed
            and groups == 1
        )

    def _convolve_backward(
        self, gradient: Tensor, images: Tensor, weight: Tensor, bias_sizes: Any, *others: Any
    ) -> Any:
        mask: Sequence[bool] = others[-1]
        if not mask[2] and self._can_tile(images, weight, others[:-1]) and _is_pixels(gradient):
            of_images = of_weight = None
            if mask[0]:
                of_images = self._convolve_tiles(gradient, weight.flip(2, 3).permute(2, 3, 0, 1))
            if mask[1]:
                found = self._correlate_tiles(gradient, images).permute(3, 2, 0, 1)
                of_weight = found.to(weight.dtype, memory_format=torch.channels_last)
            return of_images, of_weight, None
        if not self._can_correlate(gradient, images, weight, others):
            return None
        convolve_backward = torch.ops.aten.convolution_backward.default
        rest = gradient, images, weight, bias_sizes, *others[:-1]
        of_images, _, of_bias = convolve_backward(*rest, [mask[0], False, mask[2]])
        number, channels, height, width = images.shape
        outputs, taps = weight.shape[0], weight.shape[2]
        over_outputs = min(self._num_threads, outputs // 32)
        over_images = self._num_threads // over_outputs
        sizes = number, height, width, channels, outputs, taps, over_outputs, over_images
        out = torch.empty(over_images, outputs, taps, taps, channels)
        self._call_with_memory("correlate", [out, gradient, images], *sizes, threads=over_outputs * over_images)
        return of_images, out.sum(dim=0).permute(0, 3, 1, 2).to(weight.dtype), of_bias

    def _can_correlate(self, gradient: Tensor, images: Tensor, weight: Tensor, others: Sequence[Any]) -> bool:
        stride, padding, dilation, transposed, _, groups, mask = others
        taps = weight.shape[2]
        return bool(
            self._has_amx
            and mask[1]
            and images.dtype == torch.bfloat16
            and _is_pixels(gradient)
            and _is_pixels(images)
            and weight.shape[0] % 32 == 0
            and weight.shape[3] == taps
            and taps % 2
            and list(padding) == [taps // 2, taps // 2]
            and list(stride) == list(dilation) == [1, 1]
            and not transposed
            and groups == 1
        )


def _is_pixels(values: Tensor) -> bool:
    """Say whether the channels of each pixel stand next to each other, in a type that the kernels know."""
    return (
        values.ndim == 4
        and values.is_contiguous(memory_format=torch.channels_last)
        and values.dtype in (torch.bfloat16, torch.float32)
        and values.device.type == "cpu"
    )


_TILED = {"avx2": (torch.float32,), "avx512": (torch.float32,), "avx512_bf16": (torch.float32, torch.bfloat16)}
"""The types of floats whose convolutions are computed by tiles; on other processors it was not found to pay."""

_aten = torch.ops.aten
_COMPUTE: dict[Any, Callable[..., Any]] = {
    _aten.max_pool2d_with_indices.default: LargeSteps._pool,
    _aten.max_pool2d_with_indices_backward.default: LargeSteps._unpool,
    _aten.gelu.default: LargeSteps._gelu,
    _aten.gelu_backward.default: LargeSteps._gelu_backward,
    _aten.native_batch_norm.default: LargeSteps._normalize,
    _aten.native_batch_norm_backward.default: LargeSteps._normalize_backward,
    _aten.convolution.default: LargeSteps._convolve,
    _aten.convolution_backward.default: LargeSteps._convolve_backward,
}
