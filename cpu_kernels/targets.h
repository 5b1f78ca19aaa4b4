// From sums to the target: the epilogue, and stores past the caches for targets that are larger
// than the caches. See passes.h.

constexpr int64_t kCaches = 12 << 20;  // bytes: a larger target is written past the caches

template <class E>
inline void write(E* row, const Lanes& lanes, Vector values, bool past_caches) {
  if (past_caches && lanes.target_run && lanes.live == kAll && stream(row + lanes.target, values))
    return;
  if (lanes.target_run)
    store_some(row + lanes.target, values, lanes.live);
  else
    scatter_some(row + lanes.target, lanes.target_at, values, lanes.live);
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
        residual(epilogue.residual ? static_cast<const E*>(epilogue.residual) + row * pitch
                                   : nullptr),
        relu(epilogue.relu) {}
  Vector operator()(Vector sums, const Lanes& lanes) const {
    Vector out = fma(sums, scale, bias);
    if (residual) {
      const E* at = residual + lanes.target;
      out += lanes.target_run ? load_some(at, lanes.live)
                              : gather_some(at, lanes.target_at, lanes.live);
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
inline ProductScratch<E> take_product(Scratch& scratch, const Problem& p, const Grid& grid,
                                      int64_t vectors, int64_t rows) {
  ProductScratch<E> out;
  out.vectors = take_vectors(scratch, grid, vectors);
  out.tiles = take_tiles(scratch, vectors);
  for (Block<E>& block : out.blocks) block = take_block<E>(scratch, p, vectors);
  out.panel = scratch.take<float>(depth(p) * vectors * kLanes);
  out.sums = scratch.take<float>(rows * vectors * kLanes);
  out.kept = scratch.take<int32_t>(p.kept);
  return out;
}

constexpr int64_t kSoon = 2;  // rows of the residual that are fetched in advance

// Writes the sums to the target, row by row over all tiles. `index`: the rows of the target; null:
// the first rows in order. `all`: how many rows the target has.
template <bool Finish, class E>
void write_all(const ProductScratch<E>& s, int64_t rows, const Grid& grid, int64_t all,
               const int32_t* index, E* target, const Epilogue& epilogue = {}) {
  const Tiles& tiles = s.tiles;
  const bool past_caches = grid.target_pitch * all * int64_t(sizeof(E)) > kCaches;
  const auto place_of = [&](int64_t row) { return index ? index[row] : row; };
  const E* residual = static_cast<const E*>(epilogue.residual);
  for (int64_t row = 0; Finish && residual && row < least(kSoon, rows); ++row)
    for (int64_t v = 0; v < tiles.vectors; ++v)
      __builtin_prefetch(residual + place_of(row) * grid.target_pitch + s.vectors.lanes[v].target);
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t place = place_of(row);
    E* out = target + place * grid.target_pitch;
    const Finisher<E> finish(epilogue, place, grid.target_pitch);
    const E* soon = Finish && residual
                        ? residual + place_of(least(row + kSoon, rows - 1)) * grid.target_pitch
                        : nullptr;
    for (int64_t i = 0; i < tiles.count; ++i) {
      const int64_t begin = tiles.begin(i), width = tiles.width(i);
      for (int64_t v = 0; v < width; ++v) {
        const Lanes& lanes = s.vectors.lanes[begin + v];
        if (soon) __builtin_prefetch(soon + lanes.target);
        Vector values = load(s.sums + (begin * rows + row * width + v) * kLanes);
        if constexpr (Finish) values = finish(values, lanes);
        write(out, lanes, values, past_caches);
      }
    }
  }
  if (past_caches) fence();
}
