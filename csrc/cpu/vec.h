// Vectors of fp32 lanes in GCC / clang vector extensions: loads, stores and conversions of the three tile dtypes, and
// the exp and tanh of the row kernels. Compiled once per instruction set; everything is in an unnamed namespace, and
// nothing of the standard library's inline functions is used, so that no copy leaks into another instruction set's
// code.
#pragma once

#include <cstdint>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float vf __attribute__((vector_size(kLanes * 4)));
typedef int32_t vi __attribute__((vector_size(kLanes * 4)));
typedef uint32_t vu __attribute__((vector_size(kLanes * 4)));
typedef uint16_t vh __attribute__((vector_size(kLanes * 2)));

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

#define FASTPREF_INLINE inline __attribute__((always_inline))

FASTPREF_INLINE vf splat(float x) { return x - vf{}; }

template <class To, class From>
FASTPREF_INLINE To bits_as(From x) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To y;
  __builtin_memcpy(&y, &x, sizeof y);
  return y;
}

// b where either is NaN: the order of the arguments decides whether a NaN passes. One instruction on x86.
FASTPREF_INLINE vf max_or_second(vf a, vf b) { return a > b ? a : b; }
FASTPREF_INLINE vf min_or_second(vf a, vf b) { return a < b ? a : b; }

// ---- tile dtypes <-> fp32 -----------------------------------------------------------------------------------------

FASTPREF_INLINE vh load_half(const uint16_t* p) {
  vh h;
  __builtin_memcpy(&h, p, sizeof h);
  return h;
}

FASTPREF_INLINE vf load(const float* p) {
  vf x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}

FASTPREF_INLINE vf load(const bf16* p) {
  return bits_as<vf>(__builtin_convertvector(load_half(&p->bits), vu) << 16);
}

FASTPREF_INLINE vf load(const f16* p) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtph_ps((__m256i)load_half(&p->bits));
#elif defined(__F16C__)
  return (vf)_mm256_cvtph_ps((__m128i)load_half(&p->bits));
#else
  const vu h = __builtin_convertvector(load_half(&p->bits), vu);
  const vu magnitude = (h & 0x7fff) << 13;
  // 2^112 moves fp16's exponent bias to fp32's, subnormals included; inf and NaN keep their all-ones exponent.
  vu u = bits_as<vu>(bits_as<vf>(magnitude) * 0x1p112f);
  u = magnitude >= 0x0f800000u ? (u | 0x7f800000u) : u;
  return bits_as<vf>(u | (h & 0x8000) << 16);
#endif
}

FASTPREF_INLINE void store(float* p, vf x) { __builtin_memcpy(p, &x, sizeof x); }

FASTPREF_INLINE void store(bf16* p, vf x) {
#if defined(__AVX512BF16__)
  const __m256bh h = _mm512_cvtneps_pbh((__m512)x);
#else
  const vu u = bits_as<vu>(x);
  vu rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;  // to nearest, ties to even
  rounded = x != x ? (u >> 16) | 0x40u : rounded;     // a NaN's payload must not be rounded into another number
  const vh h = __builtin_convertvector(rounded, vh);
#endif
  __builtin_memcpy(p, &h, sizeof h);
}

FASTPREF_INLINE void store(f16* p, vf x) {
#if defined(__AVX512F__)
  const vh h = (vh)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__F16C__)
  const vh h = (vh)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const vu u = bits_as<vu>(x);
  const vu magnitude = u & 0x7fffffffu;
  vu r = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // Adding 0.5, whose last bit is fp16's smallest subnormal, rounds subnormals as the hardware would.
  const vu subnormal = bits_as<vu>(bits_as<vf>(magnitude) + 0.5f) - 0x3f000000u;
  r = magnitude < 0x38800000u ? subnormal : r;
  r = magnitude >= 0x47800000u ? vu{} + 0x7c00u : r;
  r = magnitude > 0x7f800000u ? vu{} + 0x7e00u : r;
  const vh h = __builtin_convertvector(r | ((u >> 16) & 0x8000u), vh);
#endif
  __builtin_memcpy(p, &h, sizeof h);
}

// The first n < kLanes lanes only: what lies beyond the row belongs to somebody else.
template <class T>
FASTPREF_INLINE vf load_first(const T* p, int64_t n) {
  T lanes[kLanes] = {};
  __builtin_memcpy(lanes, p, n * sizeof(T));
  return load(lanes);
}

template <class T>
FASTPREF_INLINE void store_first(T* p, vf x, int64_t n) {
  T lanes[kLanes];
  store(lanes, x);
  __builtin_memcpy(p, lanes, n * sizeof(T));
}

// A vector whose lanes from n on are replaced.
FASTPREF_INLINE vf keep_first(vf x, int64_t n, float rest) {
  for (int64_t i = n; i < kLanes; ++i) x[i] = rest;
  return x;
}

FASTPREF_INLINE double sum_lanes(vf x) {
  double s[4] = {};
  for (int i = 0; i < kLanes; ++i) s[i % 4] += x[i];
  return (s[0] + s[1]) + (s[2] + s[3]);
}

FASTPREF_INLINE float max_lanes(vf x) {
  float m = x[0];
  for (int i = 1; i < kLanes; ++i) m = x[i] > m ? x[i] : m;
  return m;
}

