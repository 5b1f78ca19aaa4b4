// One vector of floats, in the widest form that this translation unit is compiled for. Included
// inside the variant's own namespace, and free of standard templates, so that no function compiled
// for one CPU can be linked in for another.

#define INLINE inline __attribute__((always_inline))
#define NOINLINE __attribute__((noinline))

typedef uint16_t Bits;  // a bit for each lane

struct BFloat16 {
  uint16_t bits;
};

#if defined(__AVX512F__)
// Register tiles, as large as the registers hold: kRows x kTile or kStreamRows x 1 vectors of
// outputs; in the weight gradient kDotRows x kDotFilters sums.
constexpr int kLanes = 16, kRows = 8, kTile = 3, kStreamRows = 16, kDotRows = 6, kDotFilters = 4;
#elif defined(__AVX2__)
constexpr int kLanes = 8, kRows = 6, kTile = 2, kStreamRows = 8, kDotRows = 3, kDotFilters = 3;
#else
constexpr int kLanes = 4, kRows = 4, kTile = 2, kStreamRows = 8, kDotRows = 3, kDotFilters = 3;
#endif

constexpr Bits kAll = Bits((1u << kLanes) - 1);
typedef float Vector __attribute__((vector_size(kLanes * 4)));
typedef float LooseVector __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));

inline Vector load(const float* p) { return *reinterpret_cast<const LooseVector*>(p); }
inline void store(float* p, Vector v) { *reinterpret_cast<LooseVector*>(p) = v; }

