"""Decode the bytes of an image file to what the network takes: uint8 [32, 32, 3] RGB. Free of torch.

An image is decoded by one of four decoders and no other, after its size in bytes and in pixels was checked, and that
it holds no more parts than files of its format do; one that is animated is refused (a JPEG's further pictures, such as
the depth that phones add, are left aside). It is turned as its EXIF data say, what is transparent becomes white, 16
bits a channel become 8 (the upper ones), and colour profiles are left aside. Another size than 32 x 32 is resized with
antialiasing: as a whole, whatever the ratio of its sides; cut to the square in its middle; or with a black border. A
plain RGB image of 32 x 32 comes out bit for bit.

Decoding takes up to 600 MB, for all threads together: those with large images wait for each other.
"""

from __future__ import annotations

import io
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from image_classifier.config import Fit
from image_classifier.errors import ImageError, ImageSizeError

SIDE = 32
FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
MAX_BYTES = 2**25
MAX_PIXELS = 50_000_000
"""What a large camera takes; decoded, this is 200 MB."""
MAX_WEBP_PIXELS = 25_000_000
"""Of WebP, whose decoder keeps three copies of an image."""
MAX_RUN_LENGTH_PIXELS = 2**20
"""Of BMP with run lengths, which Pillow decodes in Python."""
MAX_SIDE = 65_535
"""JPEG has no longer ones; resizing a row of 50 million pixels takes 1.6 GB of weights."""
MAX_SCANS = 40
"""Of a JPEG: progressive files have 10, of CMYK 18. Each is another pass, 50 ms for the most pixels."""
MAX_SEGMENTS = 1000
"""Of a JPEG, its scans counted; cameras write up to a hundred, most of them with a second picture."""
MAX_CHUNKS = 2**16
"""Of a PNG; usually they hold 8 kB each."""
MAX_TEXTS = 256
"""Chunks of a PNG that unpack to up to 1 MB of text or colour profile."""

UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What turns an image upright, by its EXIF orientation. (`ImageOps.exif_transpose` writes all EXIF data anew, too.)"""

SIDEWAYS = (5, 6, 7, 8)
"""The orientations of images that lie on their side."""

_FITS: dict[Fit, Callable[[Image.Image, tuple[int, int], Image.Resampling], Image.Image]] = {
    "squeeze": Image.Image.resize,
    "crop": ImageOps.fit,
    "pad": ImageOps.pad,
}
_SMALL_PIXELS = 2**20
"""Images up to this size are decoded without waiting for others."""
_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
"""Of a JPEG, apart from those that stand within a scan's data."""
_START_OF_IMAGE, _END_OF_IMAGE, _START_OF_SCAN = 0xD8, 0xD9, 0xDA
_BARE_MARKERS = (0x01, 0xC8, _START_OF_IMAGE, _END_OF_IMAGE, 0xDE, 0xDF, *range(0xF0, 0xFE))
"""Markers after which no length stands, or for which decoders do not agree on that."""

# For the whole process, since a filter that is set and taken back around each call is not safe among threads.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")  # a line for each tag that is damaged
warnings.simplefilter("error", Image.DecompressionBombWarning)


