#include <immintrin.h>

#include "problem.h"

namespace block_sparse {
namespace variant_avx512 {
#include "simd.h"
#include "positions.h"
#include "passes.h"
}  // namespace variant_avx512

const Variant& avx512() {
  using namespace variant_avx512;
  static const Variant variant = {
      "avx512", kLanes, kTile, kRun, passes<Float32>(), passes<BFloat16Mode>()};
  return variant;
}

}  // namespace block_sparse
