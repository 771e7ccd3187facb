// The model's tensors as the raw views that kernels take.
#pragma once

#include "decode/decoder_view.h"
#include "torch/runtime/cache.h"

namespace e3 {

inline MatrixView view_of(const std::optional<Linear>& linear) {
  const at::Tensor weight = linear->matrix(), bias = linear->offset();
  return {.weight = weight.data_ptr(),
          .bias = bias.defined() ? bias.data_ptr() : nullptr,
          .rows = weight.size(0),
          .columns = weight.size(1),
          .stride = weight.stride(0)};
}

inline NormView view_of(const std::optional<Norm>& norm) {
  if (!norm) return {};
  const at::Tensor& weight = norm->weight.tensor();
  return {.weight = weight.data_ptr(), .size = weight.numel(), .eps = float(norm->eps), .offset = float(norm->offset)};
}

// Without the request's part: caches and rotary tables.
inline LayerView view_of(const Layer& layer, const std::vector<Rotary>& rotaries) {
  LayerView view;
  view.attention_norm = view_of(layer.attention_norm);
  view.attention_post_norm = view_of(layer.attention_post_norm);
  view.mlp_norm = view_of(layer.mlp_norm);
  view.mlp_post_norm = view_of(layer.mlp_post_norm);
  view.query_norm = view_of(layer.query_norm);
  view.key_norm = view_of(layer.key_norm);
  view.query = view_of(layer.query);
  view.key = view_of(layer.key);
  view.value = view_of(layer.value);
  view.output = view_of(layer.output);
  view.gate = view_of(layer.gate);
  view.up = view_of(layer.up);
  view.down = view_of(layer.down);
  view.scale = float(layer.scale);
  view.softcap = float(layer.softcap);
  view.window = layer.window;
  view.rotary_half = layer.rotary < 0 ? 0 : rotaries[layer.rotary].frequencies.numel();
  return view;
}

inline std::vector<LayerView> layer_views(const Model& model) {
  std::vector<LayerView> views;
  for (const Layer& layer : model.layers) views.push_back(view_of(layer, model.rotaries));
  return views;
}

inline DecoderView decoder_view(const Model& model) {
  return {.hidden = model.hidden(),
          .heads = model.heads,
          .key_value_heads = model.key_value_heads,
          .head_dim = model.head_dim,
          .activation = model.activation,
          .embedding = view_of(model.embedding),
          .head = view_of(model.head),
          .final_norm = view_of(model.final_norm),
          .embedding_scale = float(model.embedding_scale),
          .residual_scale = float(model.residual_scale),
          .logit_scale = float(model.logit_scale),
          .logit_softcap = float(model.logit_softcap)};
}

// Adds the request's part to the view of a kept layer.
inline void bind_request(LayerView& view, const Model& model, const Cache& cache, const KeptLayer& kept) {
  view.attention = kept.attention;
  view.mlp = kept.mlp;
  if (!kept.attention) return;
  view.keys = cache.keys(kept.layer).data_ptr();
  view.values = cache.values(kept.layer).data_ptr();
  if (const int index = model.layers[kept.layer].rotary; index >= 0) {
    view.cos = model.rotaries[index].cos.data_ptr<float>();
    view.sin = model.rotaries[index].sin.data_ptr<float>();
  }
}

}  // namespace e3
