"""Decode the bytes of an image file to what the network takes: uint8 [32, 32, 3] RGB. Free of torch.

An image is decoded by one of four decoders and no other, after its size in bytes and in pixels was checked; one that
is animated is refused (a JPEG's further pictures, such as the depth that phones add, are left aside). It is turned as
its EXIF data say, what is transparent becomes white, 16 bits a channel become 8 (the upper ones), and colour profiles
are left aside. Another size than 32 x 32 is resized as a whole (the sides' ratio is not kept), with antialiasing; a
plain RGB image of 32 x 32 comes out bit for bit.
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

from image_classifier.errors import ImageError, ImageSizeError

SIDE = 32
FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
MAX_BYTES = 2**25
MAX_PIXELS = 50_000_000
"""What a large camera takes; decoded, this is 200 MB."""

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

# For the whole process, since a filter that is set and taken back around each call is not safe among threads.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")  # a line for each tag that is damaged
warnings.simplefilter("error", Image.DecompressionBombWarning)


def load_image(path: Path, *, resize: bool = True) -> NDArray[np.uint8]:
    """Load an image file: uint8 [32, 32, 3] RGB.

    Raises:
        ImageError: it cannot be read; the message has the path and the reason.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
        return decode_image(content, resize=resize)
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
    resize: bool = True,
) -> NDArray[np.uint8]:
    """Decode the bytes of an image file: uint8 [32, 32, 3] RGB.

    Raises:
        ImageSizeError: more pixels than max_pixels.
        ImageError: none of the formats, animated, damaged, truncated, over a limit, or of another size and not to be
            resized; the message is the reason.
    """
    if not content:
        raise ImageError("there are no bytes of an image")
    if len(content) > max_bytes:
        raise ImageError(f"more than {max_bytes:,} bytes")
    try:
        with Image.open(io.BytesIO(content), formats=formats) as image:
            if image.width * image.height > max_pixels:
                raise ImageSizeError(f"{image.width} x {image.height} pixels, but at most {max_pixels:,} are decoded")
            if image.format in ("PNG", "WEBP") and getattr(image, "is_animated", False):
                raise ImageError("the image is animated; choose one of its frames")
            if not resize and image.size != (SIDE, SIDE):
                raise ImageError(f"{image.width} x {image.height} pixels instead of {SIDE} x {SIDE}")
            if image.format == "PNG":  # whose checksums decoding does not look at
                image.verify()
                image = Image.open(io.BytesIO(content), formats=("PNG",))  # verified, the one before is unusable
            image.draft(None, (8 * SIDE, 8 * SIDE))  # a large JPEG is decoded at a part of its size, 8 times ours
            image.load()
            orientation = image.getexif().get(ExifTags.Base.Orientation)
            upright = image.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else image
            rgb = _convert_to_rgb(upright)
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError(f"no image in one of the formats {', '.join(formats)}") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageSizeError(f"more than {max_pixels:,} pixels") from error
    except Exception as error:  # decoders raise what they like: struct.error, SyntaxError, zlib.error
        raise ImageError(f"the image is damaged: {' '.join(str(error).split()) or type(error).__name__}") from error
    if rgb.size != (SIDE, SIDE):
        rgb = rgb.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    return np.frombuffer(bytearray(rgb.tobytes()), np.uint8).reshape(SIDE, SIDE, 3)


def _convert_to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip and not scale
        grey = np.clip(np.asarray(image).astype(np.int64), 0, 65535) >> 8
        image = Image.fromarray(grey.astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")
