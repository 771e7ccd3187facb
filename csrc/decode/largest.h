// The largest logit of a row: what greedy decoding takes, and what probabilities are relative to.
#pragma once

#include <algorithm>

#include "decode/runtime_table.h"
#include "simd/simd.h"

namespace e3::E3_ISA_NAMESPACE {

// Of a whole row; where none is above −∞ the index is 0. It runs once a token on one thread.
inline Largest largest(const float* logits, int64_t count) {
  constexpr int kChains = 8;
  constexpr int64_t kBlock = 4096, kStep = kChains * kLanes;
  Largest found{0, -kInfinity, false};
  const float* best = logits;
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const float* x = logits + begin;
    const int64_t length = std::min(kBlock, count - begin);
    Vf high[kChains];
    Vi nans{};
    std::fill_n(high, kChains, broadcast(-kInfinity));
    int64_t i = 0;
    for (; i + kStep <= length; i += kStep) {
      for (int chain = 0; chain < kChains; ++chain) {
        const Vf value = load(x + i + chain * kLanes);
        high[chain] = max(high[chain], value);
        nans |= value != value;
      }
    }
    for (int chain = 1; chain < kChains; ++chain) high[0] = max(high[0], high[chain]);
    float of_block = horizontal_max(high[0]);
    for (int lane = 0; lane < kLanes; ++lane) found.nan |= nans[lane] != 0;
    for (; i < length; ++i) {
      of_block = std::max(of_block, x[i]);
      found.nan |= x[i] != x[i];
    }
    if (of_block > found.value) {
      found.value = of_block;
      best = x;
    }
  }
  found.index = std::find(best, logits + count, found.value) - logits;
  return found;
}

}  // namespace e3::E3_ISA_NAMESPACE
