// The three passes for one variant: included by variant_*.cc inside the variant's namespace.
//
// A product, forward: the rows of the source under each (kept channel, kept tap) of a group are packed into a panel, zeros where a tap
// leaves the image, and an 8 x 48 tile of outputs stays in registers while the panel streams through it. Taps that reach no position at
// hand are left out. While a panel is multiplied, the sources of the next one are fetched into the cache. Input gradient: the same with
// the group's filters as rows, added channel by channel into a buffer of all channels that one thread owns: no atomics, and one order
// of summation. Weight gradient: dot products over long runs of positions, summed in registers.

#define UNROLL _Pragma("GCC unroll 16")

constexpr int64_t kDepth = 96;        // rows of a panel: it shares the L1 cache with the weights that it meets
constexpr int64_t kCaches = 12 << 20;  // bytes: a larger target is written past the caches
constexpr int64_t kRun = 64;          // vectors of positions in a block of the weight gradient

// Element types. kPair = 2: two bfloat16 of the summed axis lie side by side in one 32-bit lane.
struct Float32 {
  typedef float Element;
  static constexpr int kPair = 1;
  static Vector multiply_add(Vector a, Vector b, Vector c) { return fma(a, b, c); }
};
struct Widened : Float32 {
  typedef BFloat16 Element;
};
#if defined(__AVX512BF16__)
struct Paired {
  typedef BFloat16 Element;
  static constexpr int kPair = 2;
  static Vector multiply_add(Vector a, Vector b, Vector c) {
    return (Vector)_mm512_dpbf16_ps((__m512)c, (__m512bh)_mm512_castps_si512((__m512)a), (__m512bh)_mm512_castps_si512((__m512)b));
  }
};
typedef Paired BFloat16Mode;
#else
typedef Widened BFloat16Mode;
#endif

inline int64_t up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// ---- panels -------------------------------------------------------------------------------------------------------------------------

// What a group's kept taps mean for some vectors: offsets in the source, and the lanes that they reach.
struct Reach {
  int64_t count;      // taps that reach anything
  int64_t* tap;       // their places among the kept taps
  int64_t* offset;    // elements
  Bits* bits;         // [count, vectors]
};

inline Reach take_reach(Scratch& scratch, const Problem& p, int64_t vectors) {
  return {0, scratch.take<int64_t>(p.kept_taps), scratch.take<int64_t>(p.kept_taps), scratch.take<Bits>(p.kept_taps * vectors)};
}

inline void find_reach(const Problem& p, const Grid& grid, int64_t group, const Vectors& all, int64_t count, Reach& out) {
  out.count = 0;
  for (int64_t t = 0; t < p.kept_taps; ++t) {
    const int64_t tap = p.taps[group * p.kept_taps + t], ty = tap / p.kernel_width, tx = tap % p.kernel_width;
    Bits* bits = out.bits + out.count * count;
    Bits any = 0;
    for (int64_t v = 0; v < count; ++v) any |= bits[v] = all.reached(v, ty, tx);
    if (!any) continue;
    out.tap[out.count] = t;
    out.offset[out.count++] = (grid.y.offset[ty] * grid.source_width + grid.x.offset[tx]) * grid.images;
  }
}

template <class E>
inline Vector fetch(const E* row, const Lanes& lanes, Bits bits) {
  return lanes.source_run ? load_some(row + lanes.source, bits) : gather_some(row + lanes.source, lanes.source_at, bits);
}

// The rows of one product with a group's values: sources of the panel's rows, and where their weights stand.
template <class E>
struct Block {
  int64_t group, step, rows;  // the first step of the summed axis
  bool first, last;           // of its group
  Reach reach;
  const E **one, **two;       // the row's source, and its pair (null: zeros)
  int64_t *at, *tap;          // the row's weights; its place in `reach`
};

