// The model's tensors as the raw views that kernels take.
#pragma once

#include "decode/decoder_view.h"
#include "torch/runtime/cache.h"

namespace e3 {

inline MatrixView view_of(const std::optional<Linear>& linear) {
  if (!linear) return {};
  const at::Tensor weight = linear->matrix(), bias = linear->offset();
  return {.weight = weight.data_ptr(),
          .bias = bias.defined() ? bias.data_ptr() : nullptr,
          .rows = weight.size(0),
          .columns = weight.size(1),
          .stride = weight.stride(0)};
}

inline const void* data_of(const std::optional<Weight>& weight) {
  return weight ? weight->tensor().data_ptr() : nullptr;
}

inline NormView view_of(const std::optional<Norm>& norm) {
  if (!norm) return {};
  return {.weight = norm->weights.empty() ? nullptr : norm->weights[0].tensor().data_ptr(),
          .bias = data_of(norm->bias),
          .by_head = norm->by_head.empty() ? nullptr : norm->by_head.data(),
          .size = norm->size,
          .eps = float(norm->eps),
          .offset = float(norm->offset),
          .centred = norm->centred};
}

inline ExpertMatrixView view_of(const ExpertLinear& linear) {
  const at::Tensor& weight = linear.weight.tensor();
  return {.first = {.weight = weight.data_ptr(),
                    .bias = data_of(linear.bias),
                    .rows = linear.rows(),
                    .columns = linear.columns(),
                    .stride = weight.stride(1)},
          .step = weight.stride(0),
          .by_input = linear.by_input};
}

inline ExpertsView view_of(const std::optional<Experts>& experts) {
  if (!experts) return {};
  return {.count = experts->count(),
          .router = {.matrix = view_of(experts->router),
                     .fp32 = experts->router->weight.tensor().scalar_type() == at::kFloat,
                     .correction = experts->correction.defined() ? experts->correction.data_ptr<float>() : nullptr,
                     .sigmoid = experts->sigmoid,
                     .normalised = experts->normalised,
                     .scale = float(experts->scale),
                     .chosen = experts->chosen,
                     .groups = experts->groups,
                     .kept_groups = experts->kept_groups},
          .gate_up = view_of(*experts->gate_up),
          .down = view_of(*experts->down),
          .in_turn = experts->in_turn};
}

inline LatentView view_of(const std::optional<Latent>& latent) {
  if (!latent) return {};
  return {.rank = latent->rank,
          .plain = latent->plain,
          .rotated = latent->rotated,
          .value_dim = latent->value_dim,
          .query_down = view_of(latent->query_down),
          .up = view_of(latent->up),
          .query_norm = view_of(latent->query_norm),
          .norm = view_of(latent->norm)};
}

inline ConvView view_of(const std::optional<Conv>& conv) {
  if (!conv) return {};
  return {.taps = conv->taps(),
          .input = view_of(conv->input),
          .weight = data_of(conv->weight),
          .bias = data_of(conv->bias)};
}

inline LayerInputView view_of(const std::optional<LayerInput>& input) {
  if (!input) return {};
  const at::Tensor rows = input->rows();
  return {.size = input->size,
          .embedding = rows.data_ptr(),
          .stride = rows.stride(0),
          .embedding_scale = float(input->embedding_scale),
          .projection_scale = float(input->projection_scale),
          .scale = float(input->scale),
          .projection = view_of(input->projection),
          .gate = view_of(input->gate),
          .output = view_of(input->output),
          .norm = view_of(input->norm),
          .output_norm = view_of(input->output_norm)};
}

// Without the request's part: caches and rotary tables.
inline LayerView view_of(const Layer& layer, const std::vector<Rotary>& rotaries) {
  LayerView view;
  view.parallel = layer.parallel;
  view.heads = layer.heads;
  view.key_value_heads = layer.key_value_heads;
  view.head_dim = layer.head_dim;
  view.value_dim = layer.value_dim;
  view.attention_norm = view_of(layer.attention_norm);
  view.attention_post_norm = view_of(layer.attention_post_norm);
  view.mlp_norm = view_of(layer.mlp_norm);
  view.mlp_post_norm = view_of(layer.mlp_post_norm);
  view.query_norm = view_of(layer.query_norm);
  view.key_norm = view_of(layer.key_norm);
  view.value_norm = view_of(layer.value_norm);
  view.query = view_of(layer.query);
  view.key = view_of(layer.key);
  view.value = view_of(layer.value);
  view.output = view_of(layer.output);
  view.gate = view_of(layer.gate);
  view.up = view_of(layer.up);
  view.down = view_of(layer.down);
  view.latent = view_of(layer.latent);
  view.conv = view_of(layer.conv);
  view.experts = view_of(layer.experts);
  view.input = view_of(layer.input);
  view.sinks = data_of(layer.sinks);
  view.scale = float(layer.scale);
  view.softcap = float(layer.softcap);
  view.window = layer.window;
  view.output_scale = float(layer.output_scale);
  if (layer.rotary < 0) return view;
  view.rotary_half = rotaries[layer.rotary].frequencies.numel();
  view.rotary_in_turn = rotaries[layer.rotary].in_turn;
  return view;
}

inline std::vector<LayerView> layer_views(const Model& model) {
  std::vector<LayerView> views;
  for (const Layer& layer : model.layers) views.push_back(view_of(layer, model.rotaries));
  return views;
}

inline DecoderView decoder_view(const Model& model) {
  const Layer& first = model.layers.front();
  return {.hidden = model.hidden(),
          .heads = first.heads,
          .key_value_heads = first.key_value_heads,
          .head_dim = first.head_dim,
          .activation = model.activation,
          .glu_slope = float(model.glu_slope),
          .glu_limit = float(model.glu_limit),
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
  view.values = cache.values(kept.layer).defined() ? cache.values(kept.layer).data_ptr() : nullptr;
  if (const int index = model.layers[kept.layer].rotary; index >= 0) {
    view.cos = model.rotaries[index].cos.data_ptr<float>();
    view.sin = model.rotaries[index].sin.data_ptr<float>();
  }
}

}  // namespace e3
