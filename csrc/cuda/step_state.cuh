// What the host writes to device memory before a step: everything that changes between steps or requests, so that a
// captured graph stays valid.
#pragma once

#include <cuda_runtime.h>

#include "decode/decoder_view.h"

namespace e3::cuda {

inline constexpr int kMaxTokens = 8;  // of a step

struct StepState {
  int64_t count, capacity;       // tokens of the step, slots of a sequence's cache
  float* logits;                 // (count, vocabulary)
  TokenView tokens[kMaxTokens];  // of which the first `count` hold
};

struct LayerState {
  void *keys, *values;             // (sequence, key/value head, capacity, head_dim)
  const float *cos, *sin;          // (position, rotary half)
  float attention_gate, mlp_gate;  // m of x ← x + m·branch; 0: the block's kernels do not run
};

struct HeadShape {
  int64_t heads, key_value_heads, head_dim;
};

// Vectors of the step's tokens, `stride` floats apart and 16-byte aligned.
struct Rows {
  float* data;
  int64_t stride;

  __device__ float* operator[](int64_t token) const { return data + token * stride; }
};

}  // namespace e3::cuda
