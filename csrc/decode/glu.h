// Gated linear unit: out = act(gate) · up, in place on `gate`.
#pragma once

#include "decode/activation.h"
#include "simd/simd.h"

namespace e3::E3_ISA_NAMESPACE {

inline Vf activate(Vf x, Activation activation) {
  const auto exponential = [](Vf value) { return exp(value); };
  if (activation == Activation::silu) return silu(x, exponential);
  if (activation == Activation::gelu_tanh) return gelu_tanh(x, exponential);
  for (int lane = 0; lane < kLanes; ++lane) x[lane] = gelu(x[lane]);
  return x;
}

inline void glu(float* gate, const float* up, int64_t n, Activation activation) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(gate + i, activate(load(gate + i), activation) * load(up + i));
  for (; i < n; ++i) gate[i] = activate(broadcast(gate[i]), activation)[0] * up[i];
}

}  // namespace e3::E3_ISA_NAMESPACE
