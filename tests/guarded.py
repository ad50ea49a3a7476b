"""Kernels called on memory between pages that nobody may touch, on each instruction set that this processor has."""

from __future__ import annotations

import ctypes
import json
import mmap
from collections.abc import Mapping

import torch
from torch import Tensor

from image_classifier.kernels import library
from image_classifier.kernels.library import LIBRARIES, load_kernels
from image_classifier.training.determinism import get_instruction_set

_ORDER = ("avx2", "avx512", "avx512_bf16", "amx_bf16")


def list_levels() -> list[str]:
    """List the instruction sets that the package has kernels for and this processor can run, the lowest first."""
    built = json.loads((library.FOLDER / LIBRARIES).read_text())["libraries"]
    best = get_instruction_set()
    runnable = _ORDER[: _ORDER.index(best) + 1] if best in _ORDER else (best,)
    return [level for level in built if level in runnable]


LEVELS = list_levels()

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class _Block:
    """Bytes that begin right after a page which may not be touched, or end right before one."""

    def __init__(self, num_bytes: int, *, at_end: bool, aligned: int = 1) -> None:
        num_bytes = -(-num_bytes // aligned) * aligned
        self._page = mmap.PAGESIZE
        inner = max(-(-num_bytes // self._page), 1) * self._page
        self._map = mmap.mmap(-1, inner + 2 * self._page)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self._fences = (start, start + self._page + inner)
        self._protect(0)
        self.num_bytes = num_bytes
        self.address = start + self._page + (inner - num_bytes if at_end else 0)

    def _protect(self, allowed: int) -> None:
        for fence in self._fences:
            assert _libc.mprotect(fence, self._page, allowed) == 0

    def write(self, content: bytes) -> None:
        ctypes.memmove(self.address, content, len(content))

    def read(self, num_bytes: int) -> bytes:
        return ctypes.string_at(self.address, num_bytes)


def call(
    level: str, kernel: str, tensors: Mapping[str, Tensor | None], **sizes: float | tuple[int, ...]
) -> dict[str, Tensor]:
    """Call a kernel twice, its memory at the beginning and at the end of what may be touched; return all its tensors.

    Args:
        tensors: by field; copies are given to the kernel, None is the address 0.
    """
    found = [_call_between(level, kernel, tensors, sizes, at_end=at_end) for at_end in (False, True)]
    for one, other in zip(*(each.values() for each in found), strict=True):
        assert torch.equal(_get_bits(one), _get_bits(other))
    return found[0]


def _call_between(
    level: str,
    kernel: str,
    tensors: Mapping[str, Tensor | None],
    sizes: Mapping[str, float | tuple[int, ...]],
    *,
    at_end: bool,
) -> dict[str, Tensor]:
    kernels = load_kernels(level)
    blocks: dict[str, _Block] = {}
    for name, tensor in tensors.items():
        if tensor is not None:
            content = _get_bits(tensor).numpy().tobytes()
            blocks[name] = _Block(len(content), at_end=at_end)
            blocks[name].write(content)
    addresses = {name: blocks[name].address if name in blocks else 0 for name in tensors}
    struct = library.read_header()[1][library.split_name(kernel)[0]]
    if hasattr(struct, "scratch") and "scratch" not in tensors:
        arguments = kernels.prepare(kernel, **addresses, scratch=0, **sizes)
        scratch = _Block(kernels.count_scratch(kernel, arguments), at_end=at_end, aligned=64)
        scratch.write(b"\xff" * scratch.num_bytes)  # no numbers
        addresses["scratch"] = scratch.address
    kernels.call(kernel, kernels.prepare(kernel, **addresses, **sizes))
    results = {}
    for name, tensor in tensors.items():
        if tensor is not None:
            found = bytearray(blocks[name].read(blocks[name].num_bytes))
            results[name] = torch.frombuffer(found, dtype=tensor.dtype).reshape(tensor.shape) if found else tensor
    return results


def _get_bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def check(found: Tensor, expected: Tensor, bound: Tensor | float) -> None:
    """Check each number against what it should be in doubles, and how far it may be from that; no number and infinity
    stand where they should."""
    assert found.shape == expected.shape
    is_finite = expected.isfinite()
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found[found.isinf()].double(), expected[expected.isinf()])
    off = (found.double() - expected).abs()[is_finite] - torch.as_tensor(bound).expand(expected.shape)[is_finite]
    assert not len(off) or float(off.max()) <= 0, f"{int((off > 0).sum())} of {len(off)}, by {float(off.max())}"
