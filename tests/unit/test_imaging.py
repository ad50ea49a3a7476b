"""Decoding: exact where it can be, the same for each kind of file, and safe against what is none."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from image_classifier.errors import ImageError
from image_classifier.imaging import FORMATS, MAX_BYTES, decode_image, load_image
from tests.conftest import PROJECT

GENERATOR = np.random.default_rng(0)
NOISE = GENERATOR.integers(0, 256, (32, 32, 3), dtype=np.uint8)
LOSSLESS = [("PNG", {}), ("BMP", {}), ("WEBP", {"lossless": True})]


def save(image: Image.Image, image_format: str = "PNG", **options: Any) -> bytes:
    """Encode an image."""
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def build_png(width: int, height: int, *, content: bytes = b"", chunks: bytes = b"") -> bytes:
    """Build a PNG of grey pixels whose header may claim any size."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(content))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunks + data + chunk(b"IEND", b"")


@pytest.mark.parametrize("image_format, options", LOSSLESS)
def test_a_plain_image_of_the_right_size_comes_out_bit_for_bit(image_format: str, options: dict[str, Any]) -> None:
    decoded = decode_image(save(Image.fromarray(NOISE), image_format, **options))
    assert decoded.dtype == np.uint8 and decoded.flags.writeable
    np.testing.assert_array_equal(decoded, NOISE)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.tuples(*[st.integers(0, 255)] * 3), st.sampled_from(LOSSLESS))
def test_an_even_image_of_any_size_keeps_its_colour(
    width: int, height: int, colour: tuple[int, int, int], kind: tuple[str, dict[str, Any]]
) -> None:
    decoded = decode_image(save(Image.new("RGB", (width, height), colour), kind[0], **kind[1]))
    assert decoded.shape == (32, 32, 3) and (decoded == colour).all()


def test_shrinking_averages_and_does_not_pick() -> None:
    checks = np.indices((512, 512)).sum(axis=0) % 2 * np.uint8(255)
    decoded = decode_image(save(Image.fromarray(checks.astype(np.uint8))))
    assert decoded.min() > 100 and decoded.max() < 155


def test_the_whole_image_is_kept_whatever_its_sides() -> None:
    image = np.zeros((20, 400, 3), np.uint8)
    image[:, :200, 0], image[:, 200:, 2] = 255, 255
    decoded = decode_image(save(Image.fromarray(image)))
    assert decoded[:, :12].reshape(-1, 3).tolist() == [[255, 0, 0]] * 384
    assert decoded[:, -12:].reshape(-1, 3).tolist() == [[0, 0, 255]] * 384


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK"])
def test_each_mode_becomes_rgb(mode: str) -> None:
    image = Image.fromarray(NOISE).convert(mode)
    expected = np.array(image.convert("RGB"))
    decoded = decode_image(save(image, "JPEG", quality=100, subsampling=0) if mode == "CMYK" else save(image))
    np.testing.assert_allclose(decoded.astype(int), expected, atol=12 if mode == "CMYK" else 0)


@pytest.mark.parametrize(
    "mode, options", [("RGBA", {}), ("LA", {}), ("P", {"transparency": 0}), ("RGB", {"transparency": (9, 9, 9)})]
)
def test_what_is_transparent_becomes_white(mode: str, options: dict[str, Any]) -> None:
    colours: dict[str, Any] = {"RGBA": (9, 9, 9, 0), "LA": (9, 0), "P": 0, "RGB": (9, 9, 9)}
    image = Image.new(mode, (32, 32), colours[mode])
    assert (decode_image(save(image, **options)) == 255).all()
    half = Image.new("RGBA", (32, 32), (0, 0, 0, 128))
    assert (decode_image(save(half)) == 127).all()


def test_sixteen_bits_of_grey_become_their_upper_eight() -> None:
    grey = GENERATOR.integers(0, 65536, (32, 32), dtype=np.uint16)
    decoded = decode_image(save(Image.fromarray(grey)))
    np.testing.assert_array_equal(decoded, np.repeat((grey >> 8).astype(np.uint8)[:, :, None], 3, axis=2))


@pytest.mark.parametrize(
    "orientation, expected",
    [
        (1, lambda a: a),
        (2, lambda a: a[:, ::-1]),
        (3, lambda a: a[::-1, ::-1]),
        (4, lambda a: a[::-1]),
        (5, lambda a: a.transpose(1, 0, 2)),
        (6, lambda a: np.rot90(a, -1)),
        (7, lambda a: a.transpose(1, 0, 2)[::-1, ::-1]),
        (8, np.rot90),
        (9, lambda a: a),
    ],
)
@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP"])
def test_the_rotation_of_the_camera_is_honoured(orientation: int, expected: Any, image_format: str) -> None:
    smooth = np.linspace(0, 255, 32)[:, None, None] * np.array([1, 0.5, 0]) + np.linspace(0, 120, 32)[
        :, None
    ] * np.array([0, 1, 1])
    image = smooth.clip(0, 255).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    decoded = decode_image(save(Image.fromarray(image), image_format, exif=exif, quality=95))
    np.testing.assert_allclose(decoded.astype(int), expected(image), atol=25)


