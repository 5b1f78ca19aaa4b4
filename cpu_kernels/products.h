// Products of a block of rows with a group's values, tile by tile. See passes.h.

// The rows of sums that a block adds to.
struct SumRows {
  int64_t count;
  const float** weights;  // of each row
  int32_t* place;         // where its sums are kept from one block to the next
  int32_t* target;        // its row of the target
  bool *begins, *ends;    // the block is the first that adds to it, the last
};

template <class E>
struct ProductScratch {
  Vectors vectors;
  Tiles tiles;
  Block<E> blocks[2];
  SumRows rows;
  float *panel, *sums;
};

template <class E>
inline ProductScratch<E> take_product(Scratch& scratch, const Problem& p, const Grid& grid,
                                      int64_t vectors, int64_t rows) {
  ProductScratch<E> out;
  out.vectors = take_vectors(scratch, grid, vectors);
  out.tiles = take_tiles(scratch, vectors);
  for (Block<E>& block : out.blocks) block = take_block<E>(scratch, p, vectors);
  out.rows = {0,
              scratch.take<const float*>(rows),
              scratch.take<int32_t>(rows),
              scratch.take<int32_t>(rows),
              scratch.take<bool>(rows),
              scratch.take<bool>(rows)};
  out.panel = scratch.take<float>(depth(p) * kTile * kLanes);
  out.sums = scratch.take<float>(rows * vectors * kLanes);
  return out;
}

alignas(64) constexpr float kZeros[kTile * kLanes] = {};

// sums[from + m][.] (+)= sum over the rows r of weights[from + m][at[r]] * source[r][.]. With
// Neighbours, weights[from + m] is weights[from] + m.
template <class M, int MR, int NV, bool Neighbours, class Source>
NOINLINE void multiply(const Tile<typename M::Element>& tile, const SumRows& rows, int64_t from,
                       float* kept, const Output<typename M::Element>& out) {
  Vector sums[MR][NV];
  const float* weights[MR];
  UNROLL
  for (int m = 0; m < MR; ++m) {
    const float* before =
        rows.begins[from + m] ? kZeros : kept + rows.place[from + m] * NV * kLanes;
    weights[m] = rows.weights[from + m];
    UNROLL
    for (int v = 0; v < NV; ++v) sums[m][v] = load(before + v * kLanes);
    if (rows.ends[from + m]) fetch_row(out, rows.target[from + m], tile.lanes, NV);
  }
  const Source source(tile);
  const int64_t count = tile.block->count;
  const auto* block_rows = tile.block->rows;
  for (int64_t r = 0; r < count; ++r) {
    const int64_t place = block_rows[r].at;
    Vector b[NV];
    source.read(block_rows, r, b);
    UNROLL
    for (int m = 0; m < MR; ++m) {
      const Vector w = broadcast(Neighbours ? weights[0][place + m] : weights[m][place]);
      UNROLL
      for (int v = 0; v < NV; ++v) sums[m][v] = M::multiply_add(w, b[v], sums[m][v]);
    }
  }
  UNROLL
  for (int m = 0; m < MR; ++m) {
    if (rows.ends[from + m]) {
      write_row<NV>(out, rows.target[from + m], tile.lanes, sums[m]);
    } else {
      float* after = kept + rows.place[from + m] * NV * kLanes;
      UNROLL
      for (int v = 0; v < NV; ++v) store(after + v * kLanes, sums[m][v]);
    }
  }
}

template <class M, int NV, bool Neighbours, int MR = kRows>
inline void multiply_of(int64_t count, bool packed, const Tile<typename M::Element>& tile,
                        const SumRows& rows, int64_t from, float* kept,
                        const Output<typename M::Element>& out) {
  if (count == MR) {
    if (packed)
      multiply<M, MR, NV, Neighbours, FromPanel<M, NV>>(tile, rows, from, kept, out);
    else
      multiply<M, MR, NV, Neighbours, FromSource<M, NV>>(tile, rows, from, kept, out);
  } else if constexpr (MR > 1) {
    multiply_of<M, NV, Neighbours, MR - 1>(count, packed, tile, rows, from, kept, out);
  }
}

// Adds the products of a block to `s.rows`; `all`: how many rows of sums are kept.
template <class M, bool Neighbours>
void multiply_block(const ProductScratch<typename M::Element>& s,
                    const Block<typename M::Element>& block, const Block<typename M::Element>& next,
                    int64_t all, const Output<typename M::Element>& out) {
  const SumRows& rows = s.rows;
  const int64_t columns = up(rows.count, kRows);
  for (int64_t i = 0; rows.count && i < s.tiles.count; ++i) {
    const auto tile = tile_of(block, next, s.tiles, i, s.vectors, s.panel);
    float* kept = s.sums + tile.begin * all * kLanes;
    if (!tile.run) pack<M>(tile);
    for (int64_t j = 0; j < columns; ++j) {
      const int64_t from = rows.count * j / columns, count = rows.count * (j + 1) / columns - from;
      const bool packed = j || !tile.run;
      if (tile.width == kTile)
        multiply_of<M, kTile, Neighbours>(count, packed, tile, rows, from, kept, out);
      else if (tile.width == 2)
        multiply_of<M, 2, Neighbours>(count, packed, tile, rows, from, kept, out);
      else
        multiply_of<M, 1, Neighbours>(count, packed, tile, rows, from, kept, out);
    }
  }
}

// Calls body(block, next) for the blocks of the groups; next.count is 0 after the last one.
template <class E, class Body>
void for_blocks(const Problem& p, const Grid& grid, const Walk& walk, Range groups, int64_t vectors,
                ProductScratch<E>& s, const Body& body) {
  Block<E>*block = &s.blocks[0], *next = &s.blocks[1];
  fill_block(p, grid, walk, groups.begin, 0, s.vectors, vectors, *block);
  while (true) {
    const bool done = block->last && block->group + 1 == groups.end;
    if (done)
      next->count = 0;
    else
      fill_block(p, grid, walk, block->group + block->last, block->last ? 0 : block->step,
                 s.vectors, vectors, *next);
    body(*block, *next);
    if (done) return;
    Block<E>* old = block;
    block = next, next = old;
  }
}
