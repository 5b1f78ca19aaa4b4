"""The Triton kernels.

`gather_product` multiplies weights with gathered rows: the forward pass and the input gradient.
`stationary_product` is the forward pass by programs that keep the weights of one group.
`weight_gradient` is the third pass. Activations are (C, H, W, N).

- A *row* is what one (channel, tap) contributes: the values of a channel at the positions shifted
  by the tap, N contiguous images at each.
- A *list* names the rows to contract over. Its *entries* are one int32 each, `channel << 8 | tap_y
  << 4 | tap_x`, or -1 for nothing (see `plan.py`). So the lists decide what is convolved, and one
  kernel runs in both directions: forward gathers x by (kept channel, tap), the input gradient
  gathers dy by (filter, tap).
- A *table* is the list of all blocks of channels, stage after stage: the input gradient's.
- A *member* is a row of a group's result: a filter in the forward pass, a channel of a group or of
  a block in the input gradient.
- A *phase* is the pixels (y, x) with one remainder by the strides. A table's program computes
  pixels of one phase, and takes the stages whose taps reach it.

All sizes are compile-time constants: only then does Triton know that a row's length is a multiple
of 16 bytes, and copies 16 bytes at a time.
"""

import types

try:
    import triton
    import triton.language as tl
except ImportError:  # this module still imports; `launch.unavailable()` says what is missing
    triton = types.SimpleNamespace(jit=lambda kernel: kernel)
    tl = types.SimpleNamespace(constexpr=None)

from pallas_kernels.block_sparse_conv.triton.gathering import finish, gather, norm_of, positions_of