def load_image(
    path: Path, *, fit: Fit = "squeeze", note_size: Callable[[int, int], None] | None = None
) -> NDArray[np.uint8]:
    """Load an image file: uint8 [32, 32, 3] RGB.

    Raises:
        ImageError: it cannot be read; the message has the path and the reason.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
        return decode_image(content, fit=fit, note_size=note_size)
    except OSError as error:
        raise ImageError(f"{path}: {error.strerror}") from error
    except ImageError as error:
        raise ImageError(f"{path}: {error}") from error


def decode_image(
    content: bytes,
    *,
    max_bytes: int = MAX_BYTES,
    max_pixels: int = MAX_PIXELS,
    formats: tuple[str, ...] = FORMATS,
    fit: Fit = "squeeze",
    note_size: Callable[[int, int], None] | None = None,
) -> NDArray[np.uint8]:
    """Decode the bytes of an image file: uint8 [32, 32, 3] RGB.

    Args:
        fit: what becomes of an image of another size.
        note_size: told width and height of one that was fitted.

    Raises:
        ImageSizeError: more pixels than max_pixels.
        ImageError: none of the formats, animated, damaged, truncated, over a limit, or of another size and to be
            refused; the message is the reason.
    """
    if not content:
        raise ImageError("there are no bytes of an image")
    if len(content) > max_bytes:
        raise ImageError(f"more than {max_bytes:,} bytes; scale it down")
    try:
        _check_parts(content)
        with Image.open(io.BytesIO(content), formats=formats) as image:
            _check_size(image, max_pixels, len(content))
            if image.format in ("PNG", "WEBP") and getattr(image, "is_animated", False):
                raise ImageError("the image is animated; choose one of its frames")
            if fit == "refuse" and image.size != (SIDE, SIDE):
                raise ImageError(f"{image.width} x {image.height} pixels instead of {SIDE} x {SIDE}")
            if image.format != "PNG":
                return _load_fitted(image, fit, note_size)
            image.verify()  # the checksums, which decoding does not look at
        with Image.open(io.BytesIO(content), formats=("PNG",)) as image:  # verified, the one before is unusable
            return _load_fitted(image, fit, note_size)
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError(f"no image in one of the formats {', '.join(formats)}") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageSizeError(f"more than {max_pixels:,} pixels") from error
    except Exception as error:  # decoders raise what they like: struct.error, SyntaxError, zlib.error
        raise ImageError(f"the image is damaged: {' '.join(str(error).split()) or type(error).__name__}") from error


class _Budget:
    """Pixels of large images that may be decoded at the same time; a thread waits until there are enough."""

    def __init__(self, num_pixels: int) -> None:
        self._left = self._all = num_pixels
        self._change = threading.Condition()

    @contextmanager
    def take(self, num_pixels: int) -> Iterator[None]:
        num_pixels = 0 if num_pixels <= _SMALL_PIXELS else min(num_pixels, self._all)
        with self._change:
            self._change.wait_for(lambda: self._left >= num_pixels)
            self._left -= num_pixels
        try:
            yield
        finally:
            with self._change:
                self._left += num_pixels
                self._change.notify_all()


_BUDGET = _Budget(MAX_PIXELS)


def _check_size(image: Image.Image, max_pixels: int, num_bytes: int) -> None:
    num_pixels, size = image.width * image.height, f"{image.width} x {image.height}"
    if image.format == "WEBP":
        max_pixels = min(max_pixels, MAX_WEBP_PIXELS)
    if num_pixels > max_pixels:
        raise ImageSizeError(f"{size} pixels, but at most {max_pixels:,} are decoded; scale it down")
    if max(image.size) > MAX_SIDE:
        raise ImageSizeError(f"{size} pixels, but a side may have {MAX_SIDE:,} at most; scale it down")
    has_run_lengths = image.format == "BMP" and image.info.get("compression") in (1, 2)
    if has_run_lengths and max(num_pixels, num_bytes // 4) > MAX_RUN_LENGTH_PIXELS:
        raise ImageSizeError(
            f"a BMP with run lengths, of which at most {MAX_RUN_LENGTH_PIXELS:,} pixels are decoded; save it as PNG"
        )


def _check_parts(content: bytes) -> None:
    """Check that there are no more parts in the file than a decoder gets through in a moment."""
    if content.startswith(b"\xff\xd8"):
        _check_segments(content)
    elif content.startswith(b"\x89PNG\r\n\x1a\n"):
        _check_chunks(content)


def _check_segments(content: bytes) -> None:
    position, num_segments, num_scans, num_skipped = 2, 0, 0, 0
    while match := _MARKER.search(content, position):
        marker = match[0][1]
        if num_scans == 0:  # Pillow reads up to here, what is no segment byte by byte
            num_skipped += match.start() - position
            if marker in _BARE_MARKERS or num_skipped > 2**16:
                raise ImageError("the image is damaged: what is before its pixels is no JPEG")
        if marker == _END_OF_IMAGE:
            break
        num_segments += 1
        num_scans += marker == _START_OF_SCAN
        if num_scans > MAX_SCANS:
            raise ImageError(f"a JPEG of more than {MAX_SCANS} scans; save it again")
        if num_segments > MAX_SEGMENTS:
            raise ImageError(f"a JPEG of more than {MAX_SEGMENTS:,} segments; save it again")
        position = match.end()
        if marker not in _BARE_MARKERS:
            position += max(2, int.from_bytes(content[position : position + 2], "big"))


def _check_chunks(content: bytes) -> None:
    position, num_chunks, num_texts = 8, 0, 0
    while len(kind := content[position + 4 : position + 8]) == 4:
        num_chunks += 1
        num_texts += kind in (b"iCCP", b"iTXt", b"zTXt")
        if num_chunks > MAX_CHUNKS or num_texts > MAX_TEXTS:
            raise ImageError(f"a PNG of more than {MAX_CHUNKS:,} chunks, or {MAX_TEXTS} of text; save it again")
        position += 12 + int.from_bytes(content[position : position + 4], "big")


def _load_fitted(image: Image.Image, fit: Fit, note_size: Callable[[int, int], None] | None) -> NDArray[np.uint8]:
    size, num_pixels = image.size, image.width * image.height
    image.draft(None, (8 * SIDE, 8 * SIDE))  # a large JPEG is decoded at a part of its size, 8 times ours
    if "progressive" not in image.info:  # a progressive one is in memory whole all the same
        num_pixels = image.width * image.height
    with _BUDGET.take(num_pixels):
        image.load()
        orientation = image.getexif().get(ExifTags.Base.Orientation)
        rgb = _convert_to_rgb(image)
        if rgb is not image:
            image.close()  # gives its pixels up
        if orientation in UPRIGHT:
            rgb = rgb.transpose(UPRIGHT[orientation])
        if rgb.size != (SIDE, SIDE):
            if note_size is not None:
                note_size(*(size[::-1] if orientation in SIDEWAYS else size))
            rgb = _FITS[fit](rgb, (SIDE, SIDE), Image.Resampling.BICUBIC)
        return np.frombuffer(bytearray(rgb.tobytes()), np.uint8).reshape(SIDE, SIDE, 3)


def _convert_to_rgb(image: Image.Image) -> Image.Image:
    """Convert strip by strip, because some modes take several copies on the way."""
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    num_rows = max(1, _SMALL_PIXELS // image.width)
    if image.height <= num_rows:
        return _convert_strip(image)
    rgb = Image.new("RGB", image.size)
    for top in range(0, image.height, num_rows):
        strip = image.crop((0, top, image.width, min(top + num_rows, image.height)))
        rgb.paste(_convert_strip(strip), (0, top))
    return rgb


def _convert_strip(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip and not scale
        image = Image.fromarray((np.clip(np.asarray(image), 0, 65535) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
