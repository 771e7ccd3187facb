// One vector of fp32 lanes, as wide as the instruction set that this translation unit is compiled for.
//
// GCC's vector extensions carry the arithmetic; intrinsics only where they cannot say it. Everything lives in a
// namespace of the instruction set, so that the linker never merges code of two of them.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace e3::E3_ISA_NAMESPACE {

#if defined(__AVX512F__)
inline constexpr int kLanes = 16;
#elif defined(__AVX2__)
inline constexpr int kLanes = 8;
#else
inline constexpr int kLanes = 4;
#endif

inline constexpr int kLineBytes = 64;  // of a cache

#define E3_VECTOR(type) type __attribute__((vector_size(kLanes * sizeof(type))))
using Vf = E3_VECTOR(float);
using Vi = E3_VECTOR(int32_t);
using Vu = E3_VECTOR(uint32_t);
using Vh = E3_VECTOR(uint16_t);
#undef E3_VECTOR

// As many bytes of fp64 lanes.
inline constexpr int kDoubles = kLanes / 2;
using Vd = double __attribute__((vector_size(kDoubles * sizeof(double))));
using Vl = int64_t __attribute__((vector_size(kDoubles * sizeof(int64_t))));

// Storage types; both are 16 bits, told apart by type.
struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

inline constexpr float kInfinity = std::numeric_limits<float>::infinity();
inline constexpr float kLowest = std::numeric_limits<float>::lowest();

template <class To, class From>
inline To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

template <class V, class T>
inline V load_raw(const T* source) {
  V value;
  std::memcpy(&value, source, sizeof(V));
  return value;
}

template <class V, class T>
inline void store_raw(T* target, const V& value) {
  std::memcpy(target, &value, sizeof(V));
}

// value − 0, which is the value itself, −0 too: 0 + value would be an addition.
inline Vf broadcast(float value) { return value - Vf{}; }

// a·b + c, fused where the hardware has it.
inline Vf fma(Vf a, Vf b, Vf c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#elif defined(__aarch64__)
  return vfmaq_f32(c, a, b);
#else
  return a * b + c;
#endif
}

