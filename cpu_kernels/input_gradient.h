// The input gradient. See passes.h.

template <class E>
struct InputGradientScratch {
  ProductScratch<E> product;
  int32_t *first, *last;  // of the groups that keep each channel; -1: none does
};

template <class E>
inline InputGradientScratch<E> take_input_gradient(Scratch& scratch, const Problem& p,
                                                   const Grid& grid, int64_t vectors,
                                                   int64_t channels) {
  return {take_product<E>(scratch, p, grid, vectors, channels), scratch.take<int32_t>(channels),
          scratch.take<int32_t>(channels)};
}

template <class M>
size_t input_gradient_scratch(const Problem& p, const Grid& grid, int64_t vectors,
                              int64_t channels) {
  Scratch count = {nullptr};
  take_input_gradient<typename M::Element>(count, p, grid, vectors, channels);
  return count.used;
}

// Calls body(k, channel - channels.begin) for the channels in the range that the group keeps.
template <class Body>
inline void for_kept(const Problem& p, int64_t group, Range channels, const Body& body) {
  const int32_t* index = p.channels + group * p.kept;
  for (int64_t k = 0; k < p.kept; ++k)
    if (index[k] >= channels.begin && index[k] < channels.end) body(k, index[k] - channels.begin);
}

template <class M>
void input_gradient(const Problem& p, const Grid& grid, Range range, Range channels, void* memory) {
  typedef typename M::Element E;
  Scratch scratch = {static_cast<char*>(memory)};
  InputGradientScratch<E> all =
      take_input_gradient<E>(scratch, p, grid, range.size(), channels.size());
  ProductScratch<E>& s = all.product;
  describe_all(grid, range.begin, range.size(), s.vectors);
  cut(range.size(), s.tiles);
  const int64_t steps = up(p.group_size, M::kPair), count = channels.size();
  for (int64_t c = 0; c < count; ++c) all.first[c] = all.last[c] = -1;
  for (int64_t group = 0; group < p.groups; ++group)
    for_kept(p, group, channels, [&](int64_t, int64_t c) {
      if (all.first[c] < 0) all.first[c] = int32_t(group);
      all.last[c] = int32_t(group);
    });
  const Walk walk = {p.filters, p.group_size, M::kPair, 1, steps};
  const Output<E> out = output_of<E>(
      grid, static_cast<E*>(p.target) + channels.begin * grid.target_pitch, p.cin, nullptr);
  const auto add = [&](const auto& block, const auto& next) {
    SumRows& rows = s.rows;
    rows.count = 0;
    for_kept(p, block.group, channels, [&](int64_t k, int64_t c) {
      const int64_t m = rows.count++;
      rows.weights[m] = p.values + (block.group * p.kept + k) * p.kept_taps * steps;
      rows.place[m] = rows.target[m] = int32_t(c);
      rows.begins[m] = block.first && all.first[c] == block.group;
      rows.ends[m] = block.last && all.last[c] == block.group;
    });
    multiply_block<M, false>(s, block, next, count, out);
  };
  for_blocks(p, grid, walk, {0, p.groups}, range.size(), s, add);
  const Vector zero[1] = {};
  for (int64_t c = 0; c < count; ++c)
    for (int64_t v = 0; all.first[c] < 0 && v < range.size(); ++v)
      write_row<1>(out, c, s.vectors.lanes + v, zero);
  if (out.past_caches) fence();
}