@triton.jit
def gather_product(
    source,
    entries,
    weights,
    bounds,
    places,
    rows,
    scale,
    bias,
    residual,
    normed,
    joined,
    out,
    sums,
    shortcut_gradient,
    groups: tl.constexpr,
    depth: tl.constexpr,
    list_length: tl.constexpr,
    members: tl.constexpr,
    channels: tl.constexpr,
    row_length: tl.constexpr,
    size: tl.constexpr,
    out_size: tl.constexpr,
    strides: tl.constexpr,
    padding: tl.constexpr,
    dilation: tl.constexpr,
    weight_strides: tl.constexpr,
    backward: tl.constexpr,
    border: tl.constexpr,
    ragged: tl.constexpr,
    wide: tl.constexpr,
    table: tl.constexpr,
    by_phase: tl.constexpr,
    stage_depth: tl.constexpr,
    parts: tl.constexpr,
    run: tl.constexpr,
    scatter: tl.constexpr,
    with_scale: tl.constexpr,
    with_bias: tl.constexpr,
    with_residual: tl.constexpr,
    with_norm: tl.constexpr,
    with_joined: tl.constexpr,
    with_sums: tl.constexpr,
    normalise: tl.constexpr,
    relu: tl.constexpr,
    precision: tl.constexpr,
    block_rows: tl.constexpr,
    block_positions: tl.constexpr,
    block_depth: tl.constexpr,
    positions_first: tl.constexpr,
):
    """`out[rows[g]] = weights[g]^T gathered(entries[g])` for each group g.

    One program computes `block_rows x block_positions` of it.

    Args:
      source: activations `[channels, *size]`, `size = (height, width, images)`.
      entries: int32 rows to contract over, `[groups, list_length]`, of which `depth` count. With
        `table` `[stages * stage_depth]`, and `stage_depth` more; the groups are blocks.
      weights: element (group, k, m) is at `group * weight_strides[0] + k * weight_strides[1] + m *
        weight_strides[2]`; of a stage, element (k, m) at `place + k * weight_strides[1] + m % run *
        weight_strides[2]`.
      bounds: read with `table`: int32 `[groups * 4 + 1]`, the first stage of each parity.
      places: read with `table`: int32 `[stages, members / run]`, where a run of channels has its
        weights: `(row * parts + part)`, of rows of `depth` weights and parts of `stage_depth`; -1:
        it has none.
      rows: int32 `[groups, row_length]`, where each group's results go in `out`; -1: nowhere. Not
        read with `table`: the results of a block go to its channels.
      scale, bias: float32 by row of `out`; read with `with_scale` and `with_bias`. With `normalise`
        by channel of the source: what is gathered is `relu(scale * source + bias)`.
      residual: in the shape of `out`; read with `with_residual`.
      normed: in the shape of `out`; read with `with_norm`. The result is then the gradient g of
        `relu(scale * normed + bias)`, masked where `relu`, and `out` is `scale * g`.
      joined: in the shape of `out`; read with `with_joined`: where it is positive the ReLU passes.
      channels: rows of `out`.
      out: `[channels, *out_size]`; with `scatter` float32 zeros, to which the results are added.
      sums: written with `with_sums`: float32 `[2, channels, tiles]`, over the positions of each
        tile of each phase, of `out` and its squares, or with `with_norm` of g and `g * normed`.
      shortcut_gradient: written with `with_joined`: g.
      by_phase: the programs of a table work on one phase each.
      depth: with `table` the filters of a group, of which a stage holds `stage_depth`.
    """
    tiles: tl.constexpr = (members + block_rows - 1) // block_rows
    phase_y: tl.constexpr = strides[0] if by_phase else 1
    phase_x: tl.constexpr = strides[1] if by_phase else 1
    height: tl.constexpr = (out_size[0] + phase_y - 1) // phase_y
    width: tl.constexpr = (out_size[1] + phase_x - 1) // phase_x
    images: tl.constexpr = out_size[2]
    positions: tl.constexpr = height * width * images
    position_tiles: tl.constexpr = (positions + block_positions - 1) // block_positions
    all_positions: tl.constexpr = out_size[0] * out_size[1] * images
    all_tiles: tl.constexpr = position_tiles * phase_y * phase_x
    program = tl.program_id(0)
    # Neighbouring programs work on the same positions: rows that several groups gather are then
    # still in the L2 cache.
    group, part = program % (groups * tiles) // tiles, program % tiles
    tile = program // (groups * tiles) % position_tiles
    phase = program // (groups * tiles * position_tiles)
    shift_y, shift_x = phase // phase_x + padding[0], phase % phase_x + padding[1]
    place = tile * block_positions
    member = part * block_rows + tl.arange(0, block_rows)
    lane = tl.arange(0, block_positions)
    k = tl.arange(0, block_depth)

    inside = None
    if by_phase:  # the corner is the pixel's place within its phase
        top, left, image = positions_of(
            tile, lane, images, width, (1, 1), (0, 0), False, block_positions
        )
    else:
        top, left, image = positions_of(
            tile, lane, images, width, strides, padding, backward, block_positions
        )
    if positions % block_positions != 0:
        inside = (place + lane < positions)[None, :]
    pixel_offset = (place + lane)[None, :]
    if phase_y * phase_x > 1:
        y, x = top * phase_y + phase // phase_x, left * phase_x + phase % phase_x
        pixel_offset = (y * out_size[1] + x) * images + image
        if out_size[0] % phase_y != 0 or out_size[1] % phase_x != 0:
            exists = (y < out_size[0]) & (x < out_size[1]) & (image < images)
            inside = exists if inside is None else inside & exists

    # The weights are loaded in the orientation of the product: Triton copies a transposed operand
    # in small pieces on Ampere.
    k_of_weight = k[:, None] if positions_first else k[None, :]
    member_of_weight = member[None, :] if positions_first else member[:, None]
    steps_of_stage: tl.constexpr = stage_depth // block_depth
    runs: tl.constexpr = members // run
    weight_mask = None
    if not table and members % block_rows != 0:
        weight_mask = member_of_weight < members
    if table:
        row = group * members + member
        row = tl.where(row < channels, row, -1)
        segment, segments = group * 4, 4
        if phase_y * phase_x > 1:
            segment, segments = segment + shift_y % 2 * 2 + shift_x % 2, 1
        start, stop = tl.load(bounds + segment), tl.load(bounds + segment + segments)
        entries += start * stage_depth
        steps = (stop - start) * steps_of_stage
        places += start * runs
        if runs > 1:
            places += member_of_weight // run
        place_of_run = tl.load(places)
        member_of_weight %= run
    else:
        row = tl.load(rows + group * row_length + member)
        entries += group * list_length
        steps = (depth + block_depth - 1) // block_depth
        weights += group * weight_strides[0]
    weights += k_of_weight * weight_strides[1] + member_of_weight * weight_strides[2]
    total = tl.zeros(
        (block_positions, block_rows) if positions_first else (block_rows, block_positions),
        tl.float32,
    )
    # Entries are always loaded one step early: else each step would wait for two loads in a row.
    entry = tl.load(entries + k)
    for step in range(0, steps):
        factor, term = None, None
        if normalise:
            factor, term = norm_of(entry[:, None], scale, bias, ragged)
        gathered = gather(
            source,
            entry[:, None],
            top,
            left,
            image,
            inside,
            size,
            shift_y,
            shift_x,
            strides,
            dilation,
            backward,
            by_phase,
            border,
            ragged,
            wide,
            factor,
            term,
            normalise,
            relu,
        )
        mask = weight_mask
        if table:
            first_k = step % steps_of_stage * block_depth + place_of_run % parts * stage_depth
            # Written as products: Triton must see that a row begins at a multiple of 16 bytes.
            weight_block = weights + (place_of_run // parts * depth + first_k)
            if runs > 1:
                mask = place_of_run >= 0
        else:
            first_k = step * block_depth
            weight_block = weights + step * (block_depth * weight_strides[1])
        if ragged:
            inside_depth = first_k + k_of_weight < depth
            mask = inside_depth if mask is None else mask & inside_depth
        if mask is None:
            weight = tl.load(weight_block)
        else:
            weight = tl.load(weight_block, mask=mask, other=0.0)
        next_step = step + 1 if table else tl.minimum(step + 1, steps - 1)
        entry = tl.load(entries + next_step * block_depth + k)
        if table:
            place_of_run = tl.load(places + next_step // steps_of_stage * runs)
        if positions_first:
            total = tl.dot(tl.trans(gathered), weight, total, input_precision=precision)
        else:
            total = tl.dot(weight, gathered, total, input_precision=precision)
    if positions_first:
        total = tl.trans(total)

    row_offset = row.to(tl.int64) * all_positions if wide else row * all_positions
    offset = row_offset[:, None] + pixel_offset
    mask = (row >= 0)[:, None]
    if inside is not None:
        mask = mask & inside
    if scatter:
        tl.atomic_add(out + offset, total, mask=mask, sem="relaxed")
    elif with_norm:
        if with_residual:
            total += tl.load(residual + offset, mask=mask, other=0.0).to(tl.float32)
        z = tl.load(normed + offset, mask=mask, other=0.0).to(tl.float32)
        factor = tl.load(scale + row, mask=row >= 0, other=0.0)[:, None]
        if relu:
            if with_joined:
                passes = tl.load(joined + offset, mask=mask, other=0.0) > 0
            else:
                shift = tl.load(bias + row, mask=row >= 0, other=0.0)[:, None]
                passes = factor * z + shift > 0
            total = tl.where(passes, total, 0.0)
        tl.store(out + offset, (factor * total).to(out.dtype.element_ty), mask=mask)
        if with_joined:
            g = total.to(shortcut_gradient.dtype.element_ty)
            tl.store(shortcut_gradient + offset, g, mask=mask)
        place_of_sums = sums + row * all_tiles + phase * position_tiles + tile
        tl.store(place_of_sums, tl.sum(total, 1), mask=row >= 0)
        tl.store(place_of_sums + channels * all_tiles, tl.sum(total * z, 1), mask=row >= 0)
    else:
        y = finish(
            total,
            out,
            offset,
            mask,
            row,
            scale,
            bias,
            residual,
            with_scale,
            with_bias,
            with_residual,
            relu and not normalise,
        )
        if with_sums:
            rounded = y.to(tl.float32)
            place_of_sums = sums + row * all_tiles + phase * position_tiles + tile
            squares = rounded * rounded
            tl.store(place_of_sums, tl.sum(rounded, 1), mask=row >= 0)
            tl.store(place_of_sums + channels * all_tiles, tl.sum(squares, 1), mask=row >= 0)


@triton.jit
def stationary_product(
    source,
    entries,
    weights,
    rows,
    scale,
    bias,
    residual,
    out,
    sums,
    groups: tl.constexpr,
    depth: tl.constexpr,
    list_length: tl.constexpr,
    members: tl.constexpr,
    channels: tl.constexpr,
    row_length: tl.constexpr,
    size: tl.constexpr,
    out_size: tl.constexpr,
    strides: tl.constexpr,
    padding: tl.constexpr,
    dilation: tl.constexpr,
    border: tl.constexpr,
    ragged: tl.constexpr,
    wide: tl.constexpr,
    with_scale: tl.constexpr,
    with_bias: tl.constexpr,
    with_residual: tl.constexpr,
    with_sums: tl.constexpr,
    normalise: tl.constexpr,
    relu: tl.constexpr,
    precision: tl.constexpr,
    block_rows: tl.constexpr,
    block_positions: tl.constexpr,
    block_depth: tl.constexpr,
    positions_first: tl.constexpr,
    walkers: tl.constexpr,
):
    """The forward pass: `out[rows[g]] = weights[g]^T gathered(entries[g])` for each group g.

    One program loads all weights of `block_rows` of a group once, keeps them in shared memory, and
    computes every `walkers`-th tile of positions. A tile is one step: the loads of the next tiles
    are in flight while one is multiplied, and while it is stored.

    Args:
      source, entries, rows, residual: as in `gather_product`.
      weights: `[groups, depth, members]`.
      scale, bias: as in `gather_product`, with `normalise` too.
      out: `[channels, *out_size]`.
      sums: written with `with_sums`: float32 `[2, channels, walkers]`, over the positions of each
        program, of `out` and its squares.
      block_depth: `depth` or more: all rows of a group.
    """
    tiles: tl.constexpr = (members + block_rows - 1) // block_rows
    images: tl.constexpr = out_size[2]
    positions: tl.constexpr = out_size[0] * out_size[1] * images
    position_tiles: tl.constexpr = (positions + block_positions - 1) // block_positions
    program = tl.program_id(0)
    # Neighbouring programs work on the same positions, as in `gather_product`.
    group, part = program % (groups * tiles) // tiles, program % tiles
    walker = program // (groups * tiles)
    member = part * block_rows + tl.arange(0, block_rows)
    lane = tl.arange(0, block_positions)
    k = tl.arange(0, block_depth)
    row = tl.load(rows + group * row_length + member)
    row_offset = row.to(tl.int64) * positions if wide else row * positions
    entries += group * list_length
    if block_depth > list_length:
        entry = tl.load(entries + k, mask=k < list_length, other=-1)[:, None]
    else:
        entry = tl.load(entries + k)[:, None]
    factor, term = None, None
    if normalise:
        factor, term = norm_of(entry, scale, bias, ragged)
    k_of_weight = k[:, None] if positions_first else k[None, :]
    member_of_weight = member[None, :] if positions_first else member[:, None]
    weight = tl.load(
        weights + group * (depth * members) + k_of_weight * members + member_of_weight,
        mask=(k_of_weight < depth) & (member_of_weight < members),
        other=0.0,
    )

    sum_of_row = tl.zeros((block_rows,), tl.float32)
    sum_of_squares = tl.zeros((block_rows,), tl.float32)
    for tile in range(walker, position_tiles, walkers):
        place = tile * block_positions
        inside = None
        if positions % block_positions != 0:
            inside = (place + lane < positions)[None, :]
        top, left, image = positions_of(
            tile, lane, images, out_size[1], strides, padding, False, block_positions
        )
        gathered = gather(
            source,
            entry,
            top,
            left,
            image,
            inside,
            size,
            0,
            0,
            strides,
            dilation,
            False,
            False,
            border,
            ragged,
            wide,
            factor,
            term,
            normalise,
            relu,
        )
        if positions_first:
            total = tl.trans(tl.dot(tl.trans(gathered), weight, input_precision=precision))
        else:
            total = tl.dot(weight, gathered, input_precision=precision)
        offset = row_offset[:, None] + (place + lane)[None, :]
        mask = (row >= 0)[:, None]
        if inside is not None:
            mask = mask & inside
        y = finish(
            total,
            out,
            offset,
            mask,
            row,
            scale,
            bias,
            residual,
            with_scale,
            with_bias,
            with_residual,
            relu and not normalise,
        )
        if with_sums:
            rounded = y.to(tl.float32)
            sum_of_row += tl.sum(rounded, 1)
            sum_of_squares += tl.sum(rounded * rounded, 1)
    if with_sums:
        place_of_sums = sums + row * walkers + walker
        tl.store(place_of_sums, sum_of_row, mask=row >= 0)
        tl.store(place_of_sums + channels * walkers, sum_of_squares, mask=row >= 0)


@triton.jit
def weight_gradient(
    source,
    entries,
    rows,
    gradient,
    scale,
    shift,
    out,
    groups: tl.constexpr,
    depth: tl.constexpr,
    list_length: tl.constexpr,
    members: tl.constexpr,
    row_length: tl.constexpr,
    splits: tl.constexpr,
    size: tl.constexpr,
    out_size: tl.constexpr,
    strides: tl.constexpr,
    padding: tl.constexpr,
    dilation: tl.constexpr,
    border: tl.constexpr,
    ragged: tl.constexpr,
    wide: tl.constexpr,
    normalise: tl.constexpr,
    relu: tl.constexpr,
    precision: tl.constexpr,
    block_rows: tl.constexpr,
    block_depth: tl.constexpr,
    block_positions: tl.constexpr,
):
    """`out[split, g] = gathered(entries[g]) gradient[rows[g]]^T`.

    Each split sums over its share of the positions.

    Args:
      source: activations `[channels, *size]`.
      entries: int32 rows `[groups, list_length]`, of which `depth` count; -1: nothing.
      rows: int32 `[groups, row_length]`, each group's channels of the gradient; -1: nothing.
      gradient: `[channels, *out_size]`.
      scale, shift: float32 by channel of the source; read with `normalise`: what is gathered is
        `relu(scale * source + shift)`.
      out: float32 `[splits, groups, depth, members]`.
    """
    tiles: tl.constexpr = (members + block_rows - 1) // block_rows
    depth_tiles: tl.constexpr = (depth + block_depth - 1) // block_depth
    images: tl.constexpr = out_size[2]
    positions: tl.constexpr = out_size[0] * out_size[1] * images
    steps: tl.constexpr = (positions + block_positions - 1) // block_positions
    share: tl.constexpr = (steps + splits - 1) // splits
    program = tl.program_id(0)
    part, depth_tile = program % tiles, program // tiles % depth_tiles
    group = program // (tiles * depth_tiles) % groups
    split = program // (tiles * depth_tiles * groups)
    k = depth_tile * block_depth + tl.arange(0, block_depth)
    member = part * block_rows + tl.arange(0, block_rows)
    lane = tl.arange(0, block_positions)
    entry = tl.load(entries + group * list_length + k)[:, None]
    row = tl.load(rows + group * row_length + member)[:, None]
    row_offset = row.to(tl.int64) * positions if wide else row * positions
    factor, term = None, None
    if normalise:
        factor, term = norm_of(entry, scale, shift, ragged)

    total = tl.zeros((block_depth, block_rows), tl.float32)
    for step in range(split * share, tl.minimum(split * share + share, steps)):
        place = step * block_positions
        inside = None
        top, left, image = positions_of(
            step, lane, images, out_size[1], strides, padding, False, block_positions
        )
        if positions % block_positions != 0:
            inside = (place + lane < positions)[None, :]
        gathered = gather(
            source,
            entry,
            top,
            left,
            image,
            inside,
            size,
            0,
            0,
            strides,
            dilation,
            False,
            False,
            border,
            ragged,
            wide,
            factor,
            term,
            normalise,
            relu,
        )
        mask = inside
        if members % block_rows != 0:
            mask = row >= 0 if mask is None else mask & (row >= 0)
        gradient_block = gradient + row_offset + (place + lane)[None, :]
        if mask is None:
            gradient_rows = tl.load(gradient_block)
        else:
            gradient_rows = tl.load(gradient_block, mask=mask, other=0.0)
        total = tl.dot(gathered, tl.trans(gradient_rows), total, input_precision=precision)
    out += (split * groups + group) * (depth * members)
    out_block = out + k[:, None] * members + member[None, :]
    tl.store(out_block, total, mask=(k < depth)[:, None] & (member < members)[None, :])
