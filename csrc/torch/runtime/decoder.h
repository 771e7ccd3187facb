// Runs tokens through the kept layers of a model: by the fused CPU path where it applies, else by the generic one.
#pragma once

#include <ATen/record_function.h>

#include <mutex>

#include "torch/runtime/fused.h"
#include "torch/runtime/generic.h"
#ifdef E3_WITH_CUDA
#include "torch/runtime/graph_decoder.h"
#endif

namespace e3 {

class Decoder {
 public:
  explicit Decoder(std::shared_ptr<Model> model)
      : model_(std::move(model)), generic_(*model_), fused_(*model_, runtime_table_of(wanted_isa())) {
#ifdef E3_WITH_CUDA
    if (model_->device().is_cuda() && model_->plain() &&
        model_->layers.front().head_dim <= cuda::LayerGraph::kMaxHeadDim)
      graph_ = std::make_unique<GraphDecoder>(*model_);
#endif
  }

  const std::shared_ptr<Model>& model() const { return model_; }

  // Bytes of the matrices that one decoding step of `plan` reads, the output head included.
  int64_t weight_bytes(const Plan& plan) const {
    int64_t total = int64_t(model_->head->matrix().nbytes());
    for (const KeptLayer& kept : plan) {
      total += model_->layers[kept.layer].input_bytes();
      if (kept.attention) total += model_->layers[kept.layer].attention_bytes();
      if (kept.mlp) total += model_->layers[kept.layer].mlp_bytes();
    }
    return total;
  }

  // Appends ids (batch, S) to the cache, for all layers that it keeps, and returns the logits of the last `keep`
  // tokens, (batch, keep, vocabulary) in fp32 on the model's device.
  at::Tensor append(Cache& cache, const at::Tensor& ids, int64_t keep) {
    return append(cache, cache.plan(), ids, keep);
  }

  // The same for a part of the cache's layers: the slots of the others are left as they are.
  at::Tensor append(Cache& cache, const Plan& plan, const at::Tensor& ids, int64_t keep) {
    const std::lock_guard<std::mutex> alone(mutex_);
    model_->check_held();
    check(cache, ids, keep);
    cache.reserve(cache.length() + ids.size(1));
    for (Rotary& rotary : model_->rotaries) rotary.reserve(cache.length() + ids.size(1));
    at::Tensor logits = run(cache, plan, ids, keep);
    cache.advance(ids.size(1));
    return logits;
  }

 private:
  at::Tensor run(const Cache& cache, const Plan& plan, const at::Tensor& ids, int64_t keep) {
    // A range of torch.profiler: nothing but a look at thread-local state while none records.
    RECORD_USER_SCOPE(ids.size(1) > 1 ? "runtime prefill" : "runtime decode");
    if (model_->device().is_cpu() && ids.numel() <= FusedDecoder::kMaxTokens)
      return append_fused(cache, plan, ids, keep);
#ifdef E3_WITH_CUDA
    if (graph_ && ids.numel() == 1)
      return graph_->run(cache, plan, {ids.item<int64_t>(), 0, cache.length(), cache.starts()[0]}).unsqueeze(0);
#endif
    return generic_.run(cache, plan, ids.to(model_->device()), keep);
  }

  void check(const Cache& cache, const at::Tensor& ids, int64_t keep) const {
    TORCH_CHECK_VALUE(&cache.model() == model_.get(), "the cache belongs to another runtime");
    TORCH_CHECK_VALUE(ids.dim() == 2 && ids.size(0) == cache.batch() && ids.size(1) > 0, "input_ids has shape ",
                      ids.sizes(), "; the cache takes (", cache.batch(), ", at least 1)");
    TORCH_CHECK_TYPE(ids.scalar_type() == at::kLong, "input_ids is ", ids.scalar_type(), "; it must be int64");
    TORCH_CHECK_VALUE(keep > 0 && keep <= ids.size(1), "logits of the last ", keep, " tokens were asked of ",
                      ids.size(1));
    const int64_t smallest = ids.min().item<int64_t>(), largest = ids.max().item<int64_t>();
    TORCH_CHECK_VALUE(smallest >= 0 && largest < model_->embedding->rows, "input_ids holds ",
                      smallest < 0 ? smallest : largest, "; the vocabulary is 0 to ", model_->embedding->rows - 1);
  }

  // Padding tokens take no part: their slots stay zero.
  at::Tensor append_fused(const Cache& cache, const Plan& plan, const at::Tensor& ids, int64_t keep) {
    const at::Tensor host = ids.contiguous();
    const int64_t count = ids.size(1);
    std::vector<TokenView> tokens;
    std::vector<int> wanted;
    std::vector<int64_t> rows;  // of the result that the wanted tokens fill
    for (int64_t b = 0; b < cache.batch(); ++b)
      for (int64_t s = 0; s < count; ++s) {
        const int64_t slot = cache.length() + s, start = cache.starts()[b];
        if (slot < start) continue;
        if (s >= count - keep) {
          wanted.push_back(int(tokens.size()));
          rows.push_back(b * keep + s - (count - keep));
        }
        tokens.push_back({host.data_ptr<int64_t>()[b * count + s], b, slot, start});
      }
    if (tokens.empty()) return at::zeros({cache.batch(), keep, model_->vocabulary()}, at::kFloat);
    at::Tensor logits = fused_.run(cache, plan, tokens, wanted);
    if (int64_t(rows.size()) != cache.batch() * keep) {
      at::Tensor all = at::zeros({cache.batch() * keep, model_->vocabulary()}, at::kFloat);
      logits = all.index_copy_(0, at::tensor(rows, at::kLong), logits);
    }
    return logits.view({cache.batch(), keep, model_->vocabulary()});
  }

  std::shared_ptr<Model> model_;
  GenericDecoder generic_;
  FusedDecoder fused_;
#ifdef E3_WITH_CUDA
  std::unique_ptr<GraphDecoder> graph_;
#endif
  std::mutex mutex_;
};

}  // namespace e3
