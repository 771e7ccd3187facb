// Attention of a decoding step: projections, heads into their places, each thread's part of the context, the parts
// merged. What differs for a latent cache (latent.h) are the places and what the merged output passes through.
#pragma once

#include <limits>

#include "decode/rotary.h"
#include "decode/step/thread.h"

namespace e3::E3_ISA_NAMESPACE {

// This thread's part of every token's visible slots, for all heads; queries are (token, head, head_dim).
template <class T>
void attend_own_part(const StepThread<T>& t, const LayerView& layer) {
  const int64_t group = layer.heads / layer.key_value_heads;
  const bool shared = !layer.values;  // the values are the first elements of the keys
  const RowShape shape{layer.head_dim, layer.value_dim, shared ? layer.head_dim : layer.value_dim};
  for (int m = 0; m < t.tokens(); ++m) {
    const TokenView& token = t.step.tokens[m];
    const int64_t end = token.slot + 1;
    const int64_t begin = layer.window ? std::max(token.start, end - layer.window) : token.start;
    const Share own(end - begin, t.thread, t.threads);
    for (int64_t head = 0; head < layer.heads; ++head) {
      const int64_t row = m * layer.heads + head, part = t.thread * t.tokens() * layer.heads + row;
      AttentionPart sums{t.scratch.outputs + part * layer.value_dim, -std::numeric_limits<float>::infinity(), 0.0f};
      std::fill_n(sums.output, layer.value_dim, 0.0f);
      const T* keys = t.cached(layer.keys, layer, token, head / group, layer.head_dim);
      const T* values = shared ? keys : t.cached(layer.values, layer, token, head / group, layer.value_dim);
      attend(t.scratch.queries + row * layer.head_dim, keys, values, begin + own.begin, begin + own.end, shape,
             layer.scale, layer.softcap, sums);
      t.scratch.maxima[part] = sums.maximum;
      t.scratch.totals[part] = sums.total;
    }
  }
}

// out ← Σ_t e^{m_t − m}·o_t / (Σ_t e^{m_t − m}·z_t + e^{sink − m}) over the threads' parts of (token, head) `row`.
template <class T>
void merge_parts(const StepThread<T>& t, const LayerView& layer, int64_t row, float* out) {
  const int64_t rows = t.tokens() * layer.heads;
  float maximum = -std::numeric_limits<float>::infinity(), total = 0.0f;
  for (int part = 0; part < t.threads; ++part) maximum = std::max(maximum, t.scratch.maxima[part * rows + row]);
  if (layer.sinks) {
    const float sink = load_one(static_cast<const T*>(layer.sinks) + row % layer.heads);
    maximum = std::max(maximum, sink);
    total = softmax_rescale(sink, maximum);
  }
  for (int part = 0; part < t.threads; ++part)
    total += softmax_rescale(t.scratch.maxima[part * rows + row], maximum) * t.scratch.totals[part * rows + row];
  std::fill_n(out, layer.value_dim, 0.0f);
  for (int part = 0; part < t.threads; ++part)
    add_scaled(out, softmax_rescale(t.scratch.maxima[part * rows + row], maximum) / total,
               t.scratch.outputs + (part * rows + row) * layer.value_dim, layer.value_dim);
}

// Head `head` of `all`, normalised: a norm spans one head (Qwen 3), of each head's own weights (StableLM), or all heads
// (OLMo 2).
template <class T>
void normalise_head(const NormView& norm, const float* all, int64_t head, int64_t dim, float* out) {
  if (!norm.size) {
    std::copy_n(all + head * dim, dim, out);
    return;
  }
  const bool spans_all = norm.size != dim;
  const T* weight = static_cast<const T*>(norm.by_head ? norm.by_head[head] : norm.weight);
  const T* bias = static_cast<const T*>(norm.bias);
  const int64_t at = spans_all ? head * dim : 0;
  normalise(out, all + head * dim, dim, moments(spans_all ? all : all + head * dim, norm),
            weight ? weight + at : nullptr, bias ? bias + at : nullptr, norm.offset);
}

template <class T>
void rotate(const LayerView& layer, const TokenView& token, float* head) {
  if (!layer.cos) return;
  const int64_t position = (token.slot - token.start) * layer.rotary_half;
  rotary(head, layer.cos + position, layer.sin + position, layer.rotary_half, layer.rotary_in_turn);
}

// Queries go to `queries`, keys and values to the cache.
template <class T>
void place_heads(const StepThread<T>& t, const LayerView& layer) {
  const int64_t width = layer.heads + 2 * layer.key_value_heads, dim = layer.head_dim;
  const int64_t heads = layer.key.weight ? width : layer.heads;
  const Share own(t.tokens() * heads, t.thread, t.threads);
  for (int64_t item = own.begin; item < own.end; ++item) {
    const int64_t m = item / heads, head = item % heads;
    const TokenView& token = t.step.tokens[m];
    const float* queries = t.scratch.projected + m * width * dim;
    const float* keys = queries + layer.heads * dim;
    const float* values = layer.value.weight ? keys + layer.key_value_heads * dim : keys;
    if (head < layer.heads) {
      float* out = t.scratch.queries + (m * layer.heads + head) * dim;
      normalise_head<T>(layer.query_norm, queries, head, dim, out);
      rotate<T>(layer, token, out);
      continue;
    }
    const bool is_key = head < layer.heads + layer.key_value_heads;
    const int64_t index = (head - layer.heads) % layer.key_value_heads;
    normalise_head<T>(is_key ? layer.key_norm : layer.value_norm, is_key ? keys : values, index, dim, t.h);
    if (is_key) rotate<T>(layer, token, t.h);
    T* cache = t.cached(is_key ? layer.keys : layer.values, layer, token, index, dim);
    store_row(cache + token.slot * dim, t.h, dim);
  }
}

template <class T>
void attention(const StepThread<T>& t, const LayerView& layer, const MatrixView& next) {
  const int64_t queries = layer.heads * layer.head_dim, keys = layer.key_value_heads * layer.head_dim;
  const int64_t width = queries + 2 * keys;
  const Vectors input = t.block_input(layer.attention_norm);
  t.project(layer.query, input, t.scratch.projected, width);
  if (layer.key.weight) t.project(layer.key, input, t.scratch.projected + queries, width);
  if (layer.value.weight) t.project(layer.value, input, t.scratch.projected + queries + keys, width);
  t.barrier.wait();
  place_heads(t, layer);
  t.barrier.wait();
  attend_own_part(t, layer);
  t.warm(layer.output);
  t.barrier.wait();
  for (int64_t row = 0; row < t.tokens() * layer.heads; ++row) merge_parts(t, layer, row, t.h + row * layer.value_dim);
  t.project(layer.output, {t.h, layer.heads * layer.value_dim, t.step.token_count}, t.scratch.attended,
            t.decoder.hidden);
  t.warm(next);
  t.barrier.wait();
}

}  // namespace e3::E3_ISA_NAMESPACE
