// Attention of a few query heads that share one key/value head over a range of the cache, by online softmax
// (Milakov & Gimelshein 2018). Ranges of one query are merged afterwards, so that threads may split the context:
//   s_j = cap·tanh(scale·q·k_j / cap), m = max s_j, z = Σ e^{s_j − m}, o = Σ e^{s_j − m}·v_j
#pragma once

#include <limits>

#include "decode/softmax.h"
#include "simd/simd.h"

namespace e3::E3_ISA_NAMESPACE {

inline constexpr int64_t kPositionBlock = 64;

// Elements of a cached key and value; keys are dense, values lie `value_stride` apart.
struct RowShape {
  int64_t key, value, value_stride;
};

// One partial result: the sums above and the unnormalised output.
struct AttentionPart {
  float* output;
  float maximum;
  float total;
};

template <class T>
inline float dot(const float* a, const T* b, int64_t n) {
  Vf total{};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) total = fma(load(b + i), load(a + i), total);
  float out = horizontal_sum(total);
  for (; i < n; ++i) out += a[i] * load_one(b + i);
  return out;
}

template <class T>
inline void add_scaled(float* out, float factor, const T* x, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, fma(broadcast(factor), load(x + i), load(out + i)));
  for (; i < n; ++i) out[i] += factor * load_one(x + i);
}

inline void scale_in_place(float* x, float factor, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] *= factor;
}

// Scores of positions [begin, end) → their exponentials relative to the new maximum; returns that block's sum.
template <class T>
inline float score_block(const float* query, const T* keys, int64_t begin, int64_t end, const RowShape& shape,
                         float scale, float softcap, float* scores, AttentionPart& part) {
  const int64_t count = end - begin;
  for (int64_t j = 0; j < count; ++j) scores[j] = scale * dot(query, keys + (begin + j) * shape.key, shape.key);
  if (softcap != 0.0f)
    for (int64_t j = 0; j < count; ++j) scores[j] = capped(scores[j], softcap);
  float maximum = part.maximum;
  for (int64_t j = 0; j < count; ++j) maximum = scores[j] > maximum ? scores[j] : maximum;
  if (maximum != part.maximum) {
    const float factor = softmax_rescale(part.maximum, maximum);
    part.total *= factor;
    scale_in_place(part.output, factor, shape.value);
    part.maximum = maximum;
  }
  for (int64_t j = count; j % kLanes; ++j) scores[j] = -std::numeric_limits<float>::infinity();
  Vf total{};
  for (int64_t j = 0; j < count; j += kLanes) {
    const Vf weight = exp(load(scores + j) - maximum);
    store(scores + j, weight);
    total += weight;
  }
  return horizontal_sum(total);
}

// out += Σ_j weights[j]·rows[j] over rows that lie `stride` apart: a tile of the output stays in registers over all.
template <int kTile, class T>
inline void add_tile(float* out, const float* weights, const T* rows, int64_t count, int64_t stride) {
  Vf total[kTile];
  for (int i = 0; i < kTile; ++i) total[i] = load(out + i * kLanes);
  for (int64_t j = 0; j < count; ++j)
    for (int i = 0; i < kTile; ++i)
      total[i] = fma(broadcast(weights[j]), load(rows + j * stride + i * kLanes), total[i]);
  for (int i = 0; i < kTile; ++i) store(out + i * kLanes, total[i]);
}

template <class T>
inline void add_weighted(float* out, const float* weights, const T* rows, int64_t count, int64_t dim, int64_t stride) {
  constexpr int kTile = 4;
  int64_t i = 0;
  for (; i + kTile * kLanes <= dim; i += kTile * kLanes) add_tile<kTile>(out + i, weights, rows + i, count, stride);
  for (; i + kLanes <= dim; i += kLanes) add_tile<1>(out + i, weights, rows + i, count, stride);
  for (; i < dim; ++i)
    for (int64_t j = 0; j < count; ++j) out[i] += weights[j] * load_one(rows + j * stride + i);
}

// `part.output` holds zeros at the start; keys and values are (position, dimension).
template <class T>
void attend(const float* query, const T* keys, const T* values, int64_t begin, int64_t end, const RowShape& shape,
            float scale, float softcap, AttentionPart& part) {
  alignas(64) float scores[kPositionBlock];
  for (int64_t first = begin; first < end; first += kPositionBlock) {
    const int64_t last = first + kPositionBlock < end ? first + kPositionBlock : end;
    part.total += score_block(query, keys, first, last, shape, scale, softcap, scores, part);
    add_weighted(part.output, scores, values + first * shape.value_stride, last - first, shape.value,
                 shape.value_stride);
  }
}

}  // namespace e3::E3_ISA_NAMESPACE
