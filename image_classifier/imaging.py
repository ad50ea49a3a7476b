"""Decodes an image file to the network's input: uint8 [S, S, 3] RGB. Without torch.

Only four decoders are used, after checks of the size in bytes and pixels and of the number of parts in the file.
Animated images are refused. Further pictures in a JPEG, such as a phone's depth map, are ignored. The EXIF orientation
is applied, transparency becomes white, 16-bit channels keep their upper 8 bits, and colour profiles are ignored. Other
sizes than S x S are resized with antialiasing: squeezed, cropped to the central square, or padded in black. A plain RGB
image of S x S is returned bit for bit.

A JPEG is decoded at 1/2, 1/4 or 1/8 of its size if that is still large enough. For all formats, only the decoder's own
image is held as a whole: conversion, rotation and resizing work strip by strip.

All threads together use up to 160 MB for images that the server accepts by default, and 450 MB for images of a data
set. Large images wait for each other, and always leave memory for small ones.
"""

from __future__ import annotations

import ctypes
import io
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from image_classifier.choices import Fit
from image_classifier.errors import ImageError, ImageSizeError
from image_classifier.image_sizes import DEFAULT_IMAGE_SIZE
from image_classifier.text import one_line

FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
MAX_BYTES = 2**25
MAX_PIXELS = 50_000_000
"""Resolution of large cameras; 200 MB when decoded."""
MAX_WEBP_PIXELS = 25_000_000
"""Limit for WebP, whose decoder keeps three more copies of an image."""
MAX_RUN_LENGTH_PIXELS = 2**20
"""Limit for run-length encoded BMP, which Pillow decodes in Python."""
MAX_SIDE = 65_535
"""The longest side of a JPEG. Resizing a row of 50 million pixels would take 1.6 GB of weights."""
MAX_SCANS = 40
"""Limit for JPEG: progressive files have 10, in CMYK 18. Each is another pass, of 50 ms for the most pixels."""
MAX_SEGMENTS = 1000
"""Limit for JPEG, including scans; cameras write up to a hundred, mostly for a second picture."""
MAX_CHUNKS = 2**16
"""Limit for PNG; a chunk usually has 8 kB."""
MAX_TEXTS = 256
"""Limit of PNG chunks that may unpack to 1 MB of text or colour profile each."""

UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""Transpositions by EXIF orientation. (`ImageOps.exif_transpose` would also rewrite all EXIF data.)"""

SIDEWAYS = (5, 6, 7, 8)
"""Orientations that swap width and height."""

_FEWEST_DRAFT_PIXELS, _DRAFT_SCALE = 256, 3
"""Smallest side at which a JPEG is decoded, in pixels and as a multiple of S. From a factor of 3 on, the result hardly
differs from that of the full size (see `reducing_gap` of Pillow)."""
_STRIP_PIXELS = 2**18
"""Pixels that are converted, rotated and resized at a time."""
_SMALL_BYTES = 4 * 2**20
"""Images up to this memory are decoded without waiting."""
_LIGHT_BYTES = 32 * 2**20
"""Memory reserved for images up to this size (Full HD as WebP, 4K as PNG); larger ones do not use it."""
_BUDGET_BYTES = 160 * 2**20
"""Memory of all images that are decoded at the same time. A larger image is decoded alone among the large ones."""
_PIXEL_BYTES = {"1": 1, "L": 1, "P": 1, "I;16": 2}
"""Bytes per pixel by mode; 4 for other modes."""
_WEBP_PIXEL_BYTES = 16
_COEFFICIENT_BYTES = 2
_M_MMAP_THRESHOLD = -3
"""Parameter of glibc's `mallopt`: the size from which allocations use mmap."""
_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
"""JPEG markers except those within scan data."""
_START_OF_IMAGE, _END_OF_IMAGE, _START_OF_SCAN = 0xD8, 0xD9, 0xDA
_BARE_MARKERS = (0x01, 0xC8, _START_OF_IMAGE, _END_OF_IMAGE, 0xDE, 0xDF, *range(0xF0, 0xFE))
"""Markers without a length field, or for which decoders disagree."""

# For the whole process: setting filters around each call is not thread-safe.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")  # one warning per damaged tag
warnings.simplefilter("error", Image.DecompressionBombWarning)


