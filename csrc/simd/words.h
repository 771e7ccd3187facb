// A line of 32-bit words that hold what is summed: one term of fp32 each, or two of bf16, the first in the low half.
#pragma once

#if defined(__AVX512F__)

#include <type_traits>

#include "simd/simd.h"

namespace e3::E3_ISA_NAMESPACE {

template <class T>
inline constexpr int64_t kTerms = sizeof(uint32_t) / sizeof(T);

template <class T>
inline Vu broadcast_word(const T* source) {
  return load_raw<uint32_t>(source) - Vu{};
}

// A line's first `count` values, 0 in the others.
inline Vu load_words(const float* source, int64_t count) {
  return bits_as<Vu>(_mm512_maskz_loadu_ps(first_lanes<__mmask16>(count), source));
}
inline Vu load_words(const bf16* source, int64_t count) {
  return bits_as<Vu>(_mm512_maskz_loadu_epi16(first_lanes<__mmask32>(count), source));
}

inline void store_words(float* target, int64_t count, Vu words) {
  _mm512_mask_storeu_ps(target, first_lanes<__mmask16>(count), bits_as<__m512>(words));
}
inline void store_words(bf16* target, int64_t count, Vu words) {
  _mm512_mask_storeu_epi16(target, first_lanes<__mmask32>(count), bits_as<__m512i>(words));
}

// What a line of `target`'s type holds of 16 sums, or of 32 in bf16.
inline Vu rounded_line(const float*, Vf first, Vf) { return bits_as<Vu>(first); }
#if defined(__AVX512BF16__)
inline Vu rounded_line(const bf16*, Vf first, Vf second) { return bits_as<Vu>(_mm512_cvtne2ps_pbh(second, first)); }
#endif

// out[k][j] = word k of column j of a line of columns, from `terms` rows of the source; 0 past the ends.
inline void pack_words(const float* source, int64_t stride, int64_t terms, int64_t columns, float* out) {
  for (int64_t k = 0; k < terms; ++k, source += stride, out += kLanes) store_raw(out, load_words(source, columns));
}
inline void pack_words(const bf16* source, int64_t stride, int64_t terms, int64_t columns, float* out) {
  for (int64_t k = 0; k < terms; k += 2, source += 2 * stride, out += 2 * kLanes) {
    const auto even = bits_as<__m512i>(load_words(source, columns));
    const auto odd = bits_as<__m512i>(k + 1 < terms ? load_words(source + stride, columns) : Vu{});
    const auto half = [&](auto part) {
      const Vu low = bits_as<Vu>(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(even, part())));
      const Vu high = bits_as<Vu>(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(odd, part())));
      store_raw(out + part() * kLanes, Vu(low | high << 16));
    };
    half(std::integral_constant<int, 0>{});
    half(std::integral_constant<int, 1>{});
  }
}

}  // namespace e3::E3_ISA_NAMESPACE

#endif  // __AVX512F__
