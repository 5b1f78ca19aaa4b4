// The XLA FFI handlers: they check every buffer, choose the variant, and cut the passes into tasks.

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "buffers.h"
#include "grids.h"
#include "parallel.h"
#include "problem.h"

namespace ffi = xla::ffi;

namespace block_sparse {
namespace {

using Sizes = ffi::Span<const int64_t>;
using Index = ffi::Buffer<ffi::S32>;

ffi::Error invalid(const std::string& message) {
  return ffi::Error(ffi::ErrorCode::kInvalidArgument, "block_sparse_conv: " + message);
}

// ---- scratch memory: kept by each thread --------------------------------------------------------

// Null where there is not enough memory.
void* scratch(size_t bytes) {
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  static thread_local std::unique_ptr<void, Free> memory;
  static thread_local size_t size = 0;
  if (bytes > size) {
    memory.reset();
    size = (bytes + 4095) / 4096 * 4096;
    memory.reset(std::aligned_alloc(64, size));
    if (!memory) size = 0;
  }
  return memory.get();
}

// ---- what a call is -----------------------------------------------------------------------------

struct Geometry {
  Sizes kernel, strides, padding, dilation;  // (y, x); padding: top, left, bottom, right
};

struct Call {
  const Variant* variant;
  const Passes* passes;
  Problem problem;
  int64_t height, width, images, out_height, out_width;
  Geometry geometry;
};

// Fills `call` from the operands, or says what is wrong. `values` are the packed values, or their
// gradient.
ffi::Error check(const ffi::AnyBuffer& x, const ffi::AnyBuffer& y, const ffi::AnyBuffer& values,
                 const Index& filters, const Index& channels, const Index& taps,
                 bool values_are_gradient, const Geometry& geometry, std::string_view variant,
                 Call& call) {
  if (geometry.kernel.size() != 2 || geometry.strides.size() != 2 || geometry.padding.size() != 4 ||
      geometry.dilation.size() != 2)
    return invalid("kernel, strides and dilation must have two numbers each, padding four");
  for (int i = 0; i < 2; ++i) {
    const int64_t bound = 1 << 20;
    if (geometry.kernel[i] < 1 || geometry.strides[i] < 1 || geometry.dilation[i] < 1 ||
        std::min(geometry.padding[i], geometry.padding[i + 2]) < 0 ||
        std::max({geometry.kernel[i], geometry.strides[i], geometry.dilation[i],
                  geometry.padding[i], geometry.padding[i + 2]}) > bound)
      return invalid(
          "kernel, strides and dilation must be at least 1, padding at least 0, and none above "
          "2^20");
  }
  const auto xs = x.dimensions(), ys = y.dimensions(), vs = values.dimensions();
  if (xs.size() != 4 || ys.size() != 4 || vs.size() != 4)
    return invalid(
        "expected x [cin, h, w, n], y [cout, ho, wo, n], values [groups, kept, kept_taps, "
        "group_size], got " +
        shape_of(xs) + ", " + shape_of(ys) + ", " + shape_of(vs));
  for (const auto& dims : {xs, ys, vs})
    if (*std::min_element(dims.begin(), dims.end()) < 1)
      return invalid("an axis is empty: " + shape_of(dims));
  const auto type = x.element_type();
  if ((type != ffi::F32 && type != ffi::BF16) || y.element_type() != type ||
      values.element_type() != (values_are_gradient ? ffi::F32 : type))
    return invalid(
        "x, y and values must be all float32 or all bfloat16 (the gradient of the values float32)");
  Problem& p = call.problem;
  p = {};
  p.cin = xs[0], p.cout = ys[0], p.groups = vs[0], p.kept = vs[1], p.kept_taps = vs[2],
  p.group_size = vs[3];
  p.kernel_width = geometry.kernel[1];
  call.height = xs[1], call.width = xs[2], call.images = xs[3], call.out_height = ys[1],
  call.out_width = ys[2];
  call.geometry = geometry;
  for (int i = 0; i < 2; ++i) {
    const int64_t span = (geometry.kernel[i] - 1) * geometry.dilation[i] + 1,
                  room = xs[i + 1] + geometry.padding[i] + geometry.padding[i + 2] - span;
    if (room < 0 || ys[i + 1] != room / geometry.strides[i] + 1)
      return invalid("y " + shape_of(ys) +
                     " is not what kernel, strides, padding and dilation make of x " +
                     shape_of(xs));
  }
  if (ys[3] != xs[3])
    return invalid("x " + shape_of(xs) + " and y " + shape_of(ys) +
                   " have different numbers of images");
  if (p.groups * p.group_size != p.cout)
    return invalid("values " + shape_of(vs) + ": groups * group_size is not cout of y " +
                   shape_of(ys));
  const int64_t rows[3] = {p.group_size, p.kept, p.kept_taps},
                bounds[3] = {p.cout, p.cin, geometry.kernel[0] * geometry.kernel[1]};
  const Index* index[3] = {&filters, &channels, &taps};
  const char* names[3] = {"filters", "channels", "taps"};
  for (int i = 0; i < 3; ++i) {
    const auto dims = index[i]->dimensions();
    if (dims.size() != 2 || dims[0] != p.groups || dims[1] != rows[i])
      return invalid(std::string(names[i]) + " " + shape_of(dims) + " do not fit values " +
                     shape_of(vs));
    // The last group in which each index was used; all filters count as one group.
    std::vector<int64_t> last_group(bounds[i], -1);
    for (int64_t j = 0; j < dims[0] * dims[1]; ++j) {
      const int32_t at = index[i]->typed_data()[j];
      const int64_t group = i == 0 ? 0 : j / dims[1];
      if (at < 0 || at >= bounds[i])
        return invalid(std::string(names[i]) + ": " + std::to_string(at) + " is outside of [0, " +
                       std::to_string(bounds[i]) + ")");
      if (last_group[at] == group)
        return invalid(std::string(names[i]) + ": " + std::to_string(at) + " stands in two places");
      last_group[at] = group;
    }
  }
  p.filters = filters.typed_data(), p.channels = channels.typed_data(), p.taps = taps.typed_data();
  call.variant = find_variant(variant);
  if (!call.variant) return invalid("this CPU has no variant '" + std::string(variant) + "'");
  call.passes = type == ffi::F32 ? &call.variant->float32 : &call.variant->bfloat16;
  return ffi::Error::Success();
}

Grid output_grid(const Call& c, const AxisTaps& y, const AxisTaps& x) {
  return {y.axis(c.out_height, c.height, c.geometry.strides[0], 1, 0),
          x.axis(c.out_width, c.width, c.geometry.strides[1], 1, 0),
          c.images,
          c.width,
          c.height * c.width * c.images,
          c.out_width,
          c.out_height * c.out_width * c.images};
}

bool allocate(std::vector<float>& memory, int64_t size) {
  try {
    memory.resize(size);
  } catch (const std::bad_alloc&) {
    return false;
  }
  return true;
}

ffi::Error exhausted() {
  return ffi::Error(ffi::ErrorCode::kResourceExhausted, "block_sparse_conv: out of memory");
}

// Runs `task(i, memory)` for each i, with scratch memory of that size.
template <class Task>
ffi::Error run(ffi::ThreadPool& pool, int64_t tasks, size_t bytes, const Task& task) {
  std::atomic<bool> failed{false};
  parallel_for(pool, tasks, [&](int64_t i) {
    if (void* memory = scratch(bytes))
      task(i, memory);
    else
      failed = true;
  });
  return failed ? exhausted() : ffi::Error::Success();
}

Range part(int64_t total, int64_t i, int64_t parts) {
  return {total * i / parts, total * (i + 1) / parts};
}

constexpr int64_t kValuesAtOnce = 1 << 16;

template <class Word>
bool any_not_finite(ffi::ThreadPool& pool, const ffi::AnyBuffer& values, Word exponent) {
  const Word* bits = static_cast<const Word*>(values.untyped_data());
  const int64_t count = values.element_count(), pieces = up(count, kValuesAtOnce);
  std::atomic<bool> any{false};
  parallel_for(pool, pieces, [&](int64_t i) {
    const Range piece = part(count, i, pieces);
    int64_t here = 0;
    for (int64_t j = piece.begin; j < piece.end; ++j) here += (bits[j] & exponent) == exponent;
    if (here) any = true;
  });
  return any;
}

// Brings the values into the form that the pass reads; `memory` holds them. False where memory is
// exhausted.
bool prepare(ffi::ThreadPool& pool, Call& c, const ffi::AnyBuffer& values, bool input_gradient,
             std::vector<float>& memory) {
  const Sizes padding = c.geometry.padding;
  if (input_gradient || *std::max_element(padding.begin(), padding.end()) >
                            0)  // else no tap reads outside of the image
    c.problem.careful = values.element_type() == ffi::F32
                            ? any_not_finite<uint32_t>(pool, values, 0x7f800000)
                            : any_not_finite<uint16_t>(pool, values, 0x7f80);
  const void* data = values.untyped_data();
  c.problem.values = static_cast<const float*>(data);
  const int64_t size = c.passes->prepared_size(c.problem, input_gradient);
  if (!size) return true;
  if (!allocate(memory, size)) return false;
  parallel_for(pool, c.problem.groups, [&](int64_t g) {
    c.passes->prepare(c.problem, data, input_gradient, {g, g + 1}, memory.data());
  });
  c.problem.values = memory.data();
  return true;
}

// The source of the forward pass, split into the phases of its strides.
struct SplitSource {
  std::optional<Phases> phases;
  std::unique_ptr<char[]> memory;
};

// Splitting the source pays when each channel is read at least so many times: in runs, or lane by
// lane.
constexpr int64_t kReadsToSplit = 6, kGathersToSplit = 2;

// Splits the source where its vectors would otherwise be gathered, once for each group that reads
// them, or could not stream. False where memory is exhausted.
bool split_source(ffi::ThreadPool& pool, Call& c, const ffi::AnyBuffer& x, const AxisTaps& rows,
                  const AxisTaps& columns, Grid& grid, SplitSource& out) {
  const Problem& p = c.problem;
  const Sizes strides = c.geometry.strides;
  if (strides[0] * strides[1] == 1 ||
      (c.images % c.variant->lanes == 0 && p.group_size > c.passes->streamed))
    return true;
  const int64_t element = ffi::ByteWidth(x.element_type());
  const Phases& phases = out.phases.emplace(rows, columns, c.height, c.width, c.images * element,
                                            strides[0], strides[1]);
  const int64_t least = 2 * c.images < c.variant->lanes ? kGathersToSplit : kReadsToSplit;
  if (p.groups * p.kept * p.kept_taps < least * p.cin * phases.count()) return true;
  out.memory.reset(new (std::nothrow) char[p.cin * phases.pitch]);
  if (!out.memory) return false;
  const char* from = static_cast<const char*>(x.untyped_data());
  parallel_for(pool, p.cin, [&](int64_t i) {
    phases.copy(from + i * c.height * c.width * phases.pixel, c.height, c.width,
                out.memory.get() + i * phases.pitch);
  });
  c.problem.source = out.memory.get();
  grid.y = phases.y.taps.axis(c.out_height, phases.y.size, 1, 1, 0),
  grid.x = phases.x.taps.axis(c.out_width, phases.x.size, 1, 1, 0);
  grid.source_width = phases.x.size, grid.source_pitch = phases.pitch / element;
  return true;
}

constexpr int64_t kTasksPerThread = 6;
constexpr int64_t kTaskBytes = 400 << 10;  // sums of a task: they stay in the L2 cache
constexpr int64_t kMostVectors =
    72;  // of a task: long runs of memory, and each weight is loaded once
constexpr int64_t kSumsAtOnce =
    1 << 14;                          // partial sums of the weight gradient that one task adds up
constexpr int64_t kPartialSums = 16;  // spans of positions in the weight gradient: fixed, so that
                                      // sums do not depend on the threads

// Vectors in a task of a product with `sums` rows of sums; a multiple of the register tile.
int64_t vectors_at_once(const Call& c, int64_t vectors, int64_t tasks, int64_t sums) {
  const int64_t bytes = sums * c.variant->lanes * 4, tile = c.variant->tile;
  return std::clamp<int64_t>(std::min({vectors / tasks, kTaskBytes / bytes, kMostVectors}) / tile,
                             1, kMostVectors) *
         tile;
}

// ---- the passes ---------------------------------------------------------------------------------

// The epilogue. An operand without elements stands for one that the caller does not pass.
ffi::Error check_epilogue(const ffi::AnyBuffer& y, const ffi::Buffer<ffi::F32>& scale,
                          const ffi::Buffer<ffi::F32>& bias, const ffi::AnyBuffer& residual,
                          bool relu, Epilogue& out) {
  for (const auto* rows : {&scale, &bias})
    if (rows->element_count() &&
        (rows->dimensions().size() != 1 || rows->dimensions()[0] != y.dimensions()[0]))
      return invalid("scale and bias must have one number for each channel of y " +
                     shape_of(y.dimensions()));
  const auto rs = residual.dimensions(), ys = y.dimensions();
  if (residual.element_count() && (!std::equal(rs.begin(), rs.end(), ys.begin(), ys.end()) ||
                                   residual.element_type() != y.element_type()))
    return invalid("residual " + shape_of(rs) + " must be as y " + shape_of(ys));
  out.scale = scale.element_count() ? scale.typed_data() : nullptr;
  out.bias = bias.element_count() ? bias.typed_data() : nullptr;
  out.residual = residual.element_count() ? residual.untyped_data() : nullptr;
  out.relu = relu;
  return ffi::Error::Success();
}

ffi::Error forward(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer values, Index filters,
                   Index channels, Index taps, ffi::Buffer<ffi::F32> scale,
                   ffi::Buffer<ffi::F32> bias, ffi::AnyBuffer residual,
                   ffi::Result<ffi::AnyBuffer> y, Sizes kernel, Sizes strides, Sizes padding,
                   Sizes dilation, std::string_view variant, bool relu) {
  Call c;
  if (auto error = check(x, *y, values, filters, channels, taps, false,
                         {kernel, strides, padding, dilation}, variant, c);
      error.failure())
    return error;
  if (auto error = check_epilogue(*y, scale, bias, residual, relu, c.problem.epilogue);
      error.failure())
    return error;
  const AxisTaps rows = output_taps(kernel[0], padding[0], dilation[0]),
                 columns = output_taps(kernel[1], padding[1], dilation[1]);
  Grid grid = output_grid(c, rows, columns);
  std::vector<float> prepared;
  SplitSource split;
  c.problem.source = x.untyped_data(), c.problem.target = y->untyped_data();
  if (!prepare(pool, c, values, false, prepared) ||
      !split_source(pool, c, x, rows, columns, grid, split))
    return exhausted();
  const int64_t vectors = up(grid.positions(), c.variant->lanes);
  const int64_t tasks = kTasksPerThread * pool.num_threads();
  const int64_t chunk = vectors_at_once(c, vectors, tasks, c.problem.group_size);
  const int64_t chunks = vectors < tasks && c.problem.groups == 1 ? vectors : up(vectors, chunk);
  const int64_t splits = std::clamp<int64_t>(up(tasks, chunks), 1, c.problem.groups);
  const size_t bytes = c.passes->forward_scratch(c.problem, grid, up(vectors, chunks));
  return run(pool, chunks * splits, bytes, [&](int64_t i, void* memory) {
    c.passes->forward(c.problem, grid, part(vectors, i / splits, chunks),
                      part(c.problem.groups, i % splits, splits), memory);
  });
}

ffi::Error input_gradient(ffi::ThreadPool pool, ffi::AnyBuffer dy, ffi::AnyBuffer values,
                          Index filters, Index channels, Index taps, ffi::Result<ffi::AnyBuffer> dx,
                          Sizes kernel, Sizes strides, Sizes padding, Sizes dilation,
                          std::string_view variant) {
  Call c;
  if (auto error = check(*dx, dy, values, filters, channels, taps, false,
                         {kernel, strides, padding, dilation}, variant, c);
      error.failure())
    return error;
  std::vector<float> prepared;
  if (!prepare(pool, c, values, true, prepared)) return exhausted();
  c.problem.source = dy.untyped_data(), c.problem.target = dx->untyped_data();
  const int64_t tasks = kTasksPerThread * pool.num_threads();
  struct Phase {
    AxisTaps rows, columns;
    Grid grid = {};
    int64_t vectors = 0, chunks = 0;
  };
  std::vector<Phase> phases;
  int64_t total = 0;
  for (int64_t y = 0; y < std::min(strides[0], c.height); ++y)
    for (int64_t x = 0; x < std::min(strides[1], c.width); ++x) {
      phases.push_back({input_taps(kernel[0], padding[0], dilation[0], strides[0], y),
                        input_taps(kernel[1], padding[1], dilation[1], strides[1], x)});
      Phase& phase = phases.back();
      phase.grid = {phase.rows.axis(up(c.height - y, strides[0]), c.out_height, 1, strides[0], y),
                    phase.columns.axis(up(c.width - x, strides[1]), c.out_width, 1, strides[1], x),
                    c.images,
                    c.out_width,
                    c.out_height * c.out_width * c.images,
                    c.width,
                    c.height * c.width * c.images};
      phase.vectors = up(phase.grid.positions(), c.variant->lanes);
      phase.chunks = up(phase.vectors, vectors_at_once(c, phase.vectors, tasks, c.problem.cin));
      total += phase.chunks;
    }
  const int64_t parts =
      std::clamp<int64_t>(up(tasks, std::max<int64_t>(total, 1)) / 2, 1, up(c.problem.cin, 8));
  size_t bytes = 0;
  for (const Phase& phase : phases)
    bytes = std::max(bytes, c.passes->input_gradient_scratch(c.problem, phase.grid,
                                                             up(phase.vectors, phase.chunks),
                                                             up(c.problem.cin, parts)));
  return run(pool, total * parts, bytes, [&](int64_t i, void* memory) {
    int64_t chunk = i / parts, which = 0;
    while (chunk >= phases[which].chunks) chunk -= phases[which++].chunks;
    const Phase& phase = phases[which];
    c.passes->input_gradient(c.problem, phase.grid, part(phase.vectors, chunk, phase.chunks),
                             part(c.problem.cin, i % parts, parts), memory);
  });
}

ffi::Error weight_gradient(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer dy, Index filters,
                           Index channels, Index taps, ffi::Result<ffi::AnyBuffer> dvalues,
                           Sizes kernel, Sizes strides, Sizes padding, Sizes dilation,
                           std::string_view variant) {
  Call c;
  if (auto error = check(x, dy, *dvalues, filters, channels, taps, true,
                         {kernel, strides, padding, dilation}, variant, c);
      error.failure())
    return error;
  const AxisTaps rows = output_taps(kernel[0], padding[0], dilation[0]),
                 columns = output_taps(kernel[1], padding[1], dilation[1]);
  const Grid grid = output_grid(c, rows, columns);
  c.problem.source = x.untyped_data(), c.problem.other = dy.untyped_data(),
  c.problem.target = dvalues->untyped_data();
  const int64_t total = c.problem.kept * c.problem.kept_taps, size = total * c.problem.group_size,
                groups = c.problem.groups;
  const int64_t vectors = up(grid.positions(), c.variant->lanes);
  const int64_t spans =  // of positions, each with its own sums
      std::clamp<int64_t>(up(kPartialSums, groups), 1, up(vectors, c.variant->run));
  // The number of threads decides only how the rows are dealt out, which changes no sum.
  const int64_t tasks = std::max(kPartialSums, 2 * int64_t(pool.num_threads()));
  const int64_t parts = std::clamp<int64_t>(up(tasks, groups * spans), 1, up(total, 6));
  float* out = static_cast<float*>(c.problem.target);
  std::vector<float> partial;
  if (!allocate(partial, (spans - 1) * groups * size)) return exhausted();
  const size_t bytes = c.passes->weight_gradient_scratch(c.problem, grid);
  auto error = run(pool, groups * spans * parts, bytes, [&](int64_t i, void* memory) {
    const int64_t group = i / (spans * parts), span = i / parts % spans;
    float* sums = (span ? partial.data() + (span - 1) * groups * size : out) + group * size;
    const Range rows = part(total, i % parts, parts);
    if (!span)
      std::fill(sums + rows.begin * c.problem.group_size, sums + rows.end * c.problem.group_size,
                0.0f);
    c.passes->weight_gradient(c.problem, grid, group, rows, part(vectors, span, spans), sums,
                              memory);
  });
  const int64_t pieces = spans > 1 ? up(groups * size, kSumsAtOnce) : 0;
  parallel_for(pool, pieces, [&](int64_t i) {
    const Range piece = part(groups * size, i, pieces);
    for (int64_t span = 1; span < spans; ++span)
      for (int64_t j = piece.begin; j < piece.end; ++j)
        out[j] += partial[(span - 1) * groups * size + j];
  });
  return error;
}

}  // namespace
}  // namespace block_sparse

