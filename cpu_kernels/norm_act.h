// Batch norm, a residual and a ReLU in one operation, channel by channel: included by variant_*.cc
// inside the variant's namespace.
//
// Forward: y = relu((x - mean) * scale / sqrt(variance + epsilon) + bias + residual), with the mean
// and the biased variance of the channel. Backward: with g = dy where y > 0 and d = x - mean,
//   dbias = sum g,  dscale = sum g d / sqrt(variance + epsilon),
//   dx = slope (g - mean g) + factor d + constant,  slope = scale / sqrt(variance + epsilon),
// where factor holds what reaches x through the variance, and constant is the gradient of the mean
// itself, where there is one.
//
// Each pass sweeps a channel twice, the second time from its end: what the first sweep read last is
// still in the cache.

#define UNROLL _Pragma("GCC unroll 4")

constexpr int kSums = 4;          // partial sums that are added up side by side
constexpr int64_t kBlock = 1024;  // elements whose sums are float32; blocks add up in double
static_assert(kBlock % (kSums * kLanes) == 0, "only the last block of a channel has a rest");

// Calls body(i, live lanes, partial sum) for the vectors of [begin, end).
template <class Body>
inline void sweep(int64_t begin, int64_t end, const Body& body) {
  int64_t i = begin;
  for (; i + kSums * kLanes <= end; i += kSums * kLanes) {
    UNROLL
    for (int j = 0; j < kSums; ++j) body(i + j * kLanes, kAll, j);
  }
  for (; i + kLanes <= end; i += kLanes) body(i, kAll, 0);
  if (i < end) body(i, Bits((1u << (end - i)) - 1), 0);
}

template <class Body>
inline void sweep_from_end(int64_t size, const Body& body) {
  for (int64_t block = up(size, kBlock) - 1; block >= 0; --block)
    sweep(block * kBlock, least((block + 1) * kBlock, size), body);
}

// The signs of a channel: a bit for each element, set where y > 0. Vectors come in order.
inline void put_signs(uint8_t* signs, int64_t i, Bits bits) {
  if constexpr (kLanes == 16) {
    __builtin_memcpy(signs + i / 8, &bits, 2);
  } else {
    const int shift = int(i % 8);
    signs[i / 8] = uint8_t(shift ? signs[i / 8] | bits << shift : bits);
  }
}
inline Bits get_signs(const uint8_t* signs, int64_t i) {
  Bits bits;
  if constexpr (kLanes == 16)
    __builtin_memcpy(&bits, signs + i / 8, 2);
  else
    bits = Bits(signs[i / 8] >> i % 8 & kAll);
  return bits;
}

inline double total(const Vector* sums) {
  return double(sum((sums[0] + sums[1]) + (sums[2] + sums[3])));
}

template <class E>
inline void put(E* p, Vector v, Bits bits, bool past_caches) {
  if (!(past_caches && bits == kAll && stream(p, v))) store_some(p, v, bits);
}

struct Moments {
  double mean, variance;
};

// Each block's squares are taken about the block's own mean, so that a large mean cancels nothing;
// while a block is read twice it stays in the first cache.
template <class E>
inline Moments moments(const E* x, int64_t size) {
  double count = 0, mean = 0, squares = 0;
  for (int64_t begin = 0; begin < size; begin += kBlock) {
    const int64_t end = least(begin + kBlock, size);
    const float first = widen(x[begin]);
    const Vector shift = broadcast(first);
    Vector sums[kSums] = {};
    sweep(begin, end, [&](int64_t i, Bits bits, int j) {
      sums[j] += only(load_some(x + i, bits) - shift, bits);
    });
    const double elements = double(end - begin), here = first + total(sums) / elements;
    const Vector centre = broadcast(float(here));
    Vector parts[kSums] = {};
    sweep(begin, end, [&](int64_t i, Bits bits, int j) {
      const Vector d = only(load_some(x + i, bits) - centre, bits);
      parts[j] = fma(d, d, parts[j]);
    });
    const double delta = here - mean, all = count + elements;
    mean += delta * elements / all;
    squares += total(parts) + delta * delta * count * elements / all;
    count = all;
  }
  return {mean, squares / count};
}

