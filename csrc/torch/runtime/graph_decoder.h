// Decodes up to eight tokens at once on a CUDA device, through the captured graphs of csrc/cuda.
#pragma once

#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "cuda/layer_graph.h"
#include "torch/runtime/views.h"

namespace e3 {

class GraphDecoder {
 public:
  explicit GraphDecoder(const Model& model)
      : model_(model), layers_(layer_views(model)), graph_(graph_of(model, layers_)) {}

  static constexpr int64_t kMaxTokens = cuda::LayerGraph::kMaxTokens;

  // Logits (tokens, vocabulary), fp32, of up to kMaxTokens tokens whose slots the cache has room for.
  at::Tensor run(const Cache& cache, const Plan& plan, const std::vector<TokenView>& tokens) {
    const c10::cuda::CUDAGuard guard(model_.device());
    std::vector<LayerView> layers = layers_;
    std::vector<float> gates(2 * layers.size(), 0.0f);
    for (const KeptLayer& kept : plan) {
      bind_request(layers[kept.layer], model_, cache, kept);
      gates[2 * kept.layer] = kept.attention;
      gates[2 * kept.layer + 1] = kept.mlp;
    }
    const auto options = at::TensorOptions().dtype(at::kFloat).device(model_.device());
    at::Tensor logits = at::empty({int64_t(tokens.size()), model_.vocabulary()}, options);
    graph_->run({layers, gates, tokens, cache.capacity(), logits.data_ptr<float>()},
                c10::cuda::getCurrentCUDAStream().stream());
    return logits;
  }

 private:
  static std::unique_ptr<cuda::LayerGraph> graph_of(const Model& model, const std::vector<LayerView>& layers) {
    const c10::cuda::CUDAGuard guard(model.device());
    return std::make_unique<cuda::LayerGraph>(decoder_view(model), layers, storage_of(model.dtype()));
  }

  static cuda::Storage storage_of(at::ScalarType dtype) {
    if (dtype == at::kFloat) return cuda::Storage::fp32;
    return dtype == at::kBFloat16 ? cuda::Storage::bf16 : cuda::Storage::fp16;
  }

  const Model& model_;
  const std::vector<LayerView> layers_;
  const std::unique_ptr<cuda::LayerGraph> graph_;
};

}  // namespace e3
