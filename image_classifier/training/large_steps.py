"""Maps ATen operators to kernels for large batches, where torch is slow.

Pooling and normalisation are limited by memory, of which torch's own use more: indices of 8 bytes, sums in several
passes. Convolutions by 3x3 pixels take a third of the products by Winograd's algorithm; in floats of 32 bits that is
nearly as exact, in 16 bits results are off by about a hundredth of their root mean square. With AMX, where products are
cheap, oneDNN computes them, but for the gradient of a convolution's weights, which takes it four times as long.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from image_classifier.kernels.library import Kernels
from image_classifier.training.determinism import get_instruction_set
from image_classifier.training.steps import CallKernel, Make, Steps

FEWEST_CHANNELS, FEWEST_TILES = 8, 64
"""From which on the tiles' products take less than finding their factors."""


class LargeSteps(Steps):
    """Computes operations on images whose channels stand next to each other."""

    def __init__(self, kernels: Kernels, make: Make, call: CallKernel) -> None:
        super().__init__(kernels, make, call)
        self._tile, self._points = (kernels.constants[name] for name in ("WINOGRAD_TILE", "WINOGRAD_POINTS"))
        self._choose_products()

    def _choose_products(self) -> None:
        """Choose which convolutions are computed by tiles, and whether by AMX."""
        self._has_amx = get_instruction_set() == "amx_bf16" and torch.cpu._init_amx()
        self._tiled = _TILED.get(get_instruction_set(), ())

    def compute(self, called: Any, arguments: Sequence[Any], options: Mapping[str, Any]) -> Any:
        """Compute an operation of ATen; None if it stays torch's."""
        compute = COMPUTE.get(called)
        return None if compute is None or options else compute(self, *arguments)

    def _pool(self, images: Tensor, size: Sequence[int], stride: Sequence[int] = (), *others: Any) -> Any:
        if list(size) != [2, 2] or list(stride) not in ([], [2, 2]) or others or not _is_pixels(images):
            return None
        number, channels, height, width = images.shape
        out = self.make(
            torch.empty,
            (number, channels, height // 2, width // 2),
            dtype=images.dtype,
            memory_format=torch.channels_last,
        )
        indices = self.make(torch.empty_like, out, dtype=torch.uint8)
        outputs = {"out": out, "indices": indices}
        self.call(f"max_pool{_get_kind(images)}", outputs, images=images, **_get_sizes(images))
        return out, indices

    def _unpool(self, gradient: Tensor, images: Tensor, *others: Any) -> Any:
        indices: Tensor = others[-1]
        if indices.dtype != torch.uint8 or not _is_pixels(images):  # then torch pooled
            return None
        out = self.make(torch.empty_like, images)
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        tensors = {"indices": indices, "gradient": gradient}
        self.call(f"max_pool_gradient{_get_kind(images)}", {"out": out}, **tensors, **_get_sizes(images))
        return out

    def _gelu(self, values: Tensor) -> Any:
        if not _is_pixels(values):
            return None
        out = self.make(torch.empty_like, values)
        self.call(f"gelu{_get_kind(values)}", {"out": out}, values=values, count=values.numel())
        return out

    def _gelu_backward(self, gradient: Tensor, values: Tensor) -> Any:
        if not _is_pixels(values) or not _is_pixels(gradient) or gradient.dtype != values.dtype:
            return None
        out = self.make(torch.empty_like, values)
        tensors = {"gradient": gradient, "values": values}
        self.call(f"gelu_gradient{_get_kind(values)}", {"out": out}, **tensors, count=values.numel())
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
        epsilon: float,
    ) -> Any:
        if not is_training or not _is_pixels(images) or weight is None or bias is None or running_mean is None:
            return None
        channels = images.shape[1]
        out, mean, scale = (
            self.make(torch.empty_like, images),
            self.make(torch.empty, channels),
            self.make(torch.empty, channels),
        )
        outputs = {"out": out, "mean": mean, "scale": scale}
        outputs |= {"running_mean": running_mean, "running_variance": running_variance}
        tensors = {"values": images, "weight": weight, "bias": bias}
        sizes = {"num_pixels": images.numel() // channels, "channels": channels}
        numbers = {"momentum": momentum, "epsilon": epsilon}
        self.call(f"batch_norm{_get_kind(images)}", outputs, **tensors, **sizes, **numbers)
        return out, mean, scale

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
        epsilon: float,
        mask: Sequence[bool],
    ) -> Any:
        if not is_training or not (_is_pixels(images) and _is_pixels(gradient)) or gradient.dtype != images.dtype:
            return None
        channels = images.shape[1]
        of_images = self.make(torch.empty_like, images) if mask[0] else None
        of_weight, of_bias = self.make(torch.empty, channels), self.make(torch.empty, channels)
        outputs = {"of_values": of_images, "of_weight": of_weight, "of_bias": of_bias}
        tensors = {"gradient": gradient, "values": images, "weight": weight, "mean": mean, "scale": scale}
        sizes = {"num_pixels": images.numel() // channels, "channels": channels}
        self.call(f"batch_norm_gradient{_get_kind(images)}", outputs, **tensors, **sizes)
        return of_images, of_weight if mask[1] else None, of_bias if mask[2] else None

    def _convolve(self, images: Tensor, weight: Tensor, bias: Tensor | None, *others: Any) -> Any:
        if bias is not None or not self._can_tile(images, weight, others):
            return None
        return self._convolve_tiles(images, weight, weight.shape[0], for_gradient=False)

    def _convolve_tiles(self, images: Tensor, filters: Tensor, outputs: int, *, for_gradient: bool) -> Tensor:
        """Convolve with filters [O, C, 3, 3], or, for the gradient of images, with the filters of the convolution."""
        number, channels, height, width = images.shape
        kind = _get_kind(images)
        filters = filters.contiguous(memory_format=torch.channels_last)
        sizes = {"channels": channels, "outputs": outputs, "is_for_gradient": int(for_gradient)}
        at_points = self._make_scratch(f"winograd_filters{kind}", {"filters": 0, **sizes})
        self.call(f"winograd_filters{kind}", {"scratch": at_points}, filters=filters, **sizes)
        out = self.make(
            torch.empty, (number, outputs, height, width), dtype=images.dtype, memory_format=torch.channels_last
        )
        tensors = {"images": images, "filters": at_points}
        self.call(f"winograd_convolve{kind}", {"out": out}, **tensors, **_get_sizes(images), outputs=outputs)
        return out

    def _correlate_tiles(self, gradient: Tensor, images: Tensor) -> Tensor:
        """Compute the gradient of filters [O, C, 3, 3]."""
        channels, outputs = images.shape[1], gradient.shape[1]
        out = self.make(torch.empty, (outputs, channels, 3, 3), dtype=images.dtype, memory_format=torch.channels_last)
        tensors = {"gradient": gradient, "images": images}
        kernel = f"winograd_filter_gradient{_get_kind(images)}"
        self.call(kernel, {"out": out}, **tensors, **_get_sizes(images), outputs=outputs)
        return out

    def _can_tile(self, images: Tensor, weight: Tensor, others: Sequence[Any]) -> bool:
        stride, padding, dilation, transposed, _, groups = others
        number, channels, height, width = images.shape
        tiles = -(-height // self._tile) * -(-width // self._tile)
        return bool(
            images.dtype == weight.dtype
            and images.dtype in self._tiled
            and _is_pixels(images)
            and list(weight.shape[2:]) == [3, 3]
            and channels % 2 == weight.shape[0] % 2 == 0  # two share a word
            and min(channels, weight.shape[0]) >= FEWEST_CHANNELS
            and number * tiles >= FEWEST_TILES
            and tiles * self._points < height * width * 9
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
                of_images = self._convolve_tiles(gradient, weight, weight.shape[1], for_gradient=True)
            if mask[1]:
                of_weight = self._correlate_tiles(gradient, images)
            return of_images, of_weight, None
        if not self._can_correlate(gradient, images, weight, others):
            return None
        convolve_backward = torch.ops.aten.convolution_backward.default
        rest = gradient, images, weight, bias_sizes, *others[:-1]
        of_images, _, of_bias = convolve_backward(*rest, [mask[0], False, mask[2]])
        outputs, taps = weight.shape[0], weight.shape[2]
        out = self.make(torch.empty, outputs, taps, taps, images.shape[1])
        tensors = {"gradient": gradient, "images": images}
        sizes = {**_get_sizes(images), "outputs": outputs, "taps": taps}
        self.call("amx_filter_gradient_bf16", {"out": out}, **tensors, **sizes)
        return of_images, out.permute(0, 3, 1, 2).to(weight.dtype), of_bias

    def _can_correlate(self, gradient: Tensor, images: Tensor, weight: Tensor, others: Sequence[Any]) -> bool:
        stride, padding, dilation, transposed, _, groups, mask = others
        taps = weight.shape[2]
        return bool(
            self._has_amx
            and mask[1]
            and images.dtype == torch.bfloat16
            and _is_pixels(gradient)
            and _is_pixels(images)
            and weight.shape[0] % self._kernels.constants["AMX_OUTPUTS"] == 0
            and weight.shape[3] == taps
            and taps % 2
            and list(padding) == [taps // 2, taps // 2]
            and list(stride) == list(dilation) == [1, 1]
            and not transposed
            and groups == 1
        )


def _get_kind(values: Tensor) -> str:
    """Get how the names of kernels for a tensor's numbers end."""
    return "_bf16" if values.dtype == torch.bfloat16 else "_float"


def _get_sizes(images: Tensor) -> dict[str, int]:
    number, channels, height, width = images.shape
    return {"num_images": number, "height": height, "width": width, "channels": channels}


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
COMPUTE: dict[Any, Callable[..., Any]] = {
    _aten.max_pool2d_with_indices.default: LargeSteps._pool,
    _aten.max_pool2d_with_indices_backward.default: LargeSteps._unpool,
    _aten.gelu.default: LargeSteps._gelu,
    _aten.gelu_backward.default: LargeSteps._gelu_backward,
    _aten.native_batch_norm.default: LargeSteps._normalize,
    _aten.native_batch_norm_backward.default: LargeSteps._normalize_backward,
    _aten.convolution.default: LargeSteps._convolve,
    _aten.convolution_backward.default: LargeSteps._convolve_backward,
}
"""What computes an operation of torch, as long as its arguments fit."""
