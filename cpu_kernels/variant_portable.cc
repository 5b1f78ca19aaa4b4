
#include "problem.h"

namespace block_sparse {
namespace variant_portable {
#include "simd.h"
#include "positions.h"
#include "passes.h"
#include "norm_act.h"
}  // namespace variant_portable

const Variant& portable() {
  using namespace variant_portable;
  static const Variant variant = {"portable",
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
