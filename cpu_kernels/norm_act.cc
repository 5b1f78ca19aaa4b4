// The XLA FFI handlers of batch norm with a residual and a ReLU: they check every buffer, choose
// the variant, and deal the channels out.

#include <algorithm>
#include <string>
#include <string_view>

#include "buffers.h"
#include "parallel.h"
#include "problem.h"

namespace ffi = xla::ffi;

namespace block_sparse {
namespace {

using Floats = ffi::Buffer<ffi::F32>;
using Signs = ffi::Buffer<ffi::U8>;

constexpr int64_t kElementsAtOnce = 1 << 14;  // of a task at least
constexpr int64_t kFarBytes = 12 << 20;       // a larger array is written past the caches

ffi::Error invalid(const std::string& message) {
  return ffi::Error(ffi::ErrorCode::kInvalidArgument, "norm_act: " + message);
}

struct Call {
  const NormPasses* passes;
  int64_t channels, size;
  bool past_caches;
};

// Fills `call` from x [channels, ...], or says what is wrong.
ffi::Error check(const ffi::AnyBuffer& x, std::string_view variant, Call& call) {
  const auto dims = x.dimensions();
  if (dims.size() < 1 || *std::min_element(dims.begin(), dims.end()) < 1)
    return invalid("expected x [channels, ...] without empty axes, got " + shape_of(dims));
  const auto type = x.element_type();
  if (type != ffi::F32 && type != ffi::BF16) return invalid("x must be float32 or bfloat16");
  const Variant* chosen = find_variant(variant);
  if (!chosen) return invalid("this CPU has no variant '" + std::string(variant) + "'");
  call.passes = type == ffi::F32 ? &chosen->norm_float32 : &chosen->norm_bfloat16;
  call.channels = dims[0], call.size = int64_t(x.element_count()) / dims[0];
  call.past_caches = int64_t(x.size_bytes()) > kFarBytes;
  return ffi::Error::Success();
}

// An operand without elements stands for one that the caller does not pass.
template <class Buffer>
bool is_absent(const Buffer& array) {
  return array.element_count() == 0;
}

ffi::Error check_like(const char* name, const ffi::AnyBuffer& array, const ffi::AnyBuffer& x) {
  const auto as = array.dimensions(), xs = x.dimensions();
  if (array.element_type() != x.element_type() ||
      !std::equal(as.begin(), as.end(), xs.begin(), xs.end()))
    return invalid(std::string(name) + " " + shape_of(as) +
                   " must have the shape and the type of x " + shape_of(xs));
  return ffi::Error::Success();
}

template <class Buffer>
ffi::Error check_rows(const char* name, const Buffer& array, const Call& call) {
  const auto dims = array.dimensions();
  if (dims.size() != 1 || dims[0] != call.channels)
    return invalid(std::string(name) + " " + shape_of(dims) + " must have one number for each of " +
                   std::to_string(call.channels) + " channels");
  return ffi::Error::Success();
}

ffi::Error check_signs(const Signs& array, const Call& call) {
  const auto dims = array.dimensions();
  if (dims.size() != 2 || dims[0] != call.channels || dims[1] != sign_bytes(call.size))
    return invalid("signs " + shape_of(dims) + " must be [" + std::to_string(call.channels) + ", " +
                   std::to_string(sign_bytes(call.size)) + "]");
  return ffi::Error::Success();
}

#define CHECK(check) \
  if (auto error = (check); error.failure()) return error

template <class Pass, class Problem>
ffi::Error run(ffi::ThreadPool& pool, const Call& call, Pass pass, const Problem& problem) {
  const int64_t tasks =
      std::clamp<int64_t>(call.channels * call.size / kElementsAtOnce, 1, call.channels);
  parallel_for(pool, tasks, [&](int64_t i) {
    pass(problem, {call.channels * i / tasks, call.channels * (i + 1) / tasks});
  });
  return ffi::Error::Success();
}

ffi::Error forward(ffi::ThreadPool pool, ffi::AnyBuffer x, Floats scale, Floats bias,
                   ffi::AnyBuffer residual, ffi::Result<ffi::AnyBuffer> y, ffi::Result<Floats> mean,
                   ffi::Result<Floats> variance, ffi::Result<Signs> signs, float epsilon, bool relu,
                   std::string_view variant) {
  Call call;
  CHECK(check(x, variant, call));
  CHECK(check_like("y", *y, x));
  if (!is_absent(residual)) CHECK(check_like("residual", residual, x));
  CHECK(check_rows("scale", scale, call));
  CHECK(check_rows("bias", bias, call));
  CHECK(check_rows("mean", *mean, call));
  CHECK(check_rows("variance", *variance, call));
  if (!is_absent(*signs)) CHECK(check_signs(*signs, call));
  NormForward p = {};
  p.size = call.size, p.epsilon = epsilon, p.relu = relu, p.past_caches = call.past_caches;
  p.x = x.untyped_data(), p.residual = is_absent(residual) ? nullptr : residual.untyped_data();
  p.scale = scale.typed_data(), p.bias = bias.typed_data();
  p.y = y->untyped_data(), p.mean = mean->typed_data(), p.variance = variance->typed_data();
  p.signs = is_absent(*signs) ? nullptr : signs->typed_data();
  return run(pool, call, call.passes->forward, p);
}

ffi::Error backward(ffi::ThreadPool pool, ffi::AnyBuffer dy, ffi::AnyBuffer more, ffi::AnyBuffer x,
                    Signs signs, Floats scale, Floats bias, Floats mean, Floats variance,
                    Floats dmean, Floats dvariance, ffi::Result<ffi::AnyBuffer> dx,
                    ffi::Result<Floats> dscale, ffi::Result<Floats> dbias,
                    ffi::Result<ffi::AnyBuffer> dresidual, float epsilon, bool relu,
                    std::string_view variant) {
  Call call;
  CHECK(check(x, variant, call));
  CHECK(check_like("dy", dy, x));
  CHECK(check_like("dx", *dx, x));
  if (!is_absent(more)) CHECK(check_like("more", more, x));
  if (!is_absent(signs)) CHECK(check_signs(signs, call));
  if (!is_absent(*dresidual)) CHECK(check_like("dresidual", *dresidual, x));
  const char* names[] = {"scale", "bias", "mean", "variance", "dmean", "dvariance"};
  const Floats* rows[] = {&scale, &bias, &mean, &variance, &dmean, &dvariance};
  for (int i = 0; i < 6; ++i) CHECK(check_rows(names[i], *rows[i], call));
  CHECK(check_rows("dscale", *dscale, call));
  CHECK(check_rows("dbias", *dbias, call));
  NormBackward p = {};
  p.size = call.size, p.epsilon = epsilon, p.relu = relu, p.past_caches = call.past_caches;
  p.dy = dy.untyped_data(), p.x = x.untyped_data();
  p.more = is_absent(more) ? nullptr : more.untyped_data();
  p.signs = is_absent(signs) ? nullptr : signs.typed_data();
  p.scale = scale.typed_data(), p.bias = bias.typed_data(), p.mean = mean.typed_data();
  p.variance = variance.typed_data(), p.dmean = dmean.typed_data();
  p.dvariance = dvariance.typed_data();
  p.dx = dx->untyped_data(), p.dscale = dscale->typed_data(), p.dbias = dbias->typed_data();
  p.dresidual = is_absent(*dresidual) ? nullptr : dresidual->untyped_data();
  return run(pool, call, call.passes->backward, p);
}

}  // namespace
}  // namespace block_sparse

