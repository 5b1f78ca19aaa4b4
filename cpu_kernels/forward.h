// The forward pass, with panels or without. See passes.h.

template <class M>
size_t forward_scratch(const Problem& p, const Grid& grid, int64_t vectors) {
  Scratch count = {nullptr};
  take_product<typename M::Element>(count, p, grid, vectors, p.group_size);
  return count.used;
}

// A panel pays when many filters share it. For a few filters, one vector of their outputs stays in
// registers while the sources are read from where they lie, and what the next vector needs is
// fetched in advance. That does not work where all channels begin at the same place of a page: they
// would push each other out of the cache.
template <class M>
constexpr int64_t kStreamed = M::kPair == 1 ? 2 * kStreamRows : 0;

template <class M>
inline bool streams(const Problem& p, const Grid& grid) {
  const bool run =
      grid.y.source_step == 1 && grid.x.source_step == 1 && grid.x.count == grid.source_width;
  return run && p.group_size <= kStreamed<M> &&
         grid.source_pitch * sizeof(typename M::Element) % kPage;
}

// What a task of the streaming pass works on.
template <class E>
struct Stream {
  const Problem& p;
  const Grid& grid;
  const Reach& reach;
  const Lanes* lanes;
  int64_t group, vectors;
  bool past_caches;
};

template <class M, int MR>
inline void stream_rows(const Stream<typename M::Element>& s, int64_t from, int64_t v) {
  typedef typename M::Element E;
  const Problem& p = s.p;
  Vector sums[MR];
  UNROLL
  for (int m = 0; m < MR; ++m) sums[m] = Vector{};
  const int64_t step = p.kept_taps * p.group_size, ahead = v + 1 < s.vectors ? kLanes : 0;
  const int32_t *channels = p.channels + s.group * p.kept,
                *filters = p.filters + s.group * p.group_size + from;
  for (int m = 0; m < MR; ++m) {
    const int64_t at = filters[m] * s.grid.target_pitch + s.lanes[v].target + ahead;
    if (p.epilogue.residual) __builtin_prefetch(static_cast<const E*>(p.epilogue.residual) + at);
    if (!s.past_caches) __builtin_prefetch(static_cast<const E*>(p.target) + at, 1);
  }
  for (int64_t t = 0; t < s.reach.count; ++t) {
    const Bits bits = s.reach.bits[t * s.vectors + v];
    const E* source = static_cast<const E*>(p.source) + s.lanes[v].source + s.reach.offset[t];
    const float* weights =
        p.values + s.group * p.kept * step + s.reach.tap[t] * p.group_size + from;
    for (int64_t k = 0; (bits || p.careful) && k < p.kept; ++k, weights += step) {
      const E* row = source + channels[k] * s.grid.source_pitch;
      const Vector b = load_some(row, bits);
      __builtin_prefetch(row + ahead, 0, 2);
      UNROLL
      for (int m = 0; m < MR; ++m) sums[m] = M::multiply_add(broadcast(weights[m]), b, sums[m]);
    }
  }
  UNROLL
  for (int m = 0; m < MR; ++m) {
    const Finisher<E> finish(p.epilogue, filters[m], s.grid.target_pitch);
    write(static_cast<E*>(p.target) + filters[m] * s.grid.target_pitch, s.lanes[v],
          finish(sums[m], s.lanes[v]), s.past_caches);
  }
}

template <class M, int MR = kStreamRows>
inline void stream_of(int64_t count, const Stream<typename M::Element>& s, int64_t from,
                      int64_t v) {
  if (count == MR) return stream_rows<M, MR>(s, from, v);
  if constexpr (MR > 1) stream_of<M, MR - 1>(count, s, from, v);
}

template <class M>
void forward_stream(const Problem& p, const Grid& grid, Range groups, const Vectors& all,
                    int64_t vectors, Reach& reach) {
  typedef typename M::Element E;
  const int64_t filters = p.group_size, columns = up(filters, kStreamRows);
  const bool past_caches = grid.target_pitch * p.cout * int64_t(sizeof(E)) > kCaches;
  for (int64_t group = groups.begin; group < groups.end; ++group) {
    find_reach(p, grid, group, all, vectors, reach);
    const Stream<E> s = {p, grid, reach, all.lanes, group, vectors, past_caches};
    for (int64_t j = 0; j < columns; ++j) {
      const int64_t from = filters * j / columns, to = filters * (j + 1) / columns;
      for (int64_t v = 0; v < vectors; ++v) stream_of<M>(to - from, s, from, v);
    }
  }
  if (past_caches) fence();
}

template <class M>
void forward(const Problem& p, const Grid& grid, Range range, Range groups, void* memory) {
  typedef typename M::Element E;
  Scratch scratch = {static_cast<char*>(memory)};
  ProductScratch<E> s = take_product<E>(scratch, p, grid, range.size(), p.group_size);
  describe_all(grid, range.begin, range.size(), s.vectors);
  cut(range.size(), s.tiles);
  if constexpr (M::kPair == 1) {
    if (streams<M>(p, grid))
      return forward_stream<M>(p, grid, groups, s.vectors, range.size(), s.blocks[0].reach);
  }
  const int64_t filters = p.group_size;
  const bool finish = p.epilogue.scale || p.epilogue.bias || p.epilogue.residual || p.epilogue.relu;
  const Output<E> out =
      output_of(grid, static_cast<E*>(p.target), p.cout, finish ? &p.epilogue : nullptr);
  const Walk walk = {p.channels, p.kept, M::kPair, p.kept_taps * filters, filters};
  s.rows.count = filters;
  for_blocks(p, grid, walk, groups, range.size(), s, [&](const auto& block, const auto& next) {
    const float* weights = p.values + block.group * walk.steps() * walk.step_at;
    for (int64_t m = 0; m < filters; ++m) {
      s.rows.weights[m] = weights + m, s.rows.place[m] = int32_t(m);
      s.rows.target[m] = p.filters[block.group * filters + m];
      s.rows.begins[m] = block.first, s.rows.ends[m] = block.last;
    }
    multiply_block<M, true>(s, block, next, filters, out);
  });
  if (out.past_caches) fence();
}
