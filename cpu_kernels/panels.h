// Panels: the sources of a group's rows, packed, and the product of a register tile with them. See
// passes.h.

constexpr int64_t kDepth =
    96;  // rows of a panel: it shares the L1 cache with the weights of the product

// What a group's kept taps mean for some vectors: offsets in the source, and the lanes that they
// reach.
struct Reach {
  int64_t count;    // taps that reach anything
  int64_t* tap;     // where they stand among the kept taps
  int64_t* offset;  // from a position to what they read, in elements
  Bits* bits;       // [count, vectors]
};

inline Reach take_reach(Scratch& scratch, const Problem& p, int64_t vectors) {
  return {0, scratch.take<int64_t>(p.kept_taps), scratch.take<int64_t>(p.kept_taps),
          scratch.take<Bits>(p.kept_taps * vectors)};
}

inline void find_reach(const Problem& p, const Grid& grid, int64_t group, const Vectors& all,
                       int64_t count, Reach& out) {
  out.count = 0;
  for (int64_t t = 0; t < p.kept_taps; ++t) {
    const int64_t tap = p.taps[group * p.kept_taps + t], ty = tap / p.kernel_width,
                  tx = tap % p.kernel_width;
    Bits* bits = out.bits + out.count * count;
    Bits any = 0;
    for (int64_t v = 0; v < count; ++v) any |= bits[v] = all.reached(v, ty, tx);
    if (!any && !(p.careful && grid.y.active[ty] && grid.x.active[tx])) continue;
    out.tap[out.count] = t;
    out.offset[out.count++] =
        (grid.y.place[ty] * grid.source_width + grid.x.place[tx]) * grid.images;
  }
}

template <class E>
inline Vector fetch(const E* row, const Lanes& lanes, Bits bits) {
  row += lanes.source;
  if (lanes.source_run) return load_some(row, bits);
#if defined(__AVX512F__)
  if (lanes.source_halves) return halves_some(row, lanes.source_at[kLanes / 2], bits);
  if (lanes.source_near) return near_some(row, lanes.source_at, lanes.source_near_bits, bits);
#endif
  return gather_some(row, lanes.source_at, bits);
}

// The rows of one product with a group's values: the sources of the panel's rows, and where their
// weights are.
template <class E>
struct Block {
  int64_t group, step, rows;  // the first step of the summed axis
  bool first, last;           // of its group
  Reach reach;
  const E **one, **two;  // the row's source, and that of its pair (null: zeros)
  int64_t *at, *tap;     // the offset of the row's weights; the row's tap, an index into `reach`
};

// How a pass walks the summed axis: through the kept channels (forward) or the group's filters
// (input gradient).
struct Walk {
  const int32_t* index;  // [groups, count]
  int64_t count, pair;
  int64_t step_at, tap_at;  // strides of the weights
  int64_t steps() const { return up(count, pair); }
};

inline int64_t depth(const Problem& p) { return kDepth > p.kept_taps ? kDepth : p.kept_taps; }

template <class E>
inline Block<E> take_block(Scratch& scratch, const Problem& p, int64_t vectors) {
  Block<E> out = {};
  out.reach = take_reach(scratch, p, vectors);
  out.one = scratch.take<const E*>(depth(p)), out.two = scratch.take<const E*>(depth(p));
  out.at = scratch.take<int64_t>(depth(p)), out.tap = scratch.take<int64_t>(depth(p));
  return out;
}

// The block of `group` that begins at `step`.
template <class E>
inline void fill_block(const Problem& p, const Grid& grid, const Walk& walk, int64_t group,
                       int64_t step, const Vectors& all, int64_t vectors, Block<E>& out) {
  find_reach(p, grid, group, all, vectors, out.reach);
  const int64_t taps = out.reach.count, most = taps ? depth(p) / taps : 0,
                steps = taps ? walk.steps() : 0;
  const int64_t end = least(step + most, steps);
  const int32_t* index = walk.index + group * walk.count;
  const E* source = static_cast<const E*>(p.source);
  out.group = group, out.step = end, out.first = step == 0, out.last = end >= steps;
  int64_t row = 0;
  for (int64_t s = step; s < end; ++s)
    for (int64_t t = 0; t < taps; ++t, ++row) {
      const int64_t i = s * walk.pair;
      out.one[row] = source + index[i] * grid.source_pitch + out.reach.offset[t];
      out.two[row] = i + 1 < walk.count
                         ? source + index[i + 1] * grid.source_pitch + out.reach.offset[t]
                         : nullptr;
      out.at[row] = s * walk.step_at + out.reach.tap[t] * walk.tap_at;
      out.tap[row] = t;
    }
  out.rows = row;
}

// Vectors in tiles of 1 to kTile vectors, of widths as equal as possible.
struct Tiles {
  int64_t vectors, count;
  int32_t* at;  // [count + 1] the tiles' first vectors
  int64_t begin(int64_t i) const { return at[i]; }
  int64_t width(int64_t i) const { return at[i + 1] - at[i]; }
};

inline Tiles take_tiles(Scratch& scratch, int64_t most) {
  return {0, 0, scratch.take<int32_t>(up(most, kTile) + 1)};
}

inline void cut(int64_t vectors, Tiles& out) {
  out.vectors = vectors, out.count = up(vectors, kTile);
  for (int64_t i = 0; i <= out.count; ++i) out.at[i] = int32_t(vectors * i / out.count);
}

constexpr int64_t kAhead = 4;  // rows that packing fetches in advance