inline float widen(float a) { return a; }
inline float widen(BFloat16 a) {
  uint32_t bits = uint32_t(a.bits) << 16;
  float out;
  __builtin_memcpy(&out, &bits, 4);
  return out;
}
inline void narrow(float a, float* out) { *out = a; }
inline void narrow(float a, BFloat16* out) {  // to nearest, ties to even; NaN stays NaN
  uint32_t bits;
  __builtin_memcpy(&bits, &a, 4);
  out->bits =
      a != a ? uint16_t((bits >> 16) | 0x40) : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// The lanes whose bit is set, zero in the others; and the bits of the lanes above zero.
inline Vector only(Vector v, Bits bits);
inline Bits above_zero(Vector v);

// Loads and stores of the lanes whose bit is set; other lanes read as zero, and their memory is not
// touched.
template <class E>
inline Vector load_some(const E* p, Bits bits) {
  Vector out = {};
  for (int i = 0; i < kLanes; ++i)
    if (bits >> i & 1) out[i] = widen(p[i]);
  return out;
}
template <class E>
inline Vector gather_some(const E* p, const int32_t* at, Bits bits) {
  Vector out = {};
  for (int i = 0; i < kLanes; ++i)
    if (bits >> i & 1) out[i] = widen(p[at[i]]);
  return out;
}
template <class E>
inline void store_some(E* p, Vector v, Bits bits) {
  for (int i = 0; i < kLanes; ++i)
    if (bits >> i & 1) narrow(v[i], p + i);
}
template <class E>
inline void scatter_some(E* p, const int32_t* at, Vector v, Bits bits) {
  for (int i = 0; i < kLanes; ++i)
    if (bits >> i & 1) narrow(v[i], p + at[i]);
}

#if defined(__AVX512F__)
inline Vector broadcast(float a) { return (Vector)_mm512_set1_ps(a); }
inline Vector fma(Vector a, Vector b, Vector c) {
  return (Vector)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
inline Vector only(Vector v, Bits bits) { return (Vector)_mm512_maskz_mov_ps(bits, (__m512)v); }
inline Bits above_zero(Vector v) {
  return _mm512_cmp_ps_mask((__m512)v, _mm512_setzero_ps(), _CMP_GT_OQ);
}
template <>
inline Vector load_some(const float* p, Bits bits) {
  return (Vector)_mm512_maskz_loadu_ps(bits, p);
}
template <>
inline Vector gather_some(const float* p, const int32_t* at, Bits bits) {
  return (Vector)_mm512_mask_i32gather_ps(_mm512_setzero_ps(), bits, _mm512_loadu_si512(at), p, 4);
}
template <>
inline void store_some(float* p, Vector v, Bits bits) {
  _mm512_mask_storeu_ps(p, bits, (__m512)v);
}
template <>
inline void scatter_some(float* p, const int32_t* at, Vector v, Bits bits) {
  _mm512_mask_i32scatter_ps(p, bits, _mm512_loadu_si512(at), (__m512)v, 4);
}
inline __m512i load_wide(const BFloat16* p, Bits bits) {
  return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(bits, p));
}
template <>
inline Vector load_some(const BFloat16* p, Bits bits) {
  return (Vector)_mm512_castsi512_ps(_mm512_slli_epi32(load_wide(p, bits), 16));
}
template <>
inline void store_some(BFloat16* p, Vector v, Bits bits) {
  const __m512i raw = _mm512_castps_si512((__m512)v), high = _mm512_srli_epi32(raw, 16);
  const __m512i odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_srli_epi32(
      _mm512_add_epi32(_mm512_add_epi32(raw, _mm512_set1_epi32(0x7fff)), odd), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q);
  const __m512i out = _mm512_mask_or_epi32(rounded, nan, high, _mm512_set1_epi32(0x40));
  _mm256_mask_storeu_epi16(p, bits, _mm512_cvtepi32_epi16(out));
}
// Lanes that lie side by side in each half of a vector; `second`: where lane kLanes / 2 lies.
template <class E>
inline Vector halves_some(const E* p, int64_t second, Bits bits) {
  const Vector low = load_some(p, Bits(bits & 0xff)),
               high = load_some(p + second - kLanes / 2, Bits(bits & 0xff00));
  return (Vector)_mm512_mask_mov_ps((__m512)low, 0xff00, (__m512)high);
}
// Lanes that lie, in their order, at the elements whose bit is set in `elements`. Only the lanes in
// `bits` are read.
template <class E>
inline Vector near_some(const E* p, const int32_t* at, uint32_t elements, Bits bits) {
  const uint32_t read = _pdep_u32(bits, elements);
  const __m512 low = (__m512)load_some(p, Bits(read)),
               high = (__m512)load_some(p + kLanes, Bits(read >> 16));
  return (Vector)_mm512_maskz_permutex2var_ps(bits, low, _mm512_loadu_si512(at), high);
}
// Stores a full vector past the caches, for targets that are larger than the caches. Fence before
// another thread reads.
inline bool stream(float* p, Vector v) {
  if (reinterpret_cast<uintptr_t>(p) % 64) return false;
  _mm512_stream_ps(p, (__m512)v);
  return true;
}
// Adds the sum of the lanes of each of four vectors.
INLINE void add_sums4(const Vector* v, float* out) {
  const __m512 a = _mm512_add_ps(_mm512_unpacklo_ps((__m512)v[0], (__m512)v[1]),
                                 _mm512_unpackhi_ps((__m512)v[0], (__m512)v[1]));
  const __m512 b = _mm512_add_ps(_mm512_unpacklo_ps((__m512)v[2], (__m512)v[3]),
                                 _mm512_unpackhi_ps((__m512)v[2], (__m512)v[3]));
  const __m512 c = _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
  const __m256 d = _mm256_add_ps(_mm512_castps512_ps256(c), _mm512_extractf32x8_ps(c, 1));
  const __m128 sums = _mm_add_ps(_mm256_castps256_ps128(d), _mm256_extractf128_ps(d, 1));
  _mm_storeu_ps(out, _mm_add_ps(_mm_loadu_ps(out), sums));
}
#elif defined(__AVX2__)
inline Vector broadcast(float a) { return (Vector)_mm256_set1_ps(a); }
inline Vector fma(Vector a, Vector b, Vector c) {
  return (Vector)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}
inline __m256i expand(Bits bits) {
  const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(bits), lane), lane);
}
inline Vector only(Vector v, Bits bits) {
  return (Vector)_mm256_and_ps((__m256)v, _mm256_castsi256_ps(expand(bits)));
}
inline Bits above_zero(Vector v) {
  return Bits(_mm256_movemask_ps(_mm256_cmp_ps((__m256)v, _mm256_setzero_ps(), _CMP_GT_OQ)));
}
template <>
inline Vector load_some(const float* p, Bits bits) {
  return bits == kAll ? load(p) : (Vector)_mm256_maskload_ps(p, expand(bits));
}
template <>
inline void store_some(float* p, Vector v, Bits bits) {
  if (bits == kAll)
    store(p, v);
  else
    _mm256_maskstore_ps(p, expand(bits), (__m256)v);
}
template <>
inline Vector load_some(const BFloat16* p, Bits bits) {
  alignas(16) uint16_t some[kLanes] = {};
  if (bits != kAll) {
    for (int i = 0; i < kLanes; ++i)
      if (bits >> i & 1) some[i] = p[i].bits;
  }
  const __m128i raw = _mm_loadu_si128(
      reinterpret_cast<const __m128i*>(bits == kAll ? reinterpret_cast<const uint16_t*>(p) : some));
  return (Vector)_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
}
#else
inline Vector broadcast(float a) { return Vector{a, a, a, a}; }
inline Vector fma(Vector a, Vector b, Vector c) { return a * b + c; }
inline Vector only(Vector v, Bits bits) {
  for (int i = 0; i < kLanes; ++i)
    if (!(bits >> i & 1)) v[i] = 0;
  return v;
}
inline Bits above_zero(Vector v) {
  int bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= (v[i] > 0) << i;
  return Bits(bits);
}
template <>
inline Vector load_some(const float* p, Bits bits) {
  if (bits == kAll) return load(p);
  Vector out = {};
  for (int i = 0; i < kLanes; ++i)
    if (bits >> i & 1) out[i] = p[i];
  return out;
}
template <>
inline void store_some(float* p, Vector v, Bits bits) {
  if (bits == kAll) return store(p, v);
  for (int i = 0; i < kLanes; ++i)
    if (bits >> i & 1) p[i] = v[i];
}
#endif

// max(v, 0); NaN stays NaN.
inline Vector positive(Vector v) {
  const Vector zero = {};
  return v < zero ? zero : v;
}

template <class E>
inline bool stream(E*, Vector) {
  return false;
}
inline void fence() {
#if defined(__AVX512F__)
  _mm_sfence();
#endif
}

INLINE float sum(Vector v) {
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) v[i] += v[i + half];
  return v[0];
}