def test_damaged_tags_are_left_aside_without_a_word(tmp_path: Path) -> None:
    exif = b"Exif\0\0II*\0" + struct.pack("<LH", 8, 100)
    exif += b"".join(struct.pack("<HHLL", 0x9000 + tag, 7, 60_000, 8) for tag in range(100)) + bytes(4)
    (tmp_path / "image.jpg").write_bytes(save(Image.fromarray(NOISE), "JPEG", exif=exif))
    program = "import sys; from pathlib import Path; from image_classifier.imaging import load_image;"
    program += "print(load_image(Path(sys.argv[1])).shape)"
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "image.jpg"], capture_output=True, text=True, check=True, cwd=PROJECT
    )
    assert (done.stdout, done.stderr) == ("(32, 32, 3)\n", "")


def test_a_large_photo_is_decoded_close_to_its_exact_resize() -> None:
    smooth = Image.fromarray(NOISE).resize((1600, 1200), Image.Resampling.BICUBIC)
    decoded = decode_image(save(smooth, "JPEG", quality=95))
    np.testing.assert_allclose(
        decoded.astype(int), np.array(smooth.resize((32, 32), Image.Resampling.BICUBIC)), atol=16
    )


@pytest.mark.parametrize("image_format", ["GIF", "TIFF", "ICO", "PPM", "TGA", "PCX", "EPS"])
def test_other_formats_are_refused(image_format: str) -> None:
    with pytest.raises(ImageError, match="no image in one of the formats PNG, JPEG, WEBP, BMP"):
        decode_image(save(Image.fromarray(NOISE), image_format))


@pytest.mark.parametrize("content", [b"<svg/>", b"%!PS-Adobe", b"\x00" * 100, b"GIF89a", b"version https://git-lfs"])
def test_what_is_no_image_is_refused(content: bytes) -> None:
    with pytest.raises(ImageError, match="no image in one of the formats"):
        decode_image(content)


def test_no_bytes_are_refused() -> None:
    with pytest.raises(ImageError, match="there are no bytes"):
        decode_image(b"")


@pytest.mark.parametrize("image_format", FORMATS)
def test_a_truncated_image_is_refused_wherever_it_ends(image_format: str) -> None:
    content = save(Image.fromarray(NOISE), image_format)
    for sixteenth in range(16):
        with pytest.raises(ImageError) as caught:
            decode_image(content[: len(content) * sixteenth // 16])
        assert str(caught.value).isprintable()


def test_a_png_with_a_flipped_bit_is_refused() -> None:
    content = bytearray(save(Image.fromarray(NOISE)))
    content[len(content) // 2] ^= 1
    with pytest.raises(ImageError, match="damaged"):
        decode_image(bytes(content))


def test_limits_are_checked_before_decoding() -> None:
    with pytest.raises(ImageError, match=r"^7000 x 7500 pixels, but at most 50,000,000 are decoded"):
        decode_image(build_png(7000, 7500))
    with pytest.raises(ImageError, match="33 x 32 pixels, but at most 1,024"):
        decode_image(build_png(33, 32, content=bytes(33 * 33)), max_pixels=1024)
    with pytest.raises(ImageError, match="more than 100 bytes"):
        decode_image(save(Image.fromarray(NOISE)), max_bytes=100)


@pytest.mark.parametrize("side", [9_500, 14_000, 2**31 - 1])
def test_a_decompression_bomb_is_an_error_and_no_warning(side: int) -> None:
    with warnings.catch_warnings(record=True) as caught, pytest.raises(ImageError, match="more than 50,000,000 pixels"):
        decode_image(build_png(side, side))
    assert not caught


def test_a_bomb_in_a_text_chunk_is_refused() -> None:
    text = b"a\0\0" + zlib.compress(bytes(80_000_000), 9)
    chunk = struct.pack(">I", len(text)) + b"zTXt" + text + struct.pack(">I", zlib.crc32(b"zTXt" + text))
    with pytest.raises(ImageError):
        decode_image(build_png(32, 32, content=bytes(33 * 32), chunks=chunk))


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(FORMATS), st.data())
def test_an_image_with_changed_bytes_is_decoded_or_refused(image_format: str, data: st.DataObject) -> None:
    content = bytearray(save(Image.fromarray(NOISE[:8, :8]), image_format))
    for _ in range(data.draw(st.integers(1, 5))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        decoded: NDArray[np.uint8] = decode_image(bytes(content), max_pixels=100_000)
        assert decoded.shape == (32, 32, 3)
    except ImageError as error:
        assert str(error).isprintable()


def test_a_file_is_loaded_or_named(tmp_path: Path) -> None:
    (tmp_path / "good.png").write_bytes(save(Image.fromarray(NOISE)))
    np.testing.assert_array_equal(load_image(tmp_path / "good.png"), NOISE)
    (tmp_path / "bad.png").write_bytes(b"bad")
    with pytest.raises(ImageError, match=r"bad\.png: no image in one of"):
        load_image(tmp_path / "bad.png")
    with pytest.raises(ImageError, match=r"none\.png: No such file or directory"):
        load_image(tmp_path / "none.png")
    with open(tmp_path / "large.png", "wb") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(ImageError, match=r"large\.png: more than 33,554,432 bytes"):
        load_image(tmp_path / "large.png")


def test_another_size_is_refused_where_it_is_not_to_be_resized(tmp_path: Path) -> None:
    (tmp_path / "large.png").write_bytes(save(Image.new("RGB", (40, 30))))
    with pytest.raises(ImageError, match="large.png: 40 x 30 pixels instead of 32 x 32"):
        load_image(tmp_path / "large.png", resize=False)
    assert decode_image(save(Image.new("RGB", (32, 32), "red")), resize=False)[0, 0].tolist() == [255, 0, 0]