// The second argument where either is NaN, so that NaN survives max(constant, x).
inline Vf max(Vf a, Vf b) {
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#elif defined(__SSE2__)
  return _mm_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

inline Vf min(Vf a, Vf b) {
#if defined(__AVX512F__)
  return _mm512_min_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_min_ps(a, b);
#elif defined(__SSE2__)
  return _mm_min_ps(a, b);
#else
  return a < b ? a : b;
#endif
}

#if defined(__AVX512F__)
// The first `count` lanes, all of them from as many bits of the mask on.
template <class Mask>
inline Mask first_lanes(int64_t count) {
  constexpr int kBits = 8 * sizeof(Mask);
  return count >= kBits ? static_cast<Mask>(-1) : static_cast<Mask>((Mask{1} << (count > 0 ? count : 0)) - 1);
}
#endif

inline Vf select(Vi mask, Vf yes, Vf no) { return mask ? yes : no; }
inline Vu select(Vi mask, Vu yes, Vu no) { return mask ? yes : no; }

// Lanes are folded in halves: the same tree on every run.
inline float horizontal_sum(Vf v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(v);
#else
  float lanes[kLanes];
  store_raw(lanes, v);
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
#endif
}

inline double horizontal_sum(Vd v) {
  double lanes[kDoubles];
  store_raw(lanes, v);
  for (int half = kDoubles / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

inline float horizontal_max(Vf v) {
  float lanes[kLanes];
  store_raw(lanes, v);
  float best = lanes[0];
  for (int i = 1; i < kLanes; ++i) best = lanes[i] > best ? lanes[i] : best;
  return best;
}

inline float horizontal_min(Vf v) { return -horizontal_max(-v); }

// fp16 to fp32 by integer operations: rebias the exponent; a subnormal is normalised by one subtraction.
inline Vf widen_fp16_bits(Vu half) {
  constexpr uint32_t kExponent = 0x7c00u << 13, kRebias = (127u - 15u) << 23;
  const Vu shifted = (half & 0x7fffu) << 13;
  const Vu exponent = shifted & kExponent;
  const Vu normal = shifted + kRebias;
  const Vf subnormal = bits_as<Vf>(Vu(normal + (1u << 23))) - bits_as<float>(113u << 23);
  Vu magnitude = select(Vi(exponent == kExponent), Vu(normal + kRebias), normal);
  magnitude = select(Vi(exponent == 0u), bits_as<Vu>(subnormal), magnitude);
  return bits_as<Vf>(Vu(magnitude | ((half & 0x8000u) << 16)));
}

// fp32 to fp16, rounded to nearest even: the hardware's own fp32 addition rounds a subnormal result.
inline Vu narrow_fp16_bits(Vf value) {
  constexpr uint32_t kTooLarge = (127u + 16u) << 23, kSmallestNormal = 113u << 23, kInfinityBits = 255u << 23;
  constexpr uint32_t kMagic = ((127u - 15u) + (23u - 10u) + 1u) << 23;
  const Vu bits = bits_as<Vu>(value);
  const Vu sign = bits & 0x80000000u;
  const Vu magnitude = bits ^ sign;
  const Vu special = select(Vi(magnitude > kInfinityBits), Vu{} + 0x7e00u, Vu{} + 0x7c00u);
  const Vu subnormal = bits_as<Vu>(Vf(bits_as<Vf>(magnitude) + bits_as<float>(kMagic))) - kMagic;
  const Vu odd = (magnitude >> 13) & 1u;
  const Vu normal = (magnitude - ((127u - 15u) << 23) + 0xfffu + odd) >> 13;
  Vu result = select(Vi(magnitude < kSmallestNormal), subnormal, normal);
  result = select(Vi(magnitude >= kTooLarge), special, result);
  return result | (sign >> 16);
}

// fp32 to bf16, rounded to nearest even; NaN stays NaN.
inline Vu narrow_bf16_bits(Vf value) {
  const Vu bits = bits_as<Vu>(value);
  const Vu rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return select(Vi((bits & 0x7fffffffu) > 0x7f800000u), (bits >> 16) | 0x40u, rounded);
}

inline Vf load(const float* source) { return load_raw<Vf>(source); }

inline Vu load_wide(const uint16_t* source) {
#if defined(__AVX512F__)
  return bits_as<Vu>(_mm512_cvtepu16_epi32(load_raw<__m256i>(source)));
#elif defined(__AVX2__)
  return bits_as<Vu>(_mm256_cvtepu16_epi32(load_raw<__m128i>(source)));
#else
  return __builtin_convertvector(load_raw<Vh>(source), Vu);
#endif
}

inline Vf load(const bf16* source) { return bits_as<Vf>(Vu(load_wide(&source->bits) << 16)); }

inline Vf load(const fp16* source) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(load_raw<__m256i>(source));
#elif defined(__F16C__)
  return _mm256_cvtph_ps(load_raw<__m128i>(source));
#else
  return widen_fp16_bits(load_wide(&source->bits));
#endif
}

inline Vf narrow(Vf value, float) { return value; }

inline Vh narrow(Vf value, bf16) {
#if defined(__AVX512BF16__)
  return bits_as<Vh>(_mm512_cvtneps_pbh(value));
#else
  return __builtin_convertvector(narrow_bf16_bits(value), Vh);
#endif
}

inline Vh narrow(Vf value, fp16) {
#if defined(__AVX512F__)
  return bits_as<Vh>(_mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
  return bits_as<Vh>(_mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
#else
  return __builtin_convertvector(narrow_fp16_bits(value), Vh);
#endif
}

template <class T>
inline void store(T* target, Vf value) {
  store_raw(target, narrow(value, T{}));
}

// One element, for the ends that no whole vector covers.
inline float load_one(const float* source) { return *source; }

inline void store_one(float* target, float value) { *target = value; }

template <class T>
inline float load_one(const T* source) {
  T lanes[kLanes] = {*source};
  return load(lanes)[0];
}

template <class T>
inline void store_one(T* target, float value) {
  T lanes[kLanes];
  store(lanes, broadcast(value));
  *target = lanes[0];
}

// Past the caches: a written line is not read first, and does not push out the rows in use. `target` is aligned to the
// stored vector; stream_fence orders the stores before the rows are handed on.
template <class T>
inline void stream(T* target, Vf value) {
  const auto narrowed = narrow(value, T{});
#if defined(__x86_64__)
  constexpr int kBytes = sizeof(narrowed);
  if constexpr (kBytes == 16) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(target), bits_as<__m128i>(narrowed));
  } else if constexpr (kBytes == 8) {
    _mm_stream_si64(reinterpret_cast<long long*>(target), bits_as<long long>(narrowed));
  }
#if defined(__AVX2__)
  if constexpr (kBytes == 32) _mm256_stream_si256(reinterpret_cast<__m256i*>(target), bits_as<__m256i>(narrowed));
#endif
#if defined(__AVX512F__)
  if constexpr (kBytes == 64) _mm512_stream_si512(reinterpret_cast<__m512i*>(target), bits_as<__m512i>(narrowed));
#endif
#else
  store_raw(target, narrowed);
#endif
}

// How many values leave at once: with AVX-512 a whole line, whose halves could leave apart.
#if defined(__AVX512F__)
template <class T>
inline constexpr int kStreamed = kLineBytes / sizeof(T);

template <class T>
inline void stream(T* target, Vf first, Vf second) {
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<T, bf16>) {
    const auto line = bits_as<__m512i>(_mm512_cvtne2ps_pbh(second, first));
    return _mm512_stream_si512(reinterpret_cast<__m512i*>(target), line);
  }
#endif
  const __m512i low = _mm512_castsi256_si512(bits_as<__m256i>(narrow(first, T{})));
  const __m512i line = _mm512_inserti64x4(low, bits_as<__m256i>(narrow(second, T{})), 1);
  _mm512_stream_si512(reinterpret_cast<__m512i*>(target), line);
}
#else
template <class T>
inline constexpr int kStreamed = kLanes;
#endif

inline void stream_fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// Results below the normal range become 0 while a guard lives: a subnormal operand costs hundreds of cycles on x86.
class FlushSubnormals {
 public:
#if defined(__x86_64__)
  FlushSubnormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040u); }
  ~FlushSubnormals() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#else
  FlushSubnormals() {}