// How a pass walks the summed axis: through the kept channels (forward) or the group's filters (input gradient).
struct Walk {
  const int32_t* index;       // [groups, count]
  int64_t count, pair;
  int64_t step_at, tap_at;    // strides of the weights
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
inline void fill_block(const Problem& p, const Grid& grid, const Walk& walk, int64_t group, int64_t step, const Vectors& all, int64_t vectors,
                       Block<E>& out) {
  find_reach(p, grid, group, all, vectors, out.reach);
  const int64_t taps = out.reach.count, most = taps ? depth(p) / taps : 0, steps = taps ? walk.steps() : 0;
  const int64_t end = least(step + most, steps);
  const int32_t* index = walk.index + group * walk.count;
  const E* source = static_cast<const E*>(p.source);
  out.group = group, out.step = end, out.first = step == 0, out.last = end >= steps;
  int64_t row = 0;
  for (int64_t s = step; s < end; ++s)
    for (int64_t t = 0; t < taps; ++t, ++row) {
      const int64_t i = s * walk.pair;
      out.one[row] = source + index[i] * grid.source_pitch + out.reach.offset[t];
      out.two[row] = i + 1 < walk.count ? source + index[i + 1] * grid.source_pitch + out.reach.offset[t] : nullptr;
      out.at[row] = s * walk.step_at + out.reach.tap[t] * walk.tap_at;
      out.tap[row] = t;
    }
  out.rows = row;
}

// Vectors in tiles of 1 to kTile, as even as can be.
struct Tiles {
  int64_t vectors, count;
  int32_t* at;  // [count + 1] the tiles' first vectors
  int64_t begin(int64_t i) const { return at[i]; }
  int64_t width(int64_t i) const { return at[i + 1] - at[i]; }
};

inline Tiles take_tiles(Scratch& scratch, int64_t most) { return {0, 0, scratch.take<int32_t>(up(most, kTile) + 1)}; }

inline void cut(int64_t vectors, Tiles& out) {
  out.vectors = vectors, out.count = up(vectors, kTile);
  for (int64_t i = 0; i <= out.count; ++i) out.at[i] = int32_t(vectors * i / out.count);
}

constexpr int64_t kAhead = 4;  // rows that packing fetches in advance

// One row of a tile, of vectors that lie side by side (Run) or anywhere.
template <class M, int NV, bool Run>
inline void pack_tile(const typename M::Element* first, const typename M::Element* second, const typename M::Element* ahead, const Lanes* lanes,
                      const Bits* bits, float* out) {
  UNROLL for (int v = 0; v < NV; ++v) {
    const int64_t at = Run ? v * kLanes : lanes[v].source;
    __builtin_prefetch(ahead + at);
    const auto get = [&](const typename M::Element* row) { return Run ? load_some(row + at, bits[v]) : fetch(row, lanes[v], bits[v]); };
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

// The panel of a block: for each tile `rows x width` vectors. A row is read over all tiles at once: long runs are what memory likes.
template <class M, bool Run>
void pack_all(const Block<typename M::Element>& block, const Lanes* lanes, const Tiles& tiles, float* panel) {
  for (int64_t r = 0; r < block.rows; ++r) {
    const Bits* bits = block.reach.bits + block.tap[r] * tiles.vectors;
    const int64_t start = Run ? lanes[0].source : 0;
    const auto *first = block.one[r] + start, *ahead = block.one[least(r + kAhead, block.rows - 1)] + start;
    const auto* second = block.two[r] ? block.two[r] + start : nullptr;
    for (int64_t i = 0; i < tiles.count; ++i) {
      const int64_t begin = tiles.begin(i), width = tiles.width(i), skip = Run ? begin * kLanes : 0;
      float* out = panel + (begin * block.rows + r * width) * kLanes;
      const auto* pair = second ? second + skip : nullptr;
      if (width == kTile) pack_tile<M, kTile, Run>(first + skip, pair, ahead + skip, lanes + begin, bits + begin, out);
      else if (width == 2) pack_tile<M, 2, Run>(first + skip, pair, ahead + skip, lanes + begin, bits + begin, out);
      else pack_tile<M, 1, Run>(first + skip, pair, ahead + skip, lanes + begin, bits + begin, out);
    }
  }
}

template <class M>
void pack(const Block<typename M::Element>& block, const Vectors& vectors, const Tiles& tiles, float* panel) {
  if (vectors.run) pack_all<M, true>(block, vectors.lanes, tiles, panel);
  else pack_all<M, false>(block, vectors.lanes, tiles, panel);
}

// What to bring into the cache while a product runs: one line for each of its rows.
struct Ahead {
  const void* const* row;
  int64_t bytes;
};

template <class E>
inline Ahead ahead_of(const Block<E>& block, const Block<E>& next, const Lanes& lanes) {
  return {reinterpret_cast<const void* const*>(next.rows >= block.rows ? next.one : block.one), lanes.source * int64_t(sizeof(E))};
}

// c[m][.] (+)= sum over the rows r of a[m][at[r]] * panel[r][.]; Neighbours: a[m] = a[0] + m.
template <class M, int MR, int NV, bool Neighbours>
inline void multiply(int64_t rows, const float* panel, const float* const* a, const int64_t* at, float* const* c, bool clear, Ahead ahead) {
  Vector sums[MR][NV];
  UNROLL for (int m = 0; m < MR; ++m) UNROLL for (int v = 0; v < NV; ++v) sums[m][v] = clear ? Vector{} : load(c[m] + v * kLanes);
  for (int64_t r = 0; r < rows; ++r) {
    __builtin_prefetch(static_cast<const char*>(ahead.row[r]) + ahead.bytes, 0, 2);
    const int64_t place = at[r];
    Vector b[NV];
    UNROLL for (int v = 0; v < NV; ++v) b[v] = load(panel + (r * NV + v) * kLanes);
    UNROLL for (int m = 0; m < MR; ++m) {
      const Vector w = broadcast(Neighbours ? a[0][place + m] : a[m][place]);
      UNROLL for (int v = 0; v < NV; ++v) sums[m][v] = M::multiply_add(w, b[v], sums[m][v]);
    }
  }
  UNROLL for (int m = 0; m < MR; ++m) UNROLL for (int v = 0; v < NV; ++v) store(c[m] + v * kLanes, sums[m][v]);
}

template <class M, int NV, bool Neighbours, int MR = kRows>
inline void multiply_of(int64_t count, int64_t rows, const float* panel, const float* const* a, const int64_t* at, float* const* c, bool clear,
                        Ahead ahead) {
  if (count == MR) return multiply<M, MR, NV, Neighbours>(rows, panel, a, at, c, clear, ahead);
  if constexpr (MR > 1) multiply_of<M, NV, Neighbours, MR - 1>(count, rows, panel, a, at, c, clear, ahead);
}

template <class M, bool Neighbours>
inline void multiply_tile(int64_t width, int64_t count, int64_t rows, const float* panel, const float* const* a, const int64_t* at,
                          float* const* c, bool clear, Ahead ahead) {
  if (width == kTile) multiply_of<M, kTile, Neighbours>(count, rows, panel, a, at, c, clear, ahead);
  else if (width == 2) multiply_of<M, 2, Neighbours>(count, rows, panel, a, at, c, clear, ahead);
  else multiply_of<M, 1, Neighbours>(count, rows, panel, a, at, c, clear, ahead);
}

template <class E>
inline void write(E* row, const Lanes& lanes, Vector values, bool past_caches) {
  if (past_caches && lanes.target_run && lanes.live == kAll && stream(row + lanes.target, values)) return;
  if (lanes.target_run) store_some(row + lanes.target, values, lanes.live);
  else scatter_some(row + lanes.target, lanes.target_at, values, lanes.live);
}

// The epilogue of one row.
template <class E>
struct Finisher {
  Vector scale, bias;
  const E* residual;
  bool relu;
  Finisher(const Epilogue& epilogue, int64_t row, int64_t pitch)
      : scale(broadcast(epilogue.scale ? epilogue.scale[row] : 1.0f)),
        bias(broadcast(epilogue.bias ? epilogue.bias[row] : 0.0f)),
        residual(epilogue.residual ? static_cast<const E*>(epilogue.residual) + row * pitch : nullptr),
        relu(epilogue.relu) {}
  Vector operator()(Vector sums, const Lanes& lanes) const {
    Vector out = fma(sums, scale, bias);
    if (residual) {
      const E* at = residual + lanes.target;
      out += lanes.target_run ? load_some(at, lanes.live) : gather_some(at, lanes.target_at, lanes.live);
    }
    return relu ? positive(out) : out;
  }
};

template <class E>
struct ProductScratch {
  Vectors vectors;
  Tiles tiles;
  Block<E> blocks[2];
  float *panel, *sums;
  int32_t* kept;
};

template <class E>
inline ProductScratch<E> take_product(Scratch& scratch, const Problem& p, const Grid& grid, int64_t vectors, int64_t rows) {
  ProductScratch<E> out;
  out.vectors = take_vectors(scratch, grid, vectors);
  out.tiles = take_tiles(scratch, vectors);
  for (Block<E>& block : out.blocks) block = take_block<E>(scratch, p, vectors);
  out.panel = scratch.take<float>(depth(p) * vectors * kLanes);
  out.sums = scratch.take<float>(rows * vectors * kLanes);
  out.kept = scratch.take<int32_t>(p.kept);
  return out;
}

// The sums to the target, row by row over all tiles; `index` null: rows in order, of `all` in the target.
template <bool Finish, class E>
void write_all(const ProductScratch<E>& s, int64_t rows, const Grid& grid, int64_t all, const int32_t* index, E* target,
               const Epilogue& epilogue = {}) {
  const Tiles& tiles = s.tiles;
  const bool past_caches = grid.target_pitch * all * int64_t(sizeof(E)) > kCaches;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t place = index ? index[row] : row;
    E* out = target + place * grid.target_pitch;
    const Finisher<E> finish(epilogue, place, grid.target_pitch);
    for (int64_t i = 0; i < tiles.count; ++i) {
      const int64_t begin = tiles.begin(i), width = tiles.width(i);
      for (int64_t v = 0; v < width; ++v) {
        const Lanes& lanes = s.vectors.lanes[begin + v];
        Vector values = load(s.sums + (begin * rows + row * width + v) * kLanes);
        if constexpr (Finish) values = finish(values, lanes);
        write(out, lanes, values, past_caches);
      }
    }
  }
  if (past_caches) fence();
}

// ---- the forward pass ---------------------------------------------------------------------------------------------------------------

template <class M>
size_t forward_scratch(const Problem& p, const Grid& grid, int64_t vectors) {
  Scratch count = {nullptr};
  take_product<typename M::Element>(count, p, grid, vectors, p.group_size);
  return count.used;
}

template <class M>
void forward(const Problem& p, const Grid& grid, Range range, Range groups, void* memory) {
  typedef typename M::Element E;
  Scratch scratch = {static_cast<char*>(memory)};
  ProductScratch<E> s = take_product<E>(scratch, p, grid, range.size(), p.group_size);
  describe_all(grid, range.begin, range.size(), s.vectors);
  cut(range.size(), s.tiles);
  const int64_t filters = p.group_size, columns = up(filters, kRows);
  const bool finish = p.epilogue.scale || p.epilogue.bias || p.epilogue.residual || p.epilogue.relu;
  const Walk walk = {p.channels, p.kept, M::kPair, p.kept_taps * filters, filters};
  const Tiles& tiles = s.tiles;
  const Lanes* lanes = s.vectors.lanes;
  Block<E>*block = &s.blocks[0], *next = &s.blocks[1];
  fill_block(p, grid, walk, groups.begin, 0, s.vectors, range.size(), *block);
  while (block) {
    const bool done = block->last && block->group + 1 == groups.end;
    if (done) next->rows = 0;
    else fill_block(p, grid, walk, block->group + block->last, block->last ? 0 : block->step, s.vectors, range.size(), *next);
    pack<M>(*block, s.vectors, tiles, s.panel);
    const float* weights = p.values + block->group * walk.steps() * walk.step_at;
    for (int64_t i = 0; i < tiles.count; ++i) {
      const int64_t begin = tiles.begin(i), width = tiles.width(i);
      for (int64_t j = 0; j < columns; ++j) {
        const int64_t from = filters * j / columns, to = filters * (j + 1) / columns;
        const float* a = weights + from;
        float* c[kRows];
        for (int64_t m = from; m < to; ++m) c[m - from] = s.sums + (begin * filters + m * width) * kLanes;
        const Ahead ahead = ahead_of(*block, *next, lanes[begin + (j < width ? j : width - 1)]);
        multiply_tile<M, true>(width, to - from, block->rows, s.panel + begin * block->rows * kLanes, &a, block->at, c, block->first, ahead);
      }
    }
    if (block->last) {
      const int32_t* index = p.filters + block->group * filters;
      E* target = static_cast<E*>(p.target);
      if (finish) write_all<true>(s, filters, grid, p.cout, index, target, p.epilogue);
      else write_all<false>(s, filters, grid, p.cout, index, target);
    }
    Block<E>* old = block;
    block = done ? nullptr : next, next = old;
  }
}

// ---- the input gradient -------------------------------------------------------------------------------------------------------------

template <class M>
size_t input_gradient_scratch(const Problem& p, const Grid& grid, int64_t vectors, int64_t channels) {
  Scratch count = {nullptr};
  take_product<typename M::Element>(count, p, grid, vectors, channels);
  return count.used;
}

template <class M>
void input_gradient(const Problem& p, const Grid& grid, Range range, Range channels, void* memory) {
  typedef typename M::Element E;
  Scratch scratch = {static_cast<char*>(memory)};
  ProductScratch<E> s = take_product<E>(scratch, p, grid, range.size(), channels.size());
  describe_all(grid, range.begin, range.size(), s.vectors);
  cut(range.size(), s.tiles);
  const int64_t steps = up(p.group_size, M::kPair), wanted = channels.size();
  const Walk walk = {p.filters, p.group_size, M::kPair, 1, steps};
  const Tiles& tiles = s.tiles;
  const Lanes* lanes = s.vectors.lanes;
  for (int64_t i = 0; i < wanted * range.size(); ++i) store(s.sums + i * kLanes, Vector{});
  Block<E>*block = &s.blocks[0], *next = &s.blocks[1];
  fill_block(p, grid, walk, 0, 0, s.vectors, range.size(), *block);
  while (block) {
    const bool done = block->last && block->group + 1 == p.groups;
    if (done) next->rows = 0;
    else fill_block(p, grid, walk, block->group + block->last, block->last ? 0 : block->step, s.vectors, range.size(), *next);
    const int32_t* index = p.channels + block->group * p.kept;
    int64_t kept = 0;  // the places of the wanted channels among the group's
    for (int64_t k = 0; k < p.kept && block->rows; ++k) s.kept[kept] = int32_t(k), kept += index[k] >= channels.begin && index[k] < channels.end;
    if (kept) pack<M>(*block, s.vectors, tiles, s.panel);
    const int64_t columns = up(kept, kRows);
    for (int64_t i = 0; i < tiles.count; ++i) {
      const int64_t begin = tiles.begin(i), width = tiles.width(i);
      for (int64_t j = 0; j < columns; ++j) {
        const int64_t from = kept * j / columns, to = kept * (j + 1) / columns;
        const float* a[kRows];
        float* c[kRows];
        for (int64_t m = from; m < to; ++m) {
          a[m - from] = p.values + (block->group * p.kept + s.kept[m]) * p.kept_taps * steps;
          c[m - from] = s.sums + (begin * wanted + (index[s.kept[m]] - channels.begin) * width) * kLanes;
        }
        const Ahead ahead = ahead_of(*block, *next, lanes[begin + (j < width ? j : width - 1)]);
        multiply_tile<M, false>(width, to - from, block->rows, s.panel + begin * block->rows * kLanes, a, block->at, c, false, ahead);
      }
    }
    Block<E>* old = block;
    block = done ? nullptr : next, next = old;
  }
  write_all<false>(s, wanted, grid, p.cin, nullptr, static_cast<E*>(p.target) + channels.begin * grid.target_pitch);
}

// ---- the weight gradient ------------------------------------------------------------------------------------------------------------

// c[r][f] += sum over the vectors of x[r][.] * y[f][.]
template <class M, int R, int F>
inline void dot(int64_t vectors, const float* x, const float* y, int64_t pitch, float* c, int64_t c_pitch, const char* ahead) {
  Vector sums[R][F];
  UNROLL for (int r = 0; r < R; ++r) UNROLL for (int f = 0; f < F; ++f) sums[r][f] = Vector{};
  for (int64_t v = 0; v < vectors; ++v) {
    __builtin_prefetch(ahead + v * kLanes * 4, 0, 2);
    Vector b[F];
    UNROLL for (int f = 0; f < F; ++f) b[f] = load(y + f * pitch + v * kLanes);
    UNROLL for (int r = 0; r < R; ++r) {
      const Vector a = load(x + r * pitch + v * kLanes);
      UNROLL for (int f = 0; f < F; ++f) sums[r][f] = M::multiply_add(a, b[f], sums[r][f]);
    }
  }
  UNROLL for (int r = 0; r < R; ++r) {
#if defined(__AVX512F__)
    if constexpr (F == 4) {
      float four[4];
      sum4(sums[r], four);
      UNROLL for (int f = 0; f < F; ++f) c[r * c_pitch + f] += four[f];
      continue;
    }
#endif
    UNROLL for (int f = 0; f < F; ++f) c[r * c_pitch + f] += sum(sums[r][f]);
  }
}

template <class M, int R = kDotRows, int F = kDotFilters>
inline void dot_of(int64_t rows, int64_t filters, int64_t vectors, const float* x, const float* y, int64_t pitch, float* c, int64_t c_pitch,
                   const char* ahead) {
  if (rows == R && filters == F) return dot<M, R, F>(vectors, x, y, pitch, c, c_pitch, ahead);
  if constexpr (R > 1) {
    if (rows < R) return dot_of<M, R - 1, F>(rows, filters, vectors, x, y, pitch, c, c_pitch, ahead);
  }
  if constexpr (F > 1) {
    if (filters < F) return dot_of<M, R, F - 1>(rows, filters, vectors, x, y, pitch, c, c_pitch, ahead);
  }
}

// A run of positions of one row: with pairs as bfloat16, else as float32.
template <class M>
inline void put(Vector values, int64_t v, float* out) {
  if constexpr (M::kPair == 1) store(out + v * kLanes, values);
  else store_some(reinterpret_cast<BFloat16*>(out) + v * kLanes, values, kAll);
}

// `count` vectors of a row, zeros in the lanes whose bit is not set (no bits: everywhere) and up to `padded`.
template <class M>
inline void pack_row(const typename M::Element* row, const Vectors& vectors, bool run, const Bits* bits, int64_t count, int64_t padded, float* out) {
  const Lanes* lanes = vectors.lanes;
  if (!bits) count = 0;
  if (run) {
    for (int64_t v = 0; v < count; ++v) put<M>(load_some(row + v * kLanes, bits[v]), v, out);
  } else {
    for (int64_t v = 0; v < count; ++v) put<M>(fetch(row, lanes[v], bits[v]), v, out);
  }
  for (int64_t v = count; v < padded; ++v) put<M>(Vector{}, v, out);
}

struct WeightGradientScratch {
  Vectors vectors;
  Reach reach;
  Bits* live;
  int64_t* place;  // of each kept tap in `reach`; -1: it reaches nothing
  float *x, *y;
};

inline WeightGradientScratch take_weight_gradient(Scratch& scratch, const Problem& p, const Grid& grid) {
  WeightGradientScratch out;
  out.vectors = take_vectors(scratch, grid, kRun);
  out.reach = take_reach(scratch, p, kRun);
  out.live = scratch.take<Bits>(kRun);
  out.place = scratch.take<int64_t>(p.kept_taps);
  out.x = scratch.take<float>(kDotRows * kRun * kLanes);
  out.y = scratch.take<float>(p.group_size * kRun * kLanes);
  return out;
}

size_t weight_gradient_scratch(const Problem& p, const Grid& grid) {
  Scratch count = {nullptr};
  take_weight_gradient(count, p, grid);
  return count.used;
}

// Adds the products over the blocks of positions in `range` (each of kRun vectors) to sums[kept, kept_taps, group_size].
template <class M>
void weight_gradient(const Problem& p, const Grid& grid, int64_t group, Range rows, Range range, float* sums, void* memory) {
  typedef typename M::Element E;
  Scratch scratch = {static_cast<char*>(memory)};
  WeightGradientScratch s = take_weight_gradient(scratch, p, grid);
  const int64_t positions = grid.positions(), filters = p.group_size, pitch = kRun * kLanes / M::kPair;
  const E *source = static_cast<const E*>(p.source), *other = static_cast<const E*>(p.other);
  for (int64_t begin = range.begin * kRun; begin < least(range.end * kRun, up(positions, kLanes)); begin += kRun) {
    const int64_t count = least(kRun, up(positions, kLanes) - begin), padded = up(count, M::kPair) * M::kPair;
    describe_all(grid, begin, count, s.vectors);
    const Lanes* lanes = s.vectors.lanes;
    for (int64_t v = 0; v < count; ++v) s.live[v] = lanes[v].live;
    find_reach(p, grid, group, s.vectors, count, s.reach);
    for (int64_t t = 0; t < p.kept_taps; ++t) s.place[t] = -1;
    for (int64_t t = 0; t < s.reach.count; ++t) s.place[s.reach.tap[t]] = t;
    const auto row_of = [&](int64_t r) {
      const int64_t place = s.place[r % p.kept_taps];
      return source + p.channels[group * p.kept + r / p.kept_taps] * grid.source_pitch + (place < 0 ? 0 : s.reach.offset[place]);
    };
    for (int64_t f = 0; f < filters; ++f) {
      const E* row = other + p.filters[group * filters + f] * positions + begin * kLanes;
      pack_row<M>(row, s.vectors, true, s.live, count, padded, s.y + f * pitch);
    }
    const int64_t tiles = up(rows.size(), kDotRows), columns = up(filters, kDotFilters);
    for (int64_t i = 0; i < tiles; ++i) {
      const int64_t from = rows.begin + rows.size() * i / tiles, to = rows.begin + rows.size() * (i + 1) / tiles;
      for (int64_t r = from; r < to; ++r) {
        const int64_t place = s.place[r % p.kept_taps];
        const Bits* bits = place < 0 ? nullptr : s.reach.bits + place * count;
        const E* row = row_of(r) + (s.vectors.run ? lanes[0].source : 0);
        pack_row<M>(row, s.vectors, s.vectors.run, bits, count, padded, s.x + (r - from) * pitch);
      }
      for (int64_t j = 0; j < columns; ++j) {
        const int64_t first = filters * j / columns, last = filters * (j + 1) / columns, row = to + j;
        const E* ahead = row_of(j < kDotRows && row < rows.end ? row : from) + lanes[0].source;
        dot_of<M>(to - from, last - first, padded / M::kPair, s.x, s.y + first * pitch, pitch, sums + from * filters + first, filters,
                  reinterpret_cast<const char*>(ahead));
      }
    }
  }
}

// ---- the values ---------------------------------------------------------------------------------------------------------------------

template <class M>
int64_t prepared_size(const Problem& p, bool input_gradient) {
  if (sizeof(typename M::Element) == 4) return 0;
  const int64_t kept = input_gradient ? p.kept : up(p.kept, M::kPair), filters = input_gradient ? up(p.group_size, M::kPair) : p.group_size;
  return p.groups * kept * p.kept_taps * filters;
}

// Widened: float32 values. Paired: 32-bit words of two bfloat16, neighbours along the kept channels (forward) or the filters.
template <class M>
void prepare(const Problem& p, const void* values, bool input_gradient, Range groups, float* out) {
  const BFloat16* in = static_cast<const BFloat16*>(values);
  const int64_t step = input_gradient ? 1 : M::kPair, pair_at = input_gradient ? 1 : p.kept_taps * p.group_size;
  const int64_t stride = input_gradient ? M::kPair : 1;
  out += groups.begin * (prepared_size<M>(p, input_gradient) / p.groups);
  for (int64_t g = groups.begin; g < groups.end; ++g)
    for (int64_t k = 0; k < p.kept; k += step)
      for (int64_t t = 0; t < p.kept_taps; ++t)
        for (int64_t f = 0; f < p.group_size; f += stride, ++out) {
          const BFloat16* at = in + ((g * p.kept + k) * p.kept_taps + t) * p.group_size + f;
          if constexpr (M::kPair == 1) {
            *out = widen(*at);
          } else {
            const bool pair = input_gradient ? f + 1 < p.group_size : k + 1 < p.kept;
            const uint32_t word = at->bits | (pair ? uint32_t(at[pair_at].bits) << 16 : 0u);
            __builtin_memcpy(out, &word, 4);
          }
        }
}

template <class M>
Passes passes() {
  return {prepared_size<M>, prepare<M>, forward_scratch<M>, forward<M>, input_gradient_scratch<M>, input_gradient<M>, weight_gradient_scratch, weight_gradient<M>};
}

#undef UNROLL
