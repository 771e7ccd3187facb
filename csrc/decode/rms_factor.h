#pragma once

#include <cmath>
#include <cstdint>

#include "decode/host_device.h"

namespace e3 {

// 1/√(mean x² + ε) from Σx² over `count` elements.
E3_SHARED float rms_factor(float squares, int64_t count, float eps) {
  return 1.0f / std::sqrt(squares / float(count) + eps);
}

}  // namespace e3
