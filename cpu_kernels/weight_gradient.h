// The weight gradient. See passes.h.

// Vectors of positions in a block of the weight gradient: the rows of a register tile stay in the
// L1 cache.
constexpr int64_t kRun = 40;

// Rows of a tile, packed. Rows do not begin at the same place of a page: they would push each other
// out of the L1 cache.
template <class M>
constexpr int64_t kPitch = (kRun / M::kPair + 1) * kLanes;

template <class M>
struct PackedRows {
  const float* first;
  Vector read(int row, int64_t v) const { return load(first + row * kPitch<M> + v * kLanes); }
};

// Rows where they lie, each vector a run: read once, and left packed for the products that follow.
template <class M>
struct SourceRows {
  const typename M::Element* const* rows;
  const Bits* const* bits;  // of each row, the lanes that count
  const int64_t* at;        // of each vector, where it lies in a row
  float* packed;
  Vector read(int row, int64_t v) const {
    const Vector out = load_some(rows[row] + at[v], bits[row][v]);
    store(packed + row * kPitch<M> + v * kLanes, out);
    return out;
  }
};

// A row of the next tile and one of the next block, which are fetched in advance.
template <class E>
struct Soon {
  const E *x, *y;
  const int64_t* x_at;  // of each vector
};

// c[r][f] += sum over the vectors of x[r][.] * y[f][.]
template <class M, int R, int F, class X, class Y>
NOINLINE void dot(int64_t vectors, const X& x, const Y& y, float* c, int64_t c_pitch,
                  const Soon<typename M::Element>& soon) {
  Vector sums[R][F];
  UNROLL
  for (int r = 0; r < R; ++r) UNROLL
  for (int f = 0; f < F; ++f) sums[r][f] = Vector{};
  for (int64_t v = 0; v < vectors; ++v) {
    __builtin_prefetch(soon.x + soon.x_at[v], 0, 2);
    __builtin_prefetch(soon.y + v * kLanes, 0, 2);
    Vector b[F];
    UNROLL
    for (int f = 0; f < F; ++f) b[f] = y.read(f, v);
    UNROLL
    for (int r = 0; r < R; ++r) {
      const Vector a = x.read(r, v);
      UNROLL
      for (int f = 0; f < F; ++f) sums[r][f] = M::multiply_add(a, b[f], sums[r][f]);
    }
  }
  UNROLL
  for (int r = 0; r < R; ++r) {
#if defined(__AVX512F__)
    if constexpr (F == 4) {
      add_sums4(sums[r], c + r * c_pitch);
      continue;
    }
#endif
    UNROLL
    for (int f = 0; f < F; ++f) c[r * c_pitch + f] += sum(sums[r][f]);
  }
}

template <class M, class X, class Y, int R = kDotRows, int F = kDotFilters>
inline void dot_of(int64_t rows, int64_t filters, int64_t vectors, const X& x, const Y& y, float* c,
                   int64_t c_pitch, const Soon<typename M::Element>& soon) {
  if (rows == R && filters == F) return dot<M, R, F>(vectors, x, y, c, c_pitch, soon);
  if constexpr (R > 1) {
    if (rows < R) return dot_of<M, X, Y, R - 1, F>(rows, filters, vectors, x, y, c, c_pitch, soon);
  }
  if constexpr (F > 1) {
    if (filters < F)
      return dot_of<M, X, Y, R, F - 1>(rows, filters, vectors, x, y, c, c_pitch, soon);
  }
}

// Stores one vector of a row: as bfloat16 where products take pairs, else as float32.
template <class M>
inline void put(Vector values, int64_t v, float* out) {
  if constexpr (M::kPair == 1)
    store(out + v * kLanes, values);
  else
    store_some(reinterpret_cast<BFloat16*>(out) + v * kLanes, values, kAll);
}

// Packs rows ahead of their products: `count` vectors, and zeros up to `padded`.
template <class M>
inline void pack_rows(int64_t rows, const SourceRows<M>& from, const Lanes* lanes, int64_t count,
                      int64_t padded) {
  for (int64_t r = 0; r < rows; ++r) {
    const auto* row = from.rows[r];
    const Bits* bits = from.bits[r];
    float* out = from.packed + r * kPitch<M>;
    for (int64_t v = 0; v < count; ++v)
      put<M>(lanes ? fetch(row, lanes[v], bits[v]) : load_some(row + from.at[v], bits[v]), v, out);
    for (int64_t v = count; v < padded; ++v) put<M>(Vector{}, v, out);
  }
}

template <class E>
struct WeightGradientScratch {
  Vectors vectors;
  Reach reach;
  const Bits** tap_bits;  // of each kept tap, the lanes that it reaches
  int64_t* tap_offset;    // and from a position to what it reads
  Bits *live, *none;
  int64_t* y_at;
  const E **x_rows, **y_rows;
  const Bits **x_bits, **y_bits;
  float *x, *y;
};

