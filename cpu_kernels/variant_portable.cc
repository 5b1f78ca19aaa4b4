
#include "problem.h"

namespace block_sparse {
namespace variant_portable {
#include "simd.h"
#include "positions.h"
#include "passes.h"
}  // namespace variant_portable

const Variant& portable() {
  using namespace variant_portable;
  static const Variant variant = {
      "portable", kLanes, kTile, kRun, passes<Float32>(), passes<BFloat16Mode>()};
  return variant;
}

}  // namespace block_sparse