#define EXPORT extern "C" __attribute__((visibility("default")))
#define OPERANDS                    \
  ffi::Ffi::Bind()                  \
      .Ctx<ffi::ThreadPool>()       \
      .Arg<ffi::AnyBuffer>()        \
      .Arg<ffi::AnyBuffer>()        \
      .Arg<ffi::Buffer<ffi::S32>>() \
      .Arg<ffi::Buffer<ffi::S32>>() \
      .Arg<ffi::Buffer<ffi::S32>>()
#define RESULT                                    \
  .Ret<ffi::AnyBuffer>()                          \
      .Attr<ffi::Span<const int64_t>>("kernel")   \
      .Attr<ffi::Span<const int64_t>>("strides")  \
      .Attr<ffi::Span<const int64_t>>("padding")  \
      .Attr<ffi::Span<const int64_t>>("dilation") \
      .Attr<std::string_view>("variant")
#define HANDLER(symbol, function, binding)          \
  EXPORT XLA_FFI_Error* symbol(XLA_FFI_CallFrame*); \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(symbol, function, binding)
#define EPILOGUE .Arg<ffi::Buffer<ffi::F32>>().Arg<ffi::Buffer<ffi::F32>>().Arg<ffi::AnyBuffer>()

HANDLER(BlockSparseConvForward, block_sparse::forward, OPERANDS EPILOGUE RESULT.Attr<bool>("relu"));
HANDLER(BlockSparseConvInputGradient, block_sparse::input_gradient, OPERANDS RESULT);
HANDLER(BlockSparseConvWeightGradient, block_sparse::weight_gradient, OPERANDS RESULT);

// The version of XLA's interface that the library was built for: a runtime accepts this version and
// older ones.
EXPORT int BlockSparseConvInterface() { return XLA_FFI_API_MINOR; }

// The variants that this CPU can run, best first, separated by commas.
EXPORT const char* BlockSparseConvVariants() {
  static const std::string names = [] {
    std::string out;
    for (const block_sparse::Variant* variant : block_sparse::variants())
      out += (out.empty() ? "" : ",") + std::string(variant->name);
    return out;
  }();
  return names.c_str();
}
