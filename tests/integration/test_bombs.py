"""Files that are bombs, each read in a process of its own under a limit of memory and of computing time."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from image_classifier.imaging import MAX_PIXELS, MAX_SCANS
from tests.bombs import (
    SIDE_OF_MOST,
    build_chunk,
    build_even_png,
    build_exif,
    build_onnx_of_zeros,
    build_onnx_without_end,
    build_png,
    build_progressive,
    build_run_lengths,
    save,
    write_parquet_of_one_value,
    write_parquet_of_zeros,
)
from tests.confined import call_confined

IMAGES: dict[str, Callable[[], bytes]] = {
    "16 bits of grey": lambda: build_even_png(16, 0),
    "palette with transparency": lambda: build_even_png(
        8, 3, build_chunk(b"PLTE", bytes(768)) + build_chunk(b"tRNS", bytes(256))
    ),
    "colour with a transparent one": lambda: build_even_png(8, 2, build_chunk(b"tRNS", bytes(6))),
    "a long row": lambda: build_png(MAX_PIXELS, 1, depth=1, content=bytes(1 + MAX_PIXELS // 8)),
    "a progressive JPEG of four inks": lambda: build_progressive(
        MAX_SCANS, (SIDE_OF_MOST,) * 2, "CMYK", exif=build_exif(6)
    ),
    "WebP": lambda: save(Image.new("RGBA", (5000, 5000), (1, 2, 3, 4)), "WEBP", lossless=True, exif=build_exif(6)),
    "BMP with a leap": lambda: build_run_lengths(1024, b"\0\2\xff\xff" * 100),
}


@pytest.mark.parametrize("kind", IMAGES)
def test_decoding_takes_no_more_memory_than_is_said(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(IMAGES[kind]())
    outcome = call_confined("image_classifier.imaging:load_image", path, memory_mb=700)
    assert outcome.memory_mb < 600
    assert outcome.error is None or kind == "a long row" and "a side may have 65,535 at most" in outcome.error


@pytest.mark.parametrize(
    "write",
    [
        lambda path: write_parquet_of_zeros(path, 1, 600_000_000),
        lambda path: write_parquet_of_one_value(path, 1000, bytes(30_000_000)),
    ],
    ids=["a large value", "one value in each row"],
)
def test_parquet_takes_no_more_memory_than_is_said(write: Callable[[Path], None], tmp_path: Path) -> None:
    path = tmp_path / "all.parquet"
    write(path)
    outcome = call_confined("image_classifier.data.parquet:iterate_images", path)
    assert outcome.memory_mb < 1100 and outcome.error is not None


@pytest.mark.parametrize("content", [build_onnx_of_zeros(10**9), build_onnx_without_end()], ids=["zeros", "no end"])
def test_an_onnx_file_takes_no_more_than_is_said(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    outcome = call_confined("image_classifier.serving.predictor:load_predictor", path, cpu_s=60)
    assert outcome.memory_mb < 1200 and outcome.cpu_s < 30
    assert re.search("takes more (than 1024 MB of memory|computing time) to read", outcome.error or "")
