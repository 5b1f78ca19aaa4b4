"""Every image is decoded when it is converted: converted right, or refused by its name."""

import io
import struct
import tracemalloc
import zlib

import cv2
import data_files as files
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from experiments.data import streaming
from experiments.data.images import decode, rgb_jpeg

RNG = np.random.default_rng(0)
SMOOTH = cv2.resize(RNG.integers(0, 256, (4, 4, 3), dtype=np.uint8), (32, 24))  # [24, 32, 3]


def encode(image, form, **options):
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def picture(form="JPEG", mode="RGB", **options):
    return encode(Image.fromarray(SMOOTH).convert(mode), form, **options)


GOOD = picture(quality=95)
NOISY = files.jpeg(RNG.integers(0, 256, (48, 64, 3), dtype=np.uint8))


def png_of_size(width, height):
    """A PNG whose header promises the size and that holds one row of one pixel."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"\0\1\2\3")
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    )


# --- refused


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "neither JPEG nor PNG"),
        (GOOD[:-1], "[Tt]runcated"),
        (GOOD[: len(GOOD) // 2], "[Tt]runcated"),
        (GOOD[:300], "[Tt]runcated"),
        (NOISY[: len(NOISY) // 2] + bytes(len(NOISY) // 2), "the end is missing"),
        (picture("PNG")[:-12], "the end is missing"),
        (picture("PNG")[:200], "[Tt]runcated"),
        (png_of_size(32, 24), "[Tt]runcated"),
        (png_of_size(40_000, 3_000), "exceeds limit of 89478485 pixels"),
        (png_of_size(400_000, 30_000), "exceeds limit"),
        (picture("GIF"), "neither JPEG nor PNG"),
        (picture("WEBP"), "neither JPEG nor PNG"),
        (picture("BMP"), "neither JPEG nor PNG"),
        (picture("TIFF"), "neither JPEG nor PNG"),
        (
            picture("PNG", save_all=True, append_images=[Image.fromarray(SMOOTH[::-1])]),
            "an animation",
        ),
    ],
)
def test_files_that_are_no_whole_image_are_refused_by_name(data, reason):
    message = f"^source: n1/x.JPEG: expected a JPEG image, got {len(data)} bytes .*{reason}"
    with pytest.raises(ValueError, match=message) as error:
        rgb_jpeg(data, "n1/x.JPEG")
    assert "\n" not in str(error.value)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damage_is_refused_or_leaves_an_image(data):
    """Whatever happens to the bytes, the result decodes or a ValueError names the file."""
    original = data.draw(st.sampled_from([GOOD, picture("PNG"), picture(mode="CMYK")]))
    damaged = bytearray(original)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(original) - 1))] = data.draw(st.integers(0, 255))
    damaged = bytes(damaged[: data.draw(st.integers(0, len(original)))])
    message = "source: x.JPEG: expected a JPEG image, got "
    try:
        assert decode(rgb_jpeg(damaged, "x.JPEG"), 3).dtype == np.uint8
    except ValueError as error:
        message = str(error)
    assert message.startswith("source: x.JPEG: expected a JPEG image, got ")
    assert "\n" not in message


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200))
def test_noise_is_refused(data):
    with pytest.raises(ValueError, match=r"^source: x: expected a JPEG image"):
        rgb_jpeg(data, "x")


# --- kept as they are


@pytest.mark.parametrize(
    "data",
    [
        GOOD,
        picture(mode="L"),
        picture(progressive=True),
        picture(quality=30, subsampling=2),
        GOOD + b"what a camera appends",
        picture("MPO", save_all=True, append_images=[Image.fromarray(SMOOTH[::-1])]),
    ],
)
def test_whole_jpegs_stay_as_they_are(data):
    assert rgb_jpeg(data, "x") == data
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(image.convert("RGB"), int)
    np.testing.assert_allclose(decode(data, 3), expected, atol=2)


def test_the_orientation_of_a_camera_is_ignored():
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    data = picture(exif=exif, quality=95)
    assert rgb_jpeg(data, "x", size=(24, 32)) == data
    np.testing.assert_array_equal(decode(data, 3), decode(GOOD, 3))
    turned = picture("PNG", exif=exif)
    np.testing.assert_allclose(decode(rgb_jpeg(turned, "x"), 3).astype(int), SMOOTH, atol=8)


# --- encoded anew


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "RGB"])
def test_pngs_of_every_mode_keep_their_colours(mode):
    image = Image.fromarray(SMOOTH).convert(mode)
    expected = np.asarray(image.convert("RGB"), int)
    result = decode(rgb_jpeg(encode(image, "PNG"), "x"), 3)
    # subsampling is off and the quality 100, so that what remains is JPEG's own rounding
    assert np.abs(result - expected).mean() < 2


def test_transparency_is_dropped():
    image = Image.fromarray(SMOOTH)
    image.putalpha(Image.fromarray(np.zeros((24, 32), np.uint8)))
    result = decode(rgb_jpeg(encode(image, "PNG"), "x"), 3)
    np.testing.assert_allclose(result.astype(int), SMOOTH, atol=8)
    palette = Image.fromarray(SMOOTH).quantize(16)
    result = decode(rgb_jpeg(encode(palette, "PNG", transparency=bytes(16)), "x"), 3)
    assert np.abs(result - np.asarray(palette.convert("RGB"), int)).mean() < 2


def test_cmyk_becomes_the_colours_that_pillow_shows():
    data = picture(mode="CMYK", quality=95)
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(image.convert("RGB"), int)
    np.testing.assert_allclose(decode(rgb_jpeg(data, "x"), 3), expected, atol=4)


def test_16_bits_are_scaled_and_not_clipped():
    grey = np.linspace(0, 65_535, 24 * 32).astype(np.uint16).reshape(24, 32)
    colours = np.stack([grey, grey[::-1], grey[:, ::-1]], -1)
    for pixels, data in (
        (grey[..., None].repeat(3, -1), encode(Image.fromarray(grey), "PNG")),
        (colours, cv2.imencode(".png", colours[..., ::-1])[1].tobytes()),
    ):
        result = decode(rgb_jpeg(data, "x"), 3).astype(int)
        np.testing.assert_allclose(result, pixels >> 8, atol=4)


def test_another_size_is_refused():
    with pytest.raises(ValueError, match="x: expected 32 x 24 pixels, got 24 x 32"):
        rgb_jpeg(GOOD, "x", size=(32, 24))


# --- crops of strips


@pytest.mark.parametrize("shape", [(1, 20_000), (20_000, 1), (3, 5001), (7, 57)])
def test_crops_of_strips_are_right_and_small(shape):
    """The values grow along the strip, so that the central square is the centre's grey."""
    h, w = shape
    ramp = np.linspace(0, 255, max(shape)).astype(np.uint8)
    image = np.broadcast_to((ramp[:, None] if h > w else ramp)[..., None], (h, w, 3)).copy()
    tracemalloc.start()
    square = streaming.center_crop(image, 224, shorter=256)
    random = streaming.random_resized_crop(np.random.default_rng(0), image, 224)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6
    assert square.shape == random.shape == (224, 224, 3)
    half = 255 * min(shape) / max(shape) / 2 + 1
    np.testing.assert_allclose(square.astype(float), 127.5, atol=half)


def test_crops_of_usual_images_are_cut_from_the_whole_image():
    image = files.RNG.integers(0, 256, (50, 400, 3), dtype=np.uint8)  # ratio 8, the last one
    whole = streaming.resize(image, 256, 2048)
    np.testing.assert_array_equal(
        streaming.center_crop(image, 224, shorter=256), whole[16:240, 912:1136]
    )
