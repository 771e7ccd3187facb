// One decoding step of a few tokens through the kept layers: the part of one thread.
#pragma once

#include "decode/step/latent.h"
#include "decode/step/layer_input.h"
#include "decode/step/mlp.h"
#include "decode/step/short_conv.h"

namespace e3::E3_ISA_NAMESPACE {

template <class T>
void embed(const StepThread<T>& t) {
  const int64_t hidden = t.decoder.hidden;
  for (int m = 0; m < t.tokens(); ++m) {
    const T* row = t.weight_of(t.decoder.embedding) + t.step.tokens[m].id * t.decoder.embedding.stride;
    std::fill_n(t.x + m * hidden, hidden, 0.0f);
    add_scaled(t.x + m * hidden, t.decoder.embedding_scale, row, hidden);
  }
}

inline const MatrixView& first_matrix_of_mlp(const LayerView& layer) {
  return layer.gate.weight ? layer.gate : layer.experts.router.matrix;
}

// The matrix that layer `index` of the step reads first.
template <class T>
const MatrixView& first_matrix(const StepThread<T>& t, int index) {
  if (index == t.step.layer_count) return t.decoder.head;
  const LayerView& layer = t.step.layers[index];
  if (!layer.attention) return first_matrix_of_mlp(layer);
  if (layer.conv.taps) return layer.conv.input;
  return layer.latent.rank ? layer.key : layer.query;
}

template <class T>
void run_layer(const StepThread<T>& t, int index) {
  const LayerView& layer = t.step.layers[index];
  const MatrixView& following = first_matrix(t, index + 1);
  const MatrixView& next = layer.input.size ? layer.input.gate : following;
  if (layer.attention) {
    const MatrixView& after = layer.mlp ? first_matrix_of_mlp(layer) : next;
    if (layer.conv.taps)
      short_conv(t, layer, after);
    else if (layer.latent.rank)
      latent_attention(t, layer, after);
    else
      attention(t, layer, after);
  }
  const bool together = layer.parallel && layer.mlp;
  if (layer.attention && !together) t.add_branch(t.scratch.attended, layer.attention_post_norm);
  if (layer.mlp) mlp(t, layer, next);
  if (layer.attention && together) t.add_branch(t.scratch.attended, layer.attention_post_norm);
  if (layer.mlp) t.add_branch(t.scratch.branch, layer.mlp_post_norm);
  if (layer.input.size) add_layer_input(t, index, following);
  if (layer.output_scale != 1.0f) scale_in_place(t.x, layer.output_scale, t.tokens() * t.decoder.hidden);
}

template <class T>
void logits(const StepThread<T>& t) {
  const DecoderView& d = t.decoder;
  for (int i = 0; i < t.step.logit_count; ++i)
    normalise<T>(t.h + i * d.hidden, t.x + t.step.logit_tokens[i] * d.hidden, d.final_norm);
  t.project(d.head, {t.h, d.hidden, t.step.logit_count}, t.step.logits, d.head.rows);
  const Share own = t.share(d.head);
  for (int i = 0; i < t.step.logit_count; ++i) {
    float* row = t.step.logits + i * d.head.rows;
    for (int64_t r = own.begin; r < own.end; ++r) row[r] *= d.logit_scale;
    if (d.logit_softcap != 0.0f)
      for (int64_t r = own.begin; r < own.end; ++r) row[r] = capped(row[r], d.logit_softcap);
  }
}

template <class T>
void decode(const StepThread<T>& t) {
  embed(t);
  project_layer_inputs(t);
  for (int i = 0; i < t.step.layer_count; ++i) run_layer(t, i);
  logits(t);
}

}  // namespace e3::E3_ISA_NAMESPACE
