#include <immintrin.h>

#include "problem.h"

namespace block_sparse {
namespace variant_avx2 {
#include "simd.h"
#include "positions.h"
#include "passes.h"
#include "norm_act.h"
}  // namespace variant_avx2

const Variant& avx2() {
  using namespace variant_avx2;
  static const Variant variant = {"avx2",
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
