#include <immintrin.h>

#include "problem.h"

namespace block_sparse {
namespace variant_avx2 {
#include "simd.h"
#include "positions.h"
#include "passes.h"
}  // namespace variant_avx2

const Variant& avx2() {
  using namespace variant_avx2;
  static const Variant variant = {
      "avx2", kLanes, kTile, kRun, passes<Float32>(), passes<BFloat16Mode>()};
  return variant;
}

}  // namespace block_sparse
