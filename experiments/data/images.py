"""Image files: encoding, decoding and repair of PNG and JPEG."""

import io
import warnings

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
            f"image: expected PNG or JPEG bytes, got {len(data)} bytes that do not decode"
        )
    return image.reshape(*image.shape[:2], channels)


def rgb_jpeg(data: bytes, entry: str, *, size: tuple[int, int] | None = None) -> bytes:
    """Returns an image file as an RGB or grey JPEG, after decoding it completely.

    A file that is one already stays as it is. Others (CMYK JPEGs and PNGs: 23 files of ImageNet)
    are encoded anew: of 16 bits the upper 8 stay, and transparency is dropped, as TFDS does.

    Args:
      data: bytes of the file.
      entry: its name, for messages.
      size: the `(h, w)` in pixels that it must have; None accepts any.

    Returns:
      JPEG bytes.

    Raises:
      ValueError: the bytes are no image or a part of one, or the image has another size.
    """
    try:
        image, stays = _open(data)
        if not stays:
            encoded = io.BytesIO()
            image.save(encoded, "JPEG", quality=100, subsampling=0)
            data = encoded.getvalue()
        decode(data, 3)  # as training will do
    except Exception as error:  # for random bytes Pillow raises nearly any exception
        reason = "neither JPEG nor PNG"
        if not isinstance(error, UnidentifiedImageError):
            reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"source: {entry}: expected a JPEG image, got {len(data)} bytes that are none "
            f"({reason}); fetch it again"
        ) from error
    if size and image.size != size[::-1]:
        raise ValueError(
            f"source: {entry}: expected {size[0]} x {size[1]} pixels, got {image.height} x "
            f"{image.width}; fetch it again"
        )
    return data


_JPEG = ("JPEG", "MPO")  # MPO is Pillow's name for a JPEG that further pictures follow
_PNG_END = b"IEND\xae\x42\x60\x82"


def _open(data: bytes) -> tuple[Image.Image, bool]:
    """Decodes a whole JPEG or PNG with Pillow.

    Args:
      data: bytes of the file.

    Returns:
      The image, RGB or grey, and whether its file is a JPEG of it that may stay as it is.

    Raises:
      Exception: nearly any, if the bytes are no whole image.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about odd metadata
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        image: Image.Image = Image.open(io.BytesIO(data), formats=("JPEG", "PNG"))
        jpeg = image.format in _JPEG
        if not jpeg and getattr(image, "n_frames", 1) > 1:
            raise ValueError("an animation")
        image.load()
        if not (_jpeg_ends(data) if jpeg else _PNG_END in data):
            raise ValueError("the end is missing")
        if image.mode.startswith("I"):  # 16 bits: Pillow's own conversion clips all above 255
            image = Image.fromarray(np.right_shift(np.asarray(image), 8).astype(np.uint8))
        if jpeg and image.mode in ("RGB", "L"):
            return image, True
        return image.convert("RGB"), False


def _jpeg_ends(data: bytes) -> bool:
    """Whether the pixels of a JPEG have their end mark.

    Of a file that is filled up with zeros the decoders make an image. FFDA starts the pixels of an
    image or of its thumbnail, FFD9 ends them, and neither stands for a pixel.
    """
    return data.rfind(b"\xff\xd9") > data.rfind(b"\xff\xda")
