// Runs tokens through the kept layers of a model: a few at once by the fused CPU path or the CUDA graph where they
// apply, else by the generic path.
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
    if (model_->device().is_cuda()) choose_graph();
  }

  // What runs a step of a few tokens, and why.
  const std::string& path() const { return path_; }

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
    if (graph_ && ids.numel() <= GraphDecoder::kMaxTokens) return append_graph(cache, plan, ids, keep);
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

  // The tokens of a step as the kernels take them. Padding takes no part: its slots stay zero.
  struct Tokens {
    std::vector<TokenView> all;
    std::vector<int> wanted;    // which of them get logits
    std::vector<int64_t> rows;  // of the result (batch·keep), that those fill
  };

  static Tokens tokens_of(const Cache& cache, const at::Tensor& ids, int64_t keep) {
    const at::Tensor host = ids.to(at::kCPU).contiguous();
    const int64_t count = ids.size(1);
    Tokens out;
    for (int64_t b = 0; b < cache.batch(); ++b)
      for (int64_t s = 0; s < count; ++s) {
        const int64_t slot = cache.length() + s, start = cache.starts()[b];
        if (slot < start) continue;
        if (s >= count - keep) {
          out.wanted.push_back(int(out.all.size()));
          out.rows.push_back(b * keep + s - (count - keep));
        }
        out.all.push_back({host.data_ptr<int64_t>()[b * count + s], b, slot, start});
      }
    return out;
  }

  // Logits of the wanted tokens → (batch, keep, vocabulary), zeros for padding.
  at::Tensor in_place(at::Tensor logits, const Tokens& tokens, int64_t batch, int64_t keep) const {
    if (int64_t(tokens.rows.size()) != batch * keep)
      logits = at::zeros({batch * keep, model_->vocabulary()}, logits.options())
                   .index_copy_(0, at::tensor(tokens.rows, at::kLong).to(logits.device()), logits);
    return logits.view({batch, keep, model_->vocabulary()});
  }

  at::Tensor append_fused(const Cache& cache, const Plan& plan, const at::Tensor& ids, int64_t keep) {
    const Tokens tokens = tokens_of(cache, ids, keep);
    if (tokens.all.empty()) return at::zeros({cache.batch(), keep, model_->vocabulary()}, at::kFloat);
    return in_place(fused_.run(cache, plan, tokens.all, tokens.wanted), tokens, cache.batch(), keep);
  }

#ifdef E3_WITH_CUDA
  at::Tensor append_graph(const Cache& cache, const Plan& plan, const at::Tensor& ids, int64_t keep) {
    const Tokens tokens = tokens_of(cache, ids, keep);
    const auto options = at::TensorOptions().dtype(at::kFloat).device(model_->device());
    if (tokens.all.empty()) return at::zeros({cache.batch(), keep, model_->vocabulary()}, options);
    at::Tensor logits = graph_->run(cache, plan, tokens.all);
    if (tokens.wanted.size() != tokens.all.size())
      logits = logits.index_select(0, at::tensor(tokens.wanted, at::kLong).to(logits.device()));
    return in_place(logits, tokens, cache.batch(), keep);
  }

  void choose_graph() {
    const c10::cuda::CUDAGuard guard(model_->device());
    cuda::DevicePath path = {};
    try {
      path = cuda::path_of_device();
      if (!model_->plain()) path = {false, "the graph runs Llama's layers alone"};
      if (path.graph) graph_ = std::make_unique<GraphDecoder>(*model_);
    } catch (const std::exception& error) { path = {false, error.what()}; }
    path_ = (path.graph ? "CUDA graph: " : "ATen: ") + path.reason;
  }
#else
  void choose_graph() { path_ = "ATen: the module is built without its CUDA half"; }
#endif

  std::shared_ptr<Model> model_;
  GenericDecoder generic_;
  FusedDecoder fused_;
  std::string path_ = model_->device().is_cpu() ? "fused CPU kernels" : "ATen";
#ifdef E3_WITH_CUDA
  std::unique_ptr<GraphDecoder> graph_;
#endif
  std::mutex mutex_;
};

}  // namespace e3
