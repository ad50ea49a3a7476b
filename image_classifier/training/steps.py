"""Shared code of the operator maps: allocates outputs and calls kernels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from inspect import signature
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from image_classifier.kernels.library import Arguments, Kernels


class Make(Protocol):
    """Makes a tensor with a function of torch."""

    def __call__(self, function: Callable[..., Tensor], *arguments: Any, **options: Any) -> Tensor: ...


CallKernel = Callable[[str, Arguments, Mapping[str, Tensor], Mapping[str, Tensor]], None]
"""Calls a kernel with its arguments, whose addresses are those of the tensors that it writes to and of those that it
reads, by field."""


class DispatchMode(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch ships it without types
    """Is given every operation that is computed while it is active, by its own thread."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # likewise

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or torch would import its compiler to leave this class out, which takes a second


class Steps(ABC):
    """Computes operations of torch by kernels.

    Args:
        make: makes the memory that kernels write to.
        call: calls a kernel, and perhaps writes down that it did.
    """

    def __init__(self, kernels: Kernels, make: Make, call: CallKernel) -> None:
        self._kernels = kernels
        self.make = make
        self._call_kernel = call

    @abstractmethod
    def compute(self, called: Any, arguments: Any, options: Mapping[str, Any]) -> Any:
        """Compute an operation of ATen; None if it stays torch's."""

    def call(self, kernel: str, outputs: Mapping[str, Tensor | None], /, **values: Any) -> None:
        """Call a kernel; memory that it needs is made.

        Args:
            outputs: what is written to, by field.
            values: tensors that are read, numbers, and sequences of numbers, by field; None is 0.
        """
        numbers = {name: _get_number(value) for name, value in {**outputs, **values}.items()}
        written = {name: tensor for name, tensor in outputs.items() if tensor is not None}
        if self._kernels.has_scratch(kernel) and "scratch" not in numbers:
            written["scratch"] = self._make_scratch(kernel, numbers)
            numbers["scratch"] = written["scratch"].data_ptr()
        read = {name: value for name, value in values.items() if isinstance(value, Tensor)}
        self._call_kernel(kernel, self._kernels.prepare(kernel, **numbers), written, read)

    def _make_scratch(self, kernel: str, numbers: Mapping[str, Any]) -> Tensor:
        num_bytes = self._kernels.count_scratch(kernel, self._kernels.prepare(kernel, **{**numbers, "scratch": 0}))
        return self.make(torch.empty, num_bytes, dtype=torch.uint8)


MOST_BRIEF = 4096
"""Numbers that a brief kernel reads and writes at most."""


def is_brief(tensors: Mapping[str, Tensor]) -> bool:
    """Say whether a kernel that reads and writes these tensors ends in a few microseconds."""
    return "scratch" not in tensors and sum(tensor.numel() for tensor in tensors.values()) <= MOST_BRIEF


def have_same_order(one: Tensor, other: Tensor) -> bool:
    """Say whether the numbers of two tensors of one shape follow each other in the same order in memory."""
    strides = zip(one.shape, one.stride(), other.stride(), strict=True)
    return all(size == 1 or step == another for size, step, another in strides)


def _get_number(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.data_ptr()
    return tuple(value) if isinstance(value, (tuple, list)) else value or 0


@cache
def _read_parameters(function: Callable[..., Any]) -> tuple[int, int | float, frozenset[str], bool]:
    """Read how few and how many positions a function has, which names, and whether it takes all names."""
    parameters = signature(function).parameters.values()
    positions = [each for each in parameters if each.kind == each.POSITIONAL_OR_KEYWORD]
    has_more = any(each.kind == each.VAR_POSITIONAL for each in parameters)
    least = sum(each.default is each.empty for each in positions)
    names = frozenset(each.name for each in parameters)
    return least, float("inf") if has_more else len(positions), names, any(p.kind == p.VAR_KEYWORD for p in parameters)


def takes(function: Callable[..., Any], arguments: Sequence[Any], options: Mapping[str, Any]) -> bool:
    """Say whether a function has parameters for these arguments."""
    least, most, names, has_all_names = _read_parameters(function)
    return least <= len(arguments) <= most and (has_all_names or options.keys() <= names)
