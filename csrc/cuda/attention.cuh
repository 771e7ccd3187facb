// Attention of one query head over the cache by online softmax (Milakov & Gimelshein 2018), the context split between
// the blocks of a grid and, within a block, between groups of lanes that each read a whole row of keys at once
// (Flash-Decoding, Dao et al. 2023): s = cap·tanh(scale·q·k / cap), m = max s, z = Σ e^{s − m}, o = Σ e^{s − m}·v.
#pragma once

#include "cuda/step_state.cuh"
#include "cuda/storage.cuh"
#include "decode/rms_factor.h"
#include "decode/rotary.h"
#include "decode/softmax.h"

namespace e3::cuda {

inline constexpr int kMaxHeadDim = 256;
inline constexpr int kAttentionThreads = 256;
inline constexpr int64_t kLeastSlots = 64;  // of a part: less is not worth the merging

// What the blocks of one query head leave to be merged, (part, token, head): outputs are not normalised.
struct AttentionParts {
  float *outputs, *maxima, *totals;
  int count;
};

// One block a head: queries are normalised and rotated into `queries`, keys and values go to the cache.
template <class T>
__global__ void place_heads(const StepState* step, const LayerState* layer, NormView query_norm, NormView key_norm,
                            HeadShape shape, int64_t rotary_half, Rows qkv, Rows queries) {
  __shared__ float head_values[kMaxHeadDim];
  const int64_t m = blockIdx.y;
  if (m >= step->count) return;
  const TokenView token = step->tokens[m];
  const int64_t head = blockIdx.x, dim = shape.head_dim;
  const bool is_query = head < shape.heads;
  const int64_t key = head - shape.heads, value = key - shape.key_value_heads;
  const auto cached = [&](void* cache, int64_t at) {
    return static_cast<T*>(cache) + ((token.sequence * shape.key_value_heads + at) * step->capacity + token.slot) * dim;
  };
  if (value >= 0) {
    T* row = cached(layer->values, value);
    for (int64_t i = threadIdx.x; i < dim; i += blockDim.x) store(row + i, qkv[m][head * dim + i]);
    return;
  }
  const NormView norm = is_query ? query_norm : key_norm;
  const T* weight = static_cast<const T*>(norm.weight);
  const bool spans_all = weight && norm.size != dim;
  const float* kind = qkv[m] + (is_query ? 0 : shape.heads * dim);
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
  const int64_t position = (token.slot - token.start) * rotary_half;
  for (int64_t i = threadIdx.x; i < rotary_half; i += blockDim.x)
    rotate_pair(head_values[i], head_values[i + rotary_half], layer->cos[position + i], layer->sin[position + i]);
  __syncthreads();
  for (int64_t i = threadIdx.x; i < dim; i += blockDim.x) {
    if (is_query)
      queries[m][at + i] = head_values[i];
    else
      store(cached(layer->keys, key) + i, head_values[i]);
  }
}

// kLanes lanes read a row of the cache, sixteen bytes each at a time, which divide it; kLanes is the least power of two
// that suffices.
template <class T, int kLanes>
__global__ void __launch_bounds__(kAttentionThreads)
    attend(const StepState* step, const LayerState* layer, HeadShape shape, int64_t window, float scale, float softcap,
           Rows queries, AttentionParts parts) {
  constexpr int kPack = Pack<T>::kCount, kPacks = (kMaxHeadDim / kPack + 31) / 32;  // loads of a lane, at most
  constexpr int kElements = (kLanes == 32 ? kPacks : 1) * kPack, kStreams = kAttentionThreads / kLanes;
  __shared__ float outputs[kStreams][kLanes * kElements];
  __shared__ float maxima[kStreams], totals[kStreams];
  const int64_t head = blockIdx.x, m = blockIdx.y, dim = shape.head_dim;
  if (m >= step->count) return;
  const TokenView token = step->tokens[m];
  const int64_t row = (blockIdx.z * gridDim.y + m) * shape.heads + head;
  const int64_t end = token.slot + 1;
  const int64_t first = window && end - window > token.start ? end - window : token.start;
  const int64_t even = (end - first + parts.count - 1) / parts.count, share = even < kLeastSlots ? kLeastSlots : even;
  const int64_t begin = first + blockIdx.z * share, last = begin + share < end ? begin + share : end;
  if (begin >= last) {
    if (threadIdx.x == 0) parts.totals[row] = 0;
    return;
  }
  const int64_t group = shape.heads / shape.key_value_heads;
  const int64_t cache = (token.sequence * shape.key_value_heads + head / group) * step->capacity * dim;
  const T* keys = static_cast<const T*>(layer->keys) + cache;
  const T* values = static_cast<const T*>(layer->values) + cache;
  const int lane = threadIdx.x % kLanes, stream = threadIdx.x / kLanes;
  const auto element = [&](int i) { return (i / kPack * kLanes + lane) * kPack + i % kPack; };
  const auto load_row = [&](const T* from, float (&to)[kElements]) {
#pragma unroll
    for (int i = 0; i < kElements; i += kPack) {
      if (element(i) >= dim) continue;
      const Pack<T> pack = load_pack(from + element(i));
#pragma unroll
      for (int j = 0; j < kPack; ++j) to[i + j] = to_float(pack.values[j]);
    }
  };
  float query[kElements], mixed[kElements] = {}, maximum = -INFINITY, total = 0;
#pragma unroll
  for (int i = 0; i < kElements; ++i) query[i] = element(i) < dim ? queries[m][head * dim + element(i)] * scale : 0.0f;
  const int warp_first = int(threadIdx.x / 32 * 32) / kLanes;  // its first stream: all its lanes take part in the sums
  for (int64_t base = begin + warp_first; base < last; base += kStreams) {
    const int64_t slot = base + stream - warp_first;
    const bool seen = slot < last;
    float key[kElements] = {}, value[kElements] = {}, score = 0;
    load_row(keys + (seen ? slot : base) * dim, key);
    load_row(values + (seen ? slot : base) * dim, value);
#pragma unroll
    for (int i = 0; i < kElements; ++i) score += query[i] * key[i];
    score = capped(lane_sum<kLanes>(score), softcap);
    if (!seen) continue;
    const float merged = fmaxf(maximum, score), keep = softmax_rescale(maximum, merged), weight = expf(score - merged);
#pragma unroll
    for (int i = 0; i < kElements; ++i) mixed[i] = keep * mixed[i] + weight * value[i];
    total = keep * total + weight;
    maximum = merged;
  }
#pragma unroll
  for (int i = 0; i < kElements; ++i) outputs[stream][element(i)] = mixed[i];
  if (lane == 0) {
    maxima[stream] = maximum;
    totals[stream] = total;
  }
  __syncthreads();
  float merged = -INFINITY, sum = 0;
  for (int s = 0; s < kStreams; ++s) merged = fmaxf(merged, maxima[s]);
  for (int s = 0; s < kStreams; ++s) sum += softmax_rescale(maxima[s], merged) * totals[s];
  for (int64_t i = threadIdx.x; i < dim; i += blockDim.x) {
    float mix = 0;
    for (int s = 0; s < kStreams; ++s) mix += softmax_rescale(maxima[s], merged) * outputs[s][i];
    parts.outputs[row * dim + i] = mix;
  }
  if (threadIdx.x == 0) {
    parts.maxima[row] = merged;
    parts.totals[row] = sum;
  }
}

// out ← Σ_p e^{m_p − m}·o_p / Σ_p e^{m_p − m}·z_p over the parts that saw any slot.
static __global__ void merge_parts(const StepState* step, HeadShape shape, AttentionParts parts, Rows out) {
  const int64_t head = blockIdx.x, m = blockIdx.y, dim = shape.head_dim;
  if (m >= step->count) return;
  const auto row = [&](int part) { return (part * int64_t(gridDim.y) + m) * shape.heads + head; };
  float merged = -INFINITY, sum = 0;
  for (int p = 0; p < parts.count; ++p)
    if (parts.totals[row(p)] > 0) merged = fmaxf(merged, parts.maxima[row(p)]);
  for (int64_t i = threadIdx.x; i < dim; i += blockDim.x) {
    float mix = 0;
    sum = 0;
    for (int p = 0; p < parts.count; ++p) {
      if (parts.totals[row(p)] <= 0) continue;
      const float factor = softmax_rescale(parts.maxima[row(p)], merged);
      sum += factor * parts.totals[row(p)];
      mix += factor * parts.outputs[row(p) * dim + i];
    }
    out[m][head * dim + i] = mix / sum;
  }
}

}  // namespace e3::cuda
