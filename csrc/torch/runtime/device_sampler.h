// The sampler of logits in the memory of a device: ATen, for all rows at once.
#pragma once

#include "torch/runtime/sampler.h"

namespace e3 {

class DeviceSampler final : public Sampler {
 public:
  using Sampler::Sampler;

  Choices largest(const at::Tensor& logits, const Contexts& contexts) override {
    process(logits, contexts);
    const auto [largest, tokens] = logits.max(1);
    return to_host(tokens, largest);
  }

  std::pair<at::Tensor, at::Tensor> probabilities(const at::Tensor& logits, const Contexts& contexts) override {
    process(logits, contexts);
    const at::Tensor largest = logits.amax(1, true);
    at::Tensor p = ((logits - largest) / sampling_.temperature).exp();
    if (sampling_.top_k && sampling_.top_k < vocabulary_)
      p = p.masked_fill(logits < std::get<0>(logits.topk(sampling_.top_k)).narrow(1, sampling_.top_k - 1, 1), 0);
    if (sampling_.top_p < 1) p = nucleus(p);
    if (sampling_.min_p > 0) p = p.masked_fill(p < sampling_.min_p, 0);
    return {(p / p.sum(1, true, at::kDouble)).to(at::kFloat), largest.squeeze(1)};
  }

  at::Tensor draw(const at::Tensor& weights, const std::vector<double>& uniforms) override {
    const at::Tensor cumulated = integers(weights).cumsum(1);
    const at::Tensor total = cumulated.narrow(1, vocabulary_ - 1, 1);
    const at::Tensor u = sent(at::tensor(uniforms, at::kDouble), weights).unsqueeze(1);
    const at::Tensor share = (u * total).to(at::kLong).minimum(total - 1);
    return at::searchsorted(cumulated, share, false, true).squeeze(1);
  }

 private:
  // From pageable memory the copy is staged before the call returns: the host need not wait for what is queued.
  static at::Tensor sent(const at::Tensor& host, const at::Tensor& like) {
    return host.to(like.device(), host.scalar_type(), /*non_blocking=*/true);
  }

  // Sums of floats on a device depend on how its threads meet, sums of integers do not: a draw depends on its uniform
  // number alone. 2⁻⁵² of the mass is the smallest weight.
  static at::Tensor integers(const at::Tensor& weights) { return (weights.to(at::kDouble) * 0x1p52).to(at::kLong); }

  // Keeps the smallest set of most probable tokens whose mass reaches top_p, the lowest index first of equals.
  at::Tensor nucleus(const at::Tensor& weights) const {
    const at::Tensor p = weights / weights.sum(1, true, at::kDouble);
    const auto [sorted, order] = p.sort(std::optional(true), 1, true);
    const at::Tensor mass = integers(sorted);
    const at::Tensor before = mass.cumsum(1) - mass;
    const at::Tensor kept = before < before.new_full({}, int64_t(sampling_.top_p * 0x1p52));
    return weights * at::zeros_like(weights).scatter(1, order, kept.to(weights.scalar_type()));
  }

  void process(const at::Tensor& logits, const Contexts& contexts) const {
    std::vector<int64_t> seen, excluded;
    for (size_t i = 0; i < contexts.size(); ++i) {
      const auto add = [&](std::vector<int64_t>& to, const std::vector<int64_t>& tokens) {
        for (const int64_t token : tokens) to.push_back(int64_t(i) * vocabulary_ + token);
      };
      if (sampling_.repetition_penalty != 1) add(seen, contexts[i]->distinct(vocabulary_));
      add(excluded, contexts[i]->excluded(sampling_, vocabulary_));
    }
    at::Tensor all = logits.view(-1);
    if (!seen.empty()) {
      const at::Tensor index = sent(at::tensor(seen, at::kLong), logits);
      const at::Tensor z = all.index_select(0, index);
      const double penalty = sampling_.repetition_penalty;
      all.index_copy_(0, index, at::where(z < 0, z * penalty, z / penalty));
    }
    if (!excluded.empty())
      all.index_fill_(0, sent(at::tensor(excluded, at::kLong), logits), -std::numeric_limits<double>::infinity());
  }
};

}  // namespace e3
