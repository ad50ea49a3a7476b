"""Finds where two digest chains diverge, and measures the difference of two tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from image_classifier.errors import RunError
from image_classifier.tracking.layout import CHAIN

Digests = dict[int, dict[str, str]]
"""Of each tensor by its name, shortened as in the chain, by step."""

MAX_HASHED_BYTES = 4 * 2**30
"""That a search for a flipped bit hashes, in a few seconds: enough for tensors of 11,000 float32."""


@dataclass(frozen=True)
class ChainDifference:
    """Where two chains part.

    Attributes:
        equal: the last step at which both have the same state; 0 where they have none in common.
        step: the first one at which they have not.
        tensors: that differ there, in the order of the state.
    """

    equal: int
    step: int
    tensors: tuple[str, ...]


def list_digests(folder: Path, chain: Sequence[dict[str, Any]]) -> Digests:
    """List the digests that a run's chain has, by step.

    Raises:
        RunError: its steps do not ascend.
    """
    lines = [line for line in chain if "tensors" in line]
    steps = [line["step"] for line in lines]
    if steps != sorted(set(steps)):
        raise RunError(f"{folder / CHAIN} is damaged: its steps are not in ascending order")
    return {line["step"]: line["tensors"] for line in lines}


def find_chain_difference(first: Digests, second: Digests) -> ChainDifference | None:
    """Find where two chains part, by the steps that both have a digest of; None where they do not."""
    equal = 0
    for step in sorted(first.keys() & second.keys()):
        names = list_differing(first[step], second[step])
        if names:
            return ChainDifference(equal, step, names)
        equal = step
    return None


def list_differing(first: Mapping[str, str], second: Mapping[str, str]) -> tuple[str, ...]:
    """List the tensors that do not have the same digest in both, or that only one of them has."""
    return tuple(name for name in {**first, **second} if first.get(name) != second.get(name))


@dataclass(frozen=True)
class TensorDifference:
    """How far apart two tensors are.

    Attributes:
        kind: dtype and shape; of both, where they are not the same, and then nothing else is known.
        num_values: of each.
        num_different: of them, by their bits.
        index: of the first that differs, in row-major order.
        first, second: its values.
        ulps: units in the last place between them; for whole numbers their distance. None for what is no number.
        largest_ulps: of all values.
        bit: which bit alone differs in all of the tensor, counted from the lowest; None where there are more.
    """

    kind: str
    num_values: int = 0
    num_different: int = 0
    index: tuple[int, ...] = ()
    first: float | int | None = None
    second: float | int | None = None
    ulps: int | None = None
    largest_ulps: int | None = None
    bit: int | None = None

    def describe(self) -> str:
        """Describe it in a line."""
        if not self.num_values:
            return self.kind
        place = f"at {list(self.index)} " if self.index else ""
        pair = f"{place}A has {_format(self.first)} and B {_format(self.second)}"
        unit = "ULP" if isinstance(self.first, float) else ""
        apart = "" if self.ulps is None else f", {self.ulps:,} {unit}".rstrip() + " apart"
        if self.bit is not None:
            return f"{pair}{apart}; bit {self.bit} of this value alone differs"
        most = "" if self.largest_ulps is None else f", by up to {self.largest_ulps:,} {unit}".rstrip()
        return f"{pair}{apart}; {self.num_different:,} of {self.num_values:,} values differ{most}"

    def to_json(self) -> dict[str, Any]:
        """Convert it to what JSON has; what is no finite number becomes its name."""
        values = {name: value for name, value in asdict(self).items() if name not in ("first", "second")}
        return {**values, "index": list(self.index), "first": _to_json(self.first), "second": _to_json(self.second)}


def _format(value: float | int | None) -> str:
    """Format a value so that neighbours in single precision are told apart."""
    return f"{value:.9g}" if isinstance(value, float) else str(value)


def _to_json(value: float | int | None) -> float | int | str | None:
    return value if value is None or np.isfinite(value) else str(value)


def compare_tensors(first: Tensor, second: Tensor) -> TensorDifference | None:
    """Compare two tensors bit by bit; None where they are equal."""
    kinds = [f"{str(each.dtype).removeprefix('torch.')} {list(each.shape)}" for each in (first, second)]
    if kinds[0] != kinds[1]:
        return TensorDifference(f"one is {kinds[0]}, the other {kinds[1]}")
    bits = [_get_bits(each) for each in (first, second)]
    changed = bits[0] ^ bits[1]
    places = np.flatnonzero(changed)
    if not len(places):
        return None
    ends = [each.detach().cpu().reshape(-1)[torch.from_numpy(places)] for each in (first, second)]
    steps = _compute_ulps(bits[0][places], bits[1][places], first.dtype)
    are_numbers = ~(torch.isnan(ends[0]) | torch.isnan(ends[1])).numpy()
    flipped = int(changed[places[0]])
    return TensorDifference(
        kinds[0],
        first.numel(),
        len(places),
        tuple(int(each) for each in np.unravel_index(places[0], tuple(first.shape))),
        ends[0][0].item(),
        ends[1][0].item(),
        int(steps[0]) if are_numbers[0] else None,
        int(steps[are_numbers].max()) if are_numbers.any() else None,
        flipped.bit_length() - 1 if len(places) == 1 and flipped.bit_count() == 1 else None,
    )


def _get_bits(tensor: Tensor) -> NDArray[np.uint64]:
    """Get the bits of a tensor's values, as unsigned integers [N]."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()]
    bits: NDArray[np.uint64] = flat.view(integers).numpy().view(f"u{flat.element_size()}").astype(np.uint64)
    return bits


def _compute_ulps(first: NDArray[np.uint64], second: NDArray[np.uint64], dtype: torch.dtype) -> NDArray[np.uint64]:
    """Compute how many steps from one value of the type to the next lie between two, from their bits."""
    sign = np.uint64(1 << (8 * dtype.itemsize - 1))

    def rank(bits: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """Number the values of the type by their size; -0 and 0 are one."""
        if dtype.is_floating_point:
            return np.where(bits & sign, sign - (bits & ~sign), sign + bits)
        return bits ^ sign if dtype.is_signed else bits

    one, other = rank(first), rank(second)
    distance: NDArray[np.uint64] = np.maximum(one, other) - np.minimum(one, other)
    return distance


def find_flipped_bit(tensor: Tensor, digest: str) -> Tensor | None:
    """Find the tensor with this digest, or beginning of one, that differs from another in one bit.

    None where there is none, or where the search would hash more than MAX_HASHED_BYTES.
    """
    raw = bytearray(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    if 4 * len(raw) ** 2 > MAX_HASHED_BYTES:
        return None
    before, view = hashlib.sha256(f"{tensor.dtype}\0{tuple(tensor.shape)}\0".encode()), memoryview(raw)
    for place, value in enumerate(raw):
        for bit in range(8):
            found = before.copy()
            found.update(bytes([value ^ 1 << bit]))
            found.update(view[place + 1 :])
            if found.hexdigest().startswith(digest):
                changed = bytearray(raw)
                changed[place] ^= 1 << bit
                return torch.frombuffer(changed, dtype=tensor.dtype).reshape(tensor.shape)
        before.update(raw[place : place + 1])
    return None
