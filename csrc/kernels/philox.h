// Philox4x32-10, the counter-based generator of Salmon et al. (SC 2011), and Gumbel noise with the same bits everywhere.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels/problem.h"

namespace e3::E3_ISA_NAMESPACE {

struct PhiloxBlock {
  uint32_t word[4];
};

inline PhiloxBlock philox(PhiloxBlock counter, uint64_t key) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  uint32_t* c = counter.word;
  for (int round = 0; round < 10; ++round) {
    const uint64_t first = uint64_t{c[0]} * 0xD2511F53u, second = uint64_t{c[2]} * 0xCD9E8D57u;
    const uint32_t c0 = static_cast<uint32_t>(second >> 32) ^ c[1] ^ k0, c1 = static_cast<uint32_t>(second);
    const uint32_t c2 = static_cast<uint32_t>(first >> 32) ^ c[3] ^ k1, c3 = static_cast<uint32_t>(first);
    c[0] = c0, c[1] = c1, c[2] = c2, c[3] = c3;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return counter;
}

// log x of a positive, normal double by one fixed sequence of IEEE operations: nothing here may be fused or reordered
// (this file is compiled with -ffp-contract=off), so that the noise has the bits of e3kernels/reference/fixed_log.py.
//
//   x = 2^e·m, m in [√½, √2);  f = (m − 1)/(m + 1);  log m = 2·artanh f = 2f·(1 + f²/3 + f⁴/5 + … + f²⁰/21)
inline double fixed_log(double x) {
  int64_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const int64_t mantissa = (bits & ((int64_t{1} << 52) - 1)) | (int64_t{1023} << 52);
  double m;
  std::memcpy(&m, &mantissa, sizeof m);
  const bool above = m >= 1.4142135623730951;
  m = above ? m * 0.5 : m;
  const double e = static_cast<double>((bits >> 52) - (above ? 1022 : 1023));
  const double f = (m - 1.0) / (m + 1.0);
  const double square = f * f;
  double series = 1.0 / 21;
  for (int n = 9; n >= 1; --n) series = series * square + 1.0 / (2 * n + 1);
  return e * 0.6931471805599453 + (f * 2.0) * (series * square + 1.0);
}

// g = −log(−log u), u = (x>>8 + ½)·2⁻²⁴, for the columns of one row: key = seed, counter = (step low, step high, row,
// column / 4), word j of a block serves column 4·block + j.
inline void gumbel_noise(uint64_t seed, uint64_t step, uint32_t row, int64_t columns, double* noise) {
  for (int64_t begin = 0; begin < columns; begin += 4) {
    const PhiloxBlock block = philox({{static_cast<uint32_t>(step), static_cast<uint32_t>(step >> 32), row,
                                       static_cast<uint32_t>(begin / 4)}}, seed);
    for (int64_t j = 0; j < 4 && begin + j < columns; ++j) noise[begin + j] = (block.word[j] >> 8) + 0.5;
  }
  for (int64_t i = 0; i < columns; ++i) noise[i] = -fixed_log(-fixed_log(noise[i] * 0x1p-24));
}

}  // namespace e3::E3_ISA_NAMESPACE
