// Panels: the sources of a group's rows, packed for one register tile. See passes.h.

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

// Rows that a product fetches into the L1 cache in advance. What the next tile reads is fetched
// too, but where all channels begin at the same place of a page it does not stay in the L1 cache.
constexpr int64_t kNear = 6;

// A row of a panel: its source, that of its pair (null: zeros), for each vector the lanes that the
// row's tap reaches, and the offset of the row's weights.
template <class E>
struct Row {
  const E *one, *two;
  const Bits* bits;
  int64_t at;
};

// The rows of one product with a group's values.
template <class E>
struct Block {
  int64_t group, step, count;  // the first step of the summed axis; rows
  bool first, last;            // of its group
  Reach reach;
  Row<E>* rows;
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
  out.rows = scratch.take<Row<E>>(depth(p) + kNear);
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
  Row<E>* row = out.rows;
  for (int64_t s = step; s < end; ++s)
    for (int64_t t = 0; t < taps; ++t, ++row) {
      const int64_t i = s * walk.pair;
      row->one = source + index[i] * grid.source_pitch + out.reach.offset[t];
      row->two = i + 1 < walk.count
                     ? source + index[i + 1] * grid.source_pitch + out.reach.offset[t]
                     : nullptr;
      row->bits = out.reach.bits + t * vectors;
      row->at = s * walk.step_at + out.reach.tap[t] * walk.tap_at;
    }
  out.count = row - out.rows;
  for (int64_t i = 0; i < kNear; ++i) row[i] = out.count ? row[-1] : Row<E>{};
}

// Vectors in tiles of 1 to kTile vectors, of widths as equal as possible.
struct Tiles {
  int64_t count;
  int32_t* at;  // [count + 1] the tiles' first vectors
  int64_t begin(int64_t i) const { return at[i]; }
  int64_t width(int64_t i) const { return at[i + 1] - at[i]; }
};

inline Tiles take_tiles(Scratch& scratch, int64_t most) {
  return {0, scratch.take<int32_t>(up(most, kTile) + 1)};
}

inline void cut(int64_t vectors, Tiles& out) {
  out.count = up(vectors, kTile);
  for (int64_t i = 0; i <= out.count; ++i) out.at[i] = int32_t(vectors * i / out.count);
}

// A tile and what its products read.
template <class E>
struct Tile {
  const Block<E>* block;
  int64_t begin, width;  // its vectors
  bool run;              // they lie side by side in the source
  const Lanes* lanes;    // of its vectors
  const Row<E>* soon;    // the rows that the next tile reads,
  int64_t soon_at;       // and where
  float* panel;          // [rows, width]
};

template <class E>
inline Tile<E> tile_of(const Block<E>& block, const Block<E>& next, const Tiles& tiles, int64_t i,
                       const Vectors& vectors, float* panel) {
  const bool last = i + 1 == tiles.count;
  const int64_t begin = tiles.begin(i), width = tiles.width(i), soon = last ? 0 : begin + width;
  const Lanes* lanes = vectors.lanes + begin;
  bool run = true;
  for (int64_t v = 0; v < width; ++v)
    run &= lanes[v].source_run && lanes[v].source == lanes[0].source + v * kLanes;
  return {&block,
          begin,
          width,
          run,
          lanes,
          last && next.count >= block.count ? next.rows : block.rows,
          vectors.lanes[soon].source,
          panel};
}

// A vector of a panel: that of a row, or of a row and its pair. `get` loads one of a row.
template <class M, class Get>
inline Vector join(const Row<typename M::Element>& row, const Get& get) {
  if constexpr (M::kPair == 1) {
    return get(row.one);
  } else {
    typedef uint32_t Words __attribute__((vector_size(kLanes * 4)));
    const Words low = (Words)get(row.one) >> 16, high = row.two ? (Words)get(row.two) : Words{};
    return (Vector)(low | high);
  }
}

// The rows of a tile as the first product reads them, where the vectors lie side by side: from the
// source. They stay in the panel for the products that follow, and what the next tile reads is
// fetched in advance.
template <class M, int NV>
struct FromSource {
  typedef typename M::Element E;
  const Row<E>* soon;
  int64_t begin, at, soon_at;
  float* panel;
  explicit FromSource(const Tile<E>& tile)
      : soon(tile.soon),
        begin(tile.begin),
        at(tile.lanes[0].source),
        soon_at(tile.soon_at),
        panel(tile.panel) {}
  void read(const Row<E>* rows, int64_t r, Vector* out) const {
    const E *ahead = soon[r].one + soon_at, *near = rows[r + kNear].one + at;
    const Bits* bits = rows[r].bits + begin;
    UNROLL
    for (int v = 0; v < NV; ++v) {
      __builtin_prefetch(ahead + v * kLanes, 0, 2);
      __builtin_prefetch(near + v * kLanes);
      out[v] =
          join<M>(rows[r], [&](const E* row) { return load_some(row + at + v * kLanes, bits[v]); });
      store(panel + (r * NV + v) * kLanes, out[v]);
    }
  }
};

template <class M, int NV>
struct FromPanel {
  const float* panel;
  explicit FromPanel(const Tile<typename M::Element>& tile) : panel(tile.panel) {}
  void read(const Row<typename M::Element>*, int64_t r, Vector* out) const {
    UNROLL
    for (int v = 0; v < NV; ++v) out[v] = load(panel + (r * NV + v) * kLanes);
  }
};

// Packs a tile whose lanes lie anywhere.
template <class M>
void pack(const Tile<typename M::Element>& tile) {
  typedef typename M::Element E;
  for (int64_t r = 0; r < tile.block->count; ++r) {
    const Row<E>& row = tile.block->rows[r];
    for (int64_t v = 0; v < tile.width; ++v) {
      __builtin_prefetch(tile.soon[r].one + tile.soon_at + v * kLanes);
      store(tile.panel + (r * tile.width + v) * kLanes, join<M>(row, [&](const E* source) {
              return fetch(source, tile.lanes[v], row.bits[tile.begin + v]);
            }));
    }
  }
}
