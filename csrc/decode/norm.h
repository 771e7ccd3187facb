// Norms of one row: RMSNorm (Zhang & Sennrich 2019), out = x / √(mean x² + ε) · (offset + w), Gemma's offset being 1,
// others' 0, and LayerNorm (Ba et al. 2016), out = (x − μ) / √(mean (x − μ)² + ε) · w + b.
#pragma once

#include "decode/decoder_view.h"
#include "decode/rms_factor.h"
#include "simd/simd.h"

namespace e3::E3_ISA_NAMESPACE {

inline float sum(const float* x, int64_t n) {
  Vf total{};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) total += load(x + i);
  float rest = horizontal_sum(total);
  for (; i < n; ++i) rest += x[i];
  return rest;
}

inline float sum_of_squares(const float* x, float mean, int64_t n) {
  Vf total{};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) total = fma(load(x + i) - mean, load(x + i) - mean, total);
  float rest = horizontal_sum(total);
  for (; i < n; ++i) rest += (x[i] - mean) * (x[i] - mean);
  return rest;
}

// What the elements that are normalised together share.
struct Moments {
  float mean, factor;
};

inline Moments moments(const float* x, const NormView& norm) {
  const float mean = norm.centred ? sum(x, norm.size) / float(norm.size) : 0.0f;
  return {mean, rms_factor(sum_of_squares(x, mean, norm.size), norm.size, norm.eps)};
}

// n of those elements; `weight` and `bias` are of the first of them.
template <class T>
void normalise(float* out, const float* x, int64_t n, const Moments& shared, const T* weight, const T* bias,
               float offset) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    Vf value = (load(x + i) - shared.mean) * shared.factor;
    if (weight) value *= load(weight + i) + offset;
    store(out + i, bias ? value + load(bias + i) : value);
  }
  for (; i < n; ++i) {
    float value = (x[i] - shared.mean) * shared.factor;
    if (weight) value *= load_one(weight + i) + offset;
    out[i] = bias ? value + load_one(bias + i) : value;
  }
}

// A whole row of norm.size elements.
template <class T>
void normalise(float* out, const float* x, const NormView& norm) {
  normalise(out, x, norm.size, moments(x, norm), static_cast<const T*>(norm.weight), static_cast<const T*>(norm.bias),
            norm.offset);
}

}  // namespace e3::E3_ISA_NAMESPACE
