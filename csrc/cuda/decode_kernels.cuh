// One decoding step of one sequence on the device, one kernel a phase. Everything that changes between steps or
// requests is read from device memory, so that a captured graph of these kernels stays valid: the token and its slot,
// the addresses of the caches, the gates. Activations are fp32; the arithmetic is that of csrc/kernels.
#pragma once

#include "cuda/layer_graph.h"
#include "cuda/storage.cuh"
#include "decode/activation.h"
#include "decode/decoder_view.h"
#include "decode/rms_factor.h"
#include "decode/rotary.h"
#include "decode/softmax.h"

namespace e3::cuda {

// Device memory that the host fills before a step.
struct StepState {
  int64_t token, slot, start, capacity;
};

struct LayerState {
  void *keys, *values;      // (key/value head, capacity, head_dim)
  const float *cos, *sin;   // (position, rotary half)
  float attention_gate, mlp_gate;  // m of x ← x + m·branch; 0: the block's kernels do not run
};

struct HeadShape {
  int64_t heads, key_value_heads, head_dim;
};

template <class T>
__global__ void embed(const StepState* step, MatrixView embedding, float scale, float* x) {
  const T* row = static_cast<const T*>(embedding.weight) + step->token * embedding.stride;
  for (int64_t i = blockIdx.x * blockDim.x + threadIdx.x; i < embedding.columns; i += gridDim.x * blockDim.x)
    x[i] = to_float(row[i]) * scale;
}

// One block; a null weight copies.
template <class T>
__global__ void rms_norm(NormView norm, int64_t n, const float* x, float* out) {
  const T* weight = static_cast<const T*>(norm.weight);
  float squares = 0;
  for (int64_t i = threadIdx.x; i < n; i += blockDim.x) squares += x[i] * x[i];
  const float scale = rms_factor(block_sum(squares), n, norm.eps);
  for (int64_t i = threadIdx.x; i < n; i += blockDim.x)
    out[i] = weight ? x[i] * scale * (to_float(weight[i]) + norm.offset) : x[i];
}

// One warp a row, sixteen bytes a load where rows are aligned.
template <class T>
__global__ void gemv(MatrixView matrix, const float* x, float* out) {
  const int64_t row = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
  const int lane = threadIdx.x % 32;
  if (row >= matrix.rows) return;
  const T* weight = static_cast<const T*>(matrix.weight) + row * matrix.stride;
  constexpr int kPack = Pack<T>::kCount;
  const bool aligned = reinterpret_cast<uintptr_t>(weight) % 16 == 0;
  const int64_t packed = aligned ? matrix.columns / kPack * kPack : 0;
  float total = 0;
  for (int64_t k = int64_t(lane) * kPack; k < packed; k += 32 * kPack) {
    const Pack<T> pack = *reinterpret_cast<const Pack<T>*>(weight + k);
#pragma unroll
    for (int j = 0; j < kPack; ++j) total += to_float(pack.values[j]) * x[k + j];
  }
  for (int64_t k = packed + lane; k < matrix.columns; k += 32) total += to_float(weight[k]) * x[k];
  total = warp_sum(total);
  if (lane == 0) out[row] = total + (matrix.bias ? to_float(static_cast<const T*>(matrix.bias)[row]) : 0.0f);
}

// One block a head: queries are normalised and rotated into `queries`, keys and values go to the cache.
template <class T>
__global__ void place_heads(const StepState* step, const LayerState* layer, NormView query_norm, NormView key_norm,
                            HeadShape shape, int64_t rotary_half, const float* qkv, float* queries) {
  extern __shared__ float head_values[];
  const int64_t head = blockIdx.x, dim = shape.head_dim;
  const bool is_query = head < shape.heads;
  const int64_t key = head - shape.heads, value = key - shape.key_value_heads;
  if (value >= 0) {
    T* row = static_cast<T*>(layer->values) + (value * step->capacity + step->slot) * dim;
    for (int64_t i = threadIdx.x; i < dim; i += blockDim.x) store(row + i, qkv[head * dim + i]);
    return;
  }
  const NormView norm = is_query ? query_norm : key_norm;
  const T* weight = static_cast<const T*>(norm.weight);
  const bool spans_all = weight && norm.size != dim;
  const float* kind = qkv + (is_query ? 0 : shape.heads * dim);
  const int64_t at = (is_query ? head : key) * dim;
  float squares = 0;
  if (weight)
    for (int64_t i = threadIdx.x; i < norm.size; i += blockDim.x) {
      const float element = kind[(spans_all ? 0 : at) + i];
      squares += element * element;
    }
  const float scale = weight ? rms_factor(block_sum(squares), norm.size, norm.eps) : 1.0f;
  for (int64_t i = threadIdx.x; i < dim; i += blockDim.x)
    head_values[i] = kind[at + i] * scale * (weight ? to_float(weight[(spans_all ? at : 0) + i]) + norm.offset : 1.0f);
  __syncthreads();
  const int64_t position = (step->slot - step->start) * rotary_half;
  for (int64_t i = threadIdx.x; i < rotary_half; i += blockDim.x)
    rotate_pair(head_values[i], head_values[i + rotary_half], layer->cos[position + i], layer->sin[position + i]);
  __syncthreads();
  T* row = static_cast<T*>(layer->keys) + (key * step->capacity + step->slot) * dim;
  for (int64_t i = threadIdx.x; i < dim; i += blockDim.x) {
    if (is_query)
      queries[at + i] = head_values[i];
    else
      store(row + i, head_values[i]);
  }
}

inline constexpr int kAttentionWarps = 8;
inline constexpr int kLaneElements = int(LayerGraph::kMaxHeadDim) / 32;

// One block a query head; its warps take every kAttentionWarps-th slot, and their online softmaxes are merged.
template <class T>
__global__ void attend(const StepState* step, const LayerState* layer, HeadShape shape, int64_t window, float scale,
                       float softcap, const float* queries, float* out) {
  __shared__ float outputs[kAttentionWarps][32 * kLaneElements];
  __shared__ float maxima[kAttentionWarps], totals[kAttentionWarps];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t dim = shape.head_dim, head = blockIdx.x;
  const int64_t cache = head / (shape.heads / shape.key_value_heads) * step->capacity * dim;
  const T* keys = static_cast<const T*>(layer->keys) + cache;
  const T* values = static_cast<const T*>(layer->values) + cache;
  const int64_t end = step->slot + 1;
  const int64_t first = window && end - window > step->start ? end - window : step->start;
  float query[kLaneElements] = {}, mixed[kLaneElements] = {};
  for (int j = 0; j < kLaneElements; ++j)
    if (lane + 32 * j < dim) query[j] = queries[head * dim + lane + 32 * j];
  float maximum = -INFINITY, total = 0;
  for (int64_t slot = first + warp; slot < end; slot += kAttentionWarps) {
    float score = 0;
    for (int j = 0; j < kLaneElements; ++j)
      if (lane + 32 * j < dim) score += query[j] * to_float(keys[slot * dim + lane + 32 * j]);
    score = capped(scale * warp_sum(score), softcap);
    const float merged = fmaxf(maximum, score), keep = softmax_rescale(maximum, merged), weight = expf(score - merged);
    for (int j = 0; j < kLaneElements; ++j)
      if (lane + 32 * j < dim) mixed[j] = keep * mixed[j] + weight * to_float(values[slot * dim + lane + 32 * j]);
    total = keep * total + weight;
    maximum = merged;
  }
  for (int j = 0; j < kLaneElements; ++j) outputs[warp][lane + 32 * j] = mixed[j];
  if (lane == 0) {
    maxima[warp] = maximum;
    totals[warp] = total;
  }
  __syncthreads();
  float merged = -INFINITY, sum = 0;
  for (int w = 0; w < kAttentionWarps; ++w) merged = fmaxf(merged, maxima[w]);
  for (int w = 0; w < kAttentionWarps; ++w) sum += softmax_rescale(maxima[w], merged) * totals[w];
  for (int64_t i = threadIdx.x; i < dim; i += blockDim.x) {
    float element = 0;
    for (int w = 0; w < kAttentionWarps; ++w) element += softmax_rescale(maxima[w], merged) * outputs[w][i];
    out[head * dim + i] = element / sum;
  }
}

static __global__ void glu(float* gate, const float* up, int64_t n, Activation activation) {
  const auto exponential = [](float value) { return expf(value); };
  for (int64_t i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) {
    const float x = gate[i];
    const float activated = activation == Activation::silu        ? silu(x, exponential)
                            : activation == Activation::gelu_tanh ? gelu_tanh(x, exponential)
                                                                  : gelu(x);
    gate[i] = activated * up[i];
  }
}

// x ← x + m·scale·branch, m from device memory.
static __global__ void add_gated(const float* gate, float scale, const float* branch, int64_t n, float* x) {
  const float factor = *gate * scale;
  for (int64_t i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x)
    x[i] += factor * branch[i];
}

static __global__ void finish_logits(float scale, float softcap, int64_t n, float* logits) {
  for (int64_t i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x)
    logits[i] = capped(logits[i] * scale, softcap);
}

}  // namespace e3::cuda
