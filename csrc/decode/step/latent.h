// Multi-head latent attention of a decoding step without expanding the cache (LatentView). With c_j the cached latent
// of slot j, r_j its rotated part, K_h and V_h the rows of `up` that make head h's keys and values:
//   q·k_j = q_plain·K_h c_j + q_rotated·r_j = (K_hᵀ q_plain)·c_j + q_rotated·r_j,   Σ_j p_j V_h c_j = V_h Σ_j p_j c_j,
// so that every head attends to one key (c_j, r_j), whose first part is the value.
#pragma once

#include "decode/step/attention.h"

namespace e3::E3_ISA_NAMESPACE {

// The rows of `up` of a head.
template <class T>
const T* head_of(const LatentView& latent, int64_t head) {
  return static_cast<const T*>(latent.up.weight) + head * (latent.plain + latent.value_dim) * latent.up.stride;
}

template <class T>
void project_latent(const StepThread<T>& t, const LayerView& layer) {
  const LatentView& latent = layer.latent;
  const int64_t width = layer.query.rows + layer.key.rows;
  const Vectors input = t.block_input(layer.attention_norm);
  t.project(layer.key, input, t.scratch.projected + layer.query.rows, width);
  if (!latent.query_down.weight) return t.project(layer.query, input, t.scratch.projected, width);
  t.project(latent.query_down, input, t.scratch.narrow, latent.query_down.rows);
  t.barrier.wait();
  const int64_t narrow = latent.query_down.rows;
  for (int m = 0; m < t.tokens(); ++m) normalise<T>(t.h + m * narrow, t.scratch.narrow + m * narrow, latent.query_norm);
  t.project(layer.query, {t.h, narrow, t.step.token_count}, t.scratch.projected, width);
}

// Items are dealt by head, all tokens of one after another: its rows of `up` are then read once.
template <class T>
void place_latent(const StepThread<T>& t, const LayerView& layer) {
  const LatentView& latent = layer.latent;
  const int64_t width = layer.query.rows + layer.key.rows, query_dim = latent.plain + latent.rotated;
  const Share own((layer.heads + 1) * t.tokens(), t.thread, t.threads);
  for (int64_t item = own.begin; item < own.end; ++item) {
    const int64_t head = item / t.tokens(), m = item % t.tokens();
    const TokenView& token = t.step.tokens[m];
    const float* query = t.scratch.projected + m * width + head * query_dim;
    if (head < layer.heads) {
      float* out = t.scratch.queries + (m * layer.heads + head) * layer.head_dim;
      gemv_by_input<T>(head_of<T>(latent, head), latent.up.stride, nullptr, 0, latent.rank, latent.plain,
                       {query, query_dim, 1}, out, layer.head_dim);
      std::copy_n(query + latent.plain, latent.rotated, out + latent.rank);
      rotate<T>(layer, token, out + latent.rank);
    } else {
      const float* key = t.scratch.projected + m * width + layer.query.rows;
      normalise<T>(t.h, key, latent.norm);
      std::copy_n(key + latent.rank, latent.rotated, t.h + latent.rank);
      rotate<T>(layer, token, t.h + latent.rank);
      T* cache = t.cached(layer.keys, layer, token, 0, layer.head_dim);
      store_row(cache + token.slot * layer.head_dim, t.h, layer.head_dim);
    }
  }
}

// This thread's heads of the attention's output, (token, head, value_dim) in `queries`, which all have read by now.
template <class T>
void expand_values(const StepThread<T>& t, const LayerView& layer) {
  const LatentView& latent = layer.latent;
  const Share own(layer.heads * t.tokens(), t.thread, t.threads);
  for (int64_t item = own.begin; item < own.end; ++item) {
    const int64_t head = item / t.tokens(), row = item % t.tokens() * layer.heads + head;
    merge_parts(t, layer, row, t.h);
    gemv<T>(head_of<T>(latent, head) + latent.plain * latent.up.stride, latent.up.stride, nullptr, 0, latent.value_dim,
            latent.rank, {t.h, latent.rank, 1}, t.scratch.queries + row * latent.value_dim, latent.value_dim);
  }
}

template <class T>
void latent_attention(const StepThread<T>& t, const LayerView& layer, const MatrixView& next) {
  project_latent(t, layer);
  t.barrier.wait();
  place_latent(t, layer);
  t.barrier.wait();
  attend_own_part(t, layer);
  t.warm(layer.output);
  t.barrier.wait();
  expand_values(t, layer);
  t.barrier.wait();
  t.project(layer.output, {t.scratch.queries, layer.heads * layer.latent.value_dim, t.step.token_count},
            t.scratch.attended, t.decoder.hidden);
  t.warm(next);
  t.barrier.wait();
}

}  // namespace e3::E3_ISA_NAMESPACE
