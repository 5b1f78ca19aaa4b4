// Where the lanes of a vector of positions lie in the source and in the target, and which of them a
// tap reaches.

struct Lanes {
  int64_t source, target;                        // element of lane 0
  int32_t source_at[kLanes], target_at[kLanes];  // of each lane, counted from lane 0
  bool source_run, target_run;                   // the lanes lie side by side
  bool source_halves;                            // the lanes of each half do
  bool source_near;                              // the lanes ascend within two vectors
  uint32_t source_near_bits;  // then: a bit for each element of them that is a lane
  Bits live;                  // lanes that are positions of the grid
};

// A few vectors with their masks: rows[v * taps_y + ty] and columns[v * taps_x + tx] say for which
// lanes the tap reads inside the image.
struct Vectors {
  Lanes* lanes;
  int64_t* source;  // of each vector, the element of lane 0
  Bits *rows, *columns;
  int64_t taps_y, taps_x;
  bool runs;  // the lanes of each vector lie side by side in the source
  Bits reached(int64_t v, int64_t ty, int64_t tx) const {
    return rows[v * taps_y + ty] & columns[v * taps_x + tx];
  }
};

// Hands out aligned pieces of the scratch memory; without memory it only counts.
struct Scratch {
  char* next;
  size_t used = 0;
  template <class T>
  T* take(int64_t count) {
    T* out = reinterpret_cast<T*>(next + used);
    used += (size_t(count) * sizeof(T) + 63) / 64 * 64;
    return out;
  }
};

inline Vectors take_vectors(Scratch& scratch, const Grid& grid, int64_t count) {
  Vectors out;
  out.taps_y = grid.y.taps, out.taps_x = grid.x.taps;
  out.lanes = scratch.take<Lanes>(count);
  out.source = scratch.take<int64_t>(count);
  out.rows = scratch.take<Bits>(count * out.taps_y);
  out.columns = scratch.take<Bits>(count * out.taps_x);
  out.runs = false;
  return out;
}

inline void mark(const Axis& axis, int64_t position, Bits lanes, Bits* masks) {
  for (int64_t t = 0; t < axis.taps; ++t) {
    const int64_t at = position * axis.source_step + axis.offset[t];
    if (axis.active[t] && at >= 0 && at < axis.source_size) masks[t] |= lanes;
  }
}

inline void describe(const Grid& grid, int64_t vector, int64_t v, const Vectors& out) {
  Lanes& lanes = out.lanes[v];
  Bits *rows = out.rows + v * out.taps_y, *columns = out.columns + v * out.taps_x;
  for (int64_t t = 0; t < out.taps_y; ++t) rows[t] = 0;
  for (int64_t t = 0; t < out.taps_x; ++t) columns[t] = 0;
  const int64_t first = vector * kLanes, pixel = first / grid.images;
  int64_t image = first - pixel * grid.images, x = pixel % grid.x.count, y = pixel / grid.x.count;
  lanes.live = 0, lanes.source_run = lanes.target_run = true;
  for (int lane = 0; lane < kLanes;) {
    if (y >= grid.y.count) {
      for (; lane < kLanes; ++lane) lanes.source_at[lane] = lanes.target_at[lane] = 0;
      break;
    }
    const int64_t source =
        (y * grid.y.source_step * grid.source_width + x * grid.x.source_step) * grid.images + image;
    const int64_t target_y = y * grid.y.target_step + grid.y.target_offset,
                  target_x = x * grid.x.target_step + grid.x.target_offset;
    const int64_t target = (target_y * grid.target_width + target_x) * grid.images + image;
    if (lane == 0) lanes.source = source, lanes.target = target;
    lanes.source_run &= source - lanes.source == lane;
    lanes.target_run &= target - lanes.target == lane;
    const int64_t remaining = grid.images - image;
    const int run = remaining < kLanes - lane ? int(remaining) : kLanes - lane;
    const Bits bits = Bits(((1u << run) - 1) << lane);
    for (int i = 0; i < run; ++i) {
      lanes.source_at[lane + i] = int32_t(source - lanes.source) + i;
      lanes.target_at[lane + i] = int32_t(target - lanes.target) + i;
    }
    lanes.live |= bits;
    mark(grid.y, y, bits, rows);
    mark(grid.x, x, bits, columns);
    lane += run, image = 0;
    if (++x == grid.x.count) x = 0, ++y;
  }
  lanes.source_halves = lanes.source_near = true, lanes.source_near_bits = 0;
  for (int i = 0; i < kLanes && lanes.live >> i & 1; ++i) {
    const int32_t at = lanes.source_at[i], half = i < kLanes / 2 ? 0 : kLanes / 2;
    lanes.source_halves &= at - lanes.source_at[half] == i - half;
    lanes.source_near &= at < 2 * kLanes && (i == 0 || at > lanes.source_at[i - 1]);
    if (lanes.source_near) lanes.source_near_bits |= 1u << at;
  }
}

// Describes vector v where it follows vector v - 1 in the same pixel.
inline void describe_next(int64_t v, const Vectors& out) {
  out.lanes[v] = out.lanes[v - 1];
  out.lanes[v].source += kLanes, out.lanes[v].target += kLanes;
  for (int64_t t = v * out.taps_y; t < (v + 1) * out.taps_y; ++t)
    out.rows[t] = out.rows[t - out.taps_y];
  for (int64_t t = v * out.taps_x; t < (v + 1) * out.taps_x; ++t)
    out.columns[t] = out.columns[t - out.taps_x];
}

inline void describe_all(const Grid& grid, int64_t first, int64_t count, Vectors& out) {
  const bool whole = grid.images % kLanes == 0;  // no vector holds images of two pixels
  out.runs = true;
  for (int64_t v = 0; v < count; ++v) {
    if (whole && v && (first + v) * kLanes % grid.images)
      describe_next(v, out);
    else
      describe(grid, first + v, v, out);
    out.source[v] = out.lanes[v].source;
    out.runs &= out.lanes[v].source_run;
  }
}
