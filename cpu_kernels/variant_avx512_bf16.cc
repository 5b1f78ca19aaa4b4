#include <immintrin.h>

#include "problem.h"

namespace block_sparse {
namespace variant_avx512_bf16 {
#include "simd.h"
#include "positions.h"
#include "passes.h"
}  // namespace variant_avx512_bf16

const Variant& avx512_bf16() {
  using namespace variant_avx512_bf16;
  static const Variant variant = {"avx512_bf16",         kLanes, kTile, kRun, passes<Float32>(),
                                  passes<BFloat16Mode>()};
  return variant;
}

}  // namespace block_sparse
