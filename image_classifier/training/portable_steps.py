"""Maps all operators of a network to kernels that compute in the same order on every processor.

What torch is left with has one possible result: it moves numbers, compares or selects them, rounds one to another type,
or computes on whole numbers. Any other operation that no kernel takes is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import cache
from itertools import groupby
from math import prod
from typing import Any

import torch
from torch import Tensor

from image_classifier.errors import SettingsError
from image_classifier.kernels.library import Arguments, Kernels, load_kernels
from image_classifier.training.determinism import choose_kernels
from image_classifier.training.large_steps import COMPUTE as LARGE
from image_classifier.training.large_steps import LargeSteps
from image_classifier.training.small_steps import COMPUTE as SMALL
from image_classifier.training.small_steps import compute_small
from image_classifier.training.steps import CallKernel, DispatchMode, Make, have_same_order, is_brief, takes
from image_classifier.training.threads import Arithmetic

MOST_DIMENSIONS = 4
"""That numbers are combined over."""

EXACT = frozenset("""
    _reshape_alias _to_copy _unsafe_view alias arange as_strided bitwise_and bitwise_not bitwise_or cat clone
    constant_pad_nd contiguous copy_ detach diagonal empty empty_like empty_strided eq expand eye fill_ flip full
    full_like gather ge gt index index_select isnan le lift_fresh logical_and logical_not lt masked_fill
    masked_fill_ ne neg new_empty new_empty_strided new_full new_zeros ones ones_like permute reflection_pad2d
    repeat replication_pad2d reshape roll scalar_tensor scatter select set_ slice split split_with_sizes squeeze
    stack t to transpose tril triu unbind unfold unsqueeze view where zero_ zeros zeros_like
    """.split())
"""Operations of torch that move, compare, select or round numbers, each by itself."""

COUNTING = frozenset("add add_ all any argmax argmin max min mul remainder sort sub sum".split())
"""Operations of torch that are exact where all that they are given is whole numbers, and what they give, too."""


class PortableSteps(LargeSteps):
    """Computes operations on images in either layout.

    Args:
        is_small: whether images are kept as planes, which suits few of them.
    """

    def __init__(self, kernels: Kernels, make: Make, call: CallKernel, *, is_small: bool = False) -> None:
        super().__init__(kernels, make, call)
        self._is_small = is_small

    def _choose_products(self) -> None:
        self._tiled, self._has_amx = (torch.float32,), False

    def compute(self, called: Any, arguments: Any, options: Mapping[str, Any]) -> Any:
        """Compute an operation of ATen; None if it is one of those that torch is left with.

        Raises:
            SettingsError: no kernel takes it.
        """
        is_fast = called in SMALL or called in LARGE
        if is_fast and (computed := self._compute_fast(called, arguments, options)) is not None:
            return computed
        if is_exact(called, arguments, options):
            return None
        if is_fast and (computed := self._compute_fast(called, _arrange(arguments), options)) is not None:
            return computed
        if (computed := self._compute_any(called, arguments, options)) is not None:
            return computed
        if (
            not called._schema.is_mutable
            and (computed := self._compute_any(called, _arrange(arguments), options)) is not None
        ):
            return computed
        raise SettingsError(
            f"--instruction_set portable has no kernel for {called} of {_describe(arguments)}; "
            "choose --instruction_set native, or another network"
        )

    def _compute_fast(self, called: Any, arguments: Any, options: Mapping[str, Any]) -> Any:
        """Compute an operation by the kernels for one layout."""
        computed = None
        if self._is_small or called not in _OF_SMALL:
            computed = compute_small(self, called, arguments, options)
        if computed is None and called in LARGE and not options:
            computed = LARGE[called](self, *arguments)
        return computed

    def _compute_any(self, called: Any, arguments: Any, options: Mapping[str, Any]) -> Any:
        """Compute an operation by the kernels for all layouts."""
        if called not in PORTABLE or not takes(PORTABLE[called], (self, *arguments), options):
            return None
        if not all(map(_is_single, [*arguments, *options.values()])):
            return None
        return PORTABLE[called](self, *arguments, **options)

    def _convolve_all(self, images: Tensor, weight: Tensor, bias: Tensor | None, *others: Any) -> Tensor | None:
        stride, padding, dilation, transposed, _, groups = others
        if not _is_simple(padding, dilation, transposed, groups, weight):
            return None
        if set(stride) != {1}:
            dense = self.compute(_aten.convolution.default, (images, weight, bias, [1, 1], *others[1:]), {})
            return _take_every(dense, stride).contiguous(memory_format=torch.channels_last)
        return self._convolve_pixels(images, weight, bias, padding[0], weight.shape[0], weight.stride(), 0)

    def _convolve_pixels(
        self,
        images: Tensor,
        filters: Tensor,
        bias: Tensor | None,
        padding: int,
        outputs: int,
        strides: Sequence[int],
        first_weight: int,
    ) -> Tensor:
        number, channels, height, width = images.shape
        taps = filters.shape[2]
        sides = (side + 2 * padding - taps + 1 for side in (height, width))
        out = self.make(torch.empty, (number, outputs, *sides), memory_format=torch.channels_last)
        tensors = {"images": images, "filters": filters, "bias": bias}
        sizes = {"num_images": number, "channels": channels, "height": height, "width": width, "outputs": outputs}
        sizes |= {"taps": taps, "padding": padding, "first_weight": first_weight}
        layout = {"image_strides": images.stride(), "filter_strides": strides}
        self.call("convolve_pixels", {"out": out}, **tensors, **sizes, **layout)
        return out

    def _convolve_backward_all(
        self, gradient: Tensor, images: Tensor, weight: Tensor, bias_sizes: Any, *others: Any
    ) -> Any:
        stride, padding, dilation, transposed, _, groups, mask = others
        if not _is_simple(padding, dilation, transposed, groups, weight) or padding[0] >= weight.shape[2]:
            return None
        of_images = of_weight = of_bias = None
        taps, channels = weight.shape[2], images.shape[1]
        if set(stride) != {1}:
            sides = [side + 2 * padding[0] - taps + 1 for side in images.shape[2:]]
            dense = self._make_zeros(len(images), len(weight), *sides)
            _take_every(dense, stride).copy_(gradient)
            rest = (images, weight, bias_sizes, [1, 1], *others[1:])
            return self.compute(_aten.convolution_backward.default, (dense, *rest), {})
        if mask[0]:  # a convolution with inputs and outputs exchanged, and the filters mirrored
            o, c, y, x = weight.stride()
            first, strides = (taps - 1) * (y + x), [c, o, -y, -x]
            around = taps - 1 - padding[0]
            of_images = self._convolve_pixels(gradient, weight, None, around, channels, strides, first)
        if mask[1] or mask[2]:
            of_weight = self.make(torch.empty_like, weight) if mask[1] else None
            of_bias = self.make(torch.empty, len(weight)) if mask[2] else None
            number, _, height, width = images.shape
            sizes = {"num_images": number, "channels": channels, "height": height, "width": width}
            sizes |= {"outputs": len(weight), "taps": taps, "padding": padding[0]}
            layout = {"image_strides": images.stride(), "gradient_strides": gradient.stride()}
            layout |= {"filter_strides": weight.stride()}
            outputs = {"of_filters": of_weight, "of_bias": of_bias}
            tensors = {"images": images, "gradient": gradient}
            self.call("convolve_filter_gradient_pixels", outputs, **tensors, **sizes, **layout)
        return of_images, of_weight, of_bias

    def _make_zeros(self, *shape: int) -> Tensor:
        return self.make(torch.empty, shape, memory_format=torch.channels_last).zero_()

    def _pool_all(
        self,
        images: Tensor,
        size: Sequence[int],
        stride: Sequence[int] = (),
        padding: Sequence[int] = (0,),
        dilation: Sequence[int] = (1,),
        rounds_up: bool = False,
    ) -> tuple[Tensor, Tensor] | None:
        """Take the greatest number of each window; the indices count the places in a window, and the first one wins."""
        if rounds_up or set(dilation) != {1}:
            return None
        margins = [padding[-1], padding[-1], padding[0], padding[0]]
        first, *others = _list_places(torch.constant_pad_nd(images, margins, -torch.inf), size, stride or size)
        greatest, indices = first, torch.zeros_like(first, dtype=torch.int64)
        for index, values in enumerate(others, start=1):
            is_greater = values > greatest
            greatest = torch.where(is_greater, values, greatest)
            indices = indices.masked_fill(is_greater, index)
        return greatest.contiguous(memory_format=torch.channels_last), indices

    def _unpool_all(self, gradient: Tensor, images: Tensor, size: Sequence[int], *others: Any) -> Tensor | None:
        stride, padding, _, _, indices = others
        if indices.dtype != torch.int64:
            return None
        number, channels, height, width = images.shape
        top, left = padding[0], padding[-1]
        padded = self._make_zeros(number, channels, height + 2 * top, width + 2 * left)
        for index, place in enumerate(_list_places(padded, size, stride or size)):
            self._combine("ADD", place, gradient.masked_fill(indices != index, 0), out=place)
        return padded[:, :, top : top + height, left : left + width].contiguous(memory_format=torch.channels_last)

    def _gelu_dense(self, values: Tensor) -> Tensor | None:
        if values.dtype != torch.float32 or not _is_dense(values):
            return None
        out = self.make(torch.empty_like, values)
        self.call("gelu_float", {"out": out}, values=values, count=values.numel())
        return out

    def _gelu_backward_dense(self, gradient: Tensor, values: Tensor) -> Tensor | None:
        if values.dtype != torch.float32 or not _is_dense(values) or not have_same_order(gradient, values):
            return None
        out = self.make(torch.empty_like, values)
        self.call("gelu_gradient_float", {"out": out}, gradient=gradient, values=values, count=values.numel())
        return out

    def _normalize_all(self, images: Tensor, weight: Tensor, bias: Tensor, *others: Any) -> Any:
        mean, variance, is_training, _, epsilon = others
        if is_training or not (weight is not None and bias is not None and mean is not None and _is_arranged(images)):
            return None
        out, channels = self.make(torch.empty_like, images), images.shape[1]
        tensors = {"values": images, "weight": weight, "bias": bias, "mean": mean, "variance": variance}
        sizes = {"num_pixels": images.numel() // channels, "channels": channels}
        self.call("batch_norm_inference", {"out": out}, **tensors, **sizes, epsilon=epsilon)
        return out, self.make(torch.empty, 0), self.make(torch.empty, 0)

    def _normalize_only(self, images: Tensor, weight: Tensor, bias: Tensor, *others: Any) -> Any:
        mean, variance, momentum, epsilon = others
        return self._normalize_all(images, weight, bias, mean, variance, False, momentum, epsilon)

    def _resize(self, images: Tensor, size: Sequence[int], align: bool, *scales: Any) -> Tensor | None:
        if align or any(scale is not None for scale in scales):
            return None
        number, channels, height, width = images.shape
        out = self.make(torch.empty, (number, channels, *size), memory_format=torch.channels_last)
        sizes = {"num_images": number, "channels": channels, "height": height, "width": width}
        sizes |= {"out_height": size[0], "out_width": size[1]}
        self.call("resize", {"out": out}, images=images, **sizes, image_strides=images.stride())
        return out

    def _mm(self, left: Tensor, right: Tensor) -> Tensor | None:
        return self._multiply(None, left, right, 0.0, 1.0)

    def _addmm(
        self, base: Tensor, left: Tensor, right: Tensor, *, beta: float = 1.0, alpha: float = 1.0
    ) -> Tensor | None:
        return self._multiply(base.expand(len(left), right.shape[1]), left, right, beta, alpha)

    def _multiply(self, base: Tensor | None, left: Tensor, right: Tensor, beta: float, alpha: float) -> Tensor:
        (rows, depth), columns = left.shape, right.shape[1]
        out = self.make(torch.empty, rows, columns)
        sizes = {"rows": rows, "depth": depth, "columns": columns, "alpha": alpha, "beta": beta}
        layout = {"left_strides": left.stride(), "right_strides": right.stride()}
        layout["base_strides"] = (0, 0) if base is None else base.stride()
        self.call("multiply", {"out": out}, left=left, right=right, base=base, **sizes, **layout)
        return out

    def _add(self, left: Tensor, right: Any, *, alpha: float = 1.0, out: Tensor | None = None) -> Tensor | None:
        return self._combine("ADD", left, right, alpha, out)

    def _subtract(self, left: Tensor, right: Any, *, alpha: float = 1.0) -> Tensor | None:
        return self._combine("SUBTRACT", left, right, alpha)

    def _times(self, left: Tensor, right: Any) -> Tensor | None:
        return self._combine("MULTIPLY", left, right)

    def _divide(self, left: Tensor, right: Any) -> Tensor | None:
        return self._combine("DIVIDE", left, right)

    def _combine(
        self, operation: str, left: Tensor, right: Any, factor: float = 1.0, out: Tensor | None = None
    ) -> Tensor | None:
        """Combine a tensor number by number with another one, which is repeated where it must be, or with a number."""
        left, other = _to_float(left), _to_float(right) if isinstance(right, Tensor) else None
        if left.dtype != torch.float32:
            return None
        shape = left.shape
        if other is not None and other.shape != shape:
            shape = torch.broadcast_shapes(shape, other.shape)  # type: ignore[no-untyped-call]  # likewise
        if out is None and shape == left.shape:
            out = self.make(torch.empty_like, left)
        elif out is None and other is not None and shape == other.shape:
            out = self.make(torch.empty_like, other)
        elif out is None:
            out = self.make(torch.empty, shape)
        if other is not None and other.shape != shape and (rows := _repeat_short_rows(other, out, left)) is not None:
            other, strides = rows, [_get_strides(_get_rows(each), 3) for each in (out, left, rows)]
            plan = _plan_loops(_get_rows(out).shape, *strides)
        else:
            strides = [_get_strides(each, len(shape)) for each in (out, left, other) if each is not None]
            plan = _plan_loops(shape, *strides)
        if plan is None:
            return None
        number = float(right) if other is None else 0.0
        values = {"operation": self._kernels.constants[operation], "number": number, "factor": float(factor)}
        self.call("combine", {"out": out}, left=left, right=other, **values, **plan)
        return out

    def _sum(self, values: Tensor, dimensions: Sequence[int] | None = None, keep: bool = False) -> Tensor | None:
        return self._reduce(values, dimensions, keep, takes_greatest=False)

    def _amax(self, values: Tensor, dimensions: Sequence[int] = (), keep: bool = False) -> Tensor | None:
        return self._reduce(values, dimensions, keep, takes_greatest=True)

    def _mean(self, values: Tensor, dimensions: Sequence[int] | None = None, keep: bool = False) -> Tensor | None:
        sums = self._sum(values, dimensions, keep)
        return None if sums is None else self._divide(sums, values.numel() // max(sums.numel(), 1))

    def _reduce(
        self, values: Tensor, dimensions: Sequence[int] | None, keep: bool, *, takes_greatest: bool
    ) -> Tensor | None:
        """Reduce a tensor over some of its dimensions, those next to each other in memory together."""
        if values.dtype != torch.float32 or not values.ndim or (takes_greatest and not values.numel()):
            return None
        reduced = {dimension % values.ndim for dimension in dimensions or range(values.ndim)}
        if not values.numel():
            left = [1 if at in reduced else size for at, size in enumerate(values.shape) if keep or at not in reduced]
            return torch.zeros(left)
        order = sorted(range(values.ndim), key=values.stride, reverse=True)  # as they lie in memory
        if not values.permute(order).is_contiguous():
            values, order = values.contiguous(), list(range(values.ndim))
        sizes = [values.shape[dimension] for dimension in order]
        is_reduced = [dimension in reduced for dimension in order]
        groups = [(key, list(each)) for key, each in groupby(range(len(order)), is_reduced.__getitem__)]
        for is_wanted, group in reversed(groups):
            if is_wanted:
                begin, end = group[0], group[-1] + 1
                rows, depth, columns = map(prod, (sizes[:begin], sizes[begin:end], sizes[end:]))
                out = self.make(torch.empty, rows * columns)
                shape = {"rows": rows, "depth": depth, "columns": columns, "takes_greatest": takes_greatest}
                self.call("reduce", {"out": out}, values=values, **shape)
                values, sizes[begin:end] = out, [1] * (end - begin)
        back = [order.index(dimension) for dimension in range(len(order))]
        result = values.view(sizes).permute(back)
        return result if keep else result.view([size for at, size in enumerate(result.shape) if at not in reduced])

    def _norm(self, values: Tensor, power: float = 2) -> Tensor | None:
        if power != 2 or not _is_dense(values):
            return None
        out = self.make(torch.empty, ())
        self.call("norm", {"out": out}, values=values, count=values.numel())
        return out

    def _softmax(self, values: Tensor, dimension: int, to_float: bool) -> Tensor | None:
        if values.ndim != 2 or dimension % 2 != 1 or to_float or not values.is_contiguous():
            return None
        out = self.make(torch.empty_like, values)
        self.call("softmax", {"out": out}, values=values, rows=len(values), columns=values.shape[1])
        return out


def _make(function: Callable[..., Tensor], *arguments: Any, **options: Any) -> Tensor:
    return function(*arguments, **options)


class PortableMode(DispatchMode):  # type: ignore[no-untyped-call]  # torch ships its base without types
    """Computes all that is computed while it is active, by this thread, as `PortableSteps` do."""

    def __init__(self, kernels: Kernels, *, is_small: bool = False) -> None:
        super().__init__()
        self._kernels = kernels
        self._steps = PortableSteps(kernels, _make, self.call, is_small=is_small)

    def call(
        self, kernel: str, arguments: Arguments, written: Mapping[str, Tensor], read: Mapping[str, Tensor]
    ) -> None:
        """Call a kernel."""
        self._kernels.call(kernel, arguments, is_brief=is_brief({**written, **read}))

    def __torch_dispatch__(
        self, called: Any, types: object, arguments: tuple[Any, ...] = (), options: dict[str, Any] | None = None
    ) -> Any:
        computed = self._steps.compute(called, arguments, options or {})
        return called(*arguments, **(options or {})) if computed is None else computed


def choose_arithmetic(instruction_set: str) -> Arithmetic:
    """Choose what is entered around all that is computed: nothing, but for a portable run.

    Raises:
        SettingsError: this processor has no kernels for it.
    """
    if instruction_set != "portable":
        return nullcontext
    kernels = load_kernels(choose_kernels(instruction_set))
    return lambda: PortableMode(kernels)


def is_exact(called: Any, arguments: Sequence[Any], options: Mapping[str, Any]) -> bool:
    """Say whether an operation of torch has one possible result."""
    name = called.overloadpacket.__name__
    if name in EXACT or name not in COUNTING:
        return name in EXACT
    given = [*arguments, *options.values()]
    return not any(
        isinstance(each, float)
        or (isinstance(each, Tensor) and each.is_floating_point())
        or (isinstance(each, torch.dtype) and each.is_floating_point)
        for each in given
    )


def _arrange(arguments: Sequence[Any]) -> tuple[Any, ...]:
    """Bring the channels of pixels next to each other, and rows one after the other."""
    formats = {4: torch.channels_last}
    return tuple(
        (
            each.contiguous(memory_format=formats.get(each.ndim, torch.contiguous_format))
            if isinstance(each, Tensor) and each.ndim
            else each
        )
        for each in arguments
    )


def _is_single(value: Any) -> bool:
    """Say whether a value is no tensor, or one on the CPU that the kernels read: of whole numbers or floats."""
    if not isinstance(value, Tensor):
        return True
    return value.device.type == "cpu" and (value.dtype == torch.float32 or not value.is_floating_point())


def _is_arranged(images: Tensor) -> bool:
    return images.ndim == 4 and images.is_contiguous(memory_format=torch.channels_last)


def _is_dense(tensor: Tensor) -> bool:
    order = sorted(range(tensor.ndim), key=tensor.stride, reverse=True)
    return tensor.permute(order).is_contiguous()


def _is_simple(padding: Sequence[int], dilation: Sequence[int], transposed: bool, groups: int, weight: Tensor) -> bool:
    """Say whether it is a convolution of one kind: square filters, the same padding all around."""
    is_square = weight.ndim == 4 and weight.shape[2] == weight.shape[3] and len(set(padding)) == 1
    return is_square and set(dilation) == {1} and not transposed and groups == 1


def _take_every(images: Tensor, stride: Sequence[int]) -> Tensor:
    """Take the pixels that a stride leaves, as a view."""
    return images[:, :, :: stride[0], :: stride[-1]]


def _list_places(images: Tensor, size: Sequence[int], stride: Sequence[int]) -> list[Tensor]:
    """List for each place in a window the numbers that all windows have there, as views [N, C, H, W]."""
    height, width = (side - each for side, each in zip(images.shape[2:], (size[0], size[-1]), strict=True))
    places = [(y, x) for y in range(size[0]) for x in range(size[-1])]
    return [_take_every(images[:, :, y : y + height + 1, x : x + width + 1], stride) for y, x in places]


def _to_float(value: Tensor) -> Tensor:
    return value if value.is_floating_point() else value.to(torch.float32)


FEWEST_NUMBERS = 16
"""In the innermost loop; rows with fewer are repeated where they can be."""


def _repeat_short_rows(other: Tensor, out: Tensor, left: Tensor) -> Tensor | None:
    """Repeat a number for each of a few channels, so that the loop over them is longer; None if it cannot be."""
    if left.shape != out.shape or not _is_arranged(out) or not _is_arranged(left):
        return None
    channels, pixels = out.shape[1], out.shape[2] * out.shape[3]
    if other.numel() != channels or other.ndim != 4 or channels >= FEWEST_NUMBERS or pixels % FEWEST_NUMBERS:
        return None
    return other.reshape(1, 1, channels).expand(1, FEWEST_NUMBERS, channels).contiguous()


def _get_rows(images: Tensor) -> Tensor:
    """Get images as rows of some pixels; what was repeated for one row, for all of them."""
    if images.ndim == 3:
        return images.expand(1, *images.shape[1:])
    return images.permute(0, 2, 3, 1).reshape(-1, FEWEST_NUMBERS, images.shape[1])


def _get_strides(tensor: Tensor, num_dimensions: int) -> tuple[int, ...]:
    """Get a tensor's strides for more dimensions; 0 where it is repeated."""
    strides = [0 if size == 1 else stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
    return (0,) * (num_dimensions - len(strides)) + tuple(strides)


@cache
def _plan_loops(shape: Sequence[int], *strides: Sequence[int]) -> dict[str, Any] | None:
    """Plan up to four loops over the numbers of a tensor and those that they are combined with; None if more are
    needed.

    Args:
        strides: of the result, and of one or two operands.
    """
    loops: list[tuple[int, ...]] = []
    for size, *steps in sorted(zip(shape, *strides, strict=True), key=lambda row: -row[1]):
        if loops and all(before == size * step for before, step in zip(loops[-1][1:], steps, strict=True)):
            loops[-1] = (loops[-1][0] * size, *steps)
        elif size != 1:
            loops.append((size, *steps))
    if len(loops) > MOST_DIMENSIONS:
        return None
    loops = [(1,) + (0,) * len(strides)] * (MOST_DIMENSIONS - len(loops)) + loops
    sizes, *steps = zip(*loops, strict=True)
    names = ("out_strides", "left_strides", "right_strides")
    return {"sizes": sizes, **dict(zip(names, [*steps, (0,) * MOST_DIMENSIONS], strict=False))}


def _describe(arguments: Sequence[Any]) -> str:
    tensors = [each for each in arguments if isinstance(each, Tensor)]
    return ", ".join(f"{str(each.dtype).removeprefix('torch.')} {list(each.shape)}" for each in tensors)


_aten = torch.ops.aten
_OF_SMALL = {
    _aten.clone.default,
    _aten.convolution.default,
    _aten.convolution_backward.default,
    _aten.max_pool2d_with_indices.default,
    _aten.max_pool2d_with_indices_backward.default,
    _aten.ones_like.default,
}
"""What small steps compute in a layout or in memory of their own."""


def _change(operation: str) -> Callable[..., Tensor | None]:
    """Make what changes a tensor itself."""

    def change(steps: PortableSteps, values: Tensor, other: Any, *, alpha: float = 1.0) -> Tensor | None:
        return steps._combine(operation, values, other, alpha, values)

    return change


PORTABLE: dict[Any, Callable[..., Any]] = {
    _aten.convolution.default: PortableSteps._convolve_all,
    _aten.convolution_backward.default: PortableSteps._convolve_backward_all,
    _aten.max_pool2d_with_indices.default: PortableSteps._pool_all,
    _aten.max_pool2d_with_indices_backward.default: PortableSteps._unpool_all,
    _aten.gelu.default: PortableSteps._gelu_dense,
    _aten.gelu_backward.default: PortableSteps._gelu_backward_dense,
    _aten.native_batch_norm.default: PortableSteps._normalize_all,
    _aten._native_batch_norm_legit_no_training.default: PortableSteps._normalize_only,
    _aten._upsample_bilinear2d_aa.default: PortableSteps._resize,
    _aten.mm.default: PortableSteps._mm,
    _aten.addmm.default: PortableSteps._addmm,
    _aten.add.Tensor: PortableSteps._add,
    _aten.add.Scalar: PortableSteps._add,
    _aten.add.out: PortableSteps._add,
    _aten.sub.Tensor: PortableSteps._subtract,
    _aten.sub.Scalar: PortableSteps._subtract,
    _aten.mul.Tensor: PortableSteps._times,
    _aten.mul.Scalar: PortableSteps._times,
    _aten.div.Tensor: PortableSteps._divide,
    _aten.div.Scalar: PortableSteps._divide,
    _aten.add_.Tensor: _change("ADD"),
    _aten.sub_.Tensor: _change("SUBTRACT"),
    _aten.mul_.Tensor: _change("MULTIPLY"),
    _aten.div_.Tensor: _change("DIVIDE"),
    _aten.sum.default: PortableSteps._sum,
    _aten.sum.dim_IntList: PortableSteps._sum,
    _aten.mean.default: PortableSteps._mean,
    _aten.mean.dim: PortableSteps._mean,
    _aten.amax.default: PortableSteps._amax,
    _aten.linalg_vector_norm.default: PortableSteps._norm,
    _aten._softmax.default: PortableSteps._softmax,
}
"""What computes an operation of torch, as long as its arguments fit, and it has no faster kernel."""
