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

// What the sums of a product are written to.
template <class E>
struct Output {
  E* target;
  int64_t pitch;
  bool past_caches;
  const Epilogue* epilogue;  // null: none
};

template <class E>
inline Output<E> output_of(const Grid& grid, E* target, int64_t rows, const Epilogue* epilogue) {
  return {target, grid.target_pitch, grid.target_pitch * rows * int64_t(sizeof(E)) > kCaches,
          epilogue};
}

// Fetches what `write_row` will touch.
template <class E>
inline void fetch_row(const Output<E>& out, int64_t row, const Lanes* lanes, int64_t vectors) {
  for (int64_t v = 0; v < vectors; ++v) {
    const int64_t at = row * out.pitch + lanes[v].target;
    if (!out.past_caches) __builtin_prefetch(out.target + at, 1);
    if (out.epilogue && out.epilogue->residual)
      __builtin_prefetch(static_cast<const E*>(out.epilogue->residual) + at);
  }
}

// Writes the sums of a row of the target.
template <int NV, class E>
INLINE void write_row(const Output<E>& out, int64_t row, const Lanes* lanes, const Vector* sums) {
  E* target = out.target + row * out.pitch;
  if (out.epilogue) {
    const Finisher<E> finish(*out.epilogue, row, out.pitch);
    for (int v = 0; v < NV; ++v)
      write(target, lanes[v], finish(sums[v], lanes[v]), out.past_caches);
  } else {
    UNROLL
    for (int v = 0; v < NV; ++v) write(target, lanes[v], sums[v], out.past_caches);
  }
}
