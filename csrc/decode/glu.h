// Activations and gated linear units, out = act(gate)·up, over rows.
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

inline void activate(float* x, int64_t n, Activation activation) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(x + i, activate(load(x + i), activation));
  for (; i < n; ++i) x[i] = activate(broadcast(x[i]), activation)[0];
}

// `out` may be `gate`.
inline void glu(float* out, const float* gate, const float* up, int64_t n, Activation activation) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, activate(load(gate + i), activation) * load(up + i));
  for (; i < n; ++i) out[i] = activate(broadcast(gate[i]), activation)[0] * up[i];
}

inline Vf clamped_glu(Vf gate, Vf up, float slope, float limit) {
  gate = min(gate, broadcast(limit));
  up = min(max(up, broadcast(-limit)), broadcast(limit));
  return gate * sigmoid(Vf(slope * gate), [](Vf value) { return exp(value); }) * (up + 1.0f);
}

inline void clamped_glu(float* out, const float* gate, const float* up, int64_t n, float slope, float limit) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, clamped_glu(load(gate + i), load(up + i), slope, limit));
  for (; i < n; ++i) out[i] = clamped_glu(broadcast(gate[i]), broadcast(up[i]), slope, limit)[0];
}

}  // namespace e3::E3_ISA_NAMESPACE
