// The small kernels of a decoding step: embedding, norms, the residual stream, and which blocks run. Activations are
// fp32; the arithmetic is that of csrc/decode.
#pragma once

#include "cuda/step_state.cuh"
#include "cuda/storage.cuh"
#include "decode/rms_factor.h"

namespace e3::cuda {

// Condition 2l is the attention of layer l, 2l + 1 its MLP.
static __global__ void set_conditions(const cudaGraphConditionalHandle* conditions, const LayerState* layers,
                                      int count) {
  const int i = int(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= count) return;
  const LayerState& layer = layers[i / 2];
  cudaGraphSetConditional(conditions[i], (i % 2 ? layer.mlp_gate : layer.attention_gate) != 0.0f);
}

template <class T>
__global__ void embed(const StepState* step, MatrixView embedding, float scale, Rows x) {
  const int64_t m = blockIdx.y, i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (m >= step->count || i >= embedding.columns) return;
  const T* row = static_cast<const T*>(embedding.weight) + step->tokens[m].id * embedding.stride;
  x[m][i] = to_float(row[i]) * scale;
}

// One block a token. With a gate it adds to the residual stream: out += gate·scale·norm(x), else out = norm(x).
template <class T>
__global__ void rms_norm(const StepState* step, NormView norm, const float* gate, float scale, Rows x, Rows out) {
  const int64_t m = blockIdx.x;
  if (m >= step->count) return;
  const T* weight = static_cast<const T*>(norm.weight);
  float squares = 0;
  for (int64_t i = threadIdx.x; i < norm.size; i += blockDim.x) squares += x[m][i] * x[m][i];
  const float factor = rms_factor(block_sum(squares), norm.size, norm.eps) * (gate ? *gate * scale : 1.0f);
  for (int64_t i = threadIdx.x; i < norm.size; i += blockDim.x) {
    const float value = x[m][i] * factor * (to_float(weight[i]) + norm.offset);
    out[m][i] = gate ? out[m][i] + value : value;
  }
}

}  // namespace e3::cuda