#endif
};

// 2^y = 2^n · P(y − n), for a result that is stored as T: minimax with P(0) = 1, of degree 5 for fp32 (relative
// error 1.1e-7) and 4 for the 16-bit types (3.4e-6, a thousandth of their own rounding). n is floor y, with P(1) = 2 in
// fp32, or round y. NaN in, NaN out; 0 below −126, where 2^y leaves the normal range; +∞ from 128 on at the latest,
// from 127.5 at the earliest.
template <class T>
inline Vf exp2(Vf y) {
  constexpr bool kWide = sizeof(T) == sizeof(float);
#if defined(__AVX512F__)
  const Vf r = _mm512_reduce_ps(y, 1);  // y − floor y; scalef takes the floor itself
  constexpr float kWideTerms[] = {0x1.eca6fp-10f, 0x1.269deep-7f, 0x1.c94442p-5f, 0x1.ebd8a4p-3f, 0x1.62e4c8p-1f, 1.0f};
  constexpr float kNarrowTerms[] = {0x1.bc31dep-7f, 0x1.aa3fcep-5f, 0x1.ee5888p-3f, 0x1.62d51ap-1f, 1.0f};
#else
  y = min(broadcast(128.1f), max(broadcast(-150.0f), y));
  const Vf shifted = y + 12582912.0f;  // 1.5·2^23: the sum holds round y in its low bits
  const Vf r = y - (shifted - 12582912.0f);
  constexpr float kWideTerms[] = {0x1.5bba14p-10f, 0x1.3cea88p-7f, 0x1.c6b752p-5f,
                                  0x1.ebf9bcp-3f,  0x1.62e42ap-1f, 1.0f};
  constexpr float kNarrowTerms[] = {0x1.3a02ccp-7f, 0x1.c9fc46p-5f, 0x1.ec0378p-3f, 0x1.62e12cp-1f, 1.0f};
#endif
  Vf p = broadcast(kWide ? kWideTerms[0] : kNarrowTerms[0]);
  for (int i = 1; i < (kWide ? 6 : 5); ++i) p = fma(p, r, broadcast(kWide ? kWideTerms[i] : kNarrowTerms[i]));
#if defined(__AVX512F__)
  return _mm512_scalef_ps(p, y);
#else
  const Vu power = (bits_as<Vu>(shifted) - (0x4b400000u - 127u)) << 23;
  return select(Vi(y < -126.0f), Vf{}, Vf(p * bits_as<Vf>(power)));
#endif
}

