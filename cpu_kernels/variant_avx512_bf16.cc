#include <immintrin.h>

#include "problem.h"

namespace block_sparse {
namespace variant_avx512_bf16 {
#include "simd.h"
#include "positions.h"
#include "passes.h"
#include "norm_act.h"
}  // namespace variant_avx512_bf16

const Variant& avx512_bf16() {
  using namespace variant_avx512_bf16;
  static const Variant variant = {"avx512_bf16",
                                  kLanes,
                                  kTile,
                                  kRun,
                                  passes<Float32>(),
                                  passes<BFloat16Mode>(),
                                  norm_passes<float>(),
                                  norm_passes<BFloat16>()};
  return variant;
}

}  // namespace block_sparse
