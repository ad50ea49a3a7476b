"""Small files that unpack to much, or keep a reader busy, and the parts that they are made of."""

from __future__ import annotations

import io
import re
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SIDE_OF_MOST = 7071
"""Of a square with as many pixels as are decoded."""
SERVED_SIDE = 3535
"""Of a square with as many pixels as the server decodes by default."""


def save(image: Image.Image, image_format: str = "PNG", **options: Any) -> bytes:
    """Encode an image."""
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def build_chunk(kind: bytes, body: bytes) -> bytes:
    """Build a chunk of a PNG."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def build_png(
    width: int, height: int, *, content: bytes = b"", chunks: bytes = b"", depth: int = 8, colour: int = 0
) -> bytes:
    """Build a PNG, of grey pixels by default, whose header may claim any size."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    data = build_chunk(b"IDAT", zlib.compress(content, 9))
    return b"\x89PNG\r\n\x1a\n" + build_chunk(b"IHDR", header) + chunks + data + build_chunk(b"IEND", b"")


def build_exif(orientation: int) -> Image.Exif:
    """Build EXIF data that say how an image is turned."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def build_progressive(num_scans: int, size: tuple[int, int] = (64, 64), mode: str = "RGB", **options: Any) -> bytes:
    """Build a progressive JPEG whose last scan, the refinement of brightness, comes again and again."""
    content = save(Image.new(mode, size), "JPEG", progressive=True, **options).removesuffix(b"\xff\xd9")
    scans = re.split(rb"(?=\xff\xda)", content)
    return content + scans[-1] * (num_scans - len(scans) + 1) + b"\xff\xd9"


def build_run_lengths(side: int, content: bytes) -> bytes:
    """Build a BMP of one byte a pixel, with run lengths."""
    head = struct.pack("<LllHHLLllLL", 40, side, side, 1, 8, 1, len(content), 0, 0, 256, 0)
    start = 14 + len(head) + 1024
    return b"BM" + struct.pack("<LLL", start + len(content), 0, start) + head + bytes(1024) + content


def build_even_png(depth: int, colour: int, chunks: bytes = b"", side: int = SIDE_OF_MOST) -> bytes:
    """Build a square PNG, by default of as many pixels as are decoded, all of them 0, that lies on its side."""
    num_channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    row = bytes(1 + (side * depth * num_channels + 7) // 8)
    turned = build_chunk(b"eXIf", build_exif(6).tobytes()[6:])
    return build_png(side, side, depth=depth, colour=colour, chunks=chunks + turned, content=row * side)


def build_laughs() -> str:
    """Build YAML of a billion values, of which each level names the one before nine times."""
    lines = ["a0: &a0 [" + ", ".join("x" * 9) + "]"]
    lines += [f"a{level}: &a{level} [" + ", ".join([f"*a{level - 1}"] * 9) + "]" for level in range(1, 9)]
    return "\n".join(lines)


def write_parquet_of_zeros(path: Path, num_rows: int, num_bytes: int) -> None:
    """Write images of so many zeros each, which hardly take a byte."""
    import pyarrow
    import pyarrow.parquet

    schema = pyarrow.schema({"image": pyarrow.binary(), "label": pyarrow.int64()})
    with pyarrow.parquet.ParquetWriter(path, schema, compression="zstd", use_dictionary=False) as writer:
        for _ in range(num_rows):
            writer.write_table(pyarrow.table([[bytes(num_bytes)], [0]], schema=schema))


def write_parquet_of_one_value(path: Path, num_rows: int, content: bytes) -> None:
    """Write one image that so many rows name."""
    import pyarrow
    import pyarrow.parquet

    indices = pyarrow.array(np.zeros(num_rows, np.int32))
    values = pyarrow.DictionaryArray.from_arrays(indices, pyarrow.array([content], pyarrow.binary()))
    table = pyarrow.table({"image": values, "label": indices})
    options: dict[str, Any] = {"dictionary_pagesize_limit": 2**30, "store_schema": False, "compression": "zstd"}
    pyarrow.parquet.write_table(table, path, **options)


def build_parquet_of_levels(num_levels: int) -> bytes:
    """Build a Parquet file without rows whose columns lie so many levels deep."""

    def element(name: bytes, num_children: int) -> bytes:  # of Thrift's compact protocol: fields 4 and 5 of the schema
        return (
            b"\x48" + bytes([len(name)]) + name + (b"\x15" + bytes([2 * num_children]) if num_children else b"") + b"\0"
        )

    head = num_levels + 1
    size = b""
    while head > 127:
        size, head = size + bytes([head & 127 | 128]), head >> 7
    schema = b"\x19\xfc" + size + bytes([head]) + element(b"a", 1) * num_levels + b"\x15\x0c" + b"\x25\2\x18\1a\0"
    footer = b"\x15\2" + schema + b"\x16\0\x19\x0c\0"
    return b"PAR1" + footer + struct.pack("<I", len(footer)) + b"PAR1"


def build_onnx_of_zeros(num_values: int) -> bytes:
    """Build an ONNX file that has its runtime make so many zeros when it is loaded."""
    import onnx
    from onnx import helper, numpy_helper

    shape = numpy_helper.from_array(np.array([num_values], np.int64), "shape")
    nodes = [
        helper.make_node("ConstantOfShape", ["shape"], ["zeros"]),
        helper.make_node("Add", ["zeros", "zeros"], ["sum"]),
        helper.make_node("ReduceSum", ["sum"], ["probabilities"], keepdims=0),
    ]
    images = helper.make_tensor_value_info("images", onnx.TensorProto.UINT8, ["N", 32, 32, 3])
    outputs = [helper.make_tensor_value_info("probabilities", onnx.TensorProto.FLOAT, [])]
    return _serialize(helper.make_graph(nodes, "zeros", [images], outputs, [shape]))


def build_onnx_without_end() -> bytes:
    """Build an ONNX file whose computation goes on for ever."""
    import onnx
    from onnx import helper

    images = helper.make_tensor_value_info("images", onnx.TensorProto.UINT8, ["N", 32, 32, 3])
    condition, goes_on = (
        helper.make_tensor_value_info(name, onnx.TensorProto.BOOL, []) for name in ("condition", "goes_on")
    )
    number, value, same = (
        helper.make_tensor_value_info(name, onnx.TensorProto.INT64, []) for name in ("number", "value", "same")
    )
    steps = [helper.make_node("Identity", [old], [new]) for old, new in (("condition", "goes_on"), ("value", "same"))]
    body = helper.make_graph(steps, "body", [number, condition, value], [goes_on, same])
    nodes = [
        helper.make_node("Size", ["images"], ["begin"]),
        helper.make_node("Loop", ["", "always", "begin"], ["end"], body=body),
        helper.make_node("Cast", ["end"], ["probabilities"], to=onnx.TensorProto.FLOAT),
    ]
    always = helper.make_tensor("always", onnx.TensorProto.BOOL, [], [True])
    outputs = [helper.make_tensor_value_info("probabilities", onnx.TensorProto.FLOAT, [])]
    return _serialize(helper.make_graph(nodes, "loop", [images], outputs, [always]))


def _serialize(graph: Any) -> bytes:
    from onnx import helper

    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    content: bytes = model.SerializeToString()
    return content
