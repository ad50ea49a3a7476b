"""Read safetensors: the size of a header in 8 bytes, the header in JSON, and the tensors' bytes one after the other.

The format is https://github.com/huggingface/safetensors; its library would be a compiled dependency for this one page.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from image_classifier.files import parse_json
from image_classifier.tracking.tensor_file import MAX_HEADER_BYTES

_DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "BOOL": torch.bool},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8},
}


def read_safetensors(raw: bytes) -> dict[str, Tensor]:
    """Read the tensors of a file by name; what it says beside them is left out.

    Raises:
        ValueError: it is damaged, or its tensors do not fill it one after the other, as the format has it.
    """
    size = int.from_bytes(raw[:8], "little")
    if not 2 <= size <= min(MAX_HEADER_BYTES, len(raw) - 8):
        raise ValueError("it has no header")
    header = parse_json(raw[8 : 8 + size])
    if not isinstance(header, dict):
        raise ValueError("its header is no object")
    header.pop("__metadata__", None)
    body, end = memoryview(raw)[8 + size :], 0
    tensors = {}
    for name, facts in sorted(header.items(), key=lambda item: _get_offsets(*item)):
        dtype, shape = _DTYPES.get(str(facts.get("dtype"))), facts.get("shape")
        begin, next_end = facts["data_offsets"]
        if dtype is None or not isinstance(shape, list) or len(shape) > 8 or any(not _is_count(n) for n in shape):
            raise ValueError(f"{name!a:.100} has no shape, or a type that is not known: {facts.get('dtype')!a:.20}")
        if begin != end or next_end - begin != math.prod(shape) * dtype.itemsize or next_end > len(body):
            raise ValueError(
                f"{name!a:.100} does not lie where the one before it ends, or has another size than its shape"
            )
        end = next_end
        content = bytearray(body[begin:end])
        flat = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
        tensors[name] = flat.reshape(shape)
    if end != len(body):
        raise ValueError(f"{len(body) - end:,} bytes at its end belong to no tensor")
    return tensors


def _get_offsets(name: str, facts: Any) -> tuple[int, int]:
    offsets = facts.get("data_offsets") if isinstance(facts, dict) else None
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise ValueError(f"{name!a:.100} has no offsets")
    return offsets[0], offsets[1]


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0
