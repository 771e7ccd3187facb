// Rotary position embedding (Su et al. 2021) of one head: (a, b) ← (a·cos_i − b·sin_i, b·cos_i + a·sin_i) for the pair
// i of r/2. Pairs lie r/2 apart (most Hugging Face models) or are neighbours (Cohere, GLM-4); dimensions from r on
// stay.
#pragma once

#include <cstdint>

#include "decode/host_device.h"

namespace e3 {

E3_SHARED void rotate_pair(float& low, float& high, float cos, float sin) {
  const float rotated = low * cos - high * sin;
  high = high * cos + low * sin;
  low = rotated;
}

static inline void rotary(float* head, const float* cos, const float* sin, int64_t half, bool in_turn) {
  const int64_t step = in_turn ? 2 : 1, apart = in_turn ? 1 : half;
  for (int64_t i = 0; i < half; ++i) rotate_pair(head[step * i], head[step * i + apart], cos[i], sin[i]);
}

}  // namespace e3
