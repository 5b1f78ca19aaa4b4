// Which variants this CPU can run.

#include "problem.h"

namespace block_sparse {

const std::vector<const Variant*>& variants() {
  static const std::vector<const Variant*> all = [] {
    std::vector<const Variant*> out;
#if defined(__x86_64__)
    __builtin_cpu_init();
    [[maybe_unused]] const bool wide =
        __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("bmi2");
#endif
#if defined(HAVE_AVX512_BF16)
    if (wide && __builtin_cpu_supports("avx512bf16")) out.push_back(&avx512_bf16());
#endif
#if defined(HAVE_AVX512)
    if (wide) out.push_back(&avx512());
#endif
#if defined(HAVE_AVX2)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) out.push_back(&avx2());
#endif
    out.push_back(&portable());
    return out;
  }();
  return all;
}

const Variant* find_variant(std::string_view name) {
  for (const Variant* variant : variants())
    if (name.empty() || name == variant->name) return variant;
  return nullptr;
}

}  // namespace block_sparse