template <class M>
inline auto take_weight_gradient(Scratch& scratch, const Problem& p, const Grid& grid) {
  typedef typename M::Element E;
  WeightGradientScratch<E> out;
  out.vectors = take_vectors(scratch, grid, kRun);
  out.reach = take_reach(scratch, p, kRun);
  out.tap_bits = scratch.take<const Bits*>(p.kept_taps);
  out.tap_offset = scratch.take<int64_t>(p.kept_taps);
  out.live = scratch.take<Bits>(kRun), out.none = scratch.take<Bits>(kRun);
  out.y_at = scratch.take<int64_t>(kRun);
  out.x_rows = scratch.take<const E*>(p.kept * p.kept_taps);
  out.x_bits = scratch.take<const Bits*>(p.kept * p.kept_taps);
  out.y_rows = scratch.take<const E*>(p.group_size);
  out.y_bits = scratch.take<const Bits*>(p.group_size);
  out.x = scratch.take<float>(kDotRows * kPitch<M>);
  out.y = scratch.take<float>(p.group_size * kPitch<M>);
  return out;
}

template <class M>
size_t weight_gradient_scratch(const Problem& p, const Grid& grid) {
  Scratch count = {nullptr};
  take_weight_gradient<M>(count, p, grid);
  return count.used;
}

// What the rows of a block read: `count` vectors of positions from `begin` on.
template <class E>
inline void describe_block(const Problem& p, const Grid& grid, int64_t group, int64_t begin,
                           int64_t count, WeightGradientScratch<E>& s) {
  describe_all(grid, begin, count, s.vectors);
  for (int64_t v = 0; v < count; ++v) {
    s.live[v] = s.vectors.lanes[v].live, s.none[v] = 0;
    s.y_at[v] = (begin + v) * kLanes;
  }
  find_reach(p, grid, group, s.vectors, count, s.reach);
  for (int64_t t = 0; t < p.kept_taps; ++t) s.tap_bits[t] = s.none, s.tap_offset[t] = 0;
  for (int64_t t = 0; t < s.reach.count; ++t) {
    s.tap_bits[s.reach.tap[t]] = s.reach.bits + t * count;
    s.tap_offset[s.reach.tap[t]] = s.reach.offset[t];
  }
  for (int64_t k = 0, r = 0; k < p.kept; ++k) {
    const E* channel =
        static_cast<const E*>(p.source) + p.channels[group * p.kept + k] * grid.source_pitch;
    for (int64_t t = 0; t < p.kept_taps; ++t, ++r)
      s.x_rows[r] = channel + s.tap_offset[t], s.x_bits[r] = s.tap_bits[t];
  }
  for (int64_t f = 0; f < p.group_size; ++f) {
    s.y_rows[f] =
        static_cast<const E*>(p.other) + p.filters[group * p.group_size + f] * grid.positions();
    s.y_bits[f] = s.live;
  }
}

// What a product fetches: a row of x and one of y, `next` and `filter`. Rows past the last one are
// those of the next block, and so is y.
template <class E>
inline Soon<E> soon_of(const WeightGradientScratch<E>& s, Range rows, int64_t next, int64_t filter,
                       int64_t count) {
  const E* x = next < rows.end ? s.x_rows[next]
                               : s.x_rows[least(next - rows.size(), rows.end - 1)] + count * kLanes;
  return {x, s.y_rows[filter] + s.y_at[0] + count * kLanes, s.vectors.source};
}

// Adds the products over the vectors of positions in `range` to sums[kept, kept_taps, group_size].
template <class M>
void weight_gradient(const Problem& p, const Grid& grid, int64_t group, Range rows, Range range,
                     float* sums, void* memory) {
  typedef typename M::Element E;
  Scratch scratch = {static_cast<char*>(memory)};
  WeightGradientScratch<E> s = take_weight_gradient<M>(scratch, p, grid);
  const int64_t filters = p.group_size, blocks = up(range.size(), kRun);
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t begin = range.begin + range.size() * block / blocks,
                  count = range.begin + range.size() * (block + 1) / blocks - begin,
                  padded = up(count, M::kPair) * M::kPair;
    describe_block(p, grid, group, begin, count, s);
    const bool runs = M::kPair == 1 && s.vectors.runs;  // x need not be packed in advance
    if (M::kPair > 1)
      pack_rows<M>(filters, {s.y_rows, s.y_bits, s.y_at, s.y}, nullptr, count, padded);
    const int64_t tiles = up(rows.size(), kDotRows), columns = up(filters, kDotFilters);
    for (int64_t i = 0; i < tiles; ++i) {
      const int64_t from = rows.begin + rows.size() * i / tiles,
                    to = rows.begin + rows.size() * (i + 1) / tiles;
      const SourceRows<M> x_source = {s.x_rows + from, s.x_bits + from, s.vectors.source, s.x};
      if (!runs) pack_rows<M>(to - from, x_source, s.vectors.lanes, count, padded);
      for (int64_t j = 0; j < columns; ++j) {
        const int64_t first = filters * j / columns, last = filters * (j + 1) / columns;
        const Soon<E> soon = soon_of(s, rows, to + j, first + least(i, last - first - 1), count);
        const PackedRows<M> x = {s.x}, y = {s.y + first * kPitch<M>};
        const auto product = [&](const auto& x_rows, const auto& y_rows) {
          dot_of<M>(to - from, last - first, padded / M::kPair, x_rows, y_rows,
                    sums + from * filters + first, filters, soon);
        };
        if constexpr (M::kPair == 1) {
          const SourceRows<M> y_source = {s.y_rows + first, s.y_bits + first, s.y_at,
                                          s.y + first * kPitch<M>};
          if (i == 0 && j == 0 && runs)
            product(x_source, y_source);
          else if (i == 0)
            product(x, y_source);
          else if (j == 0 && runs)
            product(x_source, y);
          else
            product(x, y);
        } else {
          product(x, y);
        }
      }
    }
  }
}