def load_image(
    path: Path,
    *,
    side: int = DEFAULT_IMAGE_SIZE,
    fit: Fit = "squeeze",
    note_size: Callable[[int, int], None] | None = None,
) -> NDArray[np.uint8]:
    """Load an image file: uint8 [side, side, 3] RGB.

    Raises:
        ImageError: it cannot be decoded; the message has the path and the reason.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
        return decode_image(content, side=side, fit=fit, note_size=note_size)
    except OSError as error:
        raise ImageError(f"{path}: {error.strerror}") from error
    except ImageError as error:
        raise ImageError(f"{path}: {error}") from error


# Over 50 lines: one attempt, whose many exceptions become one type.
def decode_image(
    content: bytes,
    *,
    side: int = DEFAULT_IMAGE_SIZE,
    max_bytes: int = MAX_BYTES,
    max_pixels: int = MAX_PIXELS,
    formats: tuple[str, ...] = FORMATS,
    fit: Fit = "squeeze",
    note_size: Callable[[int, int], None] | None = None,
) -> NDArray[np.uint8]:
    """Decode the bytes of an image file: uint8 [side, side, 3] RGB.

    Args:
        max_pixels: limit of decoded pixels. A JPEG counts at the scale at which it is decoded, 1/8 for most photos,
            unless it is progressive. A WebP counts 1.5 times. The full size of a JPEG may reach `MAX_PIXELS`.
        fit: how to resize an image of another size.
        note_size: called with width and height of an image that is resized.

    Raises:
        ImageSizeError: it has more than `max_pixels`.
        ImageError: it has another format, is animated, damaged or truncated, exceeds a limit, or has another size and
            `fit` refuses that. The message is the reason.
    """
    if not content:
        raise ImageError("the file is empty")
    if len(content) > max_bytes:
        raise ImageError(f"more than {max_bytes:,} bytes; scale it down")
    try:
        num_components = _check_parts(content)
        with Image.open(io.BytesIO(content), formats=formats) as image:
            size = image.size
            draft = max(_FEWEST_DRAFT_PIXELS, _DRAFT_SCALE * side)
            image.draft(None, (draft, draft))  # decode a large JPEG at a reduced size
            is_whole = image.format == "JPEG" and _is_kept_whole(image, num_components)
            _check_size(image, size, max_pixels, len(content), is_whole)
            if image.format in ("PNG", "WEBP") and getattr(image, "is_animated", False):
                raise ImageError("the image is animated; choose one of its frames")
            if fit == "refuse" and size != (side, side):
                raise ImageError(f"{size[0]} x {size[1]} pixels instead of {side} x {side}")
            if image.format != "PNG":
                with _BUDGET.take(_count_bytes(image, size, is_whole, side)):
                    return _load_fitted(image, size, side, fit, note_size)
            image.verify()  # checks the checksums, which decoding ignores
        with (
            Image.open(io.BytesIO(content), formats=("PNG",)) as image,  # verify() makes an image unusable
            _BUDGET.take(_count_bytes(image, size, is_whole, side)),
        ):
            return _load_fitted(image, size, side, fit, note_size)
    except ImageError:
        raise
    except MemoryError as error:
        raise ImageError("there is not enough memory to decode the image") from error
    except UnidentifiedImageError as error:
        names = " or ".join(", ".join(part) for part in (formats[:-1], formats[-1:]) if part)
        raise ImageError(f"not a {names} image") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageSizeError(f"more than {max_pixels:,} pixels") from error
    except Exception as error:  # decoders raise struct.error, SyntaxError, zlib.error and more
        raise ImageError(f"the image is damaged: {one_line(error)}") from error


def resize_pixels(
    pixels: NDArray[np.uint8], side: int, note_size: Callable[[int, int], None] | None = None
) -> NDArray[np.uint8]:
    """Resize decoded pixels, uint8 [H, W, 3], like those of a file: uint8 [side, side, 3]."""
    image = Image.fromarray(pixels)
    return _load_fitted(image, image.size, side, "squeeze", note_size)


def give_memory_back(num_bytes: int = _SMALL_BYTES) -> None:
    """Let this process return freed memory to the system at once, for servers.

    By default, glibc keeps tens of MB for each decoding thread. Training is faster if it keeps memory for reuse.

    Args:
        num_bytes: size from which allocations are returned when they are freed.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # not glibc
        return
    mallopt(_M_MMAP_THRESHOLD, num_bytes)


