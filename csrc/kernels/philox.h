// Philox4x32-10, the counter-based generator of Salmon et al. (SC 2011), and Gumbel noise with the same bits
// everywhere.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels/problem.h"
#include "simd/simd.h"

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

// log x of positive, normal doubles by one fixed sequence of IEEE operations: nothing here may be fused or reordered
// (this file is compiled with -ffp-contract=off), so that the noise has the bits of e3kernels/reference/fixed_log.py.
//
//   x = 2^e·m, m in [√½, √2);  f = (m − 1)/(m + 1);  log m = 2·artanh f = 2f·(1 + f²/3 + f⁴/5 + … + f²⁰/21)
inline Vd fixed_log(Vd x) {
  constexpr double kMagic = 6755399441055744.0;  // 1.5·2^52: an integer in its low bits is exact
  const Vl bits = bits_as<Vl>(x);
  const Vd whole = bits_as<Vd>(Vl((bits & ((int64_t{1} << 52) - 1)) | (int64_t{1023} << 52)));
  const Vl above = whole >= 1.4142135623730951;
  const Vd m = above ? whole * 0.5 : whole;
  const Vl exponent = (bits >> 52) - 1023 - above;  // a true comparison is −1
  const Vd e = bits_as<Vd>(Vl(exponent + bits_as<int64_t>(kMagic))) - kMagic;
  const Vd f = (m - 1.0) / (m + 1.0);
  const Vd square = f * f;
  Vd series = Vd{} + 1.0 / 21;
  for (int n = 9; n >= 1; --n) series = series * square + 1.0 / (2 * n + 1);
  return e * 0.6931471805599453 + (f * 2.0) * (series * square + 1.0);
}

// g = −log(−log u), u = (x>>8 + ½)·2⁻²⁴, for the columns of one row: key = seed, counter = (step low, step high, row,
// column / 4), word j of a block serves column 4·block + j.
inline void gumbel_noise(uint64_t seed, uint64_t step, uint32_t row, int64_t columns, double* noise) {
  for (int64_t begin = 0; begin < columns; begin += 4) {
    const PhiloxBlock block = philox(
        {{static_cast<uint32_t>(step), static_cast<uint32_t>(step >> 32), row, static_cast<uint32_t>(begin / 4)}},
        seed);
    for (int64_t j = 0; j < 4 && begin + j < columns; ++j) noise[begin + j] = (block.word[j] >> 8) + 0.5;
  }
  const auto gumbel = [](double* x) { store_raw(x, Vd(-fixed_log(-fixed_log(load_raw<Vd>(x) * 0x1p-24)))); };
  int64_t i = 0;
  for (; i + kDoubles <= columns; i += kDoubles) gumbel(noise + i);
  double rest[kDoubles];
  for (int j = 0; j < kDoubles; ++j) rest[j] = i + j < columns ? noise[i + j] : 0.5;
  gumbel(rest);
  for (int j = 0; i + j < columns; ++j) noise[i + j] = rest[j];
}

}  // namespace e3::E3_ISA_NAMESPACE