// ---- exp and tanh -------------------------------------------------------------------------------------------------

constexpr float kExpLowest = -87.33f, kExpHighest = 88.8f;
constexpr float kLog2e = 0x1.715476p0f;
constexpr float kRound = 0x1.8p23f;  // adding it rounds to an integer, which then lies in the low bits
constexpr float kLn2High = 0x1.63p-1f, kLn2Low = -0x1.bd0106p-13f;  // 12 bits, so that k times it is exact; the rest
// (expm1(r) - r) / r^2, minimax in the relative error of 1 + r + r^2 q(r) on |r| <= ln(2)/2: 3.1e-9
constexpr float kExp[] = {0x1.fffffcp-2f, 0x1.555492p-3f, 0x1.5558f2p-5f, 0x1.1239f2p-7f, 0x1.6a241ap-10f};

// exp(x) = 2^k (1 + tail), k = round(x / ln 2); tail = expm1(x - k ln 2), |tail| < 0.42.
struct ExpParts {
  vf power, tail;
};

FASTPREF_INLINE ExpParts exp_parts(vf x) {
  // Below -88.03 k is -127, whose 2^k has the bit pattern of 0; above 88.37 it is 128, that of inf. NaN passes both.
  x = max_or_second(splat(-88.3f), x);
  x = min_or_second(splat(kExpHighest), x);
  const vf t = x * kLog2e + kRound;
  const vf k = t - kRound;
  const vf r = (x - k * kLn2High) - k * kLn2Low;
  vf q = r * kExp[4] + kExp[3];
  q = q * r + kExp[2];
  q = q * r + kExp[1];
  q = q * r + kExp[0];
  const vu exponent = (bits_as<vu>(t) << 23) + 0x3f800000u;
  return {bits_as<vf>(exponent), q * (r * r) + r};
}

// exp of N vectors. Within 1 ulp for -87.33 <= x <= 88.37 (measured by test_native.py); 0 below -88.03, a subnormal or
// 0 between; inf above 88.73, and from 88.38 on where the exponent is put together by hand; exp(0) is 1; NaN stays NaN.
template <int N>
FASTPREF_INLINE void exp_all(vf (&x)[N]) {
#if defined(__AVX512F__)
  // A scaling instruction in place of the exponent's arithmetic and a mask in place of the lower clamp: 15 % less time
  // of a sweep than exp_parts. N chains of dependent steps abreast, because the processor looks ahead over only a few:
  // 8 % less for N = 4 than for 1.
  const auto each = [](auto step) {
    for (int j = 0; j < N; ++j) step(j);
  };
  __mmask16 shown[N];
  vf k[N], r[N], p[N];
  each([&](int j) { shown[j] = _mm512_cmp_ps_mask((__m512)x[j], (__m512)splat(kExpLowest), _CMP_NLT_UQ); });
  each([&](int j) { x[j] = min_or_second(splat(kExpHighest), x[j]); });
  each([&](int j) { k[j] = x[j] * kLog2e + kRound; });
  each([&](int j) { k[j] = k[j] - kRound; });
  each([&](int j) { r[j] = x[j] - k[j] * kLn2High; });
  each([&](int j) { r[j] = r[j] - k[j] * kLn2Low; });
  each([&](int j) { p[j] = r[j] * kExp[4] + kExp[3]; });
  each([&](int j) { p[j] = p[j] * r[j] + kExp[2]; });
  each([&](int j) { p[j] = p[j] * r[j] + kExp[1]; });
  each([&](int j) { p[j] = p[j] * r[j] + kExp[0]; });
  each([&](int j) { p[j] = p[j] * r[j] + 1.0f; });
  each([&](int j) { p[j] = p[j] * r[j] + 1.0f; });
  each([&](int j) { x[j] = (vf)_mm512_maskz_scalef_ps(shown[j], (__m512)p[j], (__m512)k[j]); });
#else
  for (int j = 0; j < N; ++j) {
    const ExpParts e = exp_parts(x[j]);
    x[j] = e.power * (1.0f + e.tail);
  }
#endif
}

FASTPREF_INLINE vf exp_vec(vf x) {
  vf one[1] = {x};
  exp_all(one);
  return one[0];
}

struct Tanh {
  vf value, slope;  // slope = 1 - value^2, without the cancellation near +-1
};

// tanh|x| = -d / (2 + d) and 1 - tanh^2 = 4 e / (2 + d)^2 with e = exp(-2|x|), d = expm1(-2|x|): accurate near 0 too.
// Measured: 3 ulp and, while the slope is above 1e-36, 7 x 2^-24 of it.
FASTPREF_INLINE Tanh tanh_vec(vf x) {
  const vu sign = bits_as<vu>(x) & 0x80000000u;
  const vf magnitude = bits_as<vf>(bits_as<vu>(x) ^ sign);
  const ExpParts parts = exp_parts(-2.0f * magnitude);
  const vf e = parts.power * (1.0f + parts.tail);
  const vf d = parts.power * parts.tail + (parts.power - 1.0f);
  const vf inverse = 1.0f / (2.0f + d);
  const vf value = -d * inverse;
  return {bits_as<vf>((bits_as<vu>(value) & 0x7fffffffu) | sign), 4.0f * e * inverse * inverse};
}

}  // namespace
