"""Image files: encoding, decoding and repair of PNG and JPEG."""

import io

import cv2
import numpy as np
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError


def png(image: UInt8[np.ndarray, "h w c"]) -> bytes:
    """Encodes an RGB or grey image as PNG, which loses nothing."""
    pixels = image[..., ::-1] if image.shape[-1] == 3 else image
    return cv2.imencode(".png", np.ascontiguousarray(pixels))[1].tobytes()


def decode(data: bytes, channels: int) -> UInt8[np.ndarray, "h w c"]:
    """Decodes a PNG or JPEG file; its EXIF orientation is ignored.

    Args:
      data: bytes of the file.
      channels: 3 for RGB, 1 for grey.

    Returns:
      Pixels uint8 `[h, w, channels]`.

    Raises:
      ValueError: the bytes are neither PNG nor JPEG.

    Example:
      >>> image = np.full((2, 3, 3), 7, np.uint8)
      >>> np.array_equal(decode(png(image), 3), image)
      True
    """
    color = cv2.IMREAD_GRAYSCALE if channels == 1 else cv2.IMREAD_COLOR_RGB
    image = None
    if data:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), color | cv2.IMREAD_IGNORE_ORIENTATION)
    if image is None:
        raise ValueError(
            f"image: expected PNG or JPEG bytes, got {len(data)} bytes that do not decode; prepare "
            f"the data set again"
        )
    return image.reshape(*image.shape[:2], channels)


def rgb_jpeg(data: bytes, entry: str, *, size: tuple[int, int] | None = None) -> bytes:
    """Returns an image file as an RGB or grey JPEG.

    A file that is one already stays as it is. Others (CMYK JPEGs and PNGs: 23 files of ImageNet)
    are encoded anew.

    Args:
      data: bytes of the file.
      entry: its name, for messages.
      size: the `(h, w)` in pixels that it must have; None accepts any.

    Returns:
      JPEG bytes.

    Raises:
      ValueError: the bytes are no image, or the image has another size.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            if size and image.size != size[::-1]:
                raise ValueError(
                    f"source: {entry}: expected {size[0]} x {size[1]} pixels, got {image.height} x "
                    f"{image.width}; fetch it again"
                )
            if image.format == "JPEG" and image.mode in ("RGB", "L"):
                return data
            encoded = io.BytesIO()
            image.convert("RGB").save(encoded, "JPEG", quality=100, subsampling=0)
            return encoded.getvalue()
    except UnidentifiedImageError as error:
        raise ValueError(
            f"source: {entry}: expected a JPEG image, got {len(data)} bytes that are none; fetch "
            f"it again"
        ) from error
