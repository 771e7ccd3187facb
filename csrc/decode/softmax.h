// What the attention kernels of CPU and CUDA share of the online softmax, and the cap of scores and logits.
#pragma once

#include <cmath>

#include "decode/host_device.h"

namespace e3 {

// The factor that brings a part with maximum `part` to the common maximum `merged`.
E3_SHARED float softmax_rescale(float part, float merged) { return part == merged ? 1.0f : std::exp(part - merged); }

// cap·tanh(x/cap); a cap of 0 leaves x as it is.
E3_SHARED float capped(float x, float cap) { return cap == 0.0f ? x : cap * std::tanh(x / cap); }

}  // namespace e3
