// The weight gradient. See passes.h.

constexpr int64_t kRun = 64;  // vectors of positions in a block of the weight gradient

// c[r][f] += sum over the vectors of x[r][.] * y[f][.]
template <class M, int R, int F>
inline void dot(int64_t vectors, const float* x, const float* y, int64_t pitch, float* c,
                int64_t c_pitch, const char* ahead) {
  Vector sums[R][F];
  UNROLL
  for (int r = 0; r < R; ++r) UNROLL
  for (int f = 0; f < F; ++f) sums[r][f] = Vector{};
  for (int64_t v = 0; v < vectors; ++v) {
    __builtin_prefetch(ahead + v * kLanes * 4, 0, 2);
    Vector b[F];
    UNROLL
    for (int f = 0; f < F; ++f) b[f] = load(y + f * pitch + v * kLanes);
    UNROLL
    for (int r = 0; r < R; ++r) {
      const Vector a = load(x + r * pitch + v * kLanes);
      UNROLL
      for (int f = 0; f < F; ++f) sums[r][f] = M::multiply_add(a, b[f], sums[r][f]);
    }
  }
  UNROLL
  for (int r = 0; r < R; ++r) {
#if defined(__AVX512F__)
    if constexpr (F == 4) {
      float four[4];
      sum4(sums[r], four);
      UNROLL
      for (int f = 0; f < F; ++f) c[r * c_pitch + f] += four[f];
      continue;
    }
#endif
    UNROLL
    for (int f = 0; f < F; ++f) c[r * c_pitch + f] += sum(sums[r][f]);
  }
}

template <class M, int R = kDotRows, int F = kDotFilters>
inline void dot_of(int64_t rows, int64_t filters, int64_t vectors, const float* x, const float* y,
                   int64_t pitch, float* c, int64_t c_pitch, const char* ahead) {
  if (rows == R && filters == F) return dot<M, R, F>(vectors, x, y, pitch, c, c_pitch, ahead);
  if constexpr (R > 1) {
    if (rows < R)
      return dot_of<M, R - 1, F>(rows, filters, vectors, x, y, pitch, c, c_pitch, ahead);
  }
  if constexpr (F > 1) {
    if (filters < F)
      return dot_of<M, R, F - 1>(rows, filters, vectors, x, y, pitch, c, c_pitch, ahead);
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

// `count` vectors of a row, zeros in the lanes whose bit is not set (no bits: everywhere) and up to
// `padded`.
template <class M>
inline void pack_row(const typename M::Element* row, const Vectors& vectors, bool run,
                     const Bits* bits, int64_t count, int64_t padded, float* out) {
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
  int64_t* place;  // of each kept tap, its index in `reach`; -1: it reaches nothing
  float *x, *y;
};

inline WeightGradientScratch take_weight_gradient(Scratch& scratch, const Problem& p,
                                                  const Grid& grid) {
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

// Adds the products over the blocks of positions in `range` (each of kRun vectors) to sums[kept,
// kept_taps, group_size].
template <class M>
void weight_gradient(const Problem& p, const Grid& grid, int64_t group, Range rows, Range range,
                     float* sums, void* memory) {
  typedef typename M::Element E;
  Scratch scratch = {static_cast<char*>(memory)};
  WeightGradientScratch s = take_weight_gradient(scratch, p, grid);
  const int64_t positions = grid.positions(), filters = p.group_size,
                pitch = kRun * kLanes / M::kPair;
  const E *source = static_cast<const E*>(p.source), *other = static_cast<const E*>(p.other);
  for (int64_t begin = range.begin * kRun; begin < least(range.end * kRun, up(positions, kLanes));
       begin += kRun) {
    const int64_t count = least(kRun, up(positions, kLanes) - begin),
                  padded = up(count, M::kPair) * M::kPair;
    describe_all(grid, begin, count, s.vectors);
    const Lanes* lanes = s.vectors.lanes;
    for (int64_t v = 0; v < count; ++v) s.live[v] = lanes[v].live;
    find_reach(p, grid, group, s.vectors, count, s.reach);
    for (int64_t t = 0; t < p.kept_taps; ++t) s.place[t] = -1;
    for (int64_t t = 0; t < s.reach.count; ++t) s.place[s.reach.tap[t]] = t;
    const auto row_of = [&](int64_t r) {
      const int64_t place = s.place[r % p.kept_taps];
      return source + p.channels[group * p.kept + r / p.kept_taps] * grid.source_pitch +
             (place < 0 ? 0 : s.reach.offset[place]);
    };
    for (int64_t f = 0; f < filters; ++f) {
      const E* row = other + p.filters[group * filters + f] * positions + begin * kLanes;
      pack_row<M>(row, s.vectors, true, s.live, count, padded, s.y + f * pitch);
    }
    const int64_t tiles = up(rows.size(), kDotRows), columns = up(filters, kDotFilters);
    for (int64_t i = 0; i < tiles; ++i) {
      const int64_t from = rows.begin + rows.size() * i / tiles,
                    to = rows.begin + rows.size() * (i + 1) / tiles;
      for (int64_t r = from; r < to; ++r) {
        const int64_t place = s.place[r % p.kept_taps];
        const Bits* bits = place < 0 ? nullptr : s.reach.bits + place * count;
        const E* row = row_of(r) + (s.vectors.run ? lanes[0].source : 0);
        pack_row<M>(row, s.vectors, s.vectors.run, bits, count, padded, s.x + (r - from) * pitch);
      }
      for (int64_t j = 0; j < columns; ++j) {
        const int64_t first = filters * j / columns, last = filters * (j + 1) / columns,
                      row = to + j;
        const E* ahead = row_of(j < kDotRows && row < rows.end ? row : from) + lanes[0].source;
        dot_of<M>(to - from, last - first, padded / M::kPair, s.x, s.y + first * pitch, pitch,
                  sums + from * filters + first, filters, reinterpret_cast<const char*>(ahead));
      }
    }
  }
}
