// The input gradient. See passes.h.

template <class M>
size_t input_gradient_scratch(const Problem& p, const Grid& grid, int64_t vectors,
                              int64_t channels) {
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
  const int64_t steps = up(p.group_size, M::kPair), count = channels.size();
  const Walk walk = {p.filters, p.group_size, M::kPair, 1, steps};
  const Tiles& tiles = s.tiles;
  const Lanes* lanes = s.vectors.lanes;
  for (int64_t i = 0; i < count * range.size(); ++i) store(s.sums + i * kLanes, Vector{});
  Block<E>*block = &s.blocks[0], *next = &s.blocks[1];
  fill_block(p, grid, walk, 0, 0, s.vectors, range.size(), *block);
  while (block) {
    const bool done = block->last && block->group + 1 == p.groups;
    if (done)
      next->rows = 0;
    else
      fill_block(p, grid, walk, block->group + block->last, block->last ? 0 : block->step,
                 s.vectors, range.size(), *next);
    const int32_t* index = p.channels + block->group * p.kept;
    int64_t kept =
        0;  // how many of `channels` the group keeps; s.kept: where they stand in its list
    for (int64_t k = 0; k < p.kept && block->rows; ++k)
      s.kept[kept] = int32_t(k), kept += index[k] >= channels.begin && index[k] < channels.end;
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
          c[m - from] =
              s.sums + (begin * count + (index[s.kept[m]] - channels.begin) * width) * kLanes;
        }
        const Ahead ahead = ahead_of(*block, *next, lanes[begin + (j < width ? j : width - 1)]);
        multiply_tile<M, false>(width, to - from, block->rows,
                                s.panel + begin * block->rows * kLanes, a, block->at, c, false,
                                ahead);
      }
    }
    Block<E>* old = block;
    block = done ? nullptr : next, next = old;
  }
  write_all<false>(s, count, grid, p.cin, nullptr,
                   static_cast<E*>(p.target) + channels.begin * grid.target_pitch);
}
