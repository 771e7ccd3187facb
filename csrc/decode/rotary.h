// Rotary position embedding (Su et al. 2021) of one head, in the half-split layout of Hugging Face models:
// (x_i, x_{i+r/2}) ← (x_i·cos_i − x_{i+r/2}·sin_i, x_{i+r/2}·cos_i + x_i·sin_i) for i < r/2; dimensions from r on stay.
#pragma once

#include <cstdint>

#include "decode/host_device.h"

namespace e3 {

E3_SHARED void rotate_pair(float& low, float& high, float cos, float sin) {
  const float rotated = low * cos - high * sin;
  high = high * cos + low * sin;
  low = rotated;
}

static inline void rotary(float* head, const float* cos, const float* sin, int64_t half) {
  for (int64_t i = 0; i < half; ++i) rotate_pair(head[i], head[i + half], cos[i], sin[i]);
}

}  // namespace e3
