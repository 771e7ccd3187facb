// The activations of feed-forward networks, gated or not, for a scalar or a vector V and the exponential of V.
#pragma once

#include <cmath>

#include "decode/host_device.h"

namespace e3 {

// Of the gate: SwiGLU, GeGLU with the tanh approximation, GeGLU with erf. clamped_silu is the whole unit of GPT-OSS:
// gate·σ(slope·gate)·(up + 1), the gate cut above and `up` on both sides at a limit.
enum class Activation { silu, gelu_tanh, gelu, clamped_silu };

template <class V, class Exp>
E3_SHARED V sigmoid(V x, const Exp& exp) {
  return 1.0f / (1.0f + exp(-x));
}

template <class V, class Exp>
E3_SHARED V silu(V x, const Exp& exp) {
  return x * sigmoid(x, exp);
}

// ½x(1 + tanh u) = x·σ(2u), u = √(2/π)·(x + 0.044715·x³).
template <class V, class Exp>
E3_SHARED V gelu_tanh(V x, const Exp& exp) {
  return x * sigmoid(V(1.5957691216f * (x + 0.044715f * x * x * x)), exp);
}

E3_SHARED float gelu(float x) { return 0.5f * x * (1.0f + std::erf(x * 0.70710678f)); }

}  // namespace e3
