// The fused CPU path: describes a step of a few tokens to the kernels and runs it as one parallel region.
#pragma once

#include <ATen/Parallel.h>

#include <memory>

#include "decode/runtime_table.h"
#include "torch/runtime/thread_pool.h"
#include "torch/runtime/views.h"

namespace e3 {

class FusedDecoder {
 public:
  // More tokens than this go through ATen's matrix multiplications.
  static constexpr int64_t kMaxTokens = 16;

  FusedDecoder(const Model& model, const RuntimeTable& table)
      : model_(model),
        table_(table),
        step_(function_for(model.dtype(), table)),
        decoder_(decoder_view(model)),
        layers_(layer_views(model)) {}

  // Logits (logit_tokens, vocabulary), fp32, of tokens whose slots the cache has room for. `plan` is the cache's own or
  // a part of it.
  at::Tensor run(const Cache& cache, const Plan& plan, const std::vector<TokenView>& tokens,
                 const std::vector<int>& logit_tokens) {
    std::vector<LayerView> kept;
    for (const KeptLayer& layer : plan) bind_request(kept.emplace_back(layers_[layer.layer]), model_, cache, layer);
    at::Tensor logits = at::empty({int64_t(logit_tokens.size()), model_.vocabulary()}, at::kFloat);
    StepView step{.decoder = &decoder_,
                  .layers = kept.data(),
                  .layer_count = int(kept.size()),
                  .capacity = cache.capacity(),
                  .tokens = tokens.data(),
                  .token_count = int(tokens.size()),
                  .logit_tokens = logit_tokens.data(),
                  .logit_count = int(logit_tokens.size()),
                  .logits = logits.data_ptr<float>(),
                  .scratch = nullptr};
    const int threads = pool_for_this_step().threads();
    step.scratch = scratch_for(table_.scratch_size(step, threads));
    SpinBarrier barrier(threads);
    pool_->run([&](int thread) { step_(step, barrier, thread, threads); });
    return logits;
  }

 private:
  static StepFunction function_for(at::ScalarType dtype, const RuntimeTable& table) {
    return dtype == at::kFloat ? table.step_fp32 : dtype == at::kBFloat16 ? table.step_bf16 : table.step_fp16;
  }

  ThreadPool& pool_for_this_step() {
    const int threads = at::get_num_threads();
    if (!pool_ || pool_->threads() != threads) pool_ = std::make_unique<ThreadPool>(threads);
    return *pool_;
  }

  float* scratch_for(int64_t size) {
    if (!scratch_.defined() || scratch_.numel() < size) scratch_ = at::empty({size}, at::kFloat);
    return scratch_.data_ptr<float>();
  }

  const Model& model_;
  const RuntimeTable& table_;
  const StepFunction step_;
  const DecoderView decoder_;
  const std::vector<LayerView> layers_;
  std::unique_ptr<ThreadPool> pool_;
  at::Tensor scratch_;
};

}  // namespace e3
