// The three passes for one variant: included by variant_*.cc inside the variant's namespace.
//
// Forward: an 8 x 48 tile of outputs stays in registers while the rows of the source under each
// (kept channel, kept tap) of a group are multiplied into it, with zeros where a tap reads outside
// of the image. The first product of a tile reads them from the source and leaves them in a panel
// in the L1 cache, from which the products with the group's other filters read them; small groups
// do without a panel. The last product of a group writes its sums to the output. Taps that reach
// none of the task's positions are skipped.
//
// Input gradient: the same with the group's filters as rows. The products are added channel by
// channel into sums that one thread owns, from the first group that keeps the channel to the last:
// no atomics, and one order of summation.
//
// Weight gradient: dot products over long runs of positions, summed in registers. Here too the
// first product that needs a row packs it.

#define UNROLL _Pragma("GCC unroll 16")

// Element types. kPair = 2: two bfloat16 of the summed axis lie side by side in one 32-bit lane.
struct Float32 {
  typedef float Element;
  static constexpr int kPair = 1;
  static Vector multiply_add(Vector a, Vector b, Vector c) { return fma(a, b, c); }
};
struct Widened : Float32 {
  typedef BFloat16 Element;
};
#if defined(__AVX512BF16__)
struct Paired {
  typedef BFloat16 Element;
  static constexpr int kPair = 2;
  static Vector multiply_add(Vector a, Vector b, Vector c) {
    return (Vector)_mm512_dpbf16_ps((__m512)c, (__m512bh)_mm512_castps_si512((__m512)a),
                                    (__m512bh)_mm512_castps_si512((__m512)b));
  }
};
typedef Paired BFloat16Mode;
#else
typedef Widened BFloat16Mode;
#endif

inline int64_t up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

#include "panels.h"
#include "targets.h"
#include "products.h"
#include "forward.h"
#include "input_gradient.h"
#include "weight_gradient.h"

// ---- the values ---------------------------------------------------------------------------------

template <class M>
int64_t prepared_size(const Problem& p, bool input_gradient) {
  if (sizeof(typename M::Element) == 4) return 0;
  const int64_t kept = input_gradient ? p.kept : up(p.kept, M::kPair),
                filters = input_gradient ? up(p.group_size, M::kPair) : p.group_size;
  return p.groups * kept * p.kept_taps * filters;
}

// Widened: float32 values. Paired: 32-bit words of two bfloat16, neighbours along the kept channels
// (forward) or the filters.
template <class M>
void prepare(const Problem& p, const void* values, bool input_gradient, Range groups, float* out) {
  const BFloat16* in = static_cast<const BFloat16*>(values);
  const int64_t step = input_gradient ? 1 : M::kPair,
                pair_at = input_gradient ? 1 : p.kept_taps * p.group_size;
  const int64_t stride = input_gradient ? M::kPair : 1;
  out += groups.begin * (prepared_size<M>(p, input_gradient) / p.groups);
  for (int64_t g = groups.begin; g < groups.end; ++g)
    for (int64_t k = 0; k < p.kept; k += step)
      for (int64_t t = 0; t < p.kept_taps; ++t)
        for (int64_t f = 0; f < p.group_size; f += stride, ++out) {
          const BFloat16* at = in + ((g * p.kept + k) * p.kept_taps + t) * p.group_size + f;
          if constexpr (M::kPair == 1) {
            *out = widen(*at);
          } else {
            const bool pair = input_gradient ? f + 1 < p.group_size : k + 1 < p.kept;
            const uint32_t word = at->bits | (pair ? uint32_t(at[pair_at].bits) << 16 : 0u);
            __builtin_memcpy(out, &word, 4);
          }
        }
}

template <class M>
Passes passes() {
  return {
      kStreamed<M>,      prepared_size<M>,          prepare<M>,        forward_scratch<M>,
      forward<M>,        input_gradient_scratch<M>, input_gradient<M>, weight_gradient_scratch<M>,
      weight_gradient<M>};
}

#undef UNROLL