class _Budget:
    """Limits the memory of images that are decoded at the same time; a thread waits until there is enough.

    Heavy images take turns, so that none starves, and leave `_LIGHT_BYTES` to the others.
    """

    def __init__(self, num_bytes: int) -> None:
        self._left = self._all = num_bytes
        self._change = threading.Condition()
        self._turn = threading.Lock()

    @contextmanager
    def take(self, num_bytes: int) -> Iterator[None]:
        """Wait for this much memory, and hold it until the block ends."""
        is_heavy = num_bytes > _LIGHT_BYTES
        spared = _LIGHT_BYTES if is_heavy else 0
        num_bytes = 0 if num_bytes <= _SMALL_BYTES else min(num_bytes, self._all - spared)
        with self._turn if is_heavy else nullcontext(), self._change:
            self._change.wait_for(lambda: self._left >= num_bytes + spared)
            self._left -= num_bytes
        try:
            yield
        finally:
            with self._change:
                self._left += num_bytes
                self._change.notify_all()


_BUDGET = _Budget(_BUDGET_BYTES)


def _get_layers(image: Image.Image) -> list[tuple[int, int, int, int]]:
    """Return id, horizontal and vertical sampling factor, and table of each component of a JPEG."""
    layers: list[tuple[int, int, int, int]] = getattr(image, "layer", [])
    return layers


def _is_kept_whole(image: Image.Image, num_components: int) -> bool:
    """Return whether the decoder holds all coefficients of a JPEG, because it has several scans."""
    return "progressive" in image.info or num_components < len(_get_layers(image))


def _count_bytes(image: Image.Image, size: tuple[int, int], is_whole: bool, side: int) -> int:
    """Estimate the memory of decoding in bytes: the decoder's image, its state, and the partially resized image."""
    pixel_bytes = _WEBP_PIXEL_BYTES if image.format == "WEBP" else _PIXEL_BYTES.get(image.mode, 4)
    num_bytes = image.width * image.height * pixel_bytes
    num_bytes += 4 * side * min(max(image.size), 2 * min(image.size) + side)  # long images resize columns first
    if is_whole:
        layers = _get_layers(image)
        most = max((across for _, across, _, _ in layers), default=1) * max(
            (down for _, _, down, _ in layers), default=1
        )
        samples = sum(across * down for _, across, down, _ in layers)
        num_bytes += size[0] * size[1] * samples * _COEFFICIENT_BYTES // max(1, most)
    return num_bytes


