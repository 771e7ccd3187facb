// RMSNorm of one row (Zhang & Sennrich 2019): out = x / √(mean x² + ε) · (offset + w). Gemma's offset is 1, others' 0.
#pragma once

#include "decode/rms_factor.h"
#include "simd/simd.h"

namespace e3::E3_ISA_NAMESPACE {

inline float sum_of_squares(const float* x, int64_t n) {
  Vf total{};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) total = fma(load(x + i), load(x + i), total);
  float rest = horizontal_sum(total);
  for (; i < n; ++i) rest += x[i] * x[i];
  return rest;
}

// `squares` may sum over more than this row's n elements; `count` is how many.
template <class T>
void rms_scale(float* out, const float* x, const T* weight, int64_t n, float offset, float squares, int64_t count,
               float eps) {
  const float scale = rms_factor(squares, count, eps);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, load(x + i) * scale * (load(weight + i) + offset));
  for (; i < n; ++i) out[i] = x[i] * scale * (load_one(weight + i) + offset);
}

template <class T>
void rms_norm(float* out, const float* x, const T* weight, int64_t n, float offset, float eps) {
  rms_scale(out, x, weight, n, offset, sum_of_squares(x, n), n, eps);
}

}  // namespace e3::E3_ISA_NAMESPACE
