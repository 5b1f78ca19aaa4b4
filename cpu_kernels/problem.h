// What one pass of a block-sparse convolution is: sizes, grids of positions, operands. Plain data,
// no templates: shared by the handlers and by every variant of the kernels.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

namespace block_sparse {

constexpr int64_t kPage = 4096;  // bytes: channels that begin at the same offset in a page compete
                                 // for the same lines of the caches

struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

// One image axis of a grid of positions. Position j of the grid reads the source at j * source_step
// + offset[tap], for the taps that are active and where that lies in [0, source_size); it writes
// the target at j * target_step + target_offset. In memory, what it reads lies at j * source_step +
// place[tap]: place is offset, unless the source is split into phases (grids.h).
struct Axis {
  int64_t count, source_size, source_step, target_step, target_offset;
  int64_t taps;
  const int64_t *offset, *place;
  const uint8_t* active;
};

// Positions (y, x, image), numbered in this order. The source and the target are [channel, y, x,
// image].
struct Grid {
  Axis y, x;
  int64_t images;
  int64_t source_width, source_pitch;  // pixels in a row, elements in a channel
  int64_t target_width, target_pitch;
  int64_t positions() const { return y.count * x.count * images; }
};

// What the forward pass does to a sum before it is stored: relu(scale[filter] * sum + bias[filter]
// + residual). Null pointers are left out.
struct Epilogue {
  const float *scale = nullptr, *bias = nullptr;  // [cout]
  const void* residual = nullptr;                 // as the target
  bool relu = false;
};

// forward:          source = x,  target = y
// input gradient:   source = dy, target = dx; one grid for each phase of the strides
// weight gradient:  source = x,  other = dy (at the positions of the grid), target = dvalues
struct Problem {
  int64_t cin, cout, groups, kept, kept_taps, group_size, kernel_width;
  const void* source;
  const void* other;
  const float* values;  // [groups, kept, kept_taps, group_size], or the form into which the
                        // variant's `prepare` brings them
  const int32_t* filters;
  const int32_t* channels;
  const int32_t* taps;
  void* target;
  bool careful = false;    // some value is not finite: its products with the zeros around the image
                           // are NaN and must not be skipped
  Epilogue epilogue = {};  // forward
};

// The three passes for one element type. A vector is a run of `Variant::lanes` positions of the
// grid.
struct Passes {
  int64_t streamed;  // the forward pass does without panels for groups of up to this many filters
  // Packs the values of some groups for the pass; a size of 0: the kernels read the float32 values
  // as they are.
  int64_t (*prepared_size)(const Problem&, bool input_gradient);  // floats for all groups
  void (*prepare)(const Problem&, const void* values, bool input_gradient, Range groups,
                  float* prepared);
  // Positions come in vectors; a call takes a range of them, and scratch memory of the size asked
  // for.
  size_t (*forward_scratch)(const Problem&, const Grid&, int64_t vectors);
  void (*forward)(const Problem&, const Grid&, Range vectors, Range groups, void* scratch);
  size_t (*input_gradient_scratch)(const Problem&, const Grid&, int64_t vectors, int64_t channels);
  void (*input_gradient)(const Problem&, const Grid&, Range vectors, Range channels, void* scratch);
  // Adds to the sums of the group's rows (kept channel, kept tap) over vectors.
  size_t (*weight_gradient_scratch)(const Problem&, const Grid&);
  void (*weight_gradient)(const Problem&, const Grid&, int64_t group, Range rows, Range vectors,
                          float* sums, void* scratch);
};

// A batch norm, a residual and a ReLU as one operation: norm_act.h. Each channel is one run of
// `size` elements; null pointers are left out. The signs of y are sign_bytes(size) for each
// channel.
inline int64_t sign_bytes(int64_t size) { return (size + 15) / 16 * 2; }
struct NormForward {
  int64_t size;
  float epsilon;
  bool relu, past_caches;
  const void *x, *residual;
  const float *scale, *bias;  // [channels], and so are all float arrays
  void* y;
  float *mean, *variance;
  uint8_t* signs;
};
struct NormBackward {
  int64_t size;
  float epsilon;
  bool relu, past_caches;
  const void *dy, *more, *x;  // more: is added to dy
  const uint8_t* signs;       // null: computed again, which takes a call without a residual
  const float *scale, *bias, *mean, *variance, *dmean, *dvariance;
  void *dx, *dresidual;
  float *dscale, *dbias;
};

struct NormPasses {
  void (*forward)(const NormForward&, Range channels);
  void (*backward)(const NormBackward&, Range channels);
};

struct Variant {
  const char* name;
  int64_t lanes;  // positions in a vector
  int64_t tile;   // vectors in a register tile
  int64_t run;    // vectors in a block of the weight gradient
  Passes float32, bfloat16;
  NormPasses norm_float32, norm_bfloat16;
};

const Variant& avx512_bf16();
const Variant& avx512();
const Variant& avx2();
const Variant& portable();

const std::vector<const Variant*>& variants();       // that this CPU can run, best first
const Variant* find_variant(std::string_view name);  // empty: the best; null: none of that name

}  // namespace block_sparse