// log2 e as the exponentials have it: y = x·kBitsPerNat is x in bits.
inline constexpr float kBitsPerNat = 1.44269504f;

// e^x; besides that of 2^y the rounding of y gives an error: together relative (3.6 + 1.25·|x|)·2⁻²⁴.
inline Vf exp(Vf x) { return exp2<float>(x * kBitsPerNat); }

// ln x for normal x > 0 (0 gives −87.3, a subnormal counts as 0); error at most 1.5·2⁻²³·max(|ln x|, ¼).
//
//   x = 2^n · (1 + f),  sqrt(½) <= 1 + f < sqrt(2);   s = f / (2 + f);   ln(1 + f) = 2·atanh(s) = 2s + s³·R(s²)
inline Vf log(Vf x) {
  const Vf safe = max(broadcast(std::numeric_limits<float>::min()), x);
  const Vu bits = bits_as<Vu>(safe) - 0x3f3504f3u;
  const Vf n = __builtin_convertvector(Vi(bits_as<Vi>(bits) >> 23), Vf);
  const Vf f = bits_as<Vf>(Vu((bits & 0x007fffffu) + 0x3f3504f3u)) - 1.0f;
  const Vf s = f / (f + 2.0f);
  const Vf square = s * s;
  Vf series = fma(square, broadcast(2.0f / 9), broadcast(2.0f / 7));
  series = fma(series, square, broadcast(2.0f / 5));
  series = fma(series, square, broadcast(2.0f / 3));
  const Vf tail = fma(n, broadcast(-2.12194440e-4f), Vf(series * square * s));
  return fma(n, broadcast(0.693359375f), Vf(s + s + tail));
}

// tanh x: below ½ in magnitude x·(1 + x²·P(x²)) keeps the relative error of small arguments, above it 1 − 2/(e^{2|x|} +
// 1).
inline Vf tanh(Vf x) {
  const Vf magnitude = max(x, -x);
  const Vf far = 1.0f - 2.0f / (exp(min(broadcast(20.0f), magnitude) * 2.0f) + 1.0f);
  const Vf square = x * x;
  Vf p = fma(square, broadcast(-5.70498872745e-3f), broadcast(2.06390887954e-2f));
  p = fma(p, square, broadcast(-5.37397155531e-2f));
  p = fma(p, square, broadcast(1.33314422036e-1f));
  p = fma(p, square, broadcast(-3.33332819422e-1f));
  const Vf near = fma(x * square, p, x);
  return select(Vi(magnitude < 0.625f), near, Vf(x < 0.0f ? -far : far));
}

}  // namespace e3::E3_ISA_NAMESPACE