def _check_size(image: Image.Image, size: tuple[int, int], max_pixels: int, num_bytes: int, is_whole: bool) -> None:
    num_pixels, shown = size[0] * size[1], f"{size[0]} x {size[1]}"
    num_decoded = image.width * image.height
    if image.format == "JPEG" and not is_whole and num_decoded <= max_pixels:
        max_pixels = max(max_pixels, MAX_PIXELS)
    elif image.format == "WEBP":
        max_pixels = min(max_pixels * 2 // 3, MAX_WEBP_PIXELS)
    if num_pixels > max_pixels:
        raise ImageSizeError(f"{shown} pixels, but at most {max_pixels:,} are decoded; scale it down")
    if max(size) > MAX_SIDE:
        raise ImageSizeError(f"{shown} pixels, but a side may have {MAX_SIDE:,} at most; scale it down")
    has_run_lengths = image.format == "BMP" and image.info.get("compression") in (1, 2)
    if has_run_lengths and max(num_pixels, num_bytes // 4) > MAX_RUN_LENGTH_PIXELS:
        raise ImageSizeError(
            f"a BMP with run lengths, of which at most {MAX_RUN_LENGTH_PIXELS:,} pixels are decoded; save it as PNG"
        )


def _check_parts(content: bytes) -> int:
    """Check the number of parts in a file, which bounds the decoding time.

    Returns:
        The number of components in the first scan of a JPEG; 0 for other files.
    """
    if content.startswith(b"\xff\xd8"):
        return _check_segments(content)
    if content.startswith(b"\x89PNG\r\n\x1a\n"):
        _check_chunks(content)
    return 0


def _check_segments(content: bytes) -> int:
    position, num_segments, num_scans, num_skipped, num_components = 2, 0, 0, 0, 0
    while match := _MARKER.search(content, position):
        marker = match[0][1]
        if num_scans == 0:  # Pillow reads everything before the first scan, and skips junk byte by byte
            num_skipped += match.start() - position
            if marker in _BARE_MARKERS or num_skipped > 2**16:
                raise ImageError("the image is damaged: invalid JPEG data before the pixels")
        if marker == _END_OF_IMAGE:
            break
        num_segments += 1
        num_scans += marker == _START_OF_SCAN
        if num_scans > MAX_SCANS:
            raise ImageError(f"a JPEG of more than {MAX_SCANS} scans; save it again")
        if num_segments > MAX_SEGMENTS:
            raise ImageError(f"a JPEG of more than {MAX_SEGMENTS:,} segments; save it again")
        position = match.end()
        if num_scans == 1 and marker == _START_OF_SCAN:
            num_components = int.from_bytes(content[position + 2 : position + 3], "big")
        if marker not in _BARE_MARKERS:
            position += max(2, int.from_bytes(content[position : position + 2], "big"))
    return num_components


def _check_chunks(content: bytes) -> None:
    position, num_chunks, num_texts = 8, 0, 0
    while len(kind := content[position + 4 : position + 8]) == 4:
        num_chunks += 1
        num_texts += kind in (b"iCCP", b"iTXt", b"zTXt")
        if num_chunks > MAX_CHUNKS or num_texts > MAX_TEXTS:
            raise ImageError(f"a PNG of more than {MAX_CHUNKS:,} chunks, or {MAX_TEXTS} of text; save it again")
        position += 12 + int.from_bytes(content[position : position + 4], "big")


def _load_fitted(
    image: Image.Image, size: tuple[int, int], side: int, fit: Fit, note_size: Callable[[int, int], None] | None
) -> NDArray[np.uint8]:
    image.load()
    orientation = image.getexif().get(ExifTags.Base.Orientation)
    is_sideways = orientation in SIDEWAYS
    if note_size is not None and size != (side, side):
        note_size(*(size[::-1] if is_sideways else size))
    width, height = image.size[::-1] if is_sideways else image.size
    left = top = 0.0
    target = (side, side)
    if fit == "crop":
        left, top = max(0.0, (width - height) / 2), max(0.0, (height - width) / 2)
    elif fit == "pad" and width > height:
        target = (side, round(height / width * side))
    elif fit == "pad":
        target = (round(width / height * side), side)
    if min(target) == 0:
        resized = Image.new("RGB", target)
    else:
        resized = _resize_upright(image, orientation, target, (left, top, width - left, height - top))
    if fit == "pad":
        resized = ImageOps.pad(resized, (side, side))
    return np.frombuffer(bytearray(resized.tobytes()), np.uint8).reshape(side, side, 3)


def _resize_upright(
    image: Image.Image, orientation: int | None, target: tuple[int, int], box: tuple[float, float, float, float]
) -> Image.Image:
    """Convert a loaded image to RGB, rotate it upright, and resize a box of it.

    The result is bit for bit that of processing the whole image, which would take four times the memory. Pillow resizes
    in two passes, mostly rows first. The first pass computes rows independently, so it can run strip by strip.

    Args:
        target: width and height of the result.
        box: left, top, right and bottom of the source, in pixels of the upright image.
    """
    width, height = image.size[::-1] if orientation in SIDEWAYS else image.size
    has_columns_first = height - target[1] > max(0, 2 * (width - target[0]))  # Pillow's rule
    length, breadth = (width, height) if has_columns_first else (height, width)
    half = Image.new("RGB", (width, target[1]) if has_columns_first else (target[0], height))
    step = max(1, _STRIP_PIXELS // breadth)
    for start in range(0, length, step):
        end = min(start + step, length)
        part = (start, 0, end, height) if has_columns_first else (0, start, width, end)
        strip = _convert_strip(image.crop(_find_source(part, orientation, image.size)))
        if orientation in UPRIGHT:
            strip = strip.transpose(UPRIGHT[orientation])
        if has_columns_first:
            strip = strip.resize((end - start, target[1]), Image.Resampling.BICUBIC, (0, box[1], end - start, box[3]))
            half.paste(strip, (start, 0))
        else:
            strip = strip.resize((target[0], end - start), Image.Resampling.BICUBIC, (box[0], 0, box[2], end - start))
            half.paste(strip, (0, start))
    rest = (box[0], 0, box[2], target[1]) if has_columns_first else (0, box[1], target[0], box[3])
    return half.resize(target, Image.Resampling.BICUBIC, rest)


def _find_source(
    box: tuple[int, int, int, int], orientation: int | None, size: tuple[int, int]
) -> tuple[int, int, int, int]:
    """Map a box of the upright image to the image in the file, which has this width and height."""
    left, top, right, bottom = box
    if orientation in SIDEWAYS:
        left, top, right, bottom = top, left, bottom, right
    if orientation in (2, 3, 7, 8):
        left, right = size[0] - right, size[0] - left
    if orientation in (3, 4, 6, 7):
        top, bottom = size[1] - bottom, size[1] - top
    return left, top, right, bottom


def _convert_strip(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit greyscale, which Pillow would clip instead of scaling
        image = Image.fromarray((np.clip(np.asarray(image), 0, 65535) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