// One channel's normalisation.
struct Normalised {
  Vector mean, slope, bias;
  Normalised(float mean, float slope, float bias)
      : mean(broadcast(mean)), slope(broadcast(slope)), bias(broadcast(bias)) {}
  Vector operator()(Vector x) const { return fma(x - mean, slope, bias); }
};

inline float inverse_deviation(float variance, float epsilon) {
  return 1.0f / __builtin_sqrtf(variance + epsilon);
}

template <class E>
void norm_forward(const NormForward& p, Range channels) {
  for (int64_t c = channels.begin; c < channels.end; ++c) {
    const E* x = static_cast<const E*>(p.x) + c * p.size;
    const E* residual = p.residual ? static_cast<const E*>(p.residual) + c * p.size : nullptr;
    E* y = static_cast<E*>(p.y) + c * p.size;
    uint8_t* signs = p.signs ? p.signs + c * sign_bytes(p.size) : nullptr;
    const Moments m = moments(x, p.size);
    p.mean[c] = float(m.mean), p.variance[c] = float(m.variance);
    const float slope = p.scale[c] * inverse_deviation(p.variance[c], p.epsilon);
    const Normalised normalised(p.mean[c], slope, p.bias[c]);
    sweep_from_end(p.size, [&](int64_t i, Bits bits, int) {
      Vector v = normalised(load_some(x + i, bits));
      if (residual) v += load_some(residual + i, bits);
      if (signs) put_signs(signs, i, above_zero(v));
      put(y + i, p.relu ? positive(v) : v, bits, p.past_caches);
    });
  }
  if (p.past_caches) fence();
}

template <class E>
void norm_backward(const NormBackward& p, Range channels) {
  for (int64_t c = channels.begin; c < channels.end; ++c) {
    const int64_t at = c * p.size;
    const E *dy = static_cast<const E*>(p.dy) + at, *x = static_cast<const E*>(p.x) + at;
    const E* more = p.more ? static_cast<const E*>(p.more) + at : nullptr;
    const uint8_t* signs = p.signs ? p.signs + c * sign_bytes(p.size) : nullptr;
    E *dx = static_cast<E*>(p.dx) + at,
      *dresidual = p.dresidual ? static_cast<E*>(p.dresidual) + at : nullptr;
    const float inverse = inverse_deviation(p.variance[c], p.epsilon), slope = p.scale[c] * inverse;
    const Normalised normalised(p.mean[c], slope, p.bias[c]);
    const auto before_relu = [&](int64_t i, Vector x, Bits bits) {
      Vector g = load_some(dy + i, bits);
      if (more) g += load_some(more + i, bits);
      if (!p.relu) return g;
      return only(g, signs ? get_signs(signs, i) : above_zero(normalised(x)));
    };
    double dbias = 0, products = 0;
    for (int64_t begin = 0; begin < p.size; begin += kBlock) {
      Vector sums[kSums] = {}, parts[kSums] = {};
      sweep(begin, least(begin + kBlock, p.size), [&](int64_t i, Bits bits, int j) {
        const Vector v = load_some(x + i, bits), g = before_relu(i, v, bits);
        sums[j] += g;
        parts[j] = fma(g, v - normalised.mean, parts[j]);
      });
      dbias += total(sums), products += total(parts);
    }
    p.dbias[c] = float(dbias), p.dscale[c] = float(products * inverse);
    const double count = double(p.size);
    const Vector mean_g = broadcast(float(dbias / count)),
                 constant = broadcast(float(double(p.dmean[c]) / count)),
                 factor = broadcast(float(
                     (2 * double(p.dvariance[c]) - double(slope) * inverse * inverse * products) /
                     count));
    sweep_from_end(p.size, [&](int64_t i, Bits bits, int) {
      const Vector v = load_some(x + i, bits), g = before_relu(i, v, bits);
      if (dresidual) put(dresidual + i, g, bits, p.past_caches);
      const Vector statistics = fma(v - normalised.mean, factor, constant);
      put(dx + i, fma(g - mean_g, normalised.slope, statistics), bits, p.past_caches);
    });
  }
  if (p.past_caches) fence();
}

template <class E>
NormPasses norm_passes() {
  return {norm_forward<E>, norm_backward<E>};
}

#undef UNROLL
