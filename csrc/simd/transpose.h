// A matrix of 16 by 16 words in 16 AVX-512 registers, transposed: in four rounds, rows 8, 4, 2 and 1 apart exchange
// words.
#pragma once

#if defined(__AVX512F__)

#include <utility>

#include "simd/simd.h"

namespace e3::E3_ISA_NAMESPACE {

template <uint32_t kStride, size_t... kLane>
inline void exchange(Vu (&m)[kLanes], std::index_sequence<kLane...>) {
  constexpr Vu low{(kLane & kStride ? kLanes + kLane - kStride : kLane)...};
  constexpr Vu high{(kLane & kStride ? kLanes + kLane : kLane + kStride)...};
  for (uint32_t i = 0; i < kLanes; ++i) {
    if (i & kStride) continue;
    const __m512i a = bits_as<__m512i>(m[i]), b = bits_as<__m512i>(m[i + kStride]);
    m[i] = bits_as<Vu>(_mm512_permutex2var_epi32(a, bits_as<__m512i>(low), b));
    m[i + kStride] = bits_as<Vu>(_mm512_permutex2var_epi32(a, bits_as<__m512i>(high), b));
  }
}

inline void transpose(Vu (&m)[kLanes]) {
  constexpr std::make_index_sequence<kLanes> lanes;
  exchange<8>(m, lanes);
  exchange<4>(m, lanes);
  exchange<2>(m, lanes);
  exchange<1>(m, lanes);
}

}  // namespace e3::E3_ISA_NAMESPACE

#endif  // __AVX512F__