#define HANDLER(symbol, function, binding)                                                     \
  extern "C" __attribute__((visibility("default"))) XLA_FFI_Error* symbol(XLA_FFI_CallFrame*); \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(symbol, function, binding)
#define ATTRIBUTES .Attr<float>("epsilon").Attr<bool>("relu").Attr<std::string_view>("variant")
#define FLOATS .Arg<block_sparse::Floats>()

HANDLER(NormActForward, block_sparse::forward,
        ffi::Ffi::Bind()
            .Ctx<ffi::ThreadPool>()
            .Arg<ffi::AnyBuffer>() FLOATS FLOATS.Arg<ffi::AnyBuffer>()
            .Ret<ffi::AnyBuffer>()
            .Ret<block_sparse::Floats>()
            .Ret<block_sparse::Floats>()
            .Ret<block_sparse::Signs>() ATTRIBUTES);
HANDLER(NormActBackward, block_sparse::backward,
        ffi::Ffi::Bind()
            .Ctx<ffi::ThreadPool>()
            .Arg<ffi::AnyBuffer>()
            .Arg<ffi::AnyBuffer>()
            .Arg<ffi::AnyBuffer>()
            .Arg<block_sparse::Signs>()
                FLOATS FLOATS FLOATS FLOATS FLOATS FLOATS.Ret<ffi::AnyBuffer>()
            .Ret<block_sparse::Floats>()
            .Ret<block_sparse::Floats>()
            .Ret<ffi::AnyBuffer>() ATTRIBUTES);