// One row of a tile, of vectors that lie side by side (Run) or anywhere.
template <class M, int NV, bool Run>
inline void pack_tile(const typename M::Element* first, const typename M::Element* second,
                      const typename M::Element* ahead, const Lanes* lanes, const Bits* bits,
                      float* out) {
  UNROLL
  for (int v = 0; v < NV; ++v) {
    const int64_t at = Run ? v * kLanes : lanes[v].source;
    __builtin_prefetch(ahead + at);
    const auto get = [&](const typename M::Element* row) {
      return Run ? load_some(row + at, bits[v]) : fetch(row, lanes[v], bits[v]);
    };
    if constexpr (M::kPair == 1) {
      store(out + v * kLanes, get(first));
    } else {
      typedef uint32_t Words __attribute__((vector_size(kLanes * 4)));
      const Words low = (Words)get(first) >> 16;
      const Words high = second ? (Words)get(second) : Words{};
      store(out + v * kLanes, (Vector)(low | high));
    }
  }
}

// The panel of a block: for each tile `rows x width` vectors. A row is read over all tiles at once,
// because long runs of memory are fast.
template <class M, bool Run>
void pack_all(const Block<typename M::Element>& block, const Lanes* lanes, const Tiles& tiles,
              float* panel) {
  for (int64_t r = 0; r < block.rows; ++r) {
    const Bits* bits = block.reach.bits + block.tap[r] * tiles.vectors;
    const int64_t start = Run ? lanes[0].source : 0;
    const auto *first = block.one[r] + start,
               *ahead = block.one[least(r + kAhead, block.rows - 1)] + start;
    const auto* second = block.two[r] ? block.two[r] + start : nullptr;
    for (int64_t i = 0; i < tiles.count; ++i) {
      const int64_t begin = tiles.begin(i), width = tiles.width(i), skip = Run ? begin * kLanes : 0;
      float* out = panel + (begin * block.rows + r * width) * kLanes;
      const auto* pair = second ? second + skip : nullptr;
      if (width == kTile)
        pack_tile<M, kTile, Run>(first + skip, pair, ahead + skip, lanes + begin, bits + begin,
                                 out);
      else if (width == 2)
        pack_tile<M, 2, Run>(first + skip, pair, ahead + skip, lanes + begin, bits + begin, out);
      else
        pack_tile<M, 1, Run>(first + skip, pair, ahead + skip, lanes + begin, bits + begin, out);
    }
  }
}

template <class M>
void pack(const Block<typename M::Element>& block, const Vectors& vectors, const Tiles& tiles,
          float* panel) {
  if (vectors.run)
    pack_all<M, true>(block, vectors.lanes, tiles, panel);
  else
    pack_all<M, false>(block, vectors.lanes, tiles, panel);
}

// What to bring into the cache while a product runs: one line for each of its rows.
struct Ahead {
  const void* const* row;
  int64_t bytes;
};

template <class E>
inline Ahead ahead_of(const Block<E>& block, const Block<E>& next, const Lanes& lanes) {
  return {reinterpret_cast<const void* const*>(next.rows >= block.rows ? next.one : block.one),
          lanes.source * int64_t(sizeof(E))};
}

// c[m][.] (+)= sum over the rows r of a[m][at[r]] * panel[r][.]. With Neighbours, a[m] is a[0] + m.
template <class M, int MR, int NV, bool Neighbours>
inline void multiply(int64_t rows, const float* panel, const float* const* a, const int64_t* at,
                     float* const* c, bool clear, Ahead ahead) {
  Vector sums[MR][NV];
  UNROLL
  for (int m = 0; m < MR; ++m) UNROLL
  for (int v = 0; v < NV; ++v) sums[m][v] = clear ? Vector{} : load(c[m] + v * kLanes);
  for (int64_t r = 0; r < rows; ++r) {
    __builtin_prefetch(static_cast<const char*>(ahead.row[r]) + ahead.bytes, 0, 2);
    const int64_t place = at[r];
    Vector b[NV];
    UNROLL
    for (int v = 0; v < NV; ++v) b[v] = load(panel + (r * NV + v) * kLanes);
    UNROLL
    for (int m = 0; m < MR; ++m) {
      const Vector w = broadcast(Neighbours ? a[0][place + m] : a[m][place]);
      UNROLL
      for (int v = 0; v < NV; ++v) sums[m][v] = M::multiply_add(w, b[v], sums[m][v]);
    }
  }
  UNROLL
  for (int m = 0; m < MR; ++m) UNROLL
  for (int v = 0; v < NV; ++v) store(c[m] + v * kLanes, sums[m][v]);
}

template <class M, int NV, bool Neighbours, int MR = kRows>
inline void multiply_of(int64_t count, int64_t rows, const float* panel, const float* const* a,
                        const int64_t* at, float* const* c, bool clear, Ahead ahead) {
  if (count == MR) return multiply<M, MR, NV, Neighbours>(rows, panel, a, at, c, clear, ahead);
  if constexpr (MR > 1)
    multiply_of<M, NV, Neighbours, MR - 1>(count, rows, panel, a, at, c, clear, ahead);
}

template <class M, bool Neighbours>
inline void multiply_tile(int64_t width, int64_t count, int64_t rows, const float* panel,
                          const float* const* a, const int64_t* at, float* const* c, bool clear,
                          Ahead ahead) {
  if (width == kTile)
    multiply_of<M, kTile, Neighbours>(count, rows, panel, a, at, c, clear, ahead);
  else if (width == 2)
    multiply_of<M, 2, Neighbours>(count, rows, panel, a, at, c, clear, ahead);
  else
    multiply_of<M, 1, Neighbours>(count, rows, panel, a, at, c, clear, ahead);
}
