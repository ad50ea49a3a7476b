"""Decoding: exact where it can be, the same for each kind of file, and safe against what is none."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import threading
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageOps

from image_classifier import imaging
from image_classifier.choices import Fit
from image_classifier.errors import ImageError, ImageSizeError
from image_classifier.imaging import (
    FORMATS,
    MAX_BYTES,
    MAX_CHUNKS,
    MAX_PIXELS,
    MAX_SCANS,
    MAX_SEGMENTS,
    MAX_SIDE,
    MAX_TEXTS,
    decode_image,
    load_image,
    resize_pixels,
)
from tests.bombs import build_chunk, build_exif, build_png, build_progressive, build_run_lengths, save
from tests.conftest import PROJECT

GENERATOR = np.random.default_rng(0)
NOISE = GENERATOR.integers(0, 256, (32, 32, 3), dtype=np.uint8)
LOSSLESS = [("PNG", {}), ("BMP", {}), ("WEBP", {"lossless": True})]


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


@pytest.mark.parametrize("side", [64, 96, 128, 224])
@pytest.mark.parametrize("fit", ["squeeze", "crop", "pad", "refuse"])
def test_an_image_of_the_side_that_is_asked_for_comes_out_bit_for_bit(side: int, fit: Fit) -> None:
    noise = np.random.default_rng(side).integers(0, 256, (side, side, 3), dtype=np.uint8)
    np.testing.assert_array_equal(decode_image(save(Image.fromarray(noise)), side=side, fit=fit), noise)
    np.testing.assert_array_equal(resize_pixels(noise, side), noise)
    other = save(Image.fromarray(NOISE))
    if fit == "refuse":
        with pytest.raises(ImageError, match=f"32 x 32 pixels instead of {side} x {side}"):
            decode_image(other, side=side, fit=fit)
    else:
        expected = np.asarray(Image.fromarray(NOISE).resize((side, side), Image.Resampling.BICUBIC))
        np.testing.assert_array_equal(decode_image(other, side=side, fit=fit), expected)
        np.testing.assert_array_equal(resize_pixels(NOISE, side), expected)


@pytest.mark.parametrize("side", [32, 64, 96, 128, 224])
def test_a_photo_is_decoded_at_a_part_of_its_size_and_looks_as_it_would_whole(side: int) -> None:
    smooth = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    photo = smooth.resize((3000, 2000), Image.Resampling.BICUBIC)
    content = save(photo, "JPEG", quality=95)
    whole = Image.open(io.BytesIO(content)).resize((side, side), Image.Resampling.BICUBIC)
    difference = np.abs(decode_image(content, side=side).astype(int) - np.asarray(whole).astype(int))
    assert difference.mean() < 1 and difference.max() < 16


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


def build_wide(width: int, height: int) -> Image.Image:
    """Build an image with a green square in its middle, between red on the left and blue on the right."""
    pixels = np.zeros((height, width, 3), np.uint8)
    left = (width - height) // 2
    pixels[:, :left, 0], pixels[:, left : left + height, 1], pixels[:, left + height :, 2] = 255, 255, 255
    return Image.fromarray(pixels)


@pytest.mark.parametrize("size", [(96, 32), (600, 400), (5000, 1000), (40, 20)])
@pytest.mark.parametrize("orientation", [1, 6])
def test_crop_keeps_the_square_in_the_middle(size: tuple[int, int], orientation: int) -> None:
    content = save(build_wide(*size), exif=build_exif(orientation))
    decoded = decode_image(content, fit="crop")
    inner = decoded[2:-2, 2:-2]  # antialiasing mixes in what is beside the square
    assert decoded.shape == (32, 32, 3) and (inner == (0, 255, 0)).all()


@pytest.mark.parametrize("size", [(64, 32), (600, 300), (4000, 2000), (16, 8)])
@pytest.mark.parametrize("orientation", [1, 8])
def test_pad_keeps_the_ratio_of_the_sides_between_black_borders(size: tuple[int, int], orientation: int) -> None:
    image = Image.new("RGB", size, (255, 200, 100))
    decoded = decode_image(save(image, exif=build_exif(orientation)), fit="pad")
    rows = decoded if orientation == 1 else decoded.transpose(1, 0, 2)
    assert (rows[:8] == 0).all() and (rows[-8:] == 0).all()
    assert (rows[8:-8] == (255, 200, 100)).all()


@pytest.mark.parametrize("fit", ["squeeze", "crop", "pad"])
@pytest.mark.parametrize("image_format", ["PNG", "JPEG"])
def test_the_size_of_an_image_that_is_fitted_is_noted_upright(fit: Fit, image_format: str) -> None:
    noted: list[tuple[int, int]] = []

    def note(width: int, height: int) -> None:
        noted.append((width, height))

    for size, orientation in (((3000, 400), 1), ((3000, 400), 6), ((32, 32), 1), ((33, 32), 3)):
        content = save(Image.new("RGB", size), image_format, exif=build_exif(orientation))
        decode_image(content, fit=fit, note_size=note)
    assert noted == [(3000, 400), (400, 3000), (33, 32)]


@pytest.mark.parametrize("fit", ["crop", "pad", "refuse"])
def test_a_plain_image_of_the_right_size_comes_out_bit_for_bit_however_it_is_fitted(fit: Fit) -> None:
    np.testing.assert_array_equal(decode_image(save(Image.fromarray(NOISE)), fit=fit), NOISE)


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
    decoded = decode_image(save(Image.fromarray(image), image_format, exif=build_exif(orientation), quality=95))
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
    with pytest.raises(ImageError, match="not a PNG, JPEG, WEBP or BMP image"):
        decode_image(save(Image.fromarray(NOISE), image_format))


@pytest.mark.parametrize("content", [b"<svg/>", b"%!PS-Adobe", b"\x00" * 100, b"GIF89a", b"version https://git-lfs"])
def test_what_is_no_image_is_refused(content: bytes) -> None:
    with pytest.raises(ImageError, match="not a PNG, JPEG, WEBP or BMP image"):
        decode_image(content)


def test_of_one_format_another_one_is_refused() -> None:
    with pytest.raises(ImageError, match="^not a PNG image$"):
        decode_image(save(Image.fromarray(NOISE), "JPEG"), formats=("PNG",))


def test_no_bytes_are_refused() -> None:
    with pytest.raises(ImageError, match="the file is empty"):
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
    text = build_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(80_000_000), 9))
    with pytest.raises(ImageError):
        decode_image(build_png(32, 32, content=bytes(33 * 32), chunks=text))


@pytest.mark.parametrize("size", [(MAX_SIDE + 1, 1), (1, MAX_SIDE + 1), (MAX_PIXELS, 1)])
def test_sides_that_are_too_long_to_resize_are_refused(size: tuple[int, int]) -> None:
    with pytest.raises(ImageError, match=r"^\d+ x \d+ pixels, but a side may have 65,535 at most; scale it down$"):
        decode_image(build_png(*size))


def test_webp_is_refused_beyond_what_its_decoder_can_do_with_little_memory() -> None:
    with pytest.raises(ImageError, match="^5100 x 5000 pixels, but at most 25,000,000 are decoded; scale it down$"):
        decode_image(save(Image.new("RGBA", (5100, 5000)), "WEBP", lossless=True))


def test_run_lengths_are_decoded_up_to_a_limit() -> None:
    assert (decode_image(build_run_lengths(100, b"\x64\x00\0\0" * 100 + b"\0\1")) == 0).all()
    for content in (build_run_lengths(1025, b""), build_run_lengths(100, bytes(2**22 + 4))):
        with pytest.raises(ImageError, match="a BMP with run lengths, .* 1,048,576 pixels .*; save it as PNG"):
            decode_image(content)


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_scans_are_counted_before_they_are_decoded(mode: str) -> None:
    assert decode_image(build_progressive(MAX_SCANS, mode=mode)).shape == (32, 32, 3)
    with pytest.raises(ImageError, match=f"^a JPEG of more than {MAX_SCANS} scans; save it again$"):
        decode_image(build_progressive(MAX_SCANS + 1, mode=mode))


def test_the_scans_of_other_pictures_in_a_jpeg_are_not_counted() -> None:
    many, photo = build_progressive(MAX_SCANS + 1), save(Image.fromarray(NOISE), "JPEG", quality=100, subsampling=0)
    thumbnail = b"\xff\xe1" + struct.pack(">H", len(many) + 2) + many
    decoded = decode_image(photo[:2] + thumbnail + photo[2:] + many)
    np.testing.assert_allclose(decoded.astype(int), NOISE, atol=12)


@pytest.mark.parametrize(
    "insert, reason",
    [
        (b"\xff\xe1\0\2" * MAX_SEGMENTS, "a JPEG of more than 1,000 segments; save it again"),
        (b"\xff\xdb\0\2" * MAX_SEGMENTS, "a JPEG of more than 1,000 segments; save it again"),
        (b"a" * 2**17, "the image is damaged: invalid JPEG data before the pixels"),
        (b"\xff\xdb\0\2" + b"\xff" * 2**17, "the image is damaged: invalid JPEG data before the pixels"),
        (b"\xff\xd9" + b"\xff\xe1\0\2" * 2**10, "the image is damaged: invalid JPEG data before the pixels"),
    ],
)
def test_what_takes_long_before_the_pixels_of_a_jpeg_is_refused(insert: bytes, reason: str) -> None:
    photo = save(Image.fromarray(NOISE), "JPEG")
    with pytest.raises(ImageError, match=f"^{reason}$"):
        decode_image(photo[:2] + insert + photo[2:])


def test_fill_bytes_between_the_segments_of_a_jpeg_are_passed_over() -> None:
    photo = save(Image.fromarray(NOISE), "JPEG")
    filled = photo[:2] + b"\xff" * 100 + photo[2:]
    np.testing.assert_array_equal(decode_image(filled), decode_image(photo))


@pytest.mark.parametrize(
    "chunks", [build_chunk(b"IDAT", b"") * (MAX_CHUNKS + 1), build_chunk(b"iCCP", b"a\0\0") * (MAX_TEXTS + 1)]
)
def test_what_takes_long_beside_the_pixels_of_a_png_is_refused(chunks: bytes) -> None:
    with pytest.raises(ImageError, match="^a PNG of more than 65,536 chunks, or 256 of text; save it again$"):
        decode_image(build_png(32, 32, content=bytes(33 * 32), chunks=chunks))


def test_heavy_images_take_turns_and_leave_room_for_light_ones() -> None:
    budget = imaging._Budget(100 * 2**20)
    inside, done = threading.Semaphore(0), threading.Event()
    held: list[int] = []

    def hold() -> None:
        with budget.take(40 * 2**20):
            held.append(budget._left)
            inside.release()
            assert done.wait(20)

    threads = [threading.Thread(target=hold) for _ in range(4)]
    for thread in threads:
        thread.start()
    assert inside.acquire(timeout=20)
    assert not inside.acquire(timeout=0.2)  # a second one would take what is left for light ones
    for light in (imaging._LIGHT_BYTES, imaging._SMALL_BYTES, 1):
        with budget.take(light):
            assert budget._left >= 28 * 2**20
    done.set()
    for thread in threads:
        thread.join(20)
    assert held == [60 * 2**20] * 4 and budget._left == 100 * 2**20
    with budget.take(10**12):
        assert budget._left == imaging._LIGHT_BYTES


@pytest.mark.parametrize("mode", ["RGB", "I;16", "CMYK"])
def test_an_image_waits_for_as_much_memory_as_it_takes(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []

    class Noted(imaging._Budget):
        def take(self, num_bytes: int) -> Any:
            taken.append(num_bytes)
            return super().take(num_bytes)

    monkeypatch.setattr(imaging, "_BUDGET", Noted(imaging._BUDGET_BYTES))
    narrowed = 32 * 4  # bytes of a row, or a column, that is resized in one direction
    if mode == "CMYK":
        decode_image(save(Image.new(mode, (800, 800)), "JPEG", progressive=True))
        assert taken == [400 * 400 * 4 + 800 * 800 * 4 * 2 + narrowed * 400]
    else:
        decode_image(save(Image.new(mode, (300, 300))))
        assert taken == [300 * 300 * (2 if mode == "I;16" else 4) + narrowed * 300]


def decode_whole(content: bytes, fit: Fit) -> NDArray[np.uint8]:
    """Decode an image as a whole: convert it, turn it, and only then resize it."""
    image: Image.Image = Image.open(io.BytesIO(content))
    image.draft(None, (256, 256))
    image.load()
    orientation = image.getexif().get(0x0112, 1)
    if image.mode == "I;16":
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    if orientation in imaging.UPRIGHT:
        image = image.transpose(imaging.UPRIGHT[orientation])
    fits: dict[Fit, Callable[..., Image.Image]] = {
        "squeeze": Image.Image.resize,
        "crop": ImageOps.fit,
        "pad": ImageOps.pad,
    }
    return np.array(fits[fit](image, (32, 32), Image.Resampling.BICUBIC))


def build_noise(mode: str, width: int, height: int, orientation: int) -> bytes:
    """Build a file of a mode, in which all pixels differ, that is turned."""
    noise = np.random.default_rng(width).integers(0, 256, (height, width, 4), dtype=np.uint8)
    exif = build_exif(orientation)
    if mode == "16 bits":
        rows = b"".join(b"\0" + noise[row].repeat(2, axis=1).tobytes() for row in range(height))
        turned = build_chunk(b"eXIf", exif.tobytes()[6:])
        return build_png(width, height, content=rows, depth=16, colour=6, chunks=turned)
    if mode == "I;16":
        return save(Image.fromarray(noise.view(np.uint16)[..., 0].copy()), exif=exif)
    if mode == "CMYK":
        return save(Image.fromarray(noise[..., :3]).convert("CMYK"), "JPEG", progressive=True, exif=exif)
    image_format = mode if mode in ("JPEG", "WEBP") else "PNG"
    image = Image.fromarray(noise).convert({"JPEG": "RGB", "WEBP": "RGBA"}.get(mode, mode))
    return save(image, image_format, exif=exif, **({"transparency": 3} if mode == "P" else {}))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16", "16 bits", "CMYK", "JPEG", "WEBP"])
@pytest.mark.parametrize("size", [(90, 70), (530, 520), (60, 190), (32, 500), (500, 32), (3, 400), (32, 32)])
def test_strips_come_out_as_the_whole_does(mode: str, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    fits: list[Fit] = ["squeeze", "crop", "pad"]
    for orientation in range(1, 9):
        content = build_noise(mode, *size, orientation)
        for fit in fits:
            whole = decode_whole(content, fit)
            for num_pixels in (1000, 2**18):
                monkeypatch.setattr(imaging, "_STRIP_PIXELS", num_pixels)
                np.testing.assert_array_equal(decode_image(content, fit=fit), whole, f"{orientation} {fit}")


@pytest.mark.parametrize(
    "size, image_format, options, is_decoded",
    [
        ((6000, 4000), "JPEG", {}, True),  # at an eighth
        ((6000, 4000), "JPEG", {"progressive": True}, False),
        ((4000, 3000), "JPEG", {"progressive": True}, True),
        ((8000, 6260), "JPEG", {}, False),  # more than may be decoded at any scale
        ((60_000, 500), "JPEG", {}, False),  # too narrow for another scale
        ((4000, 3000), "PNG", {}, True),
        ((5000, 5000), "PNG", {}, False),
        ((3840, 2160), "WEBP", {"lossless": True}, True),
        ((4000, 3000), "WEBP", {"lossless": True}, False),
    ],
)
def test_pixels_count_as_they_are_decoded(
    size: tuple[int, int], image_format: str, options: dict[str, Any], is_decoded: bool
) -> None:
    content = save(Image.new("RGB", size), image_format, **options)
    if is_decoded:
        assert (decode_image(content, max_pixels=12_500_000) == 0).all()
    else:
        with pytest.raises(ImageSizeError, match=f"^{size[0]} x {size[1]} pixels, but at most .* are decoded"):
            decode_image(content, max_pixels=12_500_000)


def test_a_jpeg_whose_colours_come_one_after_the_other_counts_whole() -> None:
    """Its decoder keeps it whole, progressive or not."""
    content = save(Image.new("RGB", (5000, 5000)), "JPEG")
    assert decode_image(content, max_pixels=12_500_000).shape == (32, 32, 3)
    head, _, rest = content.partition(b"\xff\xda\0\x0c\3")
    single = head + b"\xff\xda\0\x08\1" + rest[:2] + rest[6:]
    with pytest.raises(ImageSizeError, match="^5000 x 5000 pixels, but at most 12,500,000 are decoded"):
        decode_image(single, max_pixels=12_500_000)


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
    with pytest.raises(ImageError, match=r"bad\.png: not a PNG"):
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
        load_image(tmp_path / "large.png", fit="refuse")
    assert decode_image(save(Image.new("RGB", (32, 32), "red")), fit="refuse")[0, 0].tolist() == [255, 0, 0]
