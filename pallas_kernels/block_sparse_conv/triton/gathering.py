"""What the Triton kernels share: where positions lie, how rows are gathered, how results leave.

`kernels.py` explains rows, entries and positions.
"""

import types

try:
    import triton
    import triton.language as tl
except ImportError:  # this module still imports; `launch.unavailable()` says what is missing
    triton = types.SimpleNamespace(jit=lambda kernel: kernel)
    tl = types.SimpleNamespace(constexpr=None)


@triton.jit
def _corner(
    position,
    out_width: tl.constexpr,
    strides: tl.constexpr,
    padding: tl.constexpr,
    backward: tl.constexpr,
):
    """Where the tap (0, 0) of an output pixel reads the source (backward: times the strides)."""
    y, x = position // out_width, position % out_width
    if backward:
        return y + padding[0], x + padding[1]
    else:
        return y * strides[0] - padding[0], x * strides[1] - padding[1]


@triton.jit
def positions_of(
    tile,
    lane,
    images: tl.constexpr,
    out_width: tl.constexpr,
    strides: tl.constexpr,
    padding: tl.constexpr,
    backward: tl.constexpr,
    block: tl.constexpr,
):
    """Corners and images `[1, block]` of a tile of positions.

    The corner is one number where the tile lies in one pixel.
    """
    if images % block == 0:
        tiles_of_pixel: tl.constexpr = images // block
        top, left = _corner(tile // tiles_of_pixel, out_width, strides, padding, backward)
        # Written as a product: Triton must see that the first image is a multiple of the block.
        image = tile % tiles_of_pixel * block + lane
    else:
        flat = tile * block + lane
        top, left = _corner((flat // images)[None, :], out_width, strides, padding, backward)
        image = flat % images
    return top, left, image[None, :]


@triton.jit
def gather(
    source,
    entry,
    top,
    left,
    image,
    inside,
    size: tl.constexpr,
    shift_y,
    shift_x,
    strides: tl.constexpr,
    dilation: tl.constexpr,
    backward: tl.constexpr,
    by_phase: tl.constexpr,
    border: tl.constexpr,
    ragged: tl.constexpr,
    wide: tl.constexpr,
    factor=None,
    term=None,
    normalise: tl.constexpr = False,
    relu: tl.constexpr = False,
):
    """Values `[rows, positions]` of entries `[rows, 1]` at corners and images `[1, positions]`.

    The corner may be one number for all positions. `by_phase`: every tap reaches every position,
    `(shift - tap * dilation) / strides` away. `border`: a tap may fall outside the image. `ragged`:
    an entry may be -1. `inside`: which positions exist; None: all.

    `normalise`: the values are `factor * source + term`, each `[rows, 1]`, and then `relu`; what
    lies outside stays zero.
    """
    height: tl.constexpr = size[0]
    width: tl.constexpr = size[1]
    images: tl.constexpr = size[2]
    down, right, channel = ((entry >> 4) & 15) * dilation[0], (entry & 15) * dilation[1], entry >> 8
    if by_phase:
        down, right = (shift_y - down) // strides[0], (shift_x - right) // strides[1]
    elif backward:
        down, right = -down, -right
    if wide:
        channel = channel.to(tl.int64)
    strided: tl.constexpr = backward and not by_phase and strides[0] * strides[1] > 1
    if strided:
        y, x = top + down, left + right
        inside_image = (y >= 0) & (x >= 0) & (y % strides[0] == 0) & (x % strides[1] == 0)
        y, x = y // strides[0], x // strides[1]
        inside_image = inside_image & (y < height) & (x < width)
        offset = ((channel * height + y) * width + x) * images + image
    else:
        y, x = top + down, left + right
        inside_image = (y >= 0) & (y < height) & (x >= 0) & (x < width)
        offset = ((channel * height + down) * width + right) * images + (
            (top * width + left) * images + image
        )
    mask = inside
    if strided or border:
        mask = inside_image if mask is None else mask & inside_image
    if ragged:
        mask = entry >= 0 if mask is None else mask & (entry >= 0)
    if mask is None:
        values = tl.load(source + offset)
    else:
        values = tl.load(source + offset, mask=mask, other=0.0)
    if normalise:
        if mask is not None:  # by rows, where a tile lies in one pixel: cheaper than by values
            factor, term = tl.where(mask, factor, 0.0), tl.where(mask, term, 0.0)
        normalised = values.to(tl.float32) * factor + term
        if relu:
            normalised = tl.maximum(normalised, 0.0, propagate_nan=tl.PropagateNan.ALL)
        values = normalised.to(values.dtype)
    return values


@triton.jit
def norm_of(entry, scale, shift, ragged: tl.constexpr):
    """The factors and terms `[rows, 1]` of entries `[rows, 1]`, by their channels."""
    channel = entry >> 8
    if ragged:
        factor = tl.load(scale + channel, mask=entry >= 0, other=0.0)
        return factor, tl.load(shift + channel, mask=entry >= 0, other=0.0)
    else:
        return tl.load(scale + channel), tl.load(shift + channel)


@triton.jit
def finish(
    total,
    out,
    offset,
    mask,
    row,
    scale,
    bias,
    residual,
    with_scale: tl.constexpr,
    with_bias: tl.constexpr,
    with_residual: tl.constexpr,
    relu: tl.constexpr,
):
    """Applies the epilogue to sums `[rows, positions]` and stores them; returns what it stored."""
    if with_scale:
        total *= tl.load(scale + row, mask=row >= 0, other=0.0)[:, None]
    if with_bias:
        total += tl.load(bias + row, mask=row >= 0, other=0.0)[:, None]
    if with_residual:
        total += tl.load(residual + offset, mask=mask, other=0.0).to(tl.float32)
    if relu:
        total = tl.where(total < 0, 0.0, total)  # keeps NaN, which tl.maximum would not
    y = total.to(out.dtype.element_ty)
    tl.store(out + offset, y, mask=mask)
    return y
