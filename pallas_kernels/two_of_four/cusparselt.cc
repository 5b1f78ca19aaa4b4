// 2:4 weights times dense activations on sparse tensor cores: an XLA FFI handler over cuSPARSELt,
// which TwoOfFourOpen opens at run time.

#include <cusparseLt.h>
#include <dlfcn.h>

#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <tuple>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace two_of_four {
namespace {

// ---- the library --------------------------------------------------------------------------------

// clang-format off
#define FUNCTIONS(X)                                                          \
  X(Init) X(GetProperty) X(GetErrorName) X(GetErrorString)                    \
  X(DenseDescriptorInit) X(StructuredDescriptorInit) X(MatmulDescriptorInit)  \
  X(MatmulAlgSelectionInit) X(MatmulPlanInit) X(MatmulGetWorkspace)           \
  X(SpMMACompressedSize) X(SpMMACompress) X(Matmul) X(MatmulSearch)
// clang-format on

struct Library {
#define MEMBER(name) decltype(&cusparseLt##name) name = nullptr;
  FUNCTIONS(MEMBER)
#undef MEMBER
  std::string version;  // "" where it is not open
};

Library library;

std::string version(int major, int minor) {
  return std::to_string(major) + "." + std::to_string(minor);
}

std::string open(const char* path) {
  void* file = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (!file) return dlerror();
  Library opened;
#define FIND(name)                                                                        \
  opened.name = reinterpret_cast<decltype(opened.name)>(dlsym(file, "cusparseLt" #name)); \
  if (!opened.name) return std::string(path) + " has no function cusparseLt" #name;
  FUNCTIONS(FIND)
#undef FIND
  int major = -1, minor = -1;
  opened.GetProperty(MAJOR_VERSION, &major), opened.GetProperty(MINOR_VERSION, &minor);
  if (major != CUSPARSELT_VER_MAJOR ||
      minor != CUSPARSELT_VER_MINOR)  // its structures have other sizes
    return std::string(path) + " is cuSPARSELt " + version(major, minor) +
           ", and this handler was built with the header of " +
           version(CUSPARSELT_VER_MAJOR, CUSPARSELT_VER_MINOR);
  int patch = 0;
  opened.GetProperty(PATCH_LEVEL, &patch);
  opened.version = version(major, minor) + "." + std::to_string(patch);
  library = opened;
  return "";
}

// ---- one product: y = weights^T x ---------------------------------------------------------------

using Allocate = std::function<void*(size_t)>;

struct Key {
  int device;
  int64_t k, m, n;
  cudaDataType type;
  bool channel_major, search;
  bool operator<(const Key& other) const { return tie() < other.tie(); }
  std::tuple<int, int64_t, int64_t, int64_t, int, bool, bool> tie() const {
    return {device, k, m, n, type, channel_major, search};
  }
};

// Everything that cuSPARSELt needs to know about a product. Plans point to descriptors, so this
// never moves, and lives as long as the process.
struct Plan {
  cusparseLtMatDescriptor_t weights, x, y;
  cusparseLtMatmulDescriptor_t product;
  cusparseLtMatmulAlgSelection_t choice;
  cusparseLtMatmulPlan_t plan;
  size_t compressed = 0, buffer = 0;  // bytes
  bool searched = false;
  std::mutex in_use;
};

std::string describe(const char* call, cusparseStatus_t status) {
  return std::string("cusparseLt") + call + ": " + library.GetErrorName(status) + " (" +
         library.GetErrorString(status) + ")";
}

#define TRY(name, ...)                                             \
  do {                                                             \
    if (const cusparseStatus_t status = library.name(__VA_ARGS__); \
        status != CUSPARSE_STATUS_SUCCESS)                         \
      return describe(#name, status);                              \
  } while (false)

// A handle belongs to the device that is current when it is created; XLA makes the device of a call
// current.
std::string handle_of(int device, cusparseLtHandle_t** out) {
  static std::map<int, std::unique_ptr<cusparseLtHandle_t>> handles;
  auto& handle = handles[device];
  if (!handle) {
    auto fresh = std::make_unique<cusparseLtHandle_t>();
    TRY(Init, fresh.get());
    handle = std::move(fresh);
  }
  *out = handle.get();
  return "";
}

// The weights [k, m] are the structured matrix, transposed, in both layouts: rows in memory order
// where the channels come first (x [k, n], y [m, n]), and the same memory read as columns where
// they come last (x [n, k], y [n, m]).
std::string make_plan(const cusparseLtHandle_t* handle, const Key& key, Plan& plan) {
  const bool rows = key.channel_major;
  const cusparseOrder_t order = rows ? CUSPARSE_ORDER_ROW : CUSPARSE_ORDER_COL;
  const uint32_t alignment = 16;  // bytes; XLA aligns buffers to more
  TRY(StructuredDescriptorInit, handle, &plan.weights, rows ? key.k : key.m, rows ? key.m : key.k,
      key.m, alignment, key.type, order, CUSPARSELT_SPARSITY_50_PERCENT);
  TRY(DenseDescriptorInit, handle, &plan.x, key.k, key.n, rows ? key.n : key.k, alignment, key.type,
      order);
  TRY(DenseDescriptorInit, handle, &plan.y, key.m, key.n, rows ? key.n : key.m, alignment, key.type,
      order);
  TRY(MatmulDescriptorInit, handle, &plan.product,
      rows ? CUSPARSE_OPERATION_TRANSPOSE : CUSPARSE_OPERATION_NON_TRANSPOSE,
      CUSPARSE_OPERATION_NON_TRANSPOSE, &plan.weights, &plan.x, &plan.y, &plan.y,
      CUSPARSE_COMPUTE_32F);
  TRY(MatmulAlgSelectionInit, handle, &plan.choice, &plan.product, CUSPARSELT_MATMUL_ALG_DEFAULT);
  TRY(MatmulPlanInit, handle, &plan.plan, &plan.product, &plan.choice);
  TRY(SpMMACompressedSize, handle, &plan.plan, &plan.compressed, &plan.buffer);
  return "";
}

std::string plan_of(const Key& key, cusparseLtHandle_t** handle, Plan** out) {
  static std::mutex making;
  static std::map<Key, std::unique_ptr<Plan>> plans;
  const std::lock_guard<std::mutex> lock(making);
  if (library.version.empty()) return "cuSPARSELt is not open";
  if (std::string error = handle_of(key.device, handle); !error.empty()) return error;
  auto& plan = plans[key];
  if (!plan) {
    auto fresh = std::make_unique<Plan>();
    if (std::string error = make_plan(*handle, key, *fresh); !error.empty()) return error;
    plan = std::move(fresh);
  }
  *out = plan.get();
  return "";
}

// Compresses the weights, which change at every training step, and multiplies.
std::string multiply(const Key& key, const void* weights, const void* x, void* y,
                     cudaStream_t stream, const Allocate& allocate) {
  cusparseLtHandle_t* handle = nullptr;
  Plan* plan = nullptr;
  if (std::string error = plan_of(key, &handle, &plan); !error.empty()) return error;
  const std::lock_guard<std::mutex> lock(
      plan->in_use);  // of one device: a launch that waits never keeps another device waiting
  const float one = 1, zero = 0;
  void* compressed = allocate(plan->compressed);
  void* buffer = plan->buffer ? allocate(plan->buffer) : nullptr;
  if (!compressed || (plan->buffer && !buffer)) return "no memory for the compressed weights";
  TRY(SpMMACompress, handle, &plan->plan, weights, compressed, buffer, stream);
  size_t bytes = 0;
  TRY(MatmulGetWorkspace, handle, &plan->plan, &bytes);
  void* workspace = bytes ? allocate(bytes) : nullptr;
  if (bytes && !workspace)
    return "no memory for the workspace of " + std::to_string(bytes) + " bytes";
  if (key.search && !plan->searched) {  // times the algorithms on this call's operands, once; the
                                        // plan keeps the fastest
    TRY(MatmulSearch, handle, &plan->plan, &one, compressed, x, &zero, y, y, workspace, &stream, 1);
    plan->searched = true;
    bytes = 0;
    TRY(MatmulGetWorkspace, handle, &plan->plan, &bytes);
    workspace = bytes ? allocate(bytes) : nullptr;
    if (bytes && !workspace)
      return "no memory for the workspace of " + std::to_string(bytes) + " bytes";
  }
  TRY(Matmul, handle, &plan->plan, &one, compressed, x, &zero, y, y, workspace, &stream, 1);
  return "";
}

// ---- the handler --------------------------------------------------------------------------------

ffi::Error invalid(const std::string& message) {
  return ffi::Error(ffi::ErrorCode::kInvalidArgument, "two_of_four: " + message);
}

ffi::Error handle(cudaStream_t stream, int32_t device, ffi::ScratchAllocator scratch,
                  ffi::AnyBuffer weights, ffi::AnyBuffer x, ffi::Result<ffi::AnyBuffer> y,
                  bool channel_major, bool search) {
  const auto ws = weights.dimensions(), xs = x.dimensions(), ys = y->dimensions();
  if (ws.size() != 2 || xs.size() != 2 || ys.size() != 2)
    return invalid("expected weights, x and y of two axes");
  const int channels = channel_major ? 0 : 1;
  if (xs[channels] != ws[0] || ys[channels] != ws[1] || xs[1 - channels] != ys[1 - channels])
    return invalid("the sizes of weights, x and y do not fit each other");
  const auto type = weights.element_type();
  if ((type != ffi::BF16 && type != ffi::F16) || x.element_type() != type ||
      y->element_type() != type)
    return invalid("weights, x and y must be all bfloat16 or all float16");
  const Key key{
      device,        ws[0], ws[1], xs[1 - channels], type == ffi::BF16 ? CUDA_R_16BF : CUDA_R_16F,
      channel_major, search};
  const std::string error =
      multiply(key, weights.untyped_data(), x.untyped_data(), y->untyped_data(), stream,
               [&](size_t bytes) { return scratch.Allocate(bytes, 256).value_or(nullptr); });
  return error.empty() ? ffi::Error::Success()
                       : ffi::Error(ffi::ErrorCode::kInternal, "two_of_four: " + error);
}

// Keeps a message alive for ctypes, until the thread's next one.
const char* keep(std::string error) {
  static thread_local std::string last;
  last = std::move(error);
  return last.c_str();
}

}  // namespace
}  // namespace two_of_four

XLA_FFI_DEFINE_HANDLER_SYMBOL(TwoOfFourMatmul, two_of_four::handle,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Ctx<ffi::DeviceOrdinal>()
                                  .Ctx<ffi::ScratchAllocator>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<bool>("channel_major")
                                  .Attr<bool>("search"));

// Opens cuSPARSELt; "" or why it cannot be used.
extern "C" const char* TwoOfFourOpen(const char* path) {
  return two_of_four::keep(two_of_four::open(path));
}

// The version of the opened library, "" where none is open.
extern "C" const char* TwoOfFourVersion() { return two_of_four::library.version.c_str(); }

// The handler's work past XLA, on memory that the opened library reads and writes, with scratch
// memory of the host: for tests, which open a library that computes on the CPU; "" or the error.
extern "C" const char* TwoOfFourRun(int64_t k, int64_t m, int64_t n, bool bfloat16,
                                    bool channel_major, bool search, const void* weights,
                                    const void* x, void* y) {
  std::vector<std::unique_ptr<char[]>> memory;
  const two_of_four::Key key{0,     k, m, n, bfloat16 ? CUDA_R_16BF : CUDA_R_16F, channel_major,
                             search};
  return two_of_four::keep(
      two_of_four::multiply(key, weights, x, y, nullptr, [&](size_t bytes) -> void* {
        memory.push_back(std::make_unique<char[]>(bytes));
        return memory.back().get();
      }));
}
